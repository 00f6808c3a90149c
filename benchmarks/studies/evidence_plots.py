"""The pictures of the long evidence, from the JSON values that `benchmarks.studies.evidence` writes.

Lines are means, dots are seeds; a number that is not finite is a × at the edge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.experiment.arms import ARMS, choices
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.intervals import Interval
from benchmarks.records.metrics import from_json
from benchmarks.report.charts import Line
from benchmarks.report.style import DASHED, INK, QUIET, draw_lines, draw_threshold, picture, plain_log
from benchmarks.studies.evidence_reading import swept, token_share

Json = Mapping[str, Any]
_LEGEND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.85}
_COLUMNS = (0.0, 0.6)  # of the words next to the costs


def draw(name: str, value: Json, path: Path) -> None:
    """Write the picture of a name in PICTURES."""
    (title, draw_into), value = PICTURES[name], from_json(dict(value))
    experiment = Experiment.from_json(value["config"])
    batch = f"{experiment.training.batch_size} × {experiment.model.max_seq_len} tokens"
    subtitle = f"{experiment.training.steps} steps of {batch} · {experiment.subject}"
    with picture(path, [value["environment"]], f"{title}\n{subtitle}", figsize=(10.6, 6)) as figure:
        draw_into(figure, value)


def _draw_sweep(figure: Figure, value: Json) -> None:
    """Draw loss, usable rates and peak logit over the rate. An arm that coincides with an earlier one is dashed."""
    arms, unit, rates = value["arms"], value["unit"], swept(value)
    figure.set_figheight(8.4)
    losses, usable, logits = figure.subplots(3, 1, sharex=True, height_ratios=[10, 0.5 * len(arms), 7])
    seen: set[tuple[float, ...]] = set()
    for row, (name, arm) in enumerate(arms.items()):
        own, colour = rates.loc[name], ARMS[name].colour
        points = {(lr, *loss) for lr, loss in own["loss"].items()}
        dashed = not seen.isdisjoint(points)
        seen |= points
        _draw_seeds(losses, name, own.index, own["loss"], dashed=dashed)
        _draw_seeds(logits, name, own.index, own["peak_logit"], dashed=dashed)
        ring = {"color": colour, "markersize": 11 if dashed else 15, "markeredgewidth": 1.6, "fillstyle": "none"}
        losses.plot([arm["best_lr"]], [own["mean"][arm["best_lr"]]], "o", **ring)
        bar = {"color": colour, "linewidth": 5, "marker": "|", "markersize": 11, "markeredgewidth": 2}
        usable.plot(arm["usable"], [row, row], **bar)
        losses.plot([], [], color=colour, linewidth=2.2, linestyle=DASHED if dashed else "-", label=arm["label"])
    losses.plot([], [], "o", color=QUIET, markersize=12, fillstyle="none", label="best rate")
    if not np.isfinite(rates["mean"]).all():
        losses.plot([], [], "x", color=QUIET, label="diverged")
    losses.legend(loc="best", **_LEGEND)
    losses.set_title(f"Final validation loss, {unit} (mean and seeds)")
    usable.set_title(f"Usable rates: within {value['usable_margin']:g} {unit} of the best", size=10.5)
    usable.set(ylim=(len(arms) - 0.4, -0.6), yticks=[])
    usable.spines[["left", "bottom"]].set_visible(False)
    logits.set(title="Peak attention logit over the run (mean and seeds)", yscale="log")
    plain_log(logits.yaxis)
    logits.set_ylim(top=max(logits.get_ylim()[1], 2 * value["tau"]))
    draw_threshold(logits, value["tau"])
    logits.set(xscale="log", xlabel="learning rate")
    plain_log(logits.xaxis, (1.0, 2.0, 5.0))


def _draw_efficiency(figure: Figure, value: Json) -> None:
    """Draw Muon's loss over a logarithmic axis of budgets, with the straight lines of `intervals.crossing`."""
    adamw, muon, share, reference = (value[name] for name in ("adamw", "muon", "share", "reference"))
    figure.set_figheight(6.2)
    axis = figure.subplots()
    budgets = [budget["share"] for budget in muon["budgets"]]
    blue, target = ARMS["adamw"].colour, fmean(adamw["loss"])
    axis.axhspan(min(adamw["loss"]), max(adamw["loss"]), color=blue, alpha=0.13, linewidth=0)
    label = f"AdamW, rate {adamw['lr']:g}, all tokens (mean, range of seeds)"
    axis.axhline(target, color=blue, linewidth=2, label=label)
    _draw_seeds(axis, "muon", budgets, [budget["loss"] for budget in muon["budgets"]])
    label = f"Muon, rate {muon['lr']:g} (mean and seeds)"
    axis.plot([], [], "-o", color=ARMS["muon"].colour, linewidth=2, label=label)
    label = f"{reference:.0%}: Moonlight (arXiv 2502.16982), share of AdamW's training FLOPs"
    axis.axvline(reference, color=QUIET, linewidth=1.1, linestyle=(0, (1, 2)), label=label)
    if share:
        axis.plot([share["low"], share["high"]], [target, target], color=INK, linewidth=2.5, zorder=4)
        axis.plot(share["per_seed"], [target] * len(share["per_seed"]), "|", color=INK, markersize=11, zorder=4)
        axis.plot([share["mean"]], [target], "D", color=INK, markersize=8, zorder=5)
        said, at = f"{share['mean']:.0%} of AdamW's tokens", (share["mean"], target)
        if np.isfinite(share["low"]):
            interval = f"{value['confidence']:.0%} interval {share['low']:.0%} to {share['high']:.0%}"
            said += f"\n({interval}, {len(share['per_seed'])} seeds)"
    else:
        said, at = f"AdamW's loss: {token_share(value).verdict}", (0.0, 0.0)
    arrow = {"arrowstyle": "-", "color": INK, "linewidth": 0.8, "shrinkB": 6} if share else None
    words: dict[str, Any] = {"textcoords": "axes fraction", "annotation_clip": False, "arrowprops": arrow}
    axis.annotate(said, at, (0.025, 0.05), bbox={"facecolor": "white", "edgecolor": "none", "pad": 2}, **words)
    axis.margins(y=0.08)
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.18 * (high - low), high)  # room for the words
    axis.legend(loc="best", **_LEGEND)
    axis.set(xscale="log", xlim=(min([*budgets, reference]) / 1.04, max(budgets) * 1.03))
    axis.set_xticks(budgets, [f"{budget:.0%}" for budget in budgets])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("share of AdamW's tokens, each run with a schedule of its own length (log scale)")
    axis.set_title(f"Final validation loss, {value['unit']}")


