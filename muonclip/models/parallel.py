"""The reference model over many ranks: FSDP2 or HSDP × expert parallelism × tensor parallelism.

    init_process_group(…)
    torch.manual_seed(seed)                                   # the same on every rank
    model = MoE(config)                                       # whole on every rank, or on the meta device
    meshes = parallelize(model, Parallelism(shards=8, experts=8), device_type="cuda", mixed_precision=True)
    model.to_empty(device="cuda"); model.reset_parameters()   # of a model on the meta device
    optimizer = MuonClip(model, …)                            # after: parameters are replaced
    model.loss(tokens, targets).backward()                    # of this rank's share: meshes.data_rank of data_size

The ranks are replicas × shards × tensor, the last innermost. Those that differ in the first two see different tokens;
experts are spread over neighbours among these, as in TorchTitan, and their tokens travel. Gradients are those of the
mean over the ranks of each one's loss. The state dict has the names of the whole model; its tensors are DTensors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from muonclip.models.config import MoEConfig
from muonclip.models.expert_parallel import ExpertExchange
from muonclip.models.int4 import GROUP
from muonclip.models.recompute import StoreActivations, check_storage
from muonclip.models.recompute import recompute as recompute_layer
from muonclip.models.tensor_parallel import divide_experts, divide_layer
from muonclip.models.torch import Experts, Layer, MixtureOfExperts, MoE
from muonclip.torch.mesh import group_over


class DegreeError(ValueError):
    """Raised for a degree of parallelism that does not fit; `degree` is its field of `Parallelism`."""

    def __init__(self, degree: str, message: str) -> None:
        super().__init__(message)
        self.degree = degree


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Degrees of parallelism; there are replicas · shards · tensor ranks."""

    shards: int = 1
    """FSDP: number of ranks over which dense parameters are sharded."""
    replicas: int = 1
    """HSDP: number of copies of the shards."""
    experts: int = 1
    """How many of the ranks that see different tokens divide the experts; FSDP shards experts over the others."""
    tensor: int = 1
    """Number of ranks that divide heads and the width of MLPs, and see the same tokens."""

    @property
    def data(self) -> int:
        """Number of ranks that see different tokens."""
        return self.replicas * self.shards

    def check(self, config: MoEConfig, world_size: int) -> None:
        """Raise DegreeError for a degree that does not fit the ranks or the model."""
        for field in fields(self):
            degree = getattr(self, field.name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise DegreeError(field.name, f"{field.name}={degree!r} must be an integer of at least 1.")
        if self.data * self.tensor != world_size:
            raise DegreeError(
                "replicas",
                f"replicas={self.replicas} · shards={self.shards} · tensor={self.tensor} are {self.data * self.tensor} "
                f"ranks, but there are {world_size}. Set shards={max(1, world_size // (self.replicas * self.tensor))}, "
                "or start as many.",
            )
        if self.data % self.experts:
            raise DegreeError(
                "experts",
                f"experts={self.experts} must divide replicas · shards = {self.data}: the experts are shared out among "
                "ranks that see different tokens.",
            )
        if config.num_experts % self.experts:
            raise DegreeError("experts", f"experts={self.experts} must divide num_experts={config.num_experts}.")
        if self.tensor == 1:
            return
        divided = [("num_heads", 1), ("intermediate_size", 1)]
        if config.attention == "gqa":
            divided.append(("num_kv_heads", 1))
        # The grouped product reads rows of whole 16 bytes; a group of INT4 weights has its scale on one rank.
        divided.append(("moe_intermediate_size", GROUP if config.expert_weight_bits else 8))
        for name, unit in divided:
            if (size := getattr(config, name)) % (unit * self.tensor):
                multiples = f" into multiples of {unit}" if unit > 1 else ""
                raise DegreeError("tensor", f"tensor={self.tensor} must divide {name}={size}{multiples}.")


@dataclass(frozen=True, slots=True)
class Meshes:
    """The device mesh of all ranks, and this rank's position among those that see different tokens."""

    world_mesh: DeviceMesh
    """All ranks: replicas, shards, tensor."""
    data_group: dist.ProcessGroup | None
    """The ranks that see different tokens and hold the same heads as this one; None if it is the only one."""
    data_rank: int
    data_size: int


def parallelize(
    model: MoE,
    parallelism: Parallelism,
    *,
    device_type: str = "cpu",
    mixed_precision: bool = False,
    recompute: bool = False,
    store_activations: StoreActivations | None = None,
    offload_activations: bool = False,
) -> Meshes:
    """Divide a model over the ranks, in place; every rank has it whole, or on the meta device, and keeps its part.

    `mixed_precision`: forward and backward in bf16, but for routers; gradients are averaged in fp32. `recompute`:
    activations other than those of attention's products are not kept for the backward pass; `store_activations` and
    `offload_activations` are the options of `muonclip.models.recompute.recompute`.
    Raises ValueError for degrees that do not fit, and for these options without `recompute`.
    """
    parallelism.check(model.config, dist.get_world_size())
    check_storage(store_activations)
    if (store_activations or offload_activations) and not recompute:
        given = f"{store_activations=}" if store_activations else f"{offload_activations=}"
        raise ValueError(f"{given} says how recomputation keeps activations, but recompute=False. Give recompute=True.")
    p = parallelism
    world = init_device_mesh(
        device_type, (p.replicas, p.shards, p.tensor), mesh_dim_names=("replicas", "shards", "tensor")
    )
    dense = world["replicas", "shards"] if p.replicas > 1 else world["shards"]
    tensor = world["tensor"] if p.tensor > 1 else None
    experts = _ExpertMeshes.from_degrees(parallelism, device_type, dense, tensor)
    # Nothing is cast on its way into a module: the embedding's output is bf16, and the rotary tables stay fp32.
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if mixed_precision else whole
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if tensor is not None:
            divide_layer(layer, tensor)
        if recompute:
            recompute_layer(layer, store_activations=store_activations, offload_activations=offload_activations)
        if isinstance(layer.mlp, MixtureOfExperts):
            experts.divide(layer.mlp.experts)
            fully_shard(layer.mlp.experts, mesh=experts.rest, shard_placement_fn=experts.axis, mp_policy=half)
            if mixed_precision:  # a rounded router would choose other experts
                fully_shard(layer.mlp.router, mesh=dense, mp_policy=whole)
        fully_shard(layer, mesh=dense, mp_policy=half)
    fully_shard(model, mesh=dense, mp_policy=half)
    for module in model.modules():
        if device_type == "cpu" and isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    coordinate = world.get_coordinate()
    assert coordinate is not None
    return Meshes(world, group_over(world, (0, 1)), coordinate[0] * p.shards + coordinate[1], p.data)


@dataclass(frozen=True, slots=True)
class _ExpertMeshes:
    """The ranks that divide the experts, and their width (`divided`), and the others, for FSDP (`rest`)."""

    divided: DeviceMesh | None
    rest: DeviceMesh
    by_expert: bool
    by_width: bool

    @classmethod
    def from_degrees(
        cls, p: Parallelism, device_type: str, dense: DeviceMesh, tensor: DeviceMesh | None
    ) -> _ExpertMeshes:
        by_width = tensor is not None
        if p.experts == 1:
            return cls(tensor, dense, False, by_width)
        # Copies stay copies where they can: their ranks are far from each other.
        copies = p.replicas if p.shards % p.experts == 0 else 1
        names = "replicas", "expert_shards", "experts", "tensor"
        sizes = copies, p.data // copies // p.experts, p.experts, p.tensor
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=names)
        rest = mesh["replicas", "expert_shards"] if copies > 1 else mesh["expert_shards"]
        return cls(mesh["experts", "tensor"] if by_width else mesh["experts"], rest, True, by_width)

    def divide(self, experts: Experts) -> None:
        if self.divided is not None:
            divide_experts(experts, self.divided, by_expert=self.by_expert, by_width=self.by_width)
            if self.by_expert:
                experts.exchange = ExpertExchange(self.divided.get_group("experts"))

    def axis(self, parameter: nn.Parameter) -> Shard:
        """Return the first axis that divides evenly; if there is none, FSDP divides the experts unevenly."""
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(next((axis for axis, size in enumerate(part.shape) if size % self.rest.size(-1) == 0), 0))
