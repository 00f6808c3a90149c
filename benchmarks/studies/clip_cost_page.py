"""The measurements of `clip_cost` as Markdown tables, written into a page between two marks.

No number there is typed by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiment.errors import UsageError
from benchmarks.records.environment import made_with
from benchmarks.report.tables import markdown
from benchmarks.studies.clip_cost import REGIMES
from benchmarks.studies.clip_cost_models import BF16, MODELS
from benchmarks.studies.host_time import MATRICES

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
    target, ratios = cells[0]["target"], [cell["ratio"]["median"] for cell in cells]
    added = [cell["added"]["median"] for cell in cells]
    over = sorted(
        (cell for cell in cells if cell["ratio"]["median"] > target), key=lambda cell: -cell["ratio"]["median"]
    )
    surely = sum(cell["ratio"]["low"] is not None and cell["ratio"]["low"] > target for cell in over)
    ends = (min(ratios), max(ratios)), (min(added), max(added))
    return TargetFacts(target, *ends, len(cells), tuple(map(_name, over)), surely)


def read_clip_cost(result: Json) -> str:
    """Write the sections, one for each regime, from the object that `DEVICE.json` holds."""
    made, config = result["environment"], result["config"]
    clock = "the CPU time of one thread" if made["threads"] == 1 else f"the wall clock, {made['threads']} threads"
    text = (
        f"Made with {made_with(made)}; {clock}. τ = {config['tau']:g}; {config['layers']} layers, width "
        f"{config['width']}; {config['rounds']} rounds per row. Ratios are medians with {config['confidence']:.0%} "
        "intervals."
    )
    parts = [text, ""]
    for regime in (regime.name for regime in REGIMES):
        cells = [cell for cell in result["cells"] if cell["regime"] == regime]
        facts = target_facts(cells)
        missed = "met in every row"
        if facts.missed:
            missed = f"missed in {len(facts.missed)} of {facts.rows} rows, most at {facts.missed[0]}; "
            missed += f"surely in {facts.surely}"
        ratios, added = "{:.3f} to {:.3f}".format(*facts.ratios), "{:.2%} to {:.2%}".format(*facts.added)
        head = ["target of the ratio", "verdict", "ratios", "added operations"]
        verdict = [head, [f"at most {facts.target:g}", missed, ratios, added]]
        counted = {(MODELS[c["model"]], s, n): None for c in cells for s, n in Counter(c["sources"].values()).items()}
        sources = [["model", "attentions", "S comes from"], *([model, str(n), source] for model, source, n in counted)]
        parts += [f"### {regime[0].upper()}{regime[1:]}", ""]
        parts += [line for rows in (verdict, _rows(cells), sources) for line in (markdown(rows), "")]
    if "host_us" in result:  # results from before it was measured have none
        parts += ["### Host time", "", markdown(_host_rows(result["host_us"]))]
    return "\n".join(parts).strip() + "\n"


def write_into(page: Path, result: Json) -> None:
    """Put the sections between the marks of the page. Raises UsageError where it has none."""
    try:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise UsageError("--page", f"{page} does not have the lines {BEGIN} and {END}, once each.") from error
    page.write_text(f"{before}{BEGIN}\n{read_clip_cost(result)}{END}{after}", encoding="utf-8")


def _rows(cells: Sequence[Json]) -> list[list[str]]:
    head = "model|sequences × tokens|dtype|step without|with / without|without / without|added operations|heads exact"
    rows = [[*head.split("|"), "heads clipped", "bounds of the heads"]]
    for cell in cells:
        rows.append(
            [
                MODELS[cell["model"]],
                f"{cell['batch']} × {cell['length']}",
                _dtype(cell),
                f"{cell['step_ms']:.0f} ms",
                _interval(cell["ratio"]),
                _interval(cell["control"]),
                f"{cell['added']['median']:.2%}",
                f"{cell['exact']} of {cell['heads']}",
                f"{cell['clipped']} of {cell['heads']}",
                f"{cell['lowest_bound']:.1f} to {cell['highest_bound']:.1f}",
            ]
        )
    return rows


def _host_rows(microseconds: Mapping[str, float]) -> list[list[str]]:
    of = {
        "forward_per_attention": "forward, per observed attention",
        "clip_step_per_attention": "the clip's step, per attention",
        "unchanged_plan_per_step": f"the optimizer's check that nothing changed, per step of {MATRICES} matrices",
    }
    return [["host time", "µs"], *([words, f"{microseconds[key]:.0f}"] for key, words in of.items())]


def _name(cell: Json) -> str:
    return f"{MODELS[cell['model']]}, {cell['length']} tokens, {_dtype(cell)}"


def _dtype(cell: Json) -> str:
    return "fp32" if cell["dtype"] == "float32" else BF16[cell["model"]]


def _interval(value: Json) -> str:
    between = "" if value["low"] is None else f" ({value['low']:.3f}–{value['high']:.3f})"
    return f"{value['median']:.3f}{between}"
