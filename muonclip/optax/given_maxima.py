"""The maxima that an update is given, `max_logits`: brought into the order of the declared attentions, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from muonclip.optax.arguments import check_if_concrete, check_real
from muonclip.optax.dtypes import wide
from muonclip.optax.paths import below, name_of, named_leaves
from muonclip.optax.qk_projection import QKProjection, maxima_shape


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
