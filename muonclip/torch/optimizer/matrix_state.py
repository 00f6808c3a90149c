"""The declared states of matrices as tensors: made, sharded as the parameter is, and compared with a checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonclip.core import MatrixLayout
from muonclip.core.matrix_state import MatrixState, per_row
from muonclip.core.state_storage import Storage, stored_states
from muonclip.core.update_rule import MuonRule
from muonclip.torch.heads import HeadRows, scale_heads
from muonclip.torch.mesh import RankPosition, check_state, is_dtensor, is_shard, local_part, placed_like
from muonclip.torch.optimizer.options import MuonOptions
from muonclip.torch.update import (
    PlacedParameter,
    as_numbers,
    convert_states,
    error_dtypes,
    has_master,
    is_coded,
    missing_errors,
    on_host,
    rescale,
)

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


def make_matrix_states(
    state: dict[str, Any],
    rule: MuonRule,
    parameter: Tensor,
    layout: MatrixLayout,
    options: MuonOptions,
    *,
    offload: bool = False,
) -> None:
    """Add to a parameter's state what a rule declares and is not there, as zeros; no process is asked.

    What is there stays as it is stored. `offload`: keep it in host memory.
    """
    made: dict[str, Tensor] = {}
    for declared in rule.states:
        if declared.name not in state:
            for part in options.storage.parts(declared):
                made[part.name] = _zeros(part, parameter, layout, options)
    made |= missing_errors(state, parameter, options.master_weight_bits)
    state.update({name: offloaded(value) for name, value in made.items()} if offload else made)


def offloaded(value: Tensor) -> Tensor:
    """Return a copy of a state in host memory, placed as the state is."""
    return placed_like(value, on_host(local_part(value).detach()))


def held_states(rule: MuonRule, state: Mapping[str, Any]) -> tuple[MatrixState, ...]:
    """Return what a rule stores of its states, stored as they are in a parameter's state."""
    return tuple(part for declared in rule.states for part in held_states_of(declared, state))


def held_states_of(declared: MatrixState, state: Mapping[str, Any]) -> tuple[MatrixState, ...]:
    """Return what is stored of one state, stored as it is in a parameter's state."""
    return _storage_of(declared, state).parts(declared)


def local_states(rule: MuonRule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's part of what is stored of a rule's states."""
    return {part.name: local_part(state[part.name]) for part in held_states(rule, state)}


def dtype_of(declared: MatrixState, parameter: Tensor, options: MuonOptions) -> torch.dtype:
    """Return the dtype in which a state of a parameter is kept."""
    if declared.dtype == "wide":
        return torch.promote_types(parameter.dtype, torch.float32)
    name = options.storage.dtype if declared.dtype is None else declared.dtype
    return options.momentum_dtype_of(parameter) if name is None else getattr(torch, name)


def state_bytes(
    rule: MuonRule, parameter: Tensor, layout: MatrixLayout, options: MuonOptions
) -> Iterator[tuple[str, int]]:
    """Yield each state that is stored of a whole parameter, and its bytes."""
    for declared in stored_states(rule.states, options.storage):
        shape = declared.stored_shape(parameter.shape, layout.axes(parameter.ndim).fan_in)
        yield declared.name, math.prod(shape) * dtype_of(declared, parameter, options).itemsize
    bits = options.master_weight_bits
    if bits is not None and has_master(parameter, bits):
        yield from ((name, parameter.numel() * dtype.itemsize) for name, dtype in error_dtypes(bits).items())


def check_matrix_states(
    name: str, saved: Mapping[str, Any], rule: MuonRule, parameter: Tensor, layout: MatrixLayout
) -> None:
    """Raise ValueError for a state of a checkpoint that is not shaped and placed as it would be made here."""
    for declared in held_states(rule, saved):
        if declared.name in saved:
            shape, placements = _stored(declared, parameter, layout)
            check_state(name, declared.name, saved[declared.name], parameter, shape, placements)


def restored_states(
    name: str,
    saved: Mapping[str, Any],
    rule: MuonRule,
    parameter: Tensor,
    layout: MatrixLayout | None,
    options: MuonOptions,
    *,
    offload: bool,
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield copies of the saved states that are not in the parameter's dtype, to which torch would cast them, or, with
    `offload`, of all that are kept in host memory.

    States that were saved in another form than the options say are converted; None is yielded for what is left over.
    Raises ValueError for states that cannot be converted.
    """
    for declared in rule.states:
        if declared.name not in saved:
            continue
        have, want = _storage_of(declared, saved), options.storage
        if declared.dtype is None and layout is not None and have.has_codes != want.has_codes:
            for part, value in _converted(name, declared, saved, parameter, layout, options):
                yield part, offloaded(value) if offload and value is not None else value
            continue
        for part in have.parts(declared):
            dtype = dtype_of(part, parameter, options)
            if offload:
                yield part.name, offloaded(saved[part.name].detach().to(dtype=dtype))
            elif dtype != parameter.dtype:
                yield part.name, saved[part.name].detach().to(device=parameter.device, dtype=dtype, copy=True)


def _converted(
    name: str,
    declared: MatrixState,
    saved: Mapping[str, Any],
    parameter: Tensor,
    layout: MatrixLayout,
    options: MuonOptions,
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield a state as codes of the numbers that were saved, or as numbers of the codes."""
    fan_in = layout.axes(parameter.ndim).fan_in
    if is_dtensor(parameter) and any(
        is_shard(each) and each.dim % parameter.ndim in fan_in and parameter.device_mesh.size(dim) > 1
        for dim, each in enumerate(parameter.placements)
    ):
        raise ValueError(
            f"{declared.name} of {name} in the checkpoint is stored otherwise than momentum_dtype="
            f"{options.momentum_dtype!r} says, and its rows are divided over ranks. Nothing was loaded. Load it as it "
            "was saved, or convert it where rows are whole."
        )
    parts = options.storage.parts(declared)
    new = {part.name: _zeros(part, parameter, layout, options) for part in parts}
    old = {
        part.name: local_part(saved[part.name]).detach().to(parameter.device)
        for part in held_states_of(declared, saved)
    }
    value = old[declared.name]
    if options.storage.has_codes and value.numel() and bool(value.any()) and bool((value == value.round()).all()):
        raise ValueError(
            f"{declared.name} of {name} in the checkpoint holds whole numbers only: codes that were read without the "
            "sizes of their blocks. Nothing was loaded. Make the optimizer with momentum_dtype='int8' before "
            "torch.distributed.checkpoint reads its state."
        )
    convert_states({name: local_part(each) for name, each in new.items()}, old, declared.name, layout)
    yield from new.items()
    yield from ((left, None) for left in old.keys() - new.keys())


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
    held = as_numbers(local_states(rule, state))
    own = local_part(factors).to(next(iter(held.values())).device)  # which may be the host
    rescale(rule, held, own, placed, here)


_FACTORS = MatrixState("factors", per_row)


def _storage_of(declared: MatrixState, state: Mapping[str, Any]) -> Storage:
    held = state.get(declared.name)
    return Storage("int8" if isinstance(held, Tensor) and is_coded(held) else None)


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
    fan_in = layout.axes(parameter.ndim).fan_in
    held = tuple(shape[axis] if axis in fan_in else size for axis, size in enumerate(parameter.to_local().shape))
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
