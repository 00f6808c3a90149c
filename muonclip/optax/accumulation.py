"""Gradient accumulation that keeps every maximum logit: one inner update per step, on what all its micro-steps saw.

`optax.MultiSteps` calls the inner update in every micro-step and, where it does not emit, throws its state away and the
extra arguments with it: a maximum seen only there would never be clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muonclip.core.arguments import check_kind, check_whole
from muonclip.optax.arguments import check_if_concrete, check_scalar
from muonclip.optax.dtypes import wide
from muonclip.optax.given_maxima import by_attention, check_max_logits, check_shape
from muonclip.optax.paths import named_leaves
from muonclip.optax.qk_clip import QKClipState, is_narrow
from muonclip.optax.types import PyTree


class AccumulateState(NamedTuple):
    """The state of `accumulate`: what the micro-steps since the last step have added up to.

    Attributes:
        micro_step: int32: micro-steps since the last step.
        step: int32: steps taken.
        gradients: Mean since the last step, float32 or wider.
        max_logits: Maxima since the last step; −inf where nothing was seen.
        inner_state: The state of the inner transformation.
    """

    micro_step: jax.Array
    step: jax.Array
    gradients: optax.Updates
    max_logits: PyTree
    inner_state: optax.OptState


def accumulate(
    inner: optax.GradientTransformation, every: int | jax.Array | Callable[[jax.Array], int | jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` once in `every` calls, on the mean gradient and the largest `max_logits` of all of them.

    In between, updates are zero and `inner` is not touched.

    Args:
        inner: A transformation that holds one `qk_clip`; without one `optax.MultiSteps` does.
        every: A number of micro-steps, or a function of the steps taken so far.

    Raises:
        TypeError: For an update without `max_logits`.
        ValueError: For an `inner` without a `qk_clip`, or with several.
    """
    check_kind("inner", inner, optax.GradientTransformation, "a GradientTransformation of Optax")
    if not callable(every):
        check_if_concrete(every, lambda steps: check_whole("every", steps, hint="the micro-steps that make one step."))
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AccumulateState:
        inner_state = inner.init(params)
        return AccumulateState(
            micro_step=jnp.zeros((), jnp.int32),
            step=jnp.zeros((), jnp.int32),
            gradients=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide(p.dtype)), params),
            max_logits=_nothing_seen(inner_state),
            inner_state=inner_state,
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        max_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        if max_logits is None:
            raise TypeError("accumulate needs max_logits=… in every micro-step: their maximum decides the clip.")
        check_kind("state", state, AccumulateState, "what init or the last update returned")
        check_max_logits(max_logits)
        so_far, treedef = jax.tree.flatten(state.max_logits)
        names = list(named_leaves(state.max_logits))
        given = by_attention(names, treedef, max_logits)
        for name, maximum, old in zip(names, given, so_far, strict=True):
            check_shape(name, maximum, old.shape)
        max_logits = treedef.unflatten(given)
        seen = state.micro_step + 1
        gradients = jax.tree.map(
            lambda mean, g: mean + (g.astype(mean.dtype) - mean) / seen.astype(mean.dtype), state.gradients, updates
        )
        maxima = jax.tree.map(lambda old, new: jnp.maximum(old, new).astype(old.dtype), state.max_logits, max_logits)

        def step() -> tuple[optax.Updates, optax.OptState]:
            mean = jax.tree.map(lambda g, like: g.astype(like.dtype), gradients, updates)
            return inner.update(mean, state.inner_state, params, max_logits=maxima, **extra_args)

        # A clip with `wide_updates` answers narrow gradients in float32.
        narrow = any(map(is_narrow, jax.tree.leaves(updates)))
        emitted = jax.eval_shape(step)[0] if narrow else updates

        def emit(_: None) -> tuple[optax.Updates, AccumulateState]:
            new, inner_state = step()
            return jax.tree.map(lambda u, like: u.astype(like.dtype), new, emitted), AccumulateState(
                micro_step=jnp.zeros_like(state.micro_step),
                step=jnp.asarray(optax.safe_increment(state.step)),
                gradients=jax.tree.map(jnp.zeros_like, gradients),
                max_logits=jax.tree.map(lambda maximum: jnp.full_like(maximum, -jnp.inf), maxima),
                inner_state=inner_state,
            )

        def wait(_: None) -> tuple[optax.Updates, AccumulateState]:
            still = jax.tree.map(lambda u, like: jnp.zeros_like(u, dtype=like.dtype), updates, emitted)
            return still, state._replace(micro_step=seen, gradients=gradients, max_logits=maxima)

        steps = every(state.step) if callable(every) else every
        check_scalar("every", steps, ("a number of micro-steps, at least 1", lambda number: number >= 1))
        due = seen >= steps
        return jax.lax.cond(due, emit, wait, None)

    return optax.GradientTransformationExtraArgs(init, update)


def _nothing_seen(inner_state: optax.OptState) -> Any:
    clips = [
        leaf
        for leaf in jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, QKClipState))
        if isinstance(leaf, QKClipState)
    ]
    if len(clips) != 1:
        raise ValueError(
            f"accumulate wraps a transformation with one qk_clip; this one has {len(clips)}. "
            + ("Use optax.MultiSteps, which does without." if not clips else "Clip all attentions in one.")
        )
    return jax.tree.map(lambda gamma: jnp.full_like(gamma, -jnp.inf), clips[0].gamma)
