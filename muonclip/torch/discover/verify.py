"""Verification of declarations: their rows must be those that a traced forward found behind each head."""

from __future__ import annotations

from collections.abc import Sequence

from muonclip.torch.discover.attribution import Rows, feeds
from muonclip.torch.discover.parameter_paths import ParameterPaths
from muonclip.torch.discover.tracer import TracedCall
from muonclip.torch.heads import HeadRows, QKProjection

PerHead = dict[int, list[set[int]]]
"""The rows of each head, by the id of the parameter."""


def check_declaration(name: str, projection: QKProjection, call: TracedCall, paths: ParameterPaths) -> None:
    """Raise ValueError unless the declared rows are the ones that feed each head, and scale it."""
    heads = call.num_heads
    if projection.num_heads != heads:
        raise ValueError(
            f"QK-Clip: {name} declares {projection.num_heads} heads, but its attention was called with {heads}."
        )
    if not projection.scaled_parts():
        return
    if call.query.normalised and not _are_gains(projection, call, paths):
        raise ValueError(
            f"QK-Clip: {name} normalises its queries after the projection (QK-norm): scaling the declared rows would "
            'change no logit and shrink them for ever. Declare it with a reason, QKProjection(…, reason="QK-norm"), '
            "and it is observed only."
        )
    seen = (*call.query.rows, *call.key.rows)
    if call.query.problem or call.problem or call.query.normalised or not all(map(paths.has, seen)):
        return  # whoever declares it knows better
    query = _declared((*projection.query, *projection.query_facing_shared), heads)
    wrong = _first_difference(query, _found(call.query.rows, heads, paths), both=True)
    if projection.query and call.facing_private:
        found = _found(call.facing_private, heads, paths)
        wrong = wrong or _first_difference(_declared(projection.query, heads), found, both=True)
    if projection.key:
        found = _found(call.key.rows, heads, paths, only_own=True)
        wrong = wrong or _first_difference(_declared(projection.key, heads), found, both=False)
    if wrong is not None:
        parameter, head, declared, actual = wrong
        raise ValueError(
            f"QK-Clip: the declaration of {name} is wrong. It gives head {head} the rows {_span(declared)} of "
            f"{_called(parameter, paths)}, but its queries or keys are made of the rows {_span(actual)}. Correct the "
            "number of heads, the start or the stride."
        )


def _are_gains(projection: QKProjection, call: TracedCall, paths: ParameterPaths) -> bool:
    gains = {paths.parameter(gain) for gain in (*call.query.gains, *call.key.gains) if paths.has(gain)}
    return all(id(next(rows.parameters())[0]) in gains for rows in projection.scaled_parts())


def _found(rows: Sequence[Rows], heads: int, paths: ParameterPaths, *, only_own: bool = False) -> PerHead:
    found: PerHead = {}
    for each in rows:
        if each.parameter.ndim > 1:
            masks = feeds(each.masks, heads)
            masks = masks & (masks.sum(0) == 1) if only_own else masks
            found[paths.parameter(each)] = [set(mask.nonzero().flatten().tolist()) for mask in masks]
    return found


def _called(parameter: int, paths: ParameterPaths) -> str:
    for name, module in paths.modules.items():
        for attribute, each in module.named_parameters(recurse=False):
            if id(each) == parameter:
                return f"{name}.{attribute}".lstrip(".")
    return "a weight of another module"


def _declared(parts: Sequence[HeadRows], heads: int) -> PerHead:
    rows: PerHead = {}
    for part in parts:
        parameter, _ = next(part.parameters())
        per_head = rows.setdefault(id(parameter), [set() for _ in range(heads)])
        for head, index in enumerate(part.rows("cpu").tolist()):
            per_head[head].update(index)
    return rows


def _first_difference(declared: PerHead, found: PerHead, *, both: bool) -> tuple[int, int, set[int], set[int]] | None:
    """Return the first (parameter, head, its rows declared, its rows found) that differ, or None.

    `both`: every row that was found must have been declared, too.
    """
    for parameter in (declared.keys() | found.keys()) if both else declared.keys():
        nothing: list[set[int]] = [set()] * max(len(declared.get(parameter, [])), len(found.get(parameter, [])))
        pairs = zip(declared.get(parameter, nothing), found.get(parameter, nothing), strict=True)
        for head, (one, other) in enumerate(pairs):
            if one != other:
                return parameter, head, one, other
    return None


def _span(rows: set[int]) -> str:
    if not rows:
        return "none"
    ordered = sorted(rows)
    if ordered[-1] - ordered[0] + 1 == len(ordered):
        return f"{ordered[0]} to {ordered[-1]}"
    return f"{', '.join(map(str, ordered[:4]))}{', …' if len(ordered) > 4 else ''}"
