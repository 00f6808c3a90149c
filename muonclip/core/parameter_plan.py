"""The lines of a plan: who updates each parameter, as which matrices, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from muonclip.core.folded_rows import folded
from muonclip.core.text_table import table


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """One line of the plan.

    Attributes:
        name: The name of the parameter in the model.
        shape: The shape of the parameter.
        use: Who updates the parameter.
        reason: Why, in a few words.
        layout: How the parameter is read as matrices; None for AdamW.
        decays: Whether weight decay applies.
        frozen: Whether the parameter is not trained, as far as the framework knows.
    """

    name: str
    shape: tuple[int, ...]
    use: Literal["muon", "adamw"]
    reason: str
    layout: Any = None
    decays: bool = True
    frozen: bool = False


def parameter_table(lines: Sequence[PlannedParameter], describe: Callable[[Any, tuple[int, ...]], str]) -> str:
    """Write the lines as a table, repeated ones as one; `describe`: a layout and a shape as text."""
    rows = [
        (
            line.name,
            "×".join(map(str, line.shape)) or "scalar",
            line.use,
            describe(line.layout, line.shape) if line.layout is not None else "",
            line.reason + ("" if line.decays else ", no decay") + (", frozen" if line.frozen else ""),
        )
        for line in lines
    ]
    return table([("parameter", "shape", "update", "matrices", "reason"), *folded(rows)])
