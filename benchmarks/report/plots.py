"""Pictures of a result: maximum logit, train loss, validation loss and clipped heads over the steps, and a small one.

The small one shows the largest logits and the validation loss alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from benchmarks.records.summary import Results
from benchmarks.report.charts import Chart, charts, main_quantities, quantities, top_of_logits
from benchmarks.report.style import QUIET, draw_lines, draw_threshold, picture, plain_log


def draw(results: Sequence[Results], path: Path) -> None:
    """Write the PNG. One colour per arm, thin lines for seeds, a thick one for their mean; a column per experiment."""
    subjects = dict.fromkeys(result.experiment.subject for result in results)
    size = (12.5, 8) if len(results) == 1 else (6.6 * len(results), 14)
    top = top_of_logits(results)
    with picture(path, [result.environment for result in results], "\n".join(subjects), figsize=size) as figure:
        parts = figure.subfigures(1, len(results), squeeze=False, wspace=0.03)[0]
        for part, result in zip(parts, results, strict=True):
            grid = part.subplots(2, 2, sharex=True) if len(results) == 1 else part.subplots(4, 1, sharex=True)
            for axis, chart in zip(grid.flat, charts(result, top, main_quantities(result)), strict=False):
                draw_chart(axis, chart)
                axis.set_xlim(0, result.experiment.steps)
                if axis.get_subplotspec().is_last_row():
                    axis.set_xlabel("step")
            _legend(part, grid.flat[0], result, columns=3 if len(results) == 1 else 1)
            part.suptitle(result.experiment.heading, x=0.01, ha="left", fontweight="bold")


def draw_summary(results: Sequence[Results], path: Path, *, dark: bool = False) -> None:
    """Write a PNG as narrow as a phone: the largest logits of the first experiment above the losses of the last."""
    top = top_of_logits(results)
    chosen = ((results[0], quantities("max_logit")), (results[-1], quantities("val_loss")))
    panels = [(result, chart) for result, of in chosen for chart in charts(result, top, of)]
    with picture(path, [result.environment for result in results], "", dark=dark, figsize=(5.2, 6.4)) as figure:
        for part, (result, chart) in zip(figure.subfigures(len(panels), 1, squeeze=False).flat, panels, strict=True):
            axis = part.subplots()
            draw_chart(axis, chart, heading=result.experiment.title)
            axis.set_xlim(0, result.experiment.steps)
            axis.set_xlabel("step")
            _legend(part, axis, result, columns=1)


def draw_chart(axis: Axes, chart: Chart, *, heading: str = "") -> None:
    draw_lines(axis, chart.lines)
    if chart.disturbed:
        axis.axvspan(*chart.disturbed, color=QUIET, alpha=0.2, linewidth=0)
    axis.set_title(f"{heading}\n{chart.title}, {chart.note}".strip(), wrap=True)
    if chart.log:
        axis.set_yscale("log")
        plain_log(axis.yaxis)
    if chart.y_range:
        axis.set_ylim(chart.y_range)
    if chart.whole:
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    for tau in chart.taus:
        draw_threshold(axis, tau)


def _legend(part: SubFigure, axis: Axes, results: Results, *, columns: int) -> None:
    seeds, handles = results.experiment.seeds, []
    for arm in results.finished:
        handles += axis.plot([], [], color=arm.colour, linewidth=2.5, label=arm.caption)
    if len(seeds) > 1:
        label = f"{len(seeds)} seeds, and their mean in bold"
        handles += axis.plot([], [], color="#888888", linewidth=0.8, label=label)
    if len(handles) <= 4:
        axis.legend(handles=handles, frameon=False, fontsize=10.5, loc="best")
    else:  # too many to find room among the curves
        part.legend(handles=handles, frameon=False, fontsize=10.5, loc="outside lower left", ncols=columns)
