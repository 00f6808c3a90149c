"""Verification of declarations: their rows must be those that a traced forward found behind each head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from muonclip.torch.discover.attribution import feeds
from muonclip.torch.discover.head_colours import Rows
from muonclip.torch.discover.parameter_paths import ParameterPaths
from muonclip.torch.discover.tracer import TracedCall
from muonclip.torch.heads import HeadRows, QKProjection, axes_of

PerHead = dict[int, Rows]
"""The rows of each head, by the id of the parameter in the model."""


def check_declaration(name: str, projection: QKProjection, call: TracedCall, paths: ParameterPaths) -> None:
    """Raise ValueError unless the declared rows are the ones that feed each head, and scale it."""
    heads, called = call.num_heads, name or "the model"
    if projection.num_heads != heads and (projection.scaled_parts() or not call.problem):
        raise ValueError(
            f"QK-Clip: {called} declares {projection.num_heads} heads, but its attention was called with {heads}."
        )
    if not projection.scaled_parts():
        return
    if call.query.normalised and not _are_gains(projection, call, paths):
        raise ValueError(
            f"QK-Clip: {called} normalises its queries after the projection (QK-norm): scaling the declared rows would "
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
            f"QK-Clip: the declaration of {called} is wrong. It gives head {head} the rows {_span(declared)} of "
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
            found[paths.parameter(each)] = Rows(each.parameter, each.axes, masks)
    return found


def _called(parameter: int, paths: ParameterPaths) -> str:
    for name, module in paths.modules.items():
        for attribute, each in module.named_parameters(recurse=False):
            if id(each) == parameter:
                return f"{name}.{attribute}".lstrip(".")
    return "a weight of another module"


def _declared(parts: Sequence[HeadRows], heads: int) -> PerHead:
    declared: PerHead = {}
    for part in parts:
        parameter, axis = next(part.parameters())
        assert isinstance(parameter, nn.Parameter)
        axes = axes_of(axis)
        count = math.prod(parameter.shape[each] for each in axes)
        masks = torch.zeros(heads, count, dtype=torch.bool, device="cpu").scatter_(1, part.rows("cpu"), True)
        own = Rows(parameter, axes, masks)
        known = declared.get(id(parameter))
        if known is not None:
            one, other, axes = _along_the_same(known, own)
            own = Rows(parameter, axes, one | other)
        declared[id(parameter)] = own
    return declared


def _along_the_same(one: Rows, other: Rows) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return the masks of two with their rows counted along the axes of either, and these axes."""
    axes = tuple(sorted({*one.axes, *other.axes}))
    shape = one.parameter.shape

    def expanded(rows: Rows) -> Tensor:
        sizes = [shape[axis] if axis in rows.axes else 1 for axis in axes]
        masks = rows.masks.cpu().view(-1, *sizes)
        return masks.expand(-1, *(shape[axis] for axis in axes)).flatten(1)

    return expanded(one), expanded(other), axes


def _first_difference(declared: PerHead, found: PerHead, *, both: bool) -> tuple[int, int, set[int], set[int]] | None:
    """Return the first (parameter, head, its rows declared, its rows found) that differ, or None.

    `both`: every row that was found must have been declared, too.
    """
    for parameter in (declared.keys() | found.keys()) if both else declared.keys():
        one, other = declared.get(parameter), found.get(parameter)
        present = one or other
        assert present is not None
        nothing = Rows(present.parameter, present.axes, torch.zeros_like(present.masks))
        ours, theirs, _ = _along_the_same(one or nothing, other or nothing)
        for head, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            if not torch.equal(mine, its):
                declared_rows, found_rows = (set(each.nonzero().flatten().tolist()) for each in (mine, its))
                return parameter, head, declared_rows, found_rows
    return None


def _span(rows: set[int]) -> str:
    if not rows:
        return "none"
    ordered = sorted(rows)
    if ordered[-1] - ordered[0] + 1 == len(ordered):
        return f"{ordered[0]} to {ordered[-1]}"
    return f"{', '.join(map(str, ordered[:4]))}{', …' if len(ordered) > 4 else ''}"
