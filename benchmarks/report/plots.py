"""The picture of a result: maximum logit, train loss, validation loss and clipped heads over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.experiment.arms import appearance, model_changes, setup
from benchmarks.records.summary import PanelResult, Record, max_logit, spikes
from benchmarks.report.curves import SMOOTHING, Curve, bits, curve, mean, smooth
from benchmarks.report.style import DASHED, STYLE, THRESHOLD, caption, save


def draw(results: Sequence[PanelResult], path: Path) -> None:
    """Write the PNG. One colour per arm, thin lines for seeds, a thick one for their mean; a column per panel."""
    rows = (_draw_max_logit, _draw_train_loss, _draw_validation_loss, _draw_clipped_heads)
    alone = len(results) == 1
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(12.5, 8) if alone else (6.6 * len(results), 14), layout="constrained")
        figure.suptitle("\n".join(dict.fromkeys(result.panel.subject for result in results)), x=0.01, ha="left")
        parts = figure.subfigures(1, len(results), squeeze=False, wspace=0.03)[0]
        logits: list[Axes] = []
        for part, result in zip(parts, results, strict=True):
            grid = part.subplots(2, 2, sharex=True) if alone else part.subplots(4, 1, sharex=True)
            for axis, row in zip(grid.flat, rows, strict=True):
                row(axis, result)
                axis.set_xlim(0, max(setup(result.panel, arm).training.steps for arm in result.panel.arms))
                if axis.get_subplotspec().is_last_row():
                    axis.set_xlabel("step")
            logits.append(grid.flat[0])
            _legend(part, grid.flat[0], result, columns=3 if alone else 1)
            part.suptitle(result.panel.heading, x=0.01, ha="left", fontweight="bold")
        for axis in logits:
            axis.set_ylim(1, max(other.get_ylim()[1] for other in logits))
        save(figure, path, [result.environment for result in results])


def _draw_max_logit(axis: Axes, result: PanelResult) -> None:
    tau = result.panel.training.tau
    _draw_curves(axis, result, lambda records: curve(records, max_logit))
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(1, max(axis.get_ylim()[1], 2 * tau))
    axis.axhline(tau, **THRESHOLD, zorder=2.5)
    axis.annotate(
        f"τ = {tau:g}",
        (1, tau),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
    )
    capped = any("softcap" in model_changes(result.panel, arm) for arm in result.records)
    axis.set_title(f"Maximum attention logit, over layers and heads{' (before a soft cap)' if capped else ''}")


def _draw_train_loss(axis: Axes, result: PanelResult) -> None:
    training, looks = result.panel.training, appearance(result.panel)
    _draw_curves(axis, result, lambda records: smooth(curve(records, lambda record: record["loss"])))
    marked = 0
    for arm, runs in result.records.items():
        for records in runs.values():
            losses = [record["loss"] for record in records]
            at = [
                i for i in spikes(losses, training.spike_window, training.spike_threshold) if math.isfinite(losses[i])
            ]
            values = [losses[i] for i in at]
            axis.plot(
                [records[i]["step"] for i in at],
                values,
                "x",
                color=looks[arm].colour,
                markersize=4,
                alpha=0.6,
                zorder=3,
            )
            marked += len(at)
    after = training.steps // 8  # the first drop would flatten all that follows
    tops = [value for line in axis.lines for step, value in np.asarray(line.get_data()).T.tolist() if step >= after]
    axis.set_ylim(top=max(tops, default=1.0) + 0.15)
    axis.set_title(f"Train loss, nats per token (mean of {SMOOTHING} steps{'; × spikes' if marked else ''})")


def _draw_validation_loss(axis: Axes, result: PanelResult) -> None:
    unit = "byte" if result.panel.data.kind == "bytes" else "token"
    _draw_curves(axis, result, lambda records: curve(records, bits))
    axis.set_title(f"Validation loss, bits per {unit}")


def _draw_clipped_heads(axis: Axes, result: PanelResult) -> None:
    heads = result.panel.model.num_layers * result.panel.model.num_heads
    _draw_curves(axis, result, lambda records: smooth(curve(records, lambda record: record["clipped_heads"])))
    axis.set_ylim(-0.02 * heads, 1.02 * heads)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(f"Clipped heads, of {heads} (mean of {SMOOTHING} steps)")


def _draw_curves(axis: Axes, result: PanelResult, curve_of: Callable[[list[Record]], Curve]) -> None:
    """The arms in their order; one that coincides with an earlier one is dashed, so that both are seen."""
    means: list[Curve] = []
    looks = appearance(result.panel)
    for arm, runs in result.records.items():
        colour, curves = looks[arm].colour, [curve_of(records) for records in runs.values()]
        if len(curves) > 1:
            for seed in curves:
                axis.plot(*seed, color=colour, linewidth=0.8, alpha=0.45)
        bold = mean(curves)
        style = DASHED if any(np.array_equal(bold, earlier) for earlier in means) else "solid"
        axis.plot(*bold, color=colour, linewidth=2, linestyle=style, dash_capstyle="butt", zorder=2.8)
        means.append(bold)


def _legend(part: SubFigure, axis: Axes, result: PanelResult, *, columns: int) -> None:
    looks, seeds = appearance(result.panel), result.panel.seeds
    handles = []
    for arm in result.panel.arms:
        handles += axis.plot([], [], color=looks[arm].colour, linewidth=2.5, label=caption(result.panel, arm))
    if len(seeds) > 1:
        label = f"{len(seeds)} seeds, and their mean in bold"
        handles += axis.plot([], [], color="#888888", linewidth=0.8, label=label)
    if len(handles) <= 4:
        axis.legend(handles=handles, frameon=False, fontsize=10.5, loc="best")
    else:  # too many to find room among the curves
        part.legend(handles=handles, frameon=False, fontsize=10.5, loc="outside lower left", ncols=columns)
