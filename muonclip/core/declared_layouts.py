"""Layouts that a user declares by patterns of parameters' names, for heads that no softmax attention shows.

    layouts = {"*.linear_attn.q_proj": 16, "*.in_proj_qkvz": MatrixLayout(blocks=(…), heads=(…), repeats=16)}

A number divides the rows into so many heads, each a matrix of its own. The first pattern that fits counts. Queries,
keys and values of linear attention (Kimi Delta Attention, gated DeltaNet) have numbers of heads of their own, and so
has an indexer of sparse attention.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from muonclip.core.arguments import check_kind, check_whole
from muonclip.core.matrix_layout import MatrixLayout
from muonclip.core.parameter_plan import PlannedParameter
from muonclip.core.parameter_roles import ARRAY_NAMES, is_one_row

DECLARED = "as layouts= says"
"""The reason of a line whose layout was declared by a pattern."""


def check_layouts(layouts: Any) -> None:
    """Raise TypeError or ValueError for anything but None or a dict from patterns to numbers of heads or layouts."""
    if layouts is None:
        return
    example = "{'*.linear_attn.q_proj': 16}"
    check_kind(
        "layouts", layouts, Mapping, f"a dict with a number of heads or a MatrixLayout for each pattern, {example}"
    )
    given = cast("Mapping[Any, Any]", layouts)
    if not given:
        raise ValueError(f"layouts is empty; it is a dict, {example}, or None.")
    for pattern, value in given.items():
        check_kind("a pattern of layouts", pattern, str, f"a part of a parameter's name, {example}")
        if not isinstance(value, MatrixLayout):
            check_whole(f"layouts[{pattern!r}]", value, hint="the number of heads, or a MatrixLayout.")


def with_layouts(
    lines: Iterable[PlannedParameter],
    layouts: Mapping[str, int | MatrixLayout] | None,
    *,
    readable: Callable[[PlannedParameter], MatrixLayout | None] = lambda line: line.layout,
    plain_name: Callable[[str], str] = lambda name: name,
    whole: bool = True,
) -> list[PlannedParameter]:
    """Return the lines of a plan, those of Muon's matrices that a pattern fits with the layout that it declares.

    `readable`: the layout of a line's own, None where it is of another kind; `plain_name`: a name without what wrappers
    put into it; `whole`: the lines are those of the whole model.
    A pattern fits the name of a parameter or of its module.

    Raises ValueError, naming pattern and parameter, for heads that do not divide the rows or leave one row each, for a
    number where a weight holds more than one block, and for a pattern that fits no matrix of Muon's.
    """
    planned = list(lines)
    unused = set(layouts or {}) if whole else set[str]()
    for position, line in enumerate(planned):
        pattern = _first_that_fits(plain_name(line.name), layouts or {}) if line.use == "muon" else None
        if pattern is not None and layouts is not None:
            unused.discard(pattern)
            layout = _declared(f"layouts[{pattern!r}]", layouts[pattern], line, readable(line))
            planned[position] = replace(line, layout=layout, reason=DECLARED)
    for pattern in layouts or {}:
        if pattern in unused:
            names = [line.name for line in planned if line.use == "muon"]
            known = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
            raise ValueError(f"layouts names {pattern!r}, which fits no matrix of Muon's here, or none first: {known}.")
    return planned


def _first_that_fits(name: str, layouts: Mapping[str, Any]) -> str | None:
    module, _, leaf = name.replace("/", ".").rpartition(".")
    names = (name, name[: len(module)]) if leaf in ARRAY_NAMES and module else (name,)
    return next((p for p in layouts if any(fnmatch.fnmatchcase(each, p) for each in names)), None)


def _declared(
    argument: str, declared: int | MatrixLayout, line: PlannedParameter, own: MatrixLayout | None
) -> MatrixLayout:
    what = f"{argument}: {line.name!r} of shape {line.shape}"
    if isinstance(declared, MatrixLayout):
        layout = declared
    elif own is None or len(own.blocks) > 1:
        why = "holds more than one block" if own is not None else "has rows along several axes"
        raise ValueError(f"{what} {why}: say which rows the heads are with a MatrixLayout in place of {declared}.")
    else:
        layout = replace(own, blocks=(), heads=(declared,), repeats=1)
    try:
        matrices = layout.matrix_shapes(line.shape)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if is_one_row(matrices):
        raise ValueError(f"{what}: its matrices would be single rows, {layout.describe(line.shape)}. Leave it out.")
    return layout
