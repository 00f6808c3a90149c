"""Shards of Megatron's tensor parallelism: plain tensors, which an attribute tells from whole matrices."""

from __future__ import annotations

from torch import Tensor

from muonclip.torch.mesh.late_types import imported, is_dtensor


def refuse_megatron_shard(name: str, parameter: Tensor) -> None:
    """Raise ValueError for a plain tensor that is a shard of Megatron's tensor parallelism, which has its matrix on
    other ranks, too."""
    if is_dtensor(parameter) or not getattr(parameter, "tensor_model_parallel", False):
        return
    of_experts = not getattr(parameter, "allreduce", True)
    kind = "get_expert_tensor_parallel_world_size" if of_experts else "get_tensor_model_parallel_world_size"
    ranks_of = imported("megatron.core.parallel_state", kind)
    ranks = 1 if ranks_of is None else ranks_of()
    if ranks > 1:
        raise ValueError(
            f"{name} is divided by Megatron over {ranks} ranks, and Muon would take this shard of a matrix for a whole "
            "one. Give the optimizer DTensors of the shards: see 'Megatron-core' in the documentation. Or leave it to "
            "another optimizer, after which QKClip(model).attach(optimizer) clips."
        )
