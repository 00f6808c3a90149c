"""Tensor parallelism of the reference model (Megatron-LM, arXiv 1909.08053).

Each rank computes some of the heads, and some of the width of every MLP. The rest (the residual stream, norms, latents,
the rotary key, the router) every rank of the group has whole, and bit for bit the same: what enters a divided part is
copied, so that its gradient is a sum over the ranks; what leaves it is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from muonclip.models.torch import Attention, Experts, LatentAttention, Layer, MixtureOfExperts
from muonclip.torch.mesh import local_indices


def distribute_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """Replace a parameter that every rank has whole by this rank's part of it, a DTensor. Nothing is sent."""
    whole = getattr(module, name)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of its own mesh"
    part = whole.detach()
    for axis, size in enumerate(whole.shape):
        runs = local_indices(size, axis, placements, mesh.shape, coordinate)
        if runs != ((0, size),):
            part = torch.cat([part.narrow(axis, start, stop - start) for start, stop in runs], axis)
    placed = DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
    module.register_parameter(name, nn.Parameter(placed, requires_grad=whole.requires_grad))


def divide_layer(layer: Layer, mesh: DeviceMesh) -> None:
    """Divide the attention and the MLP of a layer, except the experts, over the mesh."""
    _divide_attention(layer.attn, mesh)
    swiglu = layer.mlp.shared_experts if isinstance(layer.mlp, MixtureOfExperts) else layer.mlp
    if swiglu is not None:
        distribute_parameter(swiglu.gate_up_proj, "weight", mesh, [Shard(0)])
        distribute_parameter(swiglu.down_proj, "weight", mesh, [Shard(1)])
        _copy_arguments(swiglu.gate_up_proj, mesh, 0)
    _sum_output(layer.mlp, mesh)  # of shared and other experts at once


def divide_experts(experts: Experts, mesh: DeviceMesh, *, by_expert: bool, by_width: bool) -> None:
    """Divide experts over the mesh's first dimension (`by_expert`), the width of each over its last (`by_width`).

    The mesh has only the dimensions asked for.
    """
    expert: list[Placement] = [Shard(0)] * by_expert
    distribute_parameter(experts, "gate_up_proj", mesh, [*expert, *[Shard(1)] * by_width])
    distribute_parameter(experts, "down_proj", mesh, [*expert, *[Shard(2)] * by_width])
    if by_width:  # tokens and their experts' weights; the layer sums
        _copy_arguments(experts, mesh["tensor"] if by_expert else mesh, 0, 2)


def _divide_attention(attention: Attention, mesh: DeviceMesh) -> None:
    if isinstance(attention, LatentAttention):
        queries = attention.q_b_proj if hasattr(attention, "q_b_proj") else attention.q_proj
        for by_head in (queries, attention.kv_b_proj):
            distribute_parameter(by_head, "weight", mesh, [Shard(0)])
            _copy_arguments(by_head, mesh, 0)
        _copy_output(attention.k_rope_proj, mesh)
    else:
        for name in ("q_proj", "k_proj", "v_proj"):
            distribute_parameter(getattr(attention, name), "weight", mesh, [Shard(0)])
        _copy_arguments(attention, mesh, 0)
    if attention.config.qk_norm:
        distribute_parameter(attention.q_norm, "weight", mesh, [Replicate()])
        distribute_parameter(attention.k_norm, "weight", mesh, [Replicate()])
    distribute_parameter(attention.o_proj, "weight", mesh, [Shard(1)])
    _sum_output(attention.o_proj, mesh)


def _copy_arguments(module: nn.Module, mesh: DeviceMesh, *which: int) -> None:
    def copy(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_copied(arg, mesh) if i in which else arg for i, arg in enumerate(args))

    module.register_forward_pre_hook(copy)


def _copy_output(module: nn.Module, mesh: DeviceMesh) -> None:
    def copy(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return _copied(y, mesh)

    module.register_forward_hook(copy)


def _sum_output(module: nn.Module, mesh: DeviceMesh) -> None:
    def add(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return _summed(y, mesh)

    module.register_forward_hook(add)


def _copied(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return x, which all ranks have; its gradient is summed over them."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of x over the ranks; each has the gradient already."""
    whole = DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    return whole.to_local()
