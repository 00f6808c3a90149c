"""The pictures of `benchmarks.studies.spikes`: the held-out loss over the steps, twice, and the logits below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from benchmarks.records.summary import Results
from benchmarks.report.charts import Chart, charts, quantities, top_of_logits
from benchmarks.report.plots import draw_chart
from benchmarks.report.style import ink, picture

LEAD = 30  # steps before a disturbance that are shown
END = 30  # steps at the end that the enlarged axis holds whole
_WIDTH, _HEIGHT = 5.2, 7.0  # inches of a case: as wide as a phone


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
    """Draw one case from shortly before its disturbance on: the loss, the same enlarged, and the logits."""
    training = result.experiment.training
    first = max(0, training.disturbance.after - LEAD) if training.disturbance else training.schedule.warmup
    shown = [chart for name in ("probe_loss", "max_logit") for chart in charts(result, top, quantities(name))]
    capped = any(arm.capped for arm in result.finished)
    axes: list[Axes] = list(part.subplots(3, 1, sharex=True, height_ratios=[2, 3, 2]))
    loss, logits = (replace(chart, title=title, note="") for chart, title in zip(shown, _TITLES, strict=True))
    for axis, chart in zip(axes, (loss, replace(loss, title="The same, enlarged"), logits), strict=True):
        draw_chart(axis, chart)
        axis.set_title(f"{chart.title}, before a soft cap" if chart is logits and capped else chart.title)
    low, high = _range(loss, first)
    _, end = _range(loss, training.steps - END)
    axes[0].set(xlim=(first, training.steps), ylim=(low - 0.04 * (high - low), high + 0.04 * (high - low)))
    axes[1].set_ylim(low - 0.1 * (end - low), min(end + 0.3 * (end - low), high))
    axes[2].set_xlabel("step")
    part.suptitle(result.experiment.title, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    handles = [
        axes[0].plot([], [], color=ink(arm.colour), linewidth=2.5, label=arm.label)[0] for arm in result.finished
    ]
    label = f"{len(result.experiment.seeds)} seeds, their mean in bold"
    handles += axes[0].plot([], [], color="#888888", linewidth=0.8, label=label)
    part.legend(handles=handles, frameon=False, fontsize=10, loc="outside lower left", ncols=2, columnspacing=1.0)


def _range(chart: Chart, first: int) -> tuple[float, float]:
    """Return the lowest and the highest of its values from this step on."""
    seen = [y for line in chart.lines for y in line.y[line.x >= first]]
    return min(seen), max(*seen, min(seen) + 1e-3)


_TITLES = ("Held-out loss after every update, nats per token", "Maximum attention logit")
