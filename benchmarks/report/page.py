"""The HTML report: one file with verdicts, the table, charts to zoom into, and how it was made.

It opens without a network: Plotly's JavaScript is inside, which makes nearly all of the file's 5 MB, and the page's own
policy forbids it to ask for anything. Charts are Plotly's figures, the rest is `page.html`, a template of jinja2. Every
trace says in `meta` which arm it belongs to. Numbers have four significant digits and curves at most `POINTS` points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from benchmarks.experiment.arms import Arm, resolve
from benchmarks.experiment.experiment import flat
from benchmarks.experiment.settings import FRAMEWORKS
from benchmarks.records.atomic_files import replacing
from benchmarks.records.environment import made_with
from benchmarks.records.summary import Results
from benchmarks.report.charts import Chart, charts, floor_of_logits, head_map, thin, top_of_logits
from benchmarks.report.comparison import setting_rows, shared_rows, written
from benchmarks.report.tables import model_notes, runs_table
from benchmarks.report.verdicts import arm_facts, clip_facts, effect_rows, logit_rows

POINTS = 800  # of a curve
COLUMNS, CELLS = 240, 24_000  # of a heat map, at most
_GREY, _GRID = "#7b828c", "rgba(128, 134, 144, 0.22)"  # legible on white and, inverted, on black
_SCALE = ["#e3ecf3", "#3f7fb0", "#ffd166", "#e4572e", "#7d1128"]  # the first two under τ, the others above it
_AXIS = {"gridcolor": _GRID, "linecolor": _GRID, "zeroline": False, "automargin": True, "exponentformat": "none"}
_LAYOUT: dict[str, Any] = {
    "template": "none",
    "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12.5, "color": _GREY},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 44, "r": 14, "t": 12, "b": 40},
    "showlegend": False,
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": _GREY},
    "xaxis": {**_AXIS, "title": {"text": "step", "standoff": 6}, "showgrid": False},
    "yaxis": _AXIS,
}
_LOOKS: dict[str, dict[str, Any]] = {
    "seed": {"mode": "lines", "line_width": 1, "opacity": 0.45, "hoverinfo": "skip"},
    "mean": {"mode": "lines", "line_width": 2.4, "hovertemplate": "%{y:.4~g}"},
    "marks": {"mode": "markers", "marker": {"symbol": "x-thin", "size": 6}, "hoverinfo": "skip"},
}


def write(results: Sequence[Results], path: Path, *, title: str | None = None) -> None:
    """Write the page of these experiments, next to each other where they are several. Unfinished runs are named."""
    with replacing(path) as stream:
        stream.write(page(results, title=title).encode())


def page(results: Sequence[Results], *, title: str | None = None) -> str:
    """Make the page as text."""
    arms, top, several = _all_arms(results), top_of_logits(results), len(results) > 1
    columns = len(results) if len(results) in (2, 3) else 2 if len(results) in (1, 4) else 3
    experiments = [_experiment(result, arms, top) for result in results]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title or " · ".join(dict.fromkeys(result.experiment.title for result in results)),
        subjects=list(dict.fromkeys(result.experiment.subject for result in results)),
        compared=[setting_rows(results), shared_rows(results)] if several else [],
        experiments=experiments,
        arms=[(arm, _caption(results, arm)) for arm in arms.values()],
        quantities=dict.fromkeys(title for each in experiments for title in each["charts"]),
        columns=columns,
        empty=-len(results) % columns if several else 0,  # places of a row of charts
        seeds=list(dict.fromkeys(str(seed) for r in results for runs in r.records.values() for seed in runs)),
        plotly=get_plotlyjs(),
    )


def _experiment(results: Results, arms: Mapping[str, Arm], top: float) -> dict[str, Any]:
    """Return what the template shows of one experiment."""
    experiment, facts = results.experiment, arm_facts(results)
    diverged = [
        f"{fact.arm.label}, seed {seed}, diverged: it ended at step {step} of {fact.arm.training.steps}."
        for fact in facts
        for seed, step in fact.diverged.items()
    ]
    missing = [f"{arm.label}, seed {seed}, is not finished and left out." for arm, seed in results.missing]
    framework = {"framework": FRAMEWORKS[experiment.framework]}  # by the name people know, as the first line
    settings = framework | flat(results.environment) | flat(experiment.to_json()) | framework
    return {
        "title": experiment.title,
        "heading": experiment.heading,
        "charts": {chart.title: _lines(chart, experiment.steps, arms) for chart in charts(results, top)},
        "verdicts": [logit_rows(facts), effect_rows(clip_facts(results))],
        "runs": runs_table(results),
        "notes": [*model_notes(results), *diverged, *missing],
        "maps": [_map(results, arm, arms[arm.name].label, top) for arm in results.finished],
        "made": made_with(results.environment),
        "settings": {name: value if "sha256" in name else written(value) for name, value in settings.items()},
    }


def _all_arms(results: Sequence[Results]) -> dict[str, Arm]:
    """Return the finished arms of all, with a colour for each, as if they were of the first experiment."""
    first, finished = results[0].experiment, {arm.name for result in results for arm in result.finished}
    chosen = {choice.name: choice for result in results for choice in result.experiment.chosen}
    lr = {name: rate for result in reversed(results) for name, rate in result.experiment.training.lr.items()}
    of = [choice for name, choice in chosen.items() if name in finished]
    return {arm.name: arm for arm in resolve(of, first.model, replace(first.training, lr=lr))}


def _caption(results: Sequence[Results], arm: Arm) -> str:
    captions = {own.caption for result in results for own in result.finished if own.name == arm.name}
    return captions.pop() if len(captions) == 1 else arm.label


def _lines(chart: Chart, steps: int, arms: Mapping[str, Arm]) -> dict[str, Any]:
    figure = go.Figure(layout=_LAYOUT).update_xaxes(range=[0, steps])
    for line in chart.lines:
        arm, look = arms[line.arm], _LOOKS[line.kind]
        x, y = (line.x, line.y) if line.kind == "marks" else thin(line.x, line.y, POINTS)
        if len(x) == 1 and line.kind != "marks":  # a line of one point would not be seen
            look = {**look, "mode": "markers", "marker_size": 3 * look["line_width"]}
        elif line.dashed:
            look = {**look, "line_dash": "6px,6px"}
        colours = dict.fromkeys(("line_color", "marker_color", "marker_line_color"), arm.colour)
        figure.add_scatter(
            x=x.astype(int).tolist(),
            y=_rounded(y),
            name=arm.label,
            meta={"arm": line.arm},
            marker_line_width=1,
            **look,
            **colours,
        )
    at = math.log10 if chart.log else float
    for tau in chart.taus:
        figure.add_hline(tau, line={"color": _GREY, "width": 1.2, "dash": "5px,4px"})
        place: dict[str, Any] = {"x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom", "yshift": -1}
        figure.add_annotation(text=f"τ = {tau:g}", y=at(tau), showarrow=False, **place)
    if chart.disturbed:
        figure.add_vrect(*chart.disturbed, fillcolor=_GREY, opacity=0.2, line_width=0)
    if chart.y_range:
        figure.update_yaxes(range=list(map(at, chart.y_range)))
    if chart.log:
        figure.update_yaxes(type="log", dtick="D2", tickformat="~g")
    few = len({line.arm for line in chart.lines}) <= 8
    figure.update_layout(hovermode="x unified" if few else "closest")
    return {"title": chart.title, "note": chart.note, "figure": figure}


def _map(results: Results, arm: Arm, label: str, top: float) -> dict[str, Any]:
    """Make a trace for each seed, of which the page shows one."""
    tau, runs = arm.training.tau, results.records[arm.name]
    low, high, at = (math.log10(value) for value in (floor_of_logits(tau), top, tau))
    share = (at - low) / (high - low)
    decades = [power for power in range(math.ceil(low), math.floor(high) + 1) if abs(power - at) > 0.12 * (high - low)]
    names = [*(f"{10.0**power:g}" for power in decades), f"<b>τ {tau:g}</b>"]
    bar = {"thickness": 10, "outlinewidth": 0, "ticks": "", "xpad": 6, "tickvals": [*decades, at], "ticktext": names}
    figure = go.Figure(layout=_LAYOUT)
    heads = max(1, *(records.heads["max_logits"].shape[1] for records in runs.values()))
    size = {"columns": min(COLUMNS, max(1, CELLS // heads)), "rows": heads}
    maps = {seed: head_map(records, results.experiment, tau, **size) for seed, records in runs.items()}
    largest = max(maps.values(), key=lambda cells: len(cells.values))  # a run that diverged at once has no layers
    layers, rows = largest.layers, len(largest.values)
    per_layer, every = rows // len(layers), math.ceil(len(layers) / 10)
    for seed, cells in maps.items():
        figure.add_heatmap(
            z=[_rounded(np.log10(np.maximum(row, 10**low))) for row in cells.values],
            customdata=[_rounded(row) for row in cells.values],
            x=[1 + cells.steps * column + (cells.steps - 1) / 2 for column in range(cells.values.shape[1])],
            y=[f"{layer}, head {head}" for layer in layers for head in range(per_layer)][: len(cells.values)],
            hovertemplate="%{y}<br>step %{x}: %{customdata}<extra></extra>",
            zmin=low,
            zmax=high,
            colorscale=list(zip([0, share, share, (1 + share) / 2, 1], _SCALE, strict=True)),
            colorbar=bar,
            visible=not figure.data,
            meta={"seed": str(seed)},
        )
    figure.update_xaxes(range=[0.5, results.experiment.steps + 0.5])
    middles = [per_layer * layer + (per_layer - 1) / 2 for layer in range(0, len(layers), every)]
    figure.update_yaxes(range=[rows - 0.5, -0.5], showgrid=False, ticktext=layers[::every], tickvals=middles)
    for row in range(per_layer, rows, per_layer):
        figure.add_hline(row - 0.5, line={"color": "white", "width": 2})
    note = "before the soft cap" if arm.capped else ""
    return {"title": label, "note": note, "arm": arm.name, "figure": figure}


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
