"""QK-Clip as the last transformation of a chain: it corrects `params + updates`.

    γ_h = τ / S_h   where S_h > τ,   else 1            (Kimi K2, arXiv 2507.20534, Algorithm 1; see core/qk_clip.py)

S_h, the maximum attention logit that head h had in the step's forward passes, comes with every update as the extra
argument `max_logits`; `muonclip.optax.max_logits` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from muonclip.core import ClipFactors, clip_factors
from muonclip.core.arguments import check_array, check_flag, check_kind
from muonclip.core.head_parts import Factor
from muonclip.core.qk_clip import check_alpha, check_tau
from muonclip.core.tau_rules import Tau, TauRule, check_patterns, check_tau_rules, tau_rule
from muonclip.optax.arguments import check_if_concrete
from muonclip.optax.dtypes import wide
from muonclip.optax.given_maxima import check_max_logits, maxima_of
from muonclip.optax.head_rows import shapes_of
from muonclip.optax.paths import map_named, named_leaves
from muonclip.optax.qk_projection import QKProjections, flatten_projections, maxima_shape, scaled_rows
from muonclip.optax.types import PyTree


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


def _as(number: Any, like: jax.Array) -> Any:
    """Convert τ or α to the dtype of the maxima where it is an array, which may be traced."""
    return number.astype(like.dtype) if isinstance(number, jax.Array) else number
