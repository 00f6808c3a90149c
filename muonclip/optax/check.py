"""Proof, by experiment, that declared rows make the queries and keys of the heads, and that given maxima are theirs.

Powers of two commute with rounding, so results are compared bit by bit, in the model's own dtype:

- Gauge: queries × 2^a and keys × 2^−a, for an integer a of each head, of all attentions at once. Every logit is one
  query times one key, so the output must not change.
- Scale: queries × 2^a of one attention (one layer of a stack) at a time. Each of its maxima must be 2^a times what it
  was: heads are grouped as declared, and nothing normalises them.
- Softmax: of the exponentials in the model's program, those whose arguments are scaled by just these powers are the
  softmax of that attention. What enters it has the true maxima: after RoPE, scale and mask, head by head.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muonclip.core.arguments import check_array, kind, shown
from muonclip.core.head_parts import Part
from muonclip.optax.given_maxima import maxima_of
from muonclip.optax.head_rows import shapes_of
from muonclip.optax.paths import map_named, named_arrays
from muonclip.optax.qk_projection import (
    QKProjection,
    QKProjections,
    flatten_projections,
    maxima_shape,
    scaled_rows,
)
from muonclip.optax.softmax_logits import observe_softmaxes
from muonclip.optax.types import PyTree

_EXPONENTS = (-3, 2, -1, 3, 1, -2)  # float16 has range for no more
_ROUNDING = 1e-3
_NARROW_ROUNDING = 2.0**-5


class _Measured(NamedTuple):
    """Hold what one run of the model gave, as NumPy arrays."""

    output: list[np.ndarray]
    maxima: list[np.ndarray]
    softmaxes: list[dict[int, np.ndarray]]
    """Of each exponential: number of heads → maxima [rounds, readings, heads]."""


def check(
    apply: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    params: PyTree,
    batch: PyTree,
    qk_projections: QKProjections,
) -> tuple[str, ...]:
    """Prove declared attentions and their maxima on a model; return the names of those that were proven.

    The function is compiled once and runs once for each attention and layer, and three times more. Arrays that are zero
    are filled with random numbers first: what a zero output hides would prove nothing. Attentions with a `reason` are
    passed over.

    Rows are proven on any model. Maxima (scale, mask, RoPE, order of the key heads) are compared with the logits that
    enter the softmax, to 0.1 % of the largest, 3 % where the model computes in less than float32 or on an accelerator.
    That takes a softmax in the program itself, in `jit`, `scan` or `jax.checkpoint`. Where none has these logits (it
    is in a kernel of Pallas or cuDNN, a branch or `shard_map`, or a soft cap or bias is on top), a UserWarning names
    the attention, whose maxima remain unproven. A wrong mask is seen where it changes a maximum of this batch.

    Args:
        apply: `apply(params, batch)` returns (output, max_logits), as a loss with its auxiliary value does; the maxima
            have to be exact, and the function the same in every call (no dropout).
        params: The parameters, a tree of arrays.
        batch: What `apply` takes next to them.
        qk_projections: The declared attentions, see `qk_clip`.

    Raises:
        TypeError: For an `apply` that is not a function, or returns something else than a pair.
        ValueError: Where the declared rows are not the queries and keys of an attention or do not fit their arrays, and
            where its maxima are others; it names the attention.
    """
    projections, treedef = flatten_projections(qk_projections)
    arrays = named_arrays(params)
    for name, array in arrays.items():
        check_array(f"params: {name!r}", array)
    if not callable(apply):
        raise TypeError(
            f"apply={shown(apply)} is a {kind(apply)}; give a function (params, batch) → (output, max_logits)."
        )
    scaled_rows(projections, arrays)
    shapes = shapes_of(arrays)
    params = map_named(_filled, params)
    heads = [projection.num_heads for _, projection in projections]
    program = observe_softmaxes(apply, params, batch, heads=heads)

    def measured(tree: Any) -> _Measured:
        returned, softmaxes = program.run(tree)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(f"apply returned a {kind(returned)}; it must return a pair, (output, max_logits).")
        output, max_logits = returned
        maxima = maxima_of(projections, treedef, max_logits, shapes)
        return _Measured(
            [np.asarray(leaf) for leaf in jax.tree.leaves(output)],
            [np.asarray(each) for each in maxima],
            [{n: _rounds(each) for n, each in seen.items()} for seen in softmaxes],
        )

    first = measured(params)
    again = measured(params).output
    # Where a kernel is not deterministic, bits say nothing.
    tolerance = 0.0 if _same(first.output, again, 0.0) else 2.0**-6
    if not _same(first.output, again, tolerance):
        raise ValueError("apply gives other outputs in every call; switch dropout and other random numbers off.")
    tried = [number for number, (_, projection) in enumerate(projections) if not projection.reason]
    for number in tried:
        name = projections[number][0] or "the attention"
        if not np.isfinite(first.maxima[number]).all() or not (first.maxima[number] != 0).all():
            raise ValueError(f"the maxima of {name} are {first.maxima[number]}; check needs exact and finite ones.")
    powers = {
        number: _powers(number, projections[number][1], maxima_shape(projections[number][1], shapes))
        for number in tried
    }

    balanced = params
    for number in tried:
        balanced = _scaled(balanced, projections[number][1], powers[number], shapes, keys=True)
    if not _same(first.output, measured(balanced).output, tolerance):
        guilty = [
            projections[number][0] or "the attention"
            for number in tried
            if not _same(
                first.output,
                measured(_scaled(params, projections[number][1], powers[number], shapes, keys=True)).output,
                tolerance,
            )
        ]
        raise ValueError(
            f"{', '.join(guilty)}: with queries × 2^a and keys × 2^−a the output is another, so the declared rows are "
            "not those of its queries and keys, or feed something else too. Check in_axis, and the numbers of heads."
        )
    exact = not program.has_narrow_numbers and jax.default_backend() == "cpu"
    unseen: list[str] = []
    for number in tried:
        name, projection = projections[number]
        name = name or "the attention"
        for layer in range(len(powers[number])) if powers[number].ndim > 1 else (None,):
            own = powers[number]
            if layer is not None:
                own = np.where(np.arange(len(own))[:, None] == layer, own, 1.0)
            moved = measured(_scaled(params, projection, own, shapes, keys=False))
            at = ... if layer is None else layer
            where = name if layer is None else f"{name} (layer {layer})"
            before, after = first.maxima[number][at], moved.maxima[number][at]
            _check_scale(where, before, after, own[at], tolerance)
            if _same(first.output, moved.output, tolerance):
                raise ValueError(f"{name}: the output does not depend on its logits in this batch; give a longer one.")
            entered = _entered(first, moved, own[at], tolerance)
            rounding = _ROUNDING if exact else _NARROW_ROUNDING
            if not entered or not _check_maxima(where, before, entered, rounding, is_whole=program.is_whole):
                unseen.append(where)
    if unseen:
        warnings.warn(
            f"{', '.join(unseen)}: the rows are proven and the maxima are not, since no softmax with these logits is "
            "in the program (it is in a kernel or a branch, or something is added to them). Compare the maxima with "
            "the attention's logits once, on a small batch.",
            stacklevel=2,
        )
    return tuple(projections[number][0] for number in tried)


def _check_scale(where: str, before: np.ndarray, after: np.ndarray, powers: np.ndarray, tolerance: float) -> None:
    """Raise ValueError unless the maxima of one attention follow its queries."""
    if _same([before * powers], [after], tolerance):
        return
    if np.allclose(after, before, rtol=1e-3):
        raise ValueError(
            f"{where}: its maxima do not follow the declared queries. Either they are another attention's (are names "
            "or paths exchanged?), or its queries are normalised (QK-norm): then declare QKProjection(num_heads, "
            "reason='QK-norm'), which never clips."
        )
    raise ValueError(
        f"{where}: with its queries × {powers} the maxima are {np.round(after / before, 3)} times what they were: the "
        "declared rows are not those of its heads. Check in_axis, layer_axis and the numbers of heads."
    )


def _entered(first: _Measured, moved: _Measured, powers: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """Return the largest logits [heads] that entered each softmax whose arguments were scaled by the powers."""
    found: list[np.ndarray] = []
    for before, after in zip(first.softmaxes, moved.softmaxes, strict=True):
        if len(powers) in before:
            old, new = before[len(powers)], after[len(powers)]
            with np.errstate(invalid="ignore"):
                wanted = old * powers
            same = new == wanted if not tolerance else np.isclose(new, wanted, rtol=tolerance, atol=0)
            # Where x − y was given as one number, the maximum is zero and says nothing.
            follows = (same & np.isfinite(new)).all(-1) & (old != 0).any(-1)
            if follows.any():
                found.append(old[follows].max(0))
    return found


def _check_maxima(
    where: str, maxima: np.ndarray, entered: list[np.ndarray], rounding: float, *, is_whole: bool
) -> bool:
    """Raise ValueError unless the maxima are those of one of the softmaxes, or of all; False where that is open."""
    largest = np.max(entered, axis=0)
    maxima = maxima.astype(np.float64)
    for each in (largest, *entered):
        if (np.abs(maxima - each) <= rounding * np.abs([maxima, each]).max()).all():
            return True
    if not is_whole and (maxima >= largest).all():  # the rest may be where nobody looks
        return False
    ratio = maxima / largest
    if np.ptp(ratio) <= rounding * np.abs(ratio).max():
        why = f"The scale is another: they are {ratio[0]:.3g} times the logits (1/√d is the default of scale=)."
    else:
        why = (
            "Measure the q and k that the attention multiplies: after RoPE, with its mask (is_causal=, mask=, …), its "
            "scale, and key heads in its order."
        )
    raise ValueError(
        f"{where}: max_logits is {np.round(maxima, 3)}, and the largest logits that enter its softmax are "
        f"{np.round(largest, 3)}. {why}"
    )


def _rounds(maxima: Any) -> np.ndarray:
    """Return the maxima of an exponential as [rounds, readings, heads] in float64, the rounds of all loops in one."""
    values = np.asarray(maxima).astype(np.float64)
    return values.reshape(-1, *values.shape[-2:])


def _powers(number: int, projection: QKProjection, shape: tuple[int, ...]) -> np.ndarray:
    """Return a power of two for each head; one for all heads that share a key."""
    rng = np.random.default_rng(number)
    count = math.prod(shape)
    tiles = [rng.permutation(_EXPONENTS) for _ in range(-(-count // len(_EXPONENTS)))]
    return 2.0 ** np.concatenate(tiles)[:count].reshape(shape)


def _scaled(params: Any, projection: QKProjection, powers: np.ndarray, shapes: Any, *, keys: bool) -> Any:
    """Return the parameters with queries × `powers` and, if asked for, keys divided by them.

    Heads that share a key take the power of the first. Without a declared key (the rotary one of MLA) a part keeps its
    size where the keys are to follow.
    """
    sides: dict[Part, np.ndarray] = {"query": powers, "query_facing_shared": powers}
    if keys:
        groups = projection.shared_key[0].num_heads if projection.shared_key else 0
        sides = {"query": powers, "key": 1 / powers}
        if groups:
            of_group = powers[..., :: projection.num_heads // groups]
            sides |= {
                "query_facing_shared": np.repeat(of_group, projection.num_heads // groups, axis=-1),
                "shared_key": 1 / of_group,
            }
    factors: dict[str, Any] = {}
    for part, of_heads in sides.items():
        for rows in getattr(projection, part):
            for array in rows.arrays(shapes):
                spread = array.spread(jnp.asarray(of_heads, jnp.float32))
                factors[array.name] = spread * factors.get(array.name, 1)
    return map_named(
        lambda name, x: (x * factors[name].astype(x.dtype)).astype(x.dtype) if name in factors else x, params
    )


def _filled(name: str, x: Any) -> Any:
    """Return an array, or small random numbers where it is zero."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or bool(jnp.any(x != 0)):
        return x
    seed = sum(map(ord, name))
    return (0.1 * jax.random.normal(jax.random.key(seed), x.shape, jnp.float32)).astype(x.dtype)


def _same(one: list[np.ndarray], other: list[np.ndarray], tolerance: float) -> bool:
    """Tell whether arrays agree: in bits, or up to this part of the largest."""
    if not tolerance:
        return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))
    largest = max((float(np.abs(a.astype(np.float64)).max(initial=0)) for a in one), default=0.0)
    return all(
        np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=0, atol=tolerance * largest)
        for a, b in zip(one, other, strict=True)
    )
