"""QK-Clip as the last transformation of a chain: it corrects `params + updates`.

    γ_h = τ / S_h   where S_h > τ,   else 1            (Kimi K2, arXiv 2507.20534, Algorithm 1; see core/qk_clip.py)

S_h, the maximum attention logit that head h had in the step's forward passes, comes with every update as the extra
argument `max_logits`; `muonclip.optax.max_logits` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from muonclip.core import ClipFactors, clip_factors
from muonclip.core.arguments import check_array, check_flag, check_kind, check_whole
from muonclip.core.head_parts import (
    FACTOR_OF,
    Factor,
    HeadPart,
    Part,
    check_parts,
    factors_of,
    grouped_parts,
    latent_parts,
)
from muonclip.core.qk_clip import check_alpha, check_tau
from muonclip.core.tau_rules import Tau, TauRule, check_patterns, check_tau_rules, tau_rule
from muonclip.optax.arguments import check_if_concrete, check_real
from muonclip.optax.dtypes import wide
from muonclip.optax.head_rows import HeadRows, RowsOfArray, overlapping, shapes_of
from muonclip.optax.paths import below, is_masked_node, map_named, name_of, named_leaves
from muonclip.optax.types import PyTree


@dataclass(frozen=True, slots=True)
class QKProjection:
    """The parameters that make the queries and keys of one attention (with `layer_axis`: of a stack of them).

    Args:
        num_heads: Number of query heads.
        query: Rows private to their heads, whose keys are, too; they take γ^α.
        key: Rows private to their heads; they take γ^(1−α).
        query_facing_shared: Rows that face a key that heads share; they take all of γ.
        reason: Why none is to be scaled (QK-norm, say); the maxima are then only checked.
        shared_key: The keys that heads share; never scaled, and known for checks.

    Raises:
        ValueError: For parts that do not have the same heads.
    """

    num_heads: int
    query: tuple[HeadRows, ...] = ()
    key: tuple[HeadRows, ...] = ()
    query_facing_shared: tuple[HeadRows, ...] = ()
    reason: str = ""
    shared_key: tuple[HeadRows, ...] = ()

    def __post_init__(self) -> None:
        check_whole("num_heads", self.num_heads)
        check_kind("reason", self.reason, str, "words, or an empty string")
        for name in ("query", "key", "query_facing_shared", "shared_key"):
            given = getattr(self, name)
            check_kind(name, given, Sequence, f"a tuple of HeadRows, {name}=(HeadRows(…),)")
            for each in given:
                check_kind(name, each, HeadRows, f"a tuple of HeadRows, {name}=(HeadRows(…),)")
            object.__setattr__(self, name, tuple(given))
        for rows in self.shared_key:
            grouped_parts(self.num_heads, rows.num_heads)
        for rows in self.parts():
            if rows.num_heads != self.num_heads:
                raise ValueError(
                    f"{rows.path!r} has rows for {rows.num_heads} heads, the attention has {self.num_heads}. Keys that "
                    "queries share are `shared_key`, and those queries `query_facing_shared`; of one fused array "
                    "QKProjection.fused(path, num_heads=…, num_kv_heads=…, head_dim=…) declares both."
                )
        if len({rows.layer_axis is None for rows in (*self.parts(), *self.shared_key)}) > 1:
            raise ValueError(
                "some parts stack layers (layer_axis) and some do not; declare the stack and the rest separately."
            )
        check_parts([part for part in FACTOR_OF if getattr(self, part)], self.reason)

    @classmethod
    def mha(
        cls,
        *,
        q: str,
        k: str,
        num_heads: int,
        in_axis: int | None = None,
        layer_axis: int | None = None,
        heads_last: bool = False,
    ) -> QKProjection:
        """Declare multi-head attention: every head has its own query and key.

        Args:
            q: The array of the queries, or its module: names of the tree joined by "/".
            k: That of the keys.
            num_heads: Number of heads.
            in_axis: The axis of the input, see `HeadRows`.
            layer_axis: The axis of scanned layers, see `HeadRows`.
            heads_last: Heads run fastest, see `HeadRows`.
        """
        return cls.gqa(
            q=q,
            k=k,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            in_axis=in_axis,
            layer_axis=layer_axis,
            heads_last=heads_last,
        )

    @classmethod
    def gqa(
        cls,
        *,
        q: str,
        k: str,
        num_heads: int,
        num_kv_heads: int,
        in_axis: int | None = None,
        layer_axis: int | None = None,
        heads_last: bool = False,
    ) -> QKProjection:
        """Declare grouped-query attention (one key head: multi-query).

        Where each key serves several queries, the query of a head above τ takes all of γ, so that the heads with the
        same key keep their weights.

        Args:
            q: The array of the queries, or its module: names of the tree joined by "/".
            k: That of the keys.
            num_heads: Number of query heads.
            num_kv_heads: Number of key heads, a divisor of `num_heads`.
            in_axis: The axis of the input, see `HeadRows`.
            layer_axis: The axis of scanned layers, see `HeadRows`.
            heads_last: Heads run fastest, see `HeadRows`.

        Raises:
            ValueError: For numbers of heads that do not divide.
        """
        _, parts = grouped_parts(num_heads, num_kv_heads)
        return cls._from_parts(num_heads, parts, {"q": q, "k": k}, in_axis, layer_axis, heads_last)

    @classmethod
    def fused(
        cls,
        path: str,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        v_head_dim: int | None = None,
        in_axis: int | None = None,
        layer_axis: int | None = None,
    ) -> QKProjection:
        """Declare the attention of one array whose outputs are [q | k | v], all queries first, all values last.

        An array with its heads in another order is declared part by part (`HeadRows`).

        Args:
            path: The array, or its module: names of the tree joined by "/".
            num_heads: Number of query heads.
            head_dim: Outputs of a head.
            num_kv_heads: Number of key heads, a divisor of `num_heads`; None: as many (multi-head attention).
            v_head_dim: Outputs of a head's values; None: `head_dim`.
            in_axis: The axis of the input, see `HeadRows`.
            layer_axis: The axis of scanned layers, see `HeadRows`.

        Raises:
            ValueError: For numbers of heads that do not divide.
        """
        check_whole("head_dim", head_dim)
        groups = num_heads if num_kv_heads is None else num_kv_heads
        _, parts = grouped_parts(num_heads, groups)
        v_head_dim = head_dim if v_head_dim is None else check_whole("v_head_dim", v_head_dim)
        outputs = (num_heads + groups) * head_dim + groups * v_head_dim
        starts = {"q": 0, "k": num_heads * head_dim}
        rows: dict[str, Any] = {
            part.part: (
                HeadRows(
                    path, part.num_heads, head_dim, starts[part.projection], head_dim, in_axis, layer_axis, outputs
                ),
            )
            for part in parts
            if part.part != "value"
        }
        return cls(num_heads, **rows)

    @classmethod
    def mla(
        cls,
        *,
        q: str,
        kv: str,
        num_heads: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        in_axis: int | None = None,
        layer_axis: int | None = None,
    ) -> QKProjection:
        """Declare multi-head latent attention (DeepSeek-V2, V3; K2). The rotary key is shared and never scaled.

        Args:
            q: The array with [nope | rope] rows per head (the up-projection, or the only one), or its module.
            kv: That with [k_nope | v] rows per head.
            num_heads: Number of heads.
            qk_nope_head_dim: Rows of a head's query and key without position.
            qk_rope_head_dim: Rows of a head's rotated query.
            v_head_dim: Rows of a head's value.
            in_axis: The axis of the input, see `HeadRows`.
            layer_axis: The axis of scanned layers, see `HeadRows`.
        """
        _, parts = latent_parts(num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        return cls._from_parts(num_heads, parts, {"q": q, "kv": kv}, in_axis, layer_axis)

    @classmethod
    def _from_parts(
        cls,
        num_heads: int,
        parts: Iterable[HeadPart],
        paths: Mapping[str, str],
        in_axis: int | None,
        layer_axis: int | None,
        heads_last: bool = False,
    ) -> QKProjection:
        rows: dict[str, Any] = {}
        for part in parts:
            if part.part != "value":
                own = HeadRows(
                    paths[part.projection],
                    part.num_heads,
                    part.size,
                    part.start,
                    part.stride,
                    in_axis,
                    layer_axis,
                    part.num_heads * part.stride if part.stride else None,
                    heads_last,
                )
                rows[part.part] = (*rows.get(part.part, ()), own)
        return cls(num_heads, **rows)

    def parts(self) -> tuple[HeadRows, ...]:
        """Return every declared part that may be scaled."""
        return tuple(rows for part in FACTOR_OF for rows in getattr(self, part))


QKProjections: TypeAlias = PyTree
"""A tree with a `QKProjection` for each attention. `max_logits` is a tree of the same structure, or has one
array at or below the name of each: [heads], or [layers, heads] for a stack."""


class QKClipState(NamedTuple):
    """The state of `qk_clip`: what the last step scaled, and how often it could not.

    Attributes:
        nonfinite: int32 scalar: how many maxima, of all steps, were NaN or +inf, or came with a τ that is not above 0
            or an α outside [0, 1], and so left their head as it was.
        gamma: float32, shaped as the maxima: what the last step applied; 1 where a head was not clipped.
        frozen: int32 scalar: how many heads of the last step were above τ and cannot be clipped, since their weights
            are frozen.
        unfinished: int32 scalar: how many heads of the last step needed a smaller factor than the dtype of their
            weights allows in one step; the rest comes at the next ones.
        step: int32 scalar: steps taken, for a τ that is a schedule.
    """

    nonfinite: jax.Array
    gamma: PyTree
    frozen: jax.Array
    unfinished: jax.Array
    step: jax.Array


def qk_clip(
    qk_projections: QKProjections,
    tau: optax.ScalarOrSchedule | Mapping[str, optax.ScalarOrSchedule] = 100.0,
    alpha: float | jax.Array = 0.5,
    *,
    wide_updates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rescale queries and keys of heads whose maximum attention logit exceeded τ; the last link of a chain.

        tx.update(grads, state, params, max_logits=…)

    For a head above τ `optax.apply_updates` then ends at its updated weights times their factor, up to rounding in the
    parameter's dtype: 1e-6 for float32; in bfloat16 a factor above 0.996 may change nothing. The updates of heads
    with S ≤ τ (−inf included) are handed on bit for bit, selected by γ < 1 in float32.

    Updates have the dtype in which they come. Of a weight narrower than float32 (bfloat16, float16) a step applies a
    factor of ½ at most, since then t − w, where t is factor · (weight + update) rounded to the weight's dtype, is a
    number of that dtype; the rest comes at the next steps (`unfinished`).

    A NaN or +inf maximum raises ValueError where it can be seen (outside jit) and else is counted in `nonfinite`; its
    head keeps its update. So is a traced τ that is not above 0, or α outside [0, 1].

    Args:
        qk_projections: A tree with a `QKProjection` for each attention; `max_logits` is a tree of the same structure.
        tau: The largest logit a head may keep, after the softmax scale: a number or a schedule, as a rate is; or a dict
            with either for each pattern of the attentions' names, of which the first that fits counts:
            `tau={"vision/*": 50.0, "*": 100.0}`.
        alpha: The query's share of γ where query and key are private to the head, from 0 to 1.
        wide_updates: Give updates of narrow weights in float32, with all of the factor, for a host that adds them in
            float32 and casts back (`optax.apply_updates` does, `equinox.apply_updates` does not).

    Raises:
        TypeError: For an update without `max_logits`.
        ValueError: For an update without `params`, for a `max_logits` of another structure or shape, for paths that do
            not exist, for τ ≤ 0 and for α outside [0, 1].
    """
    check_tau_rules(tau, lambda number: check_if_concrete(number, check_tau))
    check_if_concrete(alpha, check_alpha)
    check_flag("wide_updates", wide_updates)
    projections, treedef = flatten_projections(qk_projections)
    names = [name for name, _ in projections]
    by_name = cast("Tau", tau)
    check_patterns(by_name, names)
    rules = [tau_rule(by_name, name) for name in names]

    def init(params: optax.Params) -> QKClipState:
        leaves = named_leaves(params)
        shapes = shapes_of(leaves)
        if leaves:  # none where Optax asks for the structure of the state alone
            scaled_rows(projections, leaves)
        gamma = [jnp.ones(maxima_shape(projection, shapes), jnp.float32) for _, projection in projections]
        zero = jnp.zeros((), jnp.int32)
        return QKClipState(zero, jax.tree.unflatten(treedef, gamma), zero, zero, zero)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        max_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QKClipState]:
        del extra_args
        if max_logits is None:
            raise TypeError(
                "qk_clip needs the maximum logits of the step: tx.update(grads, state, params, max_logits=…). A "
                "wrapper that calls update without them cannot carry QK-Clip: use muonclip.optax.accumulate for "
                "gradient accumulation, and call tx.update yourself in place of TrainState.apply_gradients."
            )
        if params is None:
            raise ValueError("qk_clip corrects params + updates: call update(grads, state, params, max_logits=…).")
        check_kind("state", state, QKClipState, "what init or the last update returned")
        leaves = named_leaves(params)
        check_max_logits(max_logits)
        maxima = maxima_of(projections, treedef, max_logits, shapes_of(leaves))
        scalings = scaled_rows(projections, leaves)
        by_rule = {id(rule): _thresholds(rule, alpha, state.step) for rule in rules}
        now = [by_rule[id(rule)] for rule in rules]
        floors = [jnp.zeros((), jnp.float32)] * len(projections)
        if not wide_updates:
            for number, side, rows in scalings:
                if is_narrow(leaves[rows.name]):
                    floors[number] = jnp.maximum(floors[number], _smallest_gamma(side, now[number].alpha))
        factors: list[ClipFactors] = []
        scaled = {number for number, _, _ in scalings}
        nonfinite, frozen, unfinished = state.nonfinite, *[jnp.zeros_like(state.nonfinite)] * 2
        for number, (maximum, floor) in enumerate(zip(maxima, floors, strict=True)):
            finite, bad = _finite(maximum, now[number].usable)
            threshold, share = _as(now[number].tau, maximum), _as(now[number].alpha, maximum)
            limit = threshold / floor.astype(maximum.dtype)  # inf without a floor
            nonfinite += jnp.sum(bad, dtype=jnp.int32)
            if number not in scaled and not projections[number][1].reason:
                frozen += jnp.sum(finite > threshold, dtype=jnp.int32)
            unfinished += jnp.sum(finite > limit, dtype=jnp.int32)
            factors.append(clip_factors(jnp.minimum(finite, limit), threshold, share, xp=jnp))
        spread: dict[str, jax.Array] = {}
        for number, side, rows in scalings:
            own = rows.spread(getattr(factors[number], side))
            spread[rows.name] = own if rows.name not in spread else spread[rows.name] * own
        clipped = map_named(
            lambda name, update, weight: _clipped(name, update, weight, spread.get(name), wide_updates), updates, params
        )
        gamma = [
            factors[number].gamma.astype(jnp.float32) if number in scaled else jnp.ones_like(old)
            for number, old in enumerate(jax.tree.leaves(state.gamma))
        ]
        return clipped, QKClipState(
            nonfinite,
            jax.tree.unflatten(treedef, gamma),
            frozen,
            unfinished,
            jnp.asarray(optax.safe_increment(state.step)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _Thresholds(NamedTuple):
    """τ and α in one step, and whether they can be used; their defaults where not."""

    tau: Any
    alpha: Any
    usable: jax.Array


def _thresholds(rule: TauRule, alpha: Any, step: jax.Array) -> _Thresholds:
    tau: Any = rule(step) if callable(rule) else rule
    if not isinstance(tau, jax.Array):
        check_tau(tau)
    usable = jnp.logical_and(tau > 0, jnp.logical_and(alpha >= 0, alpha <= 1))
    return _Thresholds(_where(usable, tau, 100.0), _where(usable, alpha, 0.5), usable)


def _clipped(
    name: str, update: jax.Array, weight: jax.Array, factor: jax.Array | None, wide_updates: bool
) -> jax.Array:
    """Return the update that ends at factor · (weight + update)."""
    check_array(f"updates: {name!r}", update)
    if factor is None:
        return update
    if update.shape != weight.shape:
        raise ValueError(f"updates: {name!r} has shape {update.shape}, and params {weight.shape}.")
    dtype = wide(weight.dtype)
    factor, old = factor.astype(dtype), weight.astype(dtype)
    loud = (factor < 1) | jnp.zeros_like(update, bool)  # sharded as the update, which a select wants
    target = factor * (old + update.astype(dtype))
    if not is_narrow(weight):
        return jnp.where(loud, target - old, update).astype(update.dtype)
    if wide_updates:
        return jnp.where(loud, target - old, update.astype(dtype))
    # The barrier keeps XLA from leaving the rounding out.
    target = jax.lax.optimization_barrier(target.astype(weight.dtype)).astype(dtype)
    return jnp.where(loud, (target - old).astype(update.dtype), update)


def is_narrow(weight: jax.Array) -> bool:
    """Tell whether the difference of two weights may have more digits than their dtype."""
    return jnp.issubdtype(weight.dtype, jnp.floating) and jnp.finfo(weight.dtype).bits < 32


def _smallest_gamma(side: Factor, alpha: Any) -> jax.Array:
    """Return the γ with which the factor of this side is ½."""
    share = {"query": alpha, "key": 1 - alpha, "gamma": 1.0}[side]
    return 0.5 ** (1 / jnp.maximum(jnp.asarray(share, jnp.float32), 1e-30))


def _finite(maximum: jax.Array, usable: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the maxima with −inf in place of what is not to be used, and where that was."""
    bad = jnp.isnan(maximum) | (maximum == jnp.inf) | jnp.logical_not(usable)
    return jnp.where(bad, -jnp.inf, maximum), bad


def _where(usable: jax.Array, number: Any, default: float) -> Any:
    """Return τ or α, or the default where they are arrays that are not to be used."""
    return jnp.where(usable, number, default) if isinstance(number, jax.Array) else number


def flatten_projections(qk_projections: QKProjections) -> tuple[list[tuple[str, QKProjection]], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(qk_projections, is_leaf=_is_projection)
    for path, leaf in leaves:
        if not _is_projection(leaf):
            raise ValueError(f"qk_projections holds {leaf!r} at {name_of(path)!r}, which is not a QKProjection.")
    if not leaves:
        raise ValueError(f"qk_projections={qk_projections!r} declares no attention; leave QK-Clip away, or declare it.")
    return [(name_of(path), leaf) for path, leaf in leaves], treedef


def _is_projection(leaf: Any) -> TypeGuard[QKProjection]:
    return isinstance(leaf, QKProjection)


def maxima_shape(projection: QKProjection, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the maxima of one attention."""
    layers = {rows.num_layers(shapes) for rows in projection.parts()} if shapes else set()
    if len(layers) > 1:
        raise ValueError(f"the queries and keys of one attention stack different numbers of layers: {layers}.")
    count = next(iter(layers), None)
    return (projection.num_heads,) if count is None else (count, projection.num_heads)


def scaled_rows(
    projections: list[tuple[str, QKProjection]], leaves: Mapping[str, Any]
) -> list[tuple[int, Factor, RowsOfArray]]:
    """Return (number of the attention, which of its factors, rows) for everything that may be scaled."""
    found: list[tuple[int, Factor, RowsOfArray]] = []
    shapes = shapes_of(leaves)
    for number, (name, projection) in enumerate(projections):
        if projection.reason:
            continue
        held = [name for name in leaves if is_masked_node(leaves[name])]
        fixed: list[Part] = [
            part
            for part in FACTOR_OF
            if _touch(getattr(projection, part), held)
            or any(rows.is_adapter_alone(shapes) for rows in getattr(projection, part))
        ]
        if not fixed:
            seen = replace(projection, shared_key=()) if _touch(projection.shared_key, held) else projection
            _check_sizes(name, seen, shapes)
        declared: list[Part] = [part for part in FACTOR_OF if getattr(projection, part)]
        for part, side in factors_of(declared, fixed).items():
            arrays: list[RowsOfArray] = [own for rows in getattr(projection, part) for own in rows.arrays(shapes)]
            for array in arrays:
                found.append((number, side, array))
    by_array: dict[str, list[RowsOfArray]] = {}
    for _, _, rows in found:
        by_array.setdefault(rows.name, []).append(rows)
    for name, parts in by_array.items():
        if overlapping(parts):
            raise ValueError(f"two declarations scale the same rows of {name!r}.")
    return found


def _touch(parts: Iterable[HeadRows], names: Iterable[str]) -> bool:
    """Tell whether one of the arrays is of one of the parts."""
    return any(_meets(name, rows.path) for name in names for rows in parts)


def _check_sizes(name: str, projection: QKProjection, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where the query and the key of a head differ in size, or a part is queries and keys at once."""
    for query, key in (
        (projection.query, projection.key),
        (projection.query_facing_shared, projection.shared_key),
    ):
        if not query or not key:
            continue
        if {rows.path for rows in query} & {rows.path for rows in key}:
            arrays = [array for rows in (*query, *key) for array in rows.arrays(shapes)]
            for shared in {array.name for array in arrays}:
                common = overlapping([array for array in arrays if array.name == shared])
                if common:
                    raise ValueError(
                        f"{name or 'the attention'}: its queries and keys share {common} outputs of {shared!r}. If it "
                        "is [q | k | v], declare QKProjection.fused(path, num_heads=…, num_kv_heads=…, head_dim=…); "
                        "else the outputs of each part: HeadRows(path, num_heads, size, start, stride)."
                    )
        sizes = [sum(rows.head_size(shapes) for rows in side) for side in (query, key)]
        if sizes[0] != sizes[1] and len(query) == len(key):
            raise ValueError(
                f"{name or 'the attention'}: a head has a query of {sizes[0]} outputs (head_dim) in {query[0].path!r} "
                f"and a key of {sizes[1]} in {key[0].path!r}. Check the numbers of heads ({query[0].num_heads} and "
                f"{key[0].num_heads}), in_axis and layer_axis."
            )


def _meets(name: str, path: str) -> bool:
    """Tell whether a leaf is at the path, below it or above it: a mask may be a prefix of the tree."""
    return below(path, name) or below(name, path)


def maxima_of(
    projections: list[tuple[str, QKProjection]], treedef: Any, max_logits: Any, shapes: Mapping[str, tuple[int, ...]]
) -> list[jax.Array]:
    given = by_attention([name for name, _ in projections], treedef, max_logits)
    maxima: list[jax.Array] = []
    for (name, projection), maximum in zip(projections, given, strict=True):
        maximum, wanted = jnp.asarray(maximum), maxima_shape(projection, shapes)
        of_masked_stack = len(wanted) == 1 and any(rows.layer_axis is not None for rows in projection.parts())
        if not of_masked_stack:
            check_shape(name, maximum, wanted)
        sharding = jax.typeof(maximum).sharding
        if any(sharding.spec):  # heads of an explicit mesh: every device takes all
            maximum = jax.sharding.reshard(maximum, NamedSharding(sharding.mesh, PartitionSpec()))
        maxima.append(
            maximum.astype(wide(maximum.dtype) if jnp.issubdtype(maximum.dtype, jnp.floating) else jnp.float32)
        )
    return maxima


def by_attention(names: Sequence[str], treedef: Any, max_logits: Any) -> list[Any]:
    """Return the maxima in the order of the attentions with these names.

    They come in a tree of the same structure, or in one that has one array at or below each name, as layers of Flax
    sow them. Raises ValueError that names what is there too much, twice, or missing.
    """
    given, given_treedef = jax.tree.flatten(max_logits)
    if given_treedef == treedef:
        return given
    named = named_leaves(max_logits)
    found: dict[str, list[str]] = {name: [] for name in names}
    extra: list[str] = []
    for leaf in named:
        found.get(max((name for name in names if below(name, leaf)), key=len, default=""), extra).append(leaf)
    if extra or any(len(leaves) != 1 for leaves in found.values()):
        missing = [name for name, leaves in found.items() if not leaves]
        several = [leaf for leaves in found.values() if len(leaves) > 1 for leaf in leaves]
        lists = {"extra": extra, "several of one attention": several, "missing": missing}
        said = "; ".join(f"{what}: {_listed(paths)}" for what, paths in lists.items() if paths)
        raise ValueError(
            f"max_logits needs one array at or below the name of each attention. {said[0].upper()}{said[1:]}. "
            + ("" if not (extra or several) else _SOW_THEM_APART)
            + ("" if not missing else "Name the declarations as the modules that sow are named.")
            + ("" if named else " Nothing was sown: in Flax's attentions that takes sow_weights=True.")
        )
    return [named[leaves[0]] for leaves in found.values()]


_SOW_THEM_APART = (
    "Hand on the maxima alone: in Flax nnx sow them as `class MaxLogits(nnx.Variable)` and take "
    "nnx.capture(model, MaxLogits), in linen sow them in a collection of their own; for several calls of one attention "
    "sow with reduce_fn=jnp.maximum. "
)


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(repr(path) if path else "an array alone" for path in paths[:6])
    return shown if len(paths) <= 6 else f"{shown}, … ({len(paths)} in all)"


def check_shape(name: str, maximum: Any, wanted: tuple[int, ...]) -> None:
    """Raise ValueError for maxima of another shape than [heads] or [layers, heads]."""
    shape = jnp.shape(maximum)
    if shape != wanted:
        weights = (
            " These seem to be attention weights, which Flax sows with sow_weights=True: give the module an "
            "attention_fn that sows the maxima instead."
        )
        raise ValueError(
            f"max_logits of {name or 'the attention'} has shape {shape}, not {wanted}."
            + (weights if len(shape) >= len(wanted) + 3 and wanted[-1] == shape[-3] else "")
        )


def check_max_logits(max_logits: Any) -> None:
    """Raise TypeError unless they are arrays of real numbers, ValueError for NaN or +inf, where it can be seen."""
    for path, maximum in jax.tree_util.tree_flatten_with_path(max_logits)[0]:
        check_real(f"max_logits of {name_of(path) or 'the attention'}", maximum)
        check_if_concrete(maximum, partial(_check_finite, name_of(path)))


def _check_finite(name: str, maximum: Any) -> None:
    values = np.asarray(maximum, dtype=np.float64)
    bad = np.isnan(values) | (values == np.inf)
    if bad.any():
        where = ", ".join(str(tuple(map(int, index))).replace(",)", ")") for index in np.argwhere(bad))
        raise ValueError(
            f"max_logits of {name or 'the attention'} is {values[bad][0]} at {where}: the forward pass overflowed. "
            "Nothing was updated; skip the step."
        )


def _as(number: Any, like: jax.Array) -> Any:
    """Convert τ or α to the dtype of the maxima where it is an array, which may be traced."""
    return number.astype(like.dtype) if isinstance(number, jax.Array) else number
