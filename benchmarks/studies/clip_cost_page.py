"""What `clip_cost` measured, as Markdown: tables, and sentences made from their numbers. Written into a page between
two marks, so that no number there is typed by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.experiment.errors import UsageError
from benchmarks.studies.clip_cost import REGIMES
from benchmarks.studies.clip_cost_models import BF16, MODELS

Json = Mapping[str, Any]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def read_clip_cost(result: Json) -> str:
    """The sections, one for each regime, from the object that `DEVICE.json` holds."""
    parts = [_made_with(result), ""]
    for regime in (regime.name for regime in REGIMES):
        cells = [cell for cell in result["cells"] if cell["regime"] == regime]
        parts += [
            f"### {regime[0].upper()}{regime[1:]}",
            "",
            _verdict(cells),
            "",
            *_table(cells),
            "",
            *_sources(cells),
            "",
        ]
    return "\n".join(parts).strip() + "\n"


def write_into(page: Path, result: Json) -> None:
    """Put the sections between the marks of the page. Raises UsageError where it has none."""
    try:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise UsageError("--page", f"{page} is no page with the lines {BEGIN} and {END}, once each.") from error
    page.write_text(f"{before}{BEGIN}\n{read_clip_cost(result)}{END}{after}", encoding="utf-8")


def _made_with(result: Json) -> str:
    made, config = result["environment"], result["config"]
    clock = "one thread, by its CPU time," if made["threads"] == 1 else f"{made['threads']} threads, by the wall clock,"
    return (
        f"Made by `{made['command']}` on {made['date'][:10]}: "
        + (made.get("gpu") or f"{clock} on {made['cores']} cores of {made['cpu']}")
        + f", Python {made['python']}, PyTorch {made['torch']}, muonclip {made['muonclip']}. τ = {config['tau']:g}; "
        f"{config['layers']} layers, width {config['width']}; {config['rounds']} rounds per row. Ratios are medians "
        f"with their {config['confidence']:.0%} intervals."
    )


def _verdict(cells: list[Json]) -> str:
    target, ratios = cells[0]["target"], [cell["ratio"]["median"] for cell in cells]
    added = [cell["added"]["median"] for cell in cells]
    over = [cell for cell in cells if cell["ratio"]["median"] > target]
    sure = [cell for cell in over if cell["ratio"]["low"] is not None and cell["ratio"]["low"] > target]
    text = (
        f"With the clip a step takes {min(ratios):.3f} to {max(ratios):.3f} times as long as without; the added "
        f"operations by themselves take {min(added):.2%} to {max(added):.2%} of a step without. "
        f"The target is a ratio of at most {target:g}: "
    )
    if not over:
        return text + "met in every row."
    worst = max(over, key=lambda cell: cell["ratio"]["median"])
    text += f"missed in {len(over)} of {len(cells)} rows, most at {_name(worst)}; "
    return text + f"in {len(sure) or 'none'} of them by more than the interval."


def _table(cells: list[Json]) -> list[str]:
    lines = [
        "| model | sequences × tokens | dtype | step without | with / without | without / without | added operations "
        "| heads exact | heads clipped | bounds of the heads |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        columns = (
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
        )
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def _sources(cells: list[Json]) -> list[str]:
    """Where S comes from, as `QKClip.sources()` says it."""
    lines: dict[str, None] = {}
    for cell in cells:
        for source, count in Counter(cell["sources"].values()).items():
            lines[f"- {MODELS[cell['model']]}, {count} attentions: {source}."] = None
    return ["S comes from:", "", *lines]


def _name(cell: Json) -> str:
    return f"{MODELS[cell['model']]}, {cell['length']} tokens, {_dtype(cell)}"


def _dtype(cell: Json) -> str:
    return "fp32" if cell["dtype"] == "float32" else BF16[cell["model"]]


def _interval(value: Json) -> str:
    if value["low"] is None:
        return f"{value['median']:.3f}"
    return f"{value['median']:.3f} ({value['low']:.3f}–{value['high']:.3f})"
