"""Proof, by experiment, that declared rows are the queries and keys of the heads whose maxima are measured.

Powers of two commute with rounding, so results are compared bit by bit, in the model's own dtype:

- Gauge: queries × 2^a and keys × 2^−a, for an integer a of each head, of all attentions at once. Every logit is one
  query times one key, so the output must not change.
- Scale: queries × 2^a of one attention (one layer of a stack) at a time. Each of its maxima must be 2^a times what it
  was: heads are grouped as declared, and nothing normalises them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muonclip.core.arguments import check_array, kind, shown
from muonclip.core.head_parts import Part
from muonclip.optax.head_rows import shapes_of
from muonclip.optax.paths import map_named, named_arrays
from muonclip.optax.qk_clip import QKProjection, QKProjections, flatten_projections, maxima_of, maxima_shape
from muonclip.optax.types import PyTree

_EXPONENTS = (-3, 2, -1, 3, 1, -2)  # float16 has range for no more


def check(
    apply: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    params: PyTree,
    batch: PyTree,
    qk_projections: QKProjections,
) -> tuple[str, ...]:
    """Prove declared attentions on a model; return the names of those that were proven.

    The function is compiled once and runs once for each attention and layer, and four times more. Arrays that are zero
    are filled with random numbers first: what a zero output hides would prove nothing. Attentions with a `reason` are
    passed over.

    Args:
        apply: `apply(params, batch)` returns (output, max_logits), as a loss with its auxiliary value does; the maxima
            have to be exact, and the function the same in every call (no dropout).
        params: The parameters, a tree of arrays.
        batch: What `apply` takes next to them.
        qk_projections: The declared attentions, see `qk_clip`.

    Raises:
        TypeError: For an `apply` that is not a function, or returns something else than a pair.
        ValueError: Where the declared rows are not the queries and keys of an attention; it names the attention.
    """
    projections, treedef = flatten_projections(qk_projections)
    arrays = named_arrays(params)
    for name, array in arrays.items():
        check_array(f"params: {name!r}", array)
    if not callable(apply):
        raise TypeError(
            f"apply={shown(apply)} is a {kind(apply)}; give a function (params, batch) → (output, max_logits)."
        )
    shapes = shapes_of(arrays)
    params = map_named(_filled, params)
    run = jax.jit(apply)

    def measured(tree: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        returned = run(tree, batch)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(f"apply returned a {kind(returned)}; it must return a pair, (output, max_logits).")
        output, max_logits = returned
        maxima = maxima_of(projections, treedef, max_logits, shapes)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(output)], [np.asarray(each) for each in maxima]

    output, maxima = measured(params)
    again, _ = measured(params)
    # Where a kernel is not deterministic, bits say nothing.
    tolerance = 0.0 if _same(output, again, 0.0) else 2.0**-6
    if not _same(output, again, tolerance):
        raise ValueError("apply gives other outputs in every call; switch dropout and other random numbers off.")
    tried = [number for number, (_, projection) in enumerate(projections) if not projection.reason]
    for number in tried:
        name = projections[number][0] or "the attention"
        if not np.isfinite(maxima[number]).all() or not (maxima[number] != 0).all():
            raise ValueError(f"the maxima of {name} are {maxima[number]}; check needs exact and finite ones.")
    powers = {
        number: _powers(number, projections[number][1], maxima_shape(projections[number][1], shapes))
        for number in tried
    }

    balanced = params
    for number in tried:
        balanced = _scaled(balanced, projections[number][1], powers[number], shapes, keys=True)
    moved, _ = measured(balanced)
    if not _same(output, moved, tolerance):
        guilty = [
            projections[number][0] or "the attention"
            for number in tried
            if not _same(
                output,
                measured(_scaled(params, projections[number][1], powers[number], shapes, keys=True))[0],
                tolerance,
            )
        ]
        raise ValueError(
            f"{', '.join(guilty)}: with queries × 2^a and keys × 2^−a the output is another, so the declared rows are "
            "not those of its queries and keys, or feed something else too. Check in_axis, and the numbers of heads."
        )
    for number in tried:
        _check_scale(
            projections[number], number, params, output, maxima[number], powers[number], shapes, measured, tolerance
        )
    return tuple(projections[number][0] for number in tried)


def _check_scale(
    named: tuple[str, QKProjection],
    number: int,
    params: Any,
    output: list[np.ndarray],
    before: np.ndarray,
    powers: np.ndarray,
    shapes: Any,
    measured: Callable[[Any], tuple[list[np.ndarray], list[np.ndarray]]],
    tolerance: float,
) -> None:
    """Raise ValueError unless the maxima of one attention follow its queries, layer by layer."""
    name, projection = named[0] or "the attention", named[1]
    for layer in range(len(powers)) if powers.ndim > 1 else (None,):
        own = powers if layer is None else np.where(np.arange(len(powers))[:, None] == layer, powers, 1.0)
        moved, maxima = measured(_scaled(params, projection, own, shapes, keys=False))
        at = ... if layer is None else layer
        after, wanted = maxima[number][at], (before * own)[at]
        if _same([wanted], [after], tolerance):
            if _same(output, moved, tolerance):
                raise ValueError(f"{name}: the output does not depend on its logits in this batch; give a longer one.")
            continue
        where = "" if layer is None else f" (layer {layer})"
        if np.allclose(after, before[at], rtol=1e-3):
            raise ValueError(
                f"{name}{where}: its maxima do not follow the declared queries. If these are normalised (QK-norm), "
                "declare QKProjection(num_heads, reason='QK-norm')."
            )
        raise ValueError(
            f"{name}{where}: with its queries × {own[at]} the maxima are {np.round(after / before[at], 3)} times what "
            "they were: the declared rows are not those of its heads. Check in_axis, layer_axis and the "
            "numbers of heads."
        )


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
