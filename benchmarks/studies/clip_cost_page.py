"""The measurements of `clip_cost` as facts and, by the template `clip_cost.md`, as tables between two marks of a page.

No number there is typed by hand.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiment.errors import UsageError
from benchmarks.studies.clip_cost import REGIMES
from benchmarks.studies.clip_cost_models import DTYPES, MODELS
from benchmarks.studies.host_time import MATRICES
from benchmarks.studies.templates import render

Json = Mapping[str, Any]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """A regime's rows against its target: the range of their ratios and of the added operations, and which miss it."""

    target: float
    ratios: tuple[float, float]
    added: tuple[float, float]
    rows: int
    missed: tuple[str, ...]  # rows whose ratio is above the target, the worst first
    surely: int  # of these, those whose whole interval is


def target_facts(cells: Sequence[Json]) -> TargetFacts:
    target, worst_first = cells[0]["target"], sorted(cells, key=lambda cell: -cell["ratio"]["median"])
    ratios, added = ([cell[name]["median"] for cell in cells] for name in ("ratio", "added"))
    over = [cell for cell in worst_first if cell["ratio"]["median"] > target]
    missed = [f"{MODELS[of['model']]}, {of['length']} tokens, {DTYPES[of['model']][of['dtype']]}" for of in over]
    surely = sum((cell["ratio"]["low"] or 0) > target for cell in over)
    return TargetFacts(target, (min(ratios), max(ratios)), (min(added), max(added)), len(cells), tuple(missed), surely)


def read_clip_cost(result: Json) -> str:
    """Write the sections, one for each regime, from the object that `DEVICE.json` holds."""
    regimes = {each.name: [cell for cell in result["cells"] if cell["regime"] == each.name] for each in REGIMES}
    names = {"MODELS": MODELS, "DTYPES": DTYPES, "MATRICES": MATRICES}
    return render("clip_cost.md", **result, **names, regimes=regimes, target_facts=target_facts, sources=_sources)


def write_into(page: Path, written: Path) -> None:
    """Put the sections between the marks of the page. Raises UsageError without marks, or what is to be written."""
    if not written.exists():
        raise UsageError("--page", f"needs {written}, which the same command without --page measures.")
    sections = read_clip_cost(json.loads(written.read_text(encoding="utf-8")))
    try:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise UsageError("--page", f"{page} does not have the lines {BEGIN} and {END}, once each.") from error
    page.write_text(f"{before}{BEGIN}\n{sections}{END}{after}", encoding="utf-8")


def _sources(cells: Sequence[Json]) -> list[tuple[str, str, int]]:
    """Return model, source and the number of attentions that have it, once each."""
    counted = [(cell["model"], *found) for cell in cells for found in Counter(cell["sources"].values()).items()]
    return list(dict.fromkeys(counted))
