"""Parameters and gradients that may be DTensors: what this rank holds of them, and what an optimizer cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from muonclip.torch.mesh.flattened import check_not_flattened
from muonclip.torch.mesh.late_types import is_dtensor, is_partial, is_replicate
from muonclip.torch.mesh.wrapped_weights import unwrapped

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; writing there writes to the tensor."""
    return unwrapped(tensor.to_local() if is_dtensor(tensor) else tensor)


def placed_like(parameter: Tensor, local: Tensor) -> Tensor:
    """Return a tensor of a parameter's shape of which this rank holds `local`, placed as the parameter is."""
    if not is_dtensor(parameter):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return what this rank holds of the gradient, placed as the parameter is.

    Sums that are still to be taken over ranks are taken, and of what is whole where the parameter is sharded, the
    shard. `check_gradient` has found nothing wrong with it.
    """
    gradient = parameter.grad
    if not is_dtensor(gradient) or not is_dtensor(parameter):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local()


def check_state(
    name: str,
    part: str,
    value: Tensor,
    parameter: Tensor,
    shape: Sequence[int] | None = None,
    placements: Sequence[Placement] | None = None,
) -> None:
    """Raise ValueError for a tensor of a saved state that is not shaped and placed as its parameter is.

    `shape`, `placements`: what is expected in place of the parameter's.
    """
    expected = (tuple(parameter.shape if shape is None else shape), "a plain tensor")
    if is_dtensor(parameter):
        expected = (
            expected[0],
            parameter.device_mesh,
            tuple(parameter.placements if placements is None else placements),
        )
    found = (tuple(value.shape), "a plain tensor")
    if is_dtensor(value):
        found = (found[0], value.device_mesh, tuple(value.placements))
    if found != expected:
        raise ValueError(
            f"{part} of {name} in the checkpoint is {found}, here it would be {expected}. Nothing was loaded. Load "
            "states of other meshes by torch.distributed.checkpoint (set_optimizer_state_dict), which shards them as "
            "the parameters are."
        )


def check_parameter(name: str, parameter: Tensor) -> None:
    """Raise ValueError for tensors that an engine has flattened, and for sums that are still to be taken."""
    check_not_flattened(name, parameter)
    if is_dtensor(parameter) and any(is_partial(placement) for placement in parameter.placements):
        raise ValueError(f"{name} is placed as {parameter.placements}: a sum still to be taken is not a weight.")


def check_gradient(name: str, parameter: Tensor) -> None:
    """Raise ValueError for gradients that would have to be gathered to be placed as their parameter is."""
    gradient = parameter.grad
    if gradient is None:
        return
    if not is_dtensor(parameter):
        if is_dtensor(gradient):
            raise ValueError(f"{name} is a plain tensor, but its gradient is a DTensor.")
        return
    if not is_dtensor(gradient) or gradient.device_mesh != parameter.device_mesh:
        raise ValueError(f"{name} is a DTensor on {parameter.device_mesh}, but its gradient is not on that mesh.")
    pairs = zip(gradient.placements, parameter.placements, strict=True)
    if any(have != want and not (is_partial(have) or is_replicate(have)) for have, want in pairs):
        raise ValueError(
            f"{name} is placed as {parameter.placements}, its gradient as {gradient.placements}. Redistribute the "
            "gradient before the step; the optimizer would have to gather it whole."
        )
