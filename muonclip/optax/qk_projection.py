"""The declarations of attentions in a tree of parameters: which rows make the queries and keys of the heads.

They are held against the arrays by everything that shapes and names tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

import jax

from muonclip.core.arguments import check_kind, check_whole
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
from muonclip.optax.head_rows import HeadRows, RowsOfArray, overlapping, shapes_of
from muonclip.optax.paths import below, is_masked_node, name_of
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
