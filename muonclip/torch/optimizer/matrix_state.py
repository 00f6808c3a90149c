"""The declared states of matrices as tensors: made, sharded as the parameter is, and compared with a checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonclip.core import MatrixLayout
from muonclip.core.matrix_state import MatrixState, per_row
from muonclip.core.update_rule import MuonRule
from muonclip.torch.heads import HeadRows, scale_heads
from muonclip.torch.mesh import RankPosition, check_state, is_dtensor, is_shard, local_part
from muonclip.torch.optimizer.options import MuonOptions
from muonclip.torch.update import WEIGHT_ERROR, PlacedParameter, error_dtype, has_master, rescale

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


def make_matrix_states(
    state: dict[str, Any], rule: MuonRule, parameter: Tensor, layout: MatrixLayout, options: MuonOptions
) -> None:
    """Add to a parameter's state what a rule declares and is not there, as zeros; no process is asked."""
    for declared in rule.states:
        if declared.name not in state:
            state[declared.name] = _zeros(declared, parameter, layout, options)
    bits = options.master_weight_bits
    if bits is not None and has_master(parameter, bits) and WEIGHT_ERROR not in state:
        state[WEIGHT_ERROR] = torch.zeros_like(parameter, dtype=error_dtype(bits), requires_grad=False)


def dtype_of(declared: MatrixState, parameter: Tensor, options: MuonOptions) -> torch.dtype:
    """Return the dtype in which a state of a parameter is kept."""
    if declared.dtype == "wide":
        return torch.promote_types(parameter.dtype, torch.float32)
    return options.momentum_dtype_of(parameter)


def state_bytes(
    rule: MuonRule, parameter: Tensor, layout: MatrixLayout, options: MuonOptions
) -> Iterator[tuple[str, int]]:
    """Yield each state that a rule keeps of a whole parameter, and its bytes."""
    for declared in rule.states:
        shape = declared.stored_shape(parameter.shape, layout.axes(parameter.ndim).fan_in)
        yield declared.name, math.prod(shape) * dtype_of(declared, parameter, options).itemsize
    bits = options.master_weight_bits
    if bits is not None and has_master(parameter, bits):
        yield WEIGHT_ERROR, parameter.numel() * error_dtype(bits).itemsize


def check_matrix_states(
    name: str, saved: Mapping[str, Any], rule: MuonRule, parameter: Tensor, layout: MatrixLayout
) -> None:
    """Raise ValueError for a state of a checkpoint that is not shaped and placed as it would be made here."""
    for declared in rule.states:
        if declared.name in saved:
            shape, placements = _stored(declared, parameter, layout)
            check_state(name, declared.name, saved[declared.name], parameter, shape, placements)


def restored_states(
    saved: Mapping[str, Any], rule: MuonRule, parameter: Tensor, options: MuonOptions
) -> Iterator[tuple[str, Tensor]]:
    """Yield copies of the saved states whose dtype is not the parameter's, to which torch has cast them."""
    for declared in rule.states:
        value, dtype = saved.get(declared.name), dtype_of(declared, parameter, options)
        if value is not None and dtype != parameter.dtype:
            yield declared.name, value.detach().to(device=parameter.device, dtype=dtype, copy=True)


def rescale_matrix_states(
    state: Mapping[str, Tensor],
    rule: MuonRule,
    scaled: Iterable[tuple[HeadRows, Tensor]],
    parameter: Tensor,
    placed: PlacedParameter,
    here: RankPosition,
) -> None:
    """Tell a rule that the rows of the heads of a weight were multiplied by these factors [heads], for each part."""
    factors = _full(_FACTORS, parameter, placed.layout, torch.promote_types(parameter.dtype, torch.float32), 1.0)
    for rows, by_head in scaled:
        scale_heads(rows, factors, rows.axis, by_head.to(factors.device))
    held = {each.name: local_part(state[each.name]) for each in rule.states}
    rescale(rule, held, local_part(factors), placed, here)


_FACTORS = MatrixState("factors", per_row)


def _zeros(declared: MatrixState, parameter: Tensor, layout: MatrixLayout, options: MuonOptions) -> Tensor:
    return _full(declared, parameter, layout, dtype_of(declared, parameter, options), 0.0)


def _full(declared: MatrixState, parameter: Tensor, layout: MatrixLayout, dtype: torch.dtype, value: float) -> Tensor:
    if not declared.is_per_row:
        return torch.full_like(parameter, value, dtype=dtype, requires_grad=False)
    shape, placements = _stored(declared, parameter, layout)
    if not is_dtensor(parameter):
        return parameter.new_full(shape, value, dtype=dtype)
    from torch.distributed.tensor import DTensor

    whole = torch.empty(shape, device="meta")
    held = declared.stored_shape(parameter.to_local().shape, layout.axes(parameter.ndim).fan_in)
    return DTensor.from_local(
        parameter.to_local().new_full(held, value, dtype=dtype),
        parameter.device_mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _stored(
    declared: MatrixState, parameter: Tensor, layout: MatrixLayout
) -> tuple[tuple[int, ...], tuple[Placement, ...]]:
    """Return a state's shape and how it is placed: as its parameter, but whole along axes of which it has no part."""
    fan_in = layout.axes(parameter.ndim).fan_in
    shape = declared.stored_shape(parameter.shape, fan_in)
    placements = tuple(parameter.placements) if is_dtensor(parameter) else ()
    if not declared.is_per_row:
        return shape, placements
    from torch.distributed.tensor import Replicate

    return shape, tuple(
        Replicate() if is_shard(each) and each.dim % parameter.ndim in fan_in else each for each in placements
    )
