"""The matrices of a DTensor that a rank computes with: FSDP2 has gathered what it divides, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from muonclip.torch.mesh.index_ranges import length, local_indices
from muonclip.torch.mesh.late_types import is_dtensor, is_fsdp_module


def matrices_in_use(model: nn.Module) -> dict[int, int]:
    """Return how many matrices this rank computes with, by the id of a parameter, where each is a list of matrices that
    other mesh dimensions than FSDP2's divide."""
    of_fsdp = {id(parameter): spec for parameter, spec in _gathered_by_fsdp(model)}
    found: dict[int, int] = {}
    for parameter in model.parameters():
        if not is_dtensor(parameter) or parameter.ndim < 3:
            continue
        spec = of_fsdp.get(id(parameter), parameter._spec)
        if spec is not None and (at := spec.mesh.get_coordinate()) is not None:
            own = length(local_indices(len(parameter), 0, spec.placements, tuple(spec.mesh.shape), at))
            if own != len(parameter):
                found[id(parameter)] = own
    return found


def _gathered_by_fsdp(model: nn.Module) -> Iterator[tuple[nn.Parameter, Any]]:
    """Yield the parameters that FSDP2 shards, and where they are when it has gathered them: nowhere but on this rank,
    or as they were placed before. (torch has no public word for it.)"""
    for module in model.modules():
        if not is_fsdp_module(module):
            continue
        state: Any = module._get_fsdp_state()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for each in (each for group in groups if group is not None for each in group.fsdp_params):
            spec = getattr(each, "_unsharded_dtensor_spec", None)
            yield each.sharded_param, getattr(each, "_tp_spec", None) if spec is None else spec  # that of torch 2.9