def _draw_clip_cost(figure: Figure, value: Json) -> None:
    """Draw a row per threshold: mean difference, its interval, the seeds; in words the same and the heads clipped."""
    arms, baseline = value["arms"], value["baseline"]
    figure.set_figheight(2.5 + 0.75 * len(arms))
    axis, words = figure.subplots(1, 2, sharey=True)
    words.set_axis_off()
    axis.axvline(0, color=INK, linewidth=1.2)
    for row, arm in enumerate(arms):
        difference, colour = Interval.from_json(arm["difference"]), ARMS[choices(arm["name"])[0].entry].colour
        axis.plot([difference.low, difference.high], [row, row], color=colour, linewidth=2.5)
        axis.plot([difference.mean], [row], "o", color=colour, markersize=9)
        seeds = np.array(arm["difference"]["per_seed"])
        finite = seeds[np.isfinite(seeds)]
        axis.plot(finite, np.full(len(finite), row + 0.24), "o", color=colour, markersize=4.5, alpha=0.6)
        if len(finite) < len(seeds):
            edge = {"transform": axis.get_yaxis_transform(), "clip_on": False}
            axis.plot([1], [row], "x", color=colour, markersize=9, **edge)
        shares = [f"{share:.0%}" for share in sorted(arm["heads_ever_clipped"])]
        words.text(_COLUMNS[0], row, str(difference), va="center")
        words.text(_COLUMNS[1], row, " to ".join(dict.fromkeys((shares[0], shares[-1]))), va="center")
    words.text(_COLUMNS[0], -0.6, "difference", color=QUIET)
    words.text(_COLUMNS[1], -0.6, "heads ever clipped", color=QUIET)
    axis.set_yticks(range(len(arms)), [arm["label"] for arm in arms], color=INK)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    against = f"{baseline['label']}, rate {baseline['lr']:g}, {value['unit']} (right: worse)"
    axis.set_xlabel(f"final validation loss minus that of {against}")
    axis.set_title(f"Mean, {value['confidence']:.0%} interval and seeds")


def _draw_seeds(
    axis: Axes, arm: str, xs: Sequence[float], values: Sequence[Sequence[float]], *, dashed: bool = False
) -> None:
    """Draw a dot for each `values[x][seed]`, a line through the means, × at the top for what is not finite."""
    colour, x, y = ARMS[arm].colour, np.repeat(xs, [len(seeds) for seeds in values]), np.concatenate(list(values))
    means = np.array([fmean(seeds) for seeds in values])  # not finite where a seed is not: a gap
    finite = np.isfinite(y)
    lines = [Line(arm, colour, "mean", np.array(xs), means, dashed), Line(arm, colour, "marks", x[finite], y[finite])]
    draw_lines(axis, lines, marks={"marker": "o", "markersize": 3.5 if dashed else 6, "alpha": 1.0, "zorder": 2.9})
    if not finite.all():
        look = {"color": colour, "markersize": 6 if dashed else 9, "markeredgewidth": 2, "clip_on": False}
        axis.plot(x[~finite], np.ones(sum(~finite)), "x", **look, transform=axis.get_xaxis_transform())


PICTURES: dict[str, tuple[str, Callable[[Figure, Json], None]]] = {
    "sweep": ("Final loss and peak logit by learning rate", _draw_sweep),
    "efficiency": ("Tokens that Muon needs for AdamW's final loss", _draw_efficiency),
    "clip-cost": ("What clipping costs where nothing explodes", _draw_clip_cost),
}
