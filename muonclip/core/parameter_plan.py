"""The lines of a plan: who updates each parameter, as which matrices, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from muonclip.core.folded_rows import folded
from muonclip.core.text_table import table

OtherUse: TypeAlias = Literal["adamw", "rest"]
"""Who updates what Muon does not take: AdamW, or the optimizer that was given as `rest`."""

Use: TypeAlias = Literal["muon"] | OtherUse
"""Who updates a parameter."""


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """One line of the plan.

    Attributes:
        name: The name of the parameter in the model.
        shape: The shape of the parameter.
        use: Who updates the parameter.
        reason: Why, in a few words.
        layout: How the parameter is read as matrices; None where it is not Muon's.
        decays: Whether weight decay applies.
        frozen: Whether the parameter is not trained, as far as the framework knows.
    """

    name: str
    shape: tuple[int, ...]
    use: Use
    reason: str
    layout: Any = None
    decays: bool = True
    frozen: bool = False


def parameter_table(
    lines: Sequence[PlannedParameter], describe: Callable[[Any, tuple[int, ...]], str], rest: str = "rest"
) -> str:
    """Write the lines as a table, repeated ones as one; `describe`: a layout and a shape as text, `rest`: its name."""
    rows = [
        (
            line.name,
            "×".join(map(str, line.shape)) or "scalar",
            rest if line.use == "rest" else line.use,
            describe(line.layout, line.shape) if line.layout is not None else "",
            line.reason + ("" if line.decays else ", no decay") + (", frozen" if line.frozen else ""),
        )
        for line in lines
    ]
    return table([("parameter", "shape", "update", "matrices", "reason"), *folded(rows)])
