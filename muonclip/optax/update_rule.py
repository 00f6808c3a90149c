"""An update rule of the core as an Optax transformation: its stages on whole arrays, the iteration on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec, Sharding

from muonclip.core import update_scale
from muonclip.core.arguments import check_array, check_kind
from muonclip.core.state_storage import Storage, absmax_of, stored_states
from muonclip.core.update_rule import MatrixOperations, Momentum, Motion, MuonRule
from muonclip.core.update_scale import AdjustLR
from muonclip.optax.array_layout import KERNEL, ArrayLayout
from muonclip.optax.dtypes import wide
from muonclip.optax.newton_schulz import NewtonSchulz
from muonclip.optax.paths import declared_for, named_arrays
from muonclip.optax.plan import weight_layouts
from muonclip.optax.sharding import check_visible, orthogonalize_arrays
from muonclip.optax.stored_states import StoredStates, storage_of, zeros


class ScaleByMuonState(NamedTuple):
    """The state of `scale_by_muon`.

    Attributes:
        count: int32 scalar: steps taken.
        mu: Momentum, as `torch.optim.Muon` stores it.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates


class ScaleByRuleState(NamedTuple):
    """The state of a rule that declares more than the momentum."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """int32 scalar: steps taken."""
    mu: optax.Updates
    """Momentum, as `torch.optim.Muon` stores it."""
    others: Mapping[str, optax.Updates]
    """The other states, by name."""


def scale_by_rule(
    rule: MuonRule,
    newton_schulz: NewtonSchulz,
    beta: Any = 0.95,
    nesterov: bool | Literal["bias_corrected"] = True,
    mu_dtype: Any = None,
    *,
    adjust_lr_fn: AdjustLR = 1.0,
    weight_dimension_numbers: Any = None,
    shardings: Any = None,
    learning_rate: Any = None,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Update matrices by a rule of the core; `scale_by_muon` says what the arguments mean.

    A rule that moves the weights itself needs them, `update(grads, state, params)`, and a `learning_rate`, a number or
    a schedule; its updates are what is to be added, and nothing may scale them. Other rules read neither this nor
    `weight_decay`. Raises ValueError without them.
    """
    moves, storage = type(rule).move is not MuonRule.move, storage_of(mu_dtype)
    if moves and learning_rate is None:
        raise ValueError(f"{type(rule).__name__} moves the weights itself, so it needs learning_rate=….")

    def init(params: optax.Params) -> Any:
        layouts = _layouts(weight_dimension_numbers, params)
        check_visible(params, shardings)
        leaves, treedef = jax.tree.flatten(params)
        states: dict[str, optax.Updates] = {}
        for part in stored_states(rule.states, storage):
            each = zip(leaves, layouts.values(), strict=True)
            states[part.name] = treedef.unflatten([zeros(part, leaf, layout, storage) for leaf, layout in each])
        return _as_optax(jnp.zeros((), jnp.int32), states)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if moves and params is None:
            raise ValueError(f"{type(rule).__name__} moves the weights themselves: call update(grads, state, params).")
        check_kind("state", state, (ScaleByMuonState, ScaleByRuleState), "what init or the last update returned")
        layouts = _layouts(weight_dimension_numbers, updates)
        placed = declared_for(updates, shardings, Sharding, "shardings")
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients, treedef = jax.tree.flatten(updates)
        stored = {"momentum_buffer": state.mu, **getattr(state, "others", {})}
        weights = treedef.flatten_up_to(params) if moves else [None] * len(gradients)
        _check_stored(stored, storage)
        columns = {part.name: treedef.flatten_up_to(stored[part.name]) for part in stored_states(rule.states, storage)}
        arrays: list[_Array] = []
        for number, (name, layout) in enumerate(layouts.items()):
            gradient, weight = gradients[number], weights[number]
            form = StoredStates(layout, storage, wide(gradient.dtype), name, count)
            old = form.read(rule.states, {name: column[number] for name, column in columns.items()})
            dtype = old["momentum_buffer"].dtype
            momentum = Momentum(beta, nesterov, count.astype(wide(dtype)))
            scales = _scales(layout, gradient.shape, adjust_lr_fn)
            own = _operations(layout, dtype)
            given: Any = gradient
            if moves:
                given, old = rule.pull_back(gradient, weight, old, own)
            arrays.append(_Array(given, layout, old, momentum, own, scales, gradient.dtype, form))
        states = [rule.advance(each.gradient, each.old, each.momentum, each.operations) for each in arrays]
        directions = [
            rule.direction(each.gradient, advanced, each.momentum, each.operations)
            for each, advanced in zip(arrays, states, strict=True)
        ]
        # Else the scale can be taken with the iteration.
        plain = not moves and type(rule).apply is MuonRule.apply
        done = orthogonalize_arrays(
            directions,
            list(layouts.values()),
            [each.scales if plain else (1.0,) * len(each.scales) for each in arrays],
            newton_schulz,
            [placed[name] for name in layouts],
        )
        if not plain:
            now = [rate(state.count) if callable(rate) else rate for rate in (learning_rate, weight_decay)]
            applied = [_applied(rule, *each, *now) for each in zip(arrays, done, states, weights, strict=True)]
            done, states = [u for u, _ in applied], [s for _, s in applied]
        done = [u.astype(each.dtype) for u, each in zip(done, arrays, strict=True)]
        written = [each.form.write(rule.states, state) for each, state in zip(arrays, states, strict=True)]
        new = {name: treedef.unflatten([each[name] for each in written]) for name in columns}
        return treedef.unflatten(done), _as_optax(count, new)

    return optax.GradientTransformationExtraArgs(init, update)


