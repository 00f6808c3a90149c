"""The inputs of the plan of an update, in a form that costs little to take and to compare in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from muonclip.torch.mesh import is_dtensor

_OPTIONS = (
    "use",
    "ns_coefficients",
    "ns_steps",
    "ns_form",
    "ns_dtype",
    "momentum_dtype",
    "eps",
    "eps_given",
    "products",
    "capturable",
    "master_weight_bits",
)
"""Those that the plan, the checks of parameters or the making of state read."""


def plan_inputs(groups: Sequence[Mapping[str, Any]], topology_version: int) -> list[object]:
    """Take the parameters themselves (by id: the groups keep them), what changes in place, and the options."""
    inputs: list[object] = [topology_version]
    for group in groups:
        parameters = group["params"]
        inputs.append(tuple(map(group.get, _OPTIONS)))
        inputs.append(tuple(map(id, parameters)))
        inputs.append([(p.requires_grad or p.grad is not None, p.dtype, p.device, p.shape) for p in parameters])
        inputs.append([(p.device_mesh, p.placements) for p in parameters if is_dtensor(p)])
    return inputs
