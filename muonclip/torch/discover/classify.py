"""The part that the rows behind queries and keys play, by which heads use them.

A row behind one head only is private to it. A key row that several queries meet, of one attention or of several, is
shared: its queries take all of γ. A query that is not proportional to its rows, and a row that plays two parts, is
refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.discover.attribution import Source, feeds
from muonclip.torch.discover.head_colours import Rows
from muonclip.torch.discover.parameter_paths import ParameterPaths
from muonclip.torch.discover.tracer import TracedCall
from muonclip.torch.heads import Axes, HeadRows, QKProjection
from muonclip.torch.logits import MaxLogits

_MOST_READ = 6  # of the choices of rows for queries and keys


class ProjectionReader:
    """Reads calls as projections; all `calls` of the model are needed to know which keys are shared."""

    def __init__(self, paths: ParameterPaths, calls: Sequence[TracedCall], *, clip_gains: bool) -> None:
        self.paths, self.clip_gains = paths, clip_gains
        self.shared_keys = _keys_of_several(calls, paths)

    def read(self, call: TracedCall) -> QKProjection | str:
        """Return the projection of a call, or the reason why there is none."""
        query, key, value, heads = call.query, call.key, call.value, call.num_heads
        if call.problem or query.problem:
            return call.problem or f"its queries {query.problem}"
        if not all(map(self.paths.has, (*query.rows, *query.gains, *key.rows, *key.gains))):
            return "its weights are not registered: no module of the model has them as parameters"
        if query.normalised:
            return self._normalised(call)
        queries = self._parts(query.rows)
        if queries is None:
            return "its queries come from unequal numbers of rows"
        if any(bool((rows.masks.sum(0) > 1).any()) for rows in query.rows):
            return "rows of its query projection feed several heads"
        if _overlap(query.rows, key.rows):
            return "its queries and keys are made of the same rows"
        if value is not None and _overlap(query.rows, value.rows):
            return "its queries and values are made of the same rows"
        values = (self._parts(value.rows) or ()) if value is not None else ()

        def projection(kind: str, **parts: Any) -> QKProjection:
            return QKProjection(kind, heads, MaxLogits(heads), **parts, value=values)

        if key.problem or key.normalised or not key.rows:
            kind = "keys normalised" if key.normalised else "keys of no projection"
            return projection(kind, query_facing_shared=queries)
        private, shared = _divide(key.rows, heads, self.shared_keys, self.paths)
        private_keys, shared_keys = self._parts(private), self._parts(shared) or ()
        if not private:
            groups = max((rows.num_heads for rows in shared_keys), default=1)
            kind = "mha" if groups == heads else "gqa" if groups > 1 else "mqa"  # mha: of a key of several attentions
            return projection(kind, query_facing_shared=queries, shared_key=shared_keys)
        if private_keys is None or (value is not None and _overlap(private, value.rows)):
            return projection("mha", query_facing_shared=queries, shared_key=shared_keys)
        if not shared:
            return projection("mha", query=queries, key=private_keys)
        own, facing = self._parts(call.facing_private), self._parts(call.facing_shared)
        if not own or not facing:
            return projection("mla", query_facing_shared=queries, shared_key=(*shared_keys, *private_keys))
        return projection("mla", query=own, key=private_keys, query_facing_shared=facing, shared_key=shared_keys)

    def others(self, call: TracedCall) -> list[QKProjection]:
        """Return the projections of the other rows that may feed the heads of a call."""
        pairs = itertools.product(_choices(call.query), _choices(call.key))
        read = [self.read(replace(call, query=query, key=key)) for query, key in itertools.islice(pairs, 1, _MOST_READ)]
        with_terms = _queries_of_all_terms(call)
        if with_terms is not None and all(map(self.paths.has, with_terms)):
            query = replace(call.query, candidates=[with_terms])
            read.append(self.read(replace(call, query=query, facing_private=[], facing_shared=[])))
        return [each for each in read if not isinstance(each, str)]

    def _normalised(self, call: TracedCall) -> QKProjection:
        heads, gains = call.num_heads, call.query.gains
        norm = "QK-norm: scaling the projection would change nothing"
        own = None if any(bool((rows.masks.sum(0) > 1).any()) for rows in gains) else self._parts(gains)
        if own and self.clip_gains:
            private, shared = _divide(call.key.gains, heads, {}, self.paths)
            keys = self._parts(private)
            if keys and not shared:
                return QKProjection("qk-norm gains", heads, MaxLogits(heads), query=own, key=keys)
            return QKProjection("qk-norm gains", heads, MaxLogits(heads), query_facing_shared=own)
        if own:
            norm += "; its gain is per head: clip_gains=True clips it"
        elif gains and self.clip_gains:
            norm += "; its gain is shared by the heads and not clipped"
        return QKProjection("qk-norm", heads, MaxLogits(heads), reason=norm)

    def _parts(self, rows: Sequence[Rows]) -> tuple[HeadRows, ...] | None:
        """Return the rows in the model, a bias with its weight; None where heads have unequal numbers of them."""
        parts: list[HeadRows] = []
        vectors = [each for each in rows if each.parameter.ndim == 1]
        with_a_weight: set[int] = set()
        for each in sorted(rows, key=lambda each: each.parameter.ndim == 1):
            if id(each) in with_a_weight:
                continue
            masks = _distinct(each.masks)
            counts = masks.sum(1)
            if not each.parameter.ndim or bool((counts != counts[0]).any()) or not bool(counts[0]):
                return None
            axes, masks = _fewer_axes(each, masks)
            index = masks.nonzero()[:, 1].view(len(masks), -1)
            name, attribute = self.paths.path(each)
            bias = ""
            for vector in vectors:
                where, its_attribute = self.paths.path(vector)
                if where == name and vector is not each and torch.equal(vector.masks, each.masks):
                    bias = its_attribute
                    with_a_weight.add(id(vector))
                    break
            parts.append(HeadRows.from_index(index, self.paths.modules[name], attribute, bias, axes))
        return tuple(parts)


def _choices(source: Source) -> list[Source]:
    """Return a source with each of its candidates in front, the one that is now first."""
    sets = source.candidates
    return [replace(source, candidates=[each, *(s for s in sets if s is not each)]) for each in sets] or [source]


def _queries_of_all_terms(call: TracedCall) -> list[Rows] | None:
    """Return rows that every product in the logits is linear in, those of the queries among them, as W_q, u and v are
    of (q + u)·k + (q + v)·r; None where they are not to be told.

    They are on the side of a product that has rows of the queries, or has none of the keys where the other side has.
    """
    rows = {(id(each.parameter), each.axes): each for each in call.query.rows}
    for one, other in call.terms:
        if _overlap(one.rows, call.query.rows) or _overlap(other.rows, call.key.rows):
            side = one
        elif _overlap(other.rows, call.query.rows) or _overlap(one.rows, call.key.rows):
            side = other
        else:
            return None
        if not side.rows or side.problem or side.normalised:
            return None
        for each in side.rows:
            known = rows.setdefault((id(each.parameter), each.axes), each)
            rows[id(each.parameter), each.axes] = replace(known, masks=known.masks | each.masks)
    return list(rows.values()) if call.terms else None


def _divide(
    rows: Sequence[Rows], heads: int, shared_keys: Mapping[object, Tensor], paths: ParameterPaths
) -> tuple[list[Rows], list[Rows]]:
    """Divide the rows behind keys into those that one query head has to itself and those that several meet."""
    private, shared = [], []
    for each in rows:
        many = feeds(each.masks, heads).sum(0) > 1
        others = shared_keys.get((paths.parameter(each), each.axes))
        many = many if others is None else many | others
        for part, chosen in ((private, ~many), (shared, many)):
            masks = each.masks & chosen
            if masks.any():
                part.append(replace(each, masks=masks))
    return private, shared


def _distinct(masks: Tensor) -> Tensor:
    """Remove the repetitions of key heads that were repeated for their queries."""
    keep = [0] + [i for i in range(1, len(masks)) if not torch.equal(masks[i], masks[i - 1])]
    return masks[keep]


def _fewer_axes(rows: Rows, masks: Tensor) -> tuple[Axes, Tensor]:
    """Leave out the axes that need not be counted, where all axes of a parameter are: of a learned query
    [1, length, heads · width] a head has columns."""
    shape = rows.parameter.shape
    axes, by_axis = list(rows.axes), masks.view(len(masks), *(shape[axis] for axis in rows.axes))
    if all(axis in axes for axis, size in enumerate(shape) if size > 1):
        for axis in rows.axes:
            place = 1 + axes.index(axis)
            first = by_axis.narrow(place, 0, 1)
            if len(axes) > 1 and bool((by_axis == first).all()):
                axes.remove(axis)
                by_axis = first.squeeze(place)
    return (axes[0] if len(axes) == 1 else tuple(axes)), by_axis.flatten(1)


def _overlap(rows: Sequence[Rows], others: Sequence[Rows]) -> bool:
    """Tell whether an entry of a parameter is among both."""
    return any(a.parameter is b.parameter and bool((a.entries() & b.entries()).any()) for a in rows for b in others)


def _keys_of_several(calls: Sequence[TracedCall], paths: ParameterPaths) -> dict[object, Tensor]:
    """Return the rows behind keys that attentions with different queries share, by (parameter, axes)."""
    seen: dict[object, dict[object, Tensor]] = {}
    for call in calls:
        if not all(map(paths.has, (*call.query.rows, *call.key.rows))):
            continue
        queries = paths.identity(call.query.rows, call.num_heads)
        for rows in call.key.rows:
            by_query = seen.setdefault((paths.parameter(rows), rows.axes), {})
            mask = rows.masks.any(0)
            by_query[queries] = by_query[queries] | mask if queries in by_query else mask
    shared = {}
    for place, by_query in seen.items():
        count = torch.stack([mask.long() for mask in by_query.values()]).sum(0)
        if bool((count > 1).any()):
            shared[place] = count > 1
    return shared