class _Array(NamedTuple):
    """An array of matrices in one update: what its rule is given, and the scale of each block."""

    gradient: jax.Array
    layout: ArrayLayout
    old: Mapping[str, jax.Array]
    momentum: Momentum
    operations: MatrixOperations
    scales: tuple[float, ...]
    dtype: Any
    """That of the updates: the gradient's."""
    form: StoredStates


def _applied(
    rule: MuonRule,
    array: _Array,
    polar: jax.Array,
    state: Mapping[str, jax.Array],
    weight: jax.Array | None,
    learning_rate: Any,
    weight_decay: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the scaled update of a rule that changes the polar factor, and its states in their own dtypes.

    With a weight: what the rule moves it by.
    """
    update, new = rule.apply(polar, state, array.operations)
    scale = _by_block(array.layout, update, array.scales)
    if weight is None:
        update = update * scale
    else:
        dtype = wide(weight.dtype)
        motion = Motion(_as(learning_rate, dtype), _as(weight_decay, dtype), scale)
        moved, new = rule.move(weight, update, new, motion, array.operations)
        update = moved - array.operations.wide(weight)
    return update, {name: value.astype(state[name].dtype) for name, value in new.items()}


def _as(number: Any, dtype: Any) -> Any:
    return number.astype(dtype) if isinstance(number, jax.Array) else number


def _as_optax(count: jax.Array, states: Mapping[str, optax.Updates]) -> ScaleByMuonState | ScaleByRuleState:
    others = {name: value for name, value in states.items() if name != "momentum_buffer"}
    mu = states["momentum_buffer"]
    return ScaleByRuleState(count, mu, others) if others else ScaleByMuonState(count, mu)


def _check_stored(stored: Mapping[str, Any], storage: Storage) -> None:
    """Raise ValueError for a state that was stored in another form than `mu_dtype` says."""
    has_codes = absmax_of("momentum_buffer") in stored
    if has_codes != storage.has_codes:
        raise ValueError(
            f"the state's momentum is {'codes of blocks' if has_codes else 'stored as numbers'}, and mu_dtype says "
            "otherwise. Give the mu_dtype that it was made with."
        )


def _layouts(weight_dimension_numbers: Any, arrays: Any) -> dict[str, ArrayLayout]:
    declared = weight_layouts(weight_dimension_numbers, arrays)
    layouts: dict[str, ArrayLayout] = {}
    for name, array in named_arrays(arrays).items():
        check_array(f"parameter {name!r}", array)
        layout = declared[name]
        if layout is None and array.ndim != 2:
            raise ValueError(
                f"{name!r} has shape {array.shape}; Muon needs a matrix [in, out]. Say which axes are rows and columns "
                "by weight_dimension_numbers=, or leave it to AdamW."
            )
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise ValueError(f"{name!r} is complex; Muon's polynomials are real. Leave it to AdamW.")
        try:
            layouts[name] = ArrayLayout.from_layout(layout or KERNEL, array.shape)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
    return layouts


def _scales(layout: ArrayLayout, shape: tuple[int, ...], adjust_lr_fn: AdjustLR) -> tuple[float, ...]:
    blocks = layout.fused.matrix_shapes(layout.unit_shape(shape))
    return tuple(update_scale(fan_out, fan_in, adjust_lr_fn) for _, fan_out, fan_in in blocks)


def _operations(layout: ArrayLayout, dtype: Any) -> MatrixOperations:
    """Make the operations on a whole array of matrices; averages are rounded once, to `dtype`."""
    summed = wide(dtype)

    def lerp(start: jax.Array, end: jax.Array, weight: Any) -> jax.Array:
        start, end = start.astype(summed), end.astype(summed)
        return (start + weight * (end - start)).astype(dtype)

    def total(x: jax.Array) -> jax.Array:
        rows = jnp.sum(x, axis=layout.fan_in, keepdims=True)
        spec = jax.typeof(rows).sharding.spec
        blocks = layout.fused.split(layout.units(_resharded(rows, spec, PartitionSpec())), xp=jnp)
        sums = [jnp.broadcast_to(jnp.sum(block, axis=-2, keepdims=True), block.shape) for block in blocks]
        whole = layout.array(layout.fused.join(sums, layout.unit_shape(rows.shape), xp=jnp), rows.shape)
        return _resharded(whole, spec, spec)

    return MatrixOperations(
        lerp=lerp,
        average=lerp,
        wide=lambda x: x.astype(wide(x.dtype)),
        mean_columns=lambda x: jnp.mean(x, axis=layout.fan_in, keepdims=True),
        sum_columns=lambda x: jnp.sum(x, axis=layout.fan_in, keepdims=True),
        sum=total,
        xp=jnp,
    )


def _by_block(layout: ArrayLayout, x: jax.Array, scales: tuple[float, ...]) -> jax.Array:
    """Spread a number for each block over its rows, in a shape that broadcasts over the array."""
    shape = tuple(1 if axis in layout.fan_in else size for axis, size in enumerate(x.shape))
    blocks = layout.fused.matrix_shapes(layout.unit_shape(shape))
    rows = [jnp.full(block, scale, x.dtype) for block, scale in zip(blocks, scales, strict=True)]
    whole = layout.array(layout.fused.join(rows, layout.unit_shape(shape), xp=jnp), shape)
    spec = PartitionSpec(
        *(None if axis in layout.fan_in else axes for axis, axes in enumerate(jax.typeof(x).sharding.spec))
    )
    return _resharded(whole, spec, spec)


def _resharded(rows: jax.Array, spec: PartitionSpec, wanted: PartitionSpec) -> jax.Array:
    """Move what there is per row where `wanted` says, if its type says (`spec`) that it is spread over a mesh."""
    return jax.sharding.reshard(rows, wanted) if any(spec) else rows
