"""The pictures of the long evidence, from the JSON values that `benchmarks.studies.evidence` writes.

    sweep       final loss and peak logit by learning rate
    efficiency  Muon's final loss by the share of AdamW's tokens, and where it comes down to AdamW's
    clip_cost   what clipping costs where nothing explodes: differences in final loss

Lines are means, dots are seeds; a number that is not finite is a × at the edge.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from benchmarks.experiment.arms import ARMS, choices
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.intervals import Interval
from benchmarks.records.metrics import from_json
from benchmarks.report.charts import Line
from benchmarks.report.style import DASHED, INK, QUIET, draw_lines, draw_threshold, picture, plain_log
from benchmarks.studies.evidence_reading import token_share

Json = Mapping[str, Any]
_LEGEND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.85}
_COLUMNS = (0.0, 0.6)  # of the words next to the costs
_REFERENCE: dict[str, Any] = {"color": QUIET, "linewidth": 1.1, "linestyle": (0, (1, 2))}


def draw_sweep(value: Json, path: Path) -> None:
    """Draw loss, usable rates and peak logit over the rate. An arm that coincides with an earlier one is dashed."""
    value = from_json(dict(value))
    arms, unit = value["arms"], value["unit"]
    with _figure(value, path, "Final loss and peak logit by learning rate", height=8.4) as figure:
        losses, usable, logits = figure.subplots(3, 1, sharex=True, height_ratios=[10, 0.5 * len(arms), 7])
        seen: set[tuple[float, ...]] = set()
        handles: list[Line2D] = []
        for row, (name, arm) in enumerate(arms.items()):
            colour, rates = ARMS[name].colour, [rate["lr"] for rate in arm["rates"]]
            points = {(rate["lr"], *rate["loss"]) for rate in arm["rates"]}
            dashed = not seen.isdisjoint(points)
            seen |= points
            for axis, field in ((losses, "loss"), (logits, "peak_logit")):
                _draw_seeds(axis, name, rates, [rate[field] for rate in arm["rates"]], dashed=dashed)
            best = statistics.fmean(next(rate["loss"] for rate in arm["rates"] if rate["lr"] == arm["best_lr"]))
            ring = {"markersize": 11 if dashed else 15, "markeredgewidth": 1.6, "color": colour, "fillstyle": "none"}
            losses.plot([arm["best_lr"]], [best], "o", **ring)
            bar = {"linewidth": 5, "marker": "|", "markersize": 11, "markeredgewidth": 2}
            usable.plot(arm["usable"], [row, row], color=colour, **bar)
            style = DASHED if dashed else "solid"
            handles.append(Line2D([], [], color=colour, linewidth=2.2, linestyle=style, label=arm["label"]))
        mark: dict[str, Any] = {"color": QUIET, "linestyle": "none"}
        handles.append(Line2D([], [], **mark, marker="o", markersize=12, fillstyle="none", label="best rate"))
        if not all(math.isfinite(loss) for arm in arms.values() for rate in arm["rates"] for loss in rate["loss"]):
            handles.append(Line2D([], [], **mark, marker="x", label="diverged"))
        losses.legend(handles=handles, loc="best", **_LEGEND)
        losses.set_title(f"Final validation loss, {unit} (mean and seeds)")
        usable.set_title(f"Usable rates: within {value['usable_margin']:g} {unit} of the best", size=10.5)
        usable.set_ylim(len(arms) - 0.4, -0.6)
        usable.set_yticks([])
        usable.spines[["left", "bottom"]].set_visible(False)
        logits.set_title("Peak attention logit over the run (mean and seeds)")
        logits.set_yscale("log")
        plain_log(logits.yaxis)
        logits.set_ylim(top=max(logits.get_ylim()[1], 2 * value["tau"]))
        draw_threshold(logits, value["tau"])
        logits.set_xscale("log")
        plain_log(logits.xaxis, (1.0, 2.0, 5.0))
        logits.set_xlabel("learning rate")


def draw_efficiency(value: Json, path: Path) -> None:
    """Draw Muon's loss over a logarithmic axis of budgets, with the straight lines of `intervals.crossing`."""
    value = from_json(dict(value))
    adamw, muon, reference = value["adamw"], value["muon"], value["reference"]
    with _figure(value, path, "Tokens that Muon needs for AdamW's final loss", height=6.2) as figure:
        axis = figure.subplots()
        shares = [budget["share"] for budget in muon["budgets"]]
        blue, target = ARMS["adamw"].colour, statistics.fmean(adamw["loss"])
        axis.axhspan(min(adamw["loss"]), max(adamw["loss"]), color=blue, alpha=0.13, linewidth=0)
        axis.axhline(target, color=blue, linewidth=2)
        _draw_seeds(axis, "muon", shares, [budget["loss"] for budget in muon["budgets"]])
        axis.axvline(reference, **_REFERENCE)
        share = value["share"] if value["share"] and value["share"]["mean"] is not None else None
        arrow = {"arrowstyle": "-", "color": INK, "linewidth": 0.8, "shrinkB": 6}
        words: dict[str, Any] = {"textcoords": "axes fraction", "annotation_clip": False}
        words["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        if share:
            axis.plot([share["low"], share["high"]], [target, target], color=INK, linewidth=2.5, zorder=4)
            axis.plot(share["per_seed"], [target] * len(share["per_seed"]), "|", color=INK, markersize=11, zorder=4)
            axis.plot([share["mean"]], [target], "D", color=INK, markersize=8, zorder=5)
            said = f"{share['mean']:.0%} of AdamW's tokens"
            if math.isfinite(share["low"]):
                interval = f"{value['confidence']:.0%} interval {share['low']:.0%} to {share['high']:.0%}"
                said += f"\n({interval}, {len(share['per_seed'])} seeds)"
            axis.annotate(said, (share["mean"], target), (0.025, 0.05), arrowprops=arrow, **words)
        else:
            verdict = token_share({**value, "share": None}).verdict
            axis.annotate(f"AdamW's loss: {verdict}", (0, 0), (0.025, 0.05), **words)
        axis.margins(y=0.08)
        low, high = axis.get_ylim()
        axis.set_ylim(low - 0.18 * (high - low), high)  # room for the words
        rates = f"AdamW, rate {adamw['lr']:g}, all tokens (mean, range of seeds)", f"Muon, rate {muon['lr']:g}"
        moonlight = f"{reference:.0%}: Moonlight (arXiv 2502.16982), share of AdamW's training FLOPs"
        handles = [
            Line2D([], [], color=blue, linewidth=2, label=rates[0]),
            Line2D([], [], color=ARMS["muon"].colour, linewidth=2, marker="o", label=f"{rates[1]} (mean and seeds)"),
            Line2D([], [], **_REFERENCE, label=moonlight),
        ]
        axis.legend(handles=handles, loc="best", **_LEGEND)
        axis.set_xscale("log")
        axis.set_xlim(min([*shares, reference]) / 1.04, max([*shares, 1.0]) * 1.03)
        axis.xaxis.set_major_locator(FixedLocator(shares))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("share of AdamW's tokens, each run with a schedule of its own length (log scale)")
        axis.set_title(f"Final validation loss, {value['unit']}")


def draw_clip_cost(value: Json, path: Path) -> None:
    """Draw a row per threshold: mean difference, its interval, the seeds; in words the same and the heads clipped."""
    value = from_json(dict(value))
    arms, baseline = value["arms"], value["baseline"]
    with _figure(value, path, "What clipping costs where nothing explodes", height=2.5 + 0.75 * len(arms)) as figure:
        axis, words = figure.subplots(1, 2, sharey=True)
        words.set_axis_off()
        axis.axvline(0, color=INK, linewidth=1.2)
        for row, arm in enumerate(arms):
            difference, colour = arm["difference"], ARMS[choices(arm["name"])[0].entry].colour
            finite = [each for each in difference["per_seed"] if math.isfinite(each)]
            axis.plot([difference["low"], difference["high"]], [row, row], color=colour, linewidth=2.5)
            axis.plot([difference["mean"]], [row], "o", color=colour, markersize=9)
            axis.plot(finite, [row + 0.24] * len(finite), "o", color=colour, markersize=4.5, alpha=0.6)
            if len(finite) < len(difference["per_seed"]):
                edge = {"transform": axis.get_yaxis_transform(), "clip_on": False}
                axis.plot([1], [row], "x", color=colour, markersize=9, **edge)
            shares = [f"{share:.0%}" for share in sorted(arm["heads_ever_clipped"])]
            words.text(_COLUMNS[0], row, str(Interval(*(difference[key] for key in Interval._fields))), va="center")
            words.text(_COLUMNS[1], row, " to ".join(dict.fromkeys((shares[0], shares[-1]))), va="center")
        words.text(_COLUMNS[0], -0.6, "difference", color=QUIET)
        words.text(_COLUMNS[1], -0.6, "heads ever clipped", color=QUIET)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.yaxis.set_major_locator(FixedLocator(range(len(arms))))
        axis.set_yticklabels([arm["label"] for arm in arms], color=INK)
        axis.grid(visible=False, axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        against = f"{baseline['label']}, rate {baseline['lr']:g}, {value['unit']} (right: worse)"
        axis.set_xlabel(f"final validation loss minus that of {against}")
        axis.set_title(f"Mean, {value['confidence']:.0%} interval and seeds")


PICTURES: dict[str, Callable[[Json, Path], None]] = {
    "sweep": draw_sweep,
    "efficiency": draw_efficiency,
    "clip-cost": draw_clip_cost,
}


@contextlib.contextmanager
def _figure(value: Json, path: Path, title: str, *, height: float) -> Iterator[Figure]:
    experiment = Experiment.from_json(value["config"])
    batch = f"{experiment.training.batch_size} × {experiment.model.max_seq_len} tokens"
    subtitle = f"{experiment.training.steps} steps of {batch} · {experiment.subject}"
    with picture(path, [value["environment"]], f"{title}\n{subtitle}", figsize=(10.6, height)) as figure:
        yield figure


def _draw_seeds(
    axis: Axes, arm: str, xs: Sequence[float], values: Sequence[Sequence[float]], *, dashed: bool = False
) -> None:
    """Draw a dot for each `values[x][seed]`, a line through the means, × at the top for what is not finite."""
    colour = ARMS[arm].colour
    points = np.array([(x, value) for x, seeds in zip(xs, values, strict=True) for value in seeds]).T
    means = np.array([statistics.fmean(seeds) for seeds in values])  # not finite where a seed is not: a gap
    finite = np.isfinite(points[1])
    lines = [Line(arm, colour, "mean", np.array(xs), means, dashed), Line(arm, colour, "marks", *points[:, finite])]
    draw_lines(axis, lines, marks={"marker": "o", "markersize": 3.5 if dashed else 6, "alpha": 1.0, "zorder": 2.9})
    if not finite.all():
        lost = points[0, ~finite]
        look = {"color": colour, "markersize": 6 if dashed else 9, "markeredgewidth": 2, "clip_on": False}
        axis.plot(lost, np.ones(len(lost)), "x", **look, transform=axis.get_xaxis_transform())
