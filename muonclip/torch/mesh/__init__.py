"""Facts about ranks: meshes, process groups, which indices of a tensor a rank holds, what engines wrap around modules.

Nothing here knows Muon or QK-Clip.
"""

from muonclip.torch.mesh.clip_grad_norm import clip_grad_norm_
from muonclip.torch.mesh.dtensors import (
    check_gradient,
    check_parameter,
    check_state,
    local_gradient,
    local_part,
    placed_like,
)
from muonclip.torch.mesh.flattened import check_engine, check_groups_not_flattened, check_not_flattened
from muonclip.torch.mesh.index_ranges import local_indices
from muonclip.torch.mesh.late_types import (
    imported,
    is_block_mask,
    is_compiled_module,
    is_device_context,
    is_dtensor,
    is_fsdp_module,
    is_replicate,
    is_shard,
)
from muonclip.torch.mesh.megatron_shards import refuse_megatron_shard
from muonclip.torch.mesh.mesh import ONE_RANK, Mesh
from muonclip.torch.mesh.process_groups import group_of, group_over
from muonclip.torch.mesh.topology import RankPosition, Topology
from muonclip.torch.mesh.unsharded import matrices_in_use
from muonclip.torch.mesh.wrapped_weights import drop_kept_scale, unwrapped
from muonclip.torch.mesh.wrappers import (
    mixed_precision_of,
    plain_class,
    plain_name,
    replicas_of,
    running_ddp,
    unwrap,
)

__all__ = [
    "ONE_RANK",
    "Mesh",
    "RankPosition",
    "Topology",
    "check_engine",
    "check_gradient",
    "check_groups_not_flattened",
    "check_not_flattened",
    "check_parameter",
    "check_state",
    "clip_grad_norm_",
    "drop_kept_scale",
    "group_of",
    "group_over",
    "imported",
    "is_block_mask",
    "is_compiled_module",
    "is_device_context",
    "is_dtensor",
    "is_fsdp_module",
    "is_replicate",
    "is_shard",
    "local_gradient",
    "local_indices",
    "local_part",
    "matrices_in_use",
    "mixed_precision_of",
    "placed_like",
    "plain_class",
    "plain_name",
    "refuse_megatron_shard",
    "replicas_of",
    "running_ddp",
    "unwrap",
    "unwrapped",
]
