"""The pictures of `benchmarks.studies.spikes`: the held-out loss over the steps, the logits below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import SubFigure

from benchmarks.records.summary import Results
from benchmarks.report.charts import charts, quantities, top_of_logits
from benchmarks.report.plots import draw_chart, draw_legend
from benchmarks.report.style import picture

LEAD = 30  # steps before a disturbance that are shown
_WIDTH, _HEIGHT = 5.2, 5.6  # inches of a case: as wide as a phone


def draw(results: Sequence[Results], folder: Path) -> None:
    """Write spikes.png, all cases in two columns, and spike.png, the first alone; both for dark pages, too."""
    for name, dark in (("", False), ("-dark", True)):
        _draw(results, folder / f"spikes{name}.png", dark=dark)
        _draw(results[:1], folder / f"spike{name}.png", dark=dark)


def _draw(results: Sequence[Results], path: Path, *, dark: bool) -> None:
    top, columns = top_of_logits(results), min(2, len(results))
    rows = -(-len(results) // columns)
    size = (columns * _WIDTH, rows * _HEIGHT)
    with picture(path, [result.environment for result in results], "", dark=dark, figsize=size) as figure:
        parts = figure.subfigures(rows, columns, squeeze=False).flat
        for result, part in zip(results, parts, strict=False):
            _draw_case(part, result, top)


def _draw_case(part: SubFigure, result: Results, top: float) -> None:
    """Draw one case: what is before it is left out, and the loss's axis is that of what is shown."""
    training = result.experiment.training
    first = max(0, training.disturbance.after - LEAD) if training.disturbance else training.schedule.warmup
    by_title = [chart for name in ("probe_loss", "max_logit") for chart in charts(result, top, quantities(name))]
    axes = part.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for axis, chart in zip(axes, by_title, strict=True):
        draw_chart(axis, chart)
    seen = [y for line in by_title[0].lines for y in line.y[line.x >= first]]
    room = 0.04 * (max(seen) - min(seen)) or 0.1
    axes[0].set(xlim=(first, training.steps), ylim=(min(seen) - room, max(seen) + room))
    axes[1].set_xlabel("step")
    part.suptitle(result.experiment.title, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    draw_legend(part, axes[0], result, columns=2)
