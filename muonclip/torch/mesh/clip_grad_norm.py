"""The global norm of gradients on several meshes, to clip them by before the momentum takes them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from muonclip.core.arguments import check_choice, check_kind, check_number, kind, shown
from muonclip.torch.mesh.dtensors import check_gradient, check_parameter, local_part
from muonclip.torch.mesh.late_types import is_dtensor
from muonclip.torch.mesh.process_groups import group_over


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | Optimizer,
    max_norm: float,
    *,
    only: Literal["adamw", "muon"] | None = None,
    stages: dist.ProcessGroup | None = None,
) -> Tensor:
    """Clip the 2-norm of gradients on any meshes, and of plain tensors, together: experts over one mesh, dense layers
    over another. Returns the norm before, fp32 [], the same on every rank.

    One small all-reduce for each way of sharding. A plain tensor counts as replicated. All ranks must call it with the
    same parameters, and need not agree on which have a gradient. Gradients whose sum over ranks is still to be taken
    (of norms under sequence parallelism) are summed; about those ranks must agree.

    Args:
        parameters: The parameters whose gradients are clipped, or an optimizer: then those of its groups.
        max_norm: The largest norm that they keep.
        only: With an optimizer, its groups for AdamW (or the `rest` in its place) or for Muon alone. The norm is
            theirs, and other gradients stay as they are.
        stages: The ranks of this one's pipeline, whose parameters are others and count as well.

    Raises:
        ValueError: For gradients that `step` would refuse, and for `only` without an optimizer whose groups say whose
            they are.
    """
    check_number("max_norm", max_norm, ("a number, zero or more", lambda x: x >= 0))
    check_choice("only", only, None, "adamw", "muon")
    every, given = _listed(parameters, only)
    if stages is not None:
        check_kind("stages", stages, dist.ProcessGroup, "a process group, or None")
    device = every[0].device if every else torch.device("cpu")
    by_sharding: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for index, parameter in enumerate(given):
        check_parameter(f"parameter {index}", parameter)
        check_gradient(f"parameter {index}", parameter)
        key: tuple[DeviceMesh | None, tuple[int, ...]] = (None, ())
        if is_dtensor(parameter):  # which says, without a gradient here, what others have to sum
            gradient = parameter.grad
            if is_dtensor(gradient) and gradient.placements != parameter.placements:
                parameter.grad = gradient.redistribute(placements=parameter.placements)
            sharded = (dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate())
            key = parameter.device_mesh, tuple(sharded)
        parts = by_sharding.setdefault(key, [])
        if parameter.grad is not None:
            parts.append(local_part(parameter.grad))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for (mesh, dims), parts in by_sharding.items():
        squares = torch.nn.utils.get_total_norm(parts).to(device, torch.float32).square()
        group = None if mesh is None else group_over(mesh, dims)
        if group is not None:
            dist.all_reduce(squares, group=group)
        total += squares
    if stages is not None:
        dist.all_reduce(total, group=stages)
    norm = total.sqrt()
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for parts in by_sharding.values():
        for part in parts:
            part.mul_(factor)
    return norm


def _listed(parameters: object, only: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """Return all tensors, and those that are clipped. Raises TypeError and ValueError for what are none."""
    if isinstance(parameters, Optimizer):
        groups = parameters.param_groups
        if only is not None and not all("use" in group for group in groups):
            raise ValueError(
                f"only={only!r}, and groups of this {kind(parameters)} do not say whose they are. Give a MuonClip, or "
                "the parameters to clip."
            )
        wanted = [group for group in groups if only is None or (group["use"] == "muon") == (only == "muon")]
        return [p for group in groups for p in group["params"]], [p for group in wanted for p in group["params"]]
    if not isinstance(parameters, Iterable) or isinstance(parameters, str | bytes | Mapping | nn.Module):
        raise TypeError(f"parameters={shown(parameters)} is a {kind(parameters)}; give tensors, model.parameters().")
    if only is not None:
        raise ValueError(
            f"only={only!r} chooses among the groups of an optimizer: give that, clip_grad_norm_(optimizer, …)."
        )
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for index, parameter in enumerate(given):
        check_kind(f"parameters[{index}]", parameter, Tensor, "a tensor")
    return given, given
