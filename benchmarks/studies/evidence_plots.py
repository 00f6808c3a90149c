"""The pictures of the long evidence, from the JSON values that `benchmarks.evidence` writes.

    sweep       final loss and peak logit by learning rate
    efficiency  Muon's final loss by the share of AdamW's tokens, and where it comes down to AdamW's
    clip_cost   what clipping costs where nothing explodes: differences in final loss

`draw_…` write the PNG of each. Lines are means, dots are seeds; a number that is not finite is a × at the edge.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.experiment.arms import ARMS, base_of
from benchmarks.experiment.experiment import Panel
from benchmarks.records.metrics import from_json
from benchmarks.report.style import DASHED, INK, QUIET, STYLE, THRESHOLD, save

_WIDTH = 10.6  # inches
_LEGEND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.85}
_COLUMNS = (0.0, 0.6)  # of the words beside the costs


def draw_sweep(value: Mapping[str, Any], path: Path) -> None:
    _write(sweep, value, path)


def draw_efficiency(value: Mapping[str, Any], path: Path) -> None:
    _write(efficiency, value, path)


def draw_clip_cost(value: Mapping[str, Any], path: Path) -> None:
    _write(clip_cost, value, path)


def sweep(value: Mapping[str, Any]) -> Figure:
    """Loss, usable rates and peak logit over the rate. An arm that coincides with an earlier one is dashed."""
    figure = _figure(value, "Final loss and peak logit by learning rate", height=8.4)
    losses, usable, logits = figure.subplots(3, 1, sharex=True, height_ratios=[10, 0.5 * len(value["arms"]), 7])
    seen: set[tuple[float, ...]] = set()
    handles: list[Line2D] = []
    for row, (name, arm) in enumerate(value["arms"].items()):
        rates = [rate["lr"] for rate in arm["rates"]]
        points = {(rate["lr"], *rate["loss"]) for rate in arm["rates"]}
        coincides = not seen.isdisjoint(points)
        seen |= points
        colour = ARMS[name].colour
        for axis, field in ((losses, "loss"), (logits, "peak_logit")):
            _draw_seeds(axis, rates, [rate[field] for rate in arm["rates"]], colour, coincides=coincides)
        best = next(rate for rate in arm["rates"] if rate["lr"] == arm["best_lr"])
        ring = {"markersize": 11 if coincides else 15, "markeredgewidth": 1.6, "color": colour}
        losses.plot([best["lr"]], [statistics.fmean(best["loss"])], "o", fillstyle="none", **ring)
        usable.plot(arm["usable"], [row, row], color=colour, linewidth=5, marker="|", markersize=11, markeredgewidth=2)
        style = DASHED if coincides else "solid"
        handles.append(Line2D([], [], color=colour, linewidth=2.2, linestyle=style, label=arm["label"]))
    handles.append(_handle("o", "best rate", markersize=12, fillstyle="none"))
    if not all(math.isfinite(loss) for arm in value["arms"].values() for rate in arm["rates"] for loss in rate["loss"]):
        handles.append(_handle("x", "diverged"))
    losses.legend(handles=handles, loc="best", **_LEGEND)
    losses.set_title(f"Final validation loss, {value['unit']} (mean and seeds)")
    usable.set_title(f"Usable rates: within {value['usable_margin']:g} {value['unit']} of the best", size=10.5)
    usable.set_ylim(len(value["arms"]) - 0.4, -0.6)
    usable.set_yticks([])
    usable.spines[["left", "bottom"]].set_visible(False)
    logits.set_title("Peak attention logit over the run (mean and seeds)")
    logits.set_yscale("log")
    _plain_log(logits.yaxis, (1.0, 3.0))
    tau = value["tau"]
    logits.set_ylim(top=max(logits.get_ylim()[1], 2 * tau))
    logits.axhline(tau, **THRESHOLD)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    logits.annotate(f"τ = {tau:g}", (1, tau), (4, 0), **place)
    logits.set_xscale("log")
    _plain_log(logits.xaxis, (1.0, 2.0, 5.0))
    logits.set_xlabel("learning rate")
    return figure


def efficiency(value: Mapping[str, Any]) -> Figure:
    """Over a logarithmic axis: between budgets `benchmarks.intervals.crossing` draws the same straight lines."""
    figure = _figure(value, "Tokens that Muon needs for AdamW's final loss", height=6.2)
    axis = figure.subplots()
    adamw, muon, budgets = value["adamw"], value["muon"], value["muon"]["budgets"]
    shares = [budget["share"] for budget in budgets]
    blue, orange = ARMS["adamw"].colour, ARMS["muon"].colour
    target = statistics.fmean(adamw["loss"])
    axis.axhspan(min(adamw["loss"]), max(adamw["loss"]), color=blue, alpha=0.13, linewidth=0)
    axis.axhline(target, color=blue, linewidth=2)
    _draw_seeds(axis, shares, [budget["loss"] for budget in budgets], orange)
    axis.axvline(value["reference"], color=QUIET, linewidth=1.1, linestyle=(0, (1, 2)))
    left, right = min([*shares, value["reference"]]), max([*shares, 1.0])
    share = value["share"] if value["share"] and value["share"]["mean"] is not None else None
    if share:
        axis.plot([share["low"], share["high"]], [target, target], color=INK, linewidth=2.5, zorder=4)
        axis.plot(share["per_seed"], [target] * len(share["per_seed"]), "|", color=INK, markersize=11, zorder=4)
        axis.plot([share["mean"]], [target], "D", color=INK, markersize=8, zorder=5)
    axis.annotate(
        _crossing(share, value) if share else _no_crossing(value),
        (share["mean"], target) if share else (0, 0),
        (0.025, 0.05),
        textcoords="axes fraction",
        arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.8, "shrinkB": 6} if share else None,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        annotation_clip=False,
    )
    axis.margins(y=0.08)
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.18 * (high - low), high)  # room for the words
    handles = [
        Line2D(
            [], [], color=blue, linewidth=2, label=f"AdamW, rate {adamw['lr']:g}, all tokens (mean, range of seeds)"
        ),
        Line2D([], [], color=orange, linewidth=2, marker="o", label=f"Muon, rate {muon['lr']:g} (mean and seeds)"),
        Line2D([], [], color=QUIET, linewidth=1.1, linestyle=(0, (1, 2)), label=_reference(value["reference"])),
    ]
    axis.legend(handles=handles, loc="best", **_LEGEND)
    axis.set_xscale("log")
    axis.set_xlim(left / 1.04, right * 1.03)
    axis.xaxis.set_major_locator(FixedLocator(shares))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("share of AdamW's tokens, each run with a schedule of its own length (log scale)")
    axis.set_title(f"Final validation loss, {value['unit']}")
    return figure


def clip_cost(value: Mapping[str, Any]) -> Figure:
    """A row per threshold: mean difference, its interval, the seeds; in words the same and the heads clipped."""
    arms, baseline = value["arms"], value["baseline"]
    figure = _figure(value, "What clipping costs where nothing explodes", height=2.5 + 0.75 * len(arms))
    axis, words = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    words.set_axis_off()
    axis.axvline(0, color=INK, linewidth=1.2)
    for row, arm in enumerate(arms):
        difference, colour = arm["difference"], ARMS[base_of(arm["name"])].colour
        finite = [each for each in difference["per_seed"] if math.isfinite(each)]
        axis.plot([difference["low"], difference["high"]], [row, row], color=colour, linewidth=2.5)
        axis.plot([difference["mean"]], [row], "o", color=colour, markersize=9)
        axis.plot(finite, [row + 0.24] * len(finite), "o", color=colour, markersize=4.5, alpha=0.6)
        if len(finite) < len(difference["per_seed"]):
            axis.plot([1], [row], "x", color=colour, markersize=9, transform=axis.get_yaxis_transform(), clip_on=False)
        words.text(_COLUMNS[0], row, _difference(difference), va="center")
        words.text(_COLUMNS[1], row, _clipped(arm["heads_ever_clipped"]), va="center")
    words.text(_COLUMNS[0], -0.6, "difference", color=QUIET)
    words.text(_COLUMNS[1], -0.6, "heads ever clipped", color=QUIET)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.yaxis.set_major_locator(FixedLocator(range(len(arms))))
    axis.set_yticklabels([arm["label"] for arm in arms], color=INK)
    axis.grid(visible=False, axis="y")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    rate = f", rate {baseline['lr']:g}" if "lr" in baseline else ""
    axis.set_xlabel(f"final validation loss minus that of {baseline['label']}{rate}, {value['unit']} (right: worse)")
    axis.set_title(f"Mean, {value['confidence']:.0%} interval and seeds")
    return figure


def _write(draw: Callable[[Mapping[str, Any]], Figure], value: Mapping[str, Any], path: Path) -> None:
    with pyplot.rc_context(STYLE):
        save(draw(from_json(dict(value))), path, [value["environment"]])


def _figure(value: Mapping[str, Any], title: str, *, height: float) -> Figure:
    panel = Panel.from_json(value["config"])
    figure = pyplot.figure(figsize=(_WIDTH, height), layout="constrained")
    batch = f"{panel.training.batch_size} × {panel.model.max_seq_len} tokens"
    subtitle = f"{panel.training.steps} steps of {batch} · {panel.subject}"
    figure.suptitle(f"{title}\n{subtitle}", x=0.01, ha="left", size=11.5)
    return figure


def _draw_seeds(
    axis: Axes, xs: Sequence[float], values: Sequence[Sequence[float]], colour: str, *, coincides: bool = False
) -> None:
    """`values[x][seed]`: a dot for each, a line through the means, × at the top for those that are not finite."""
    means = [statistics.fmean(seeds) for seeds in values]  # not finite where a seed is not: a gap
    style = DASHED if coincides else "solid"
    axis.plot(xs, means, color=colour, linewidth=2, linestyle=style, dash_capstyle="butt", zorder=2.5)
    dots = [(x, each) for x, seeds in zip(xs, values, strict=True) for each in seeds]
    finite = [dot for dot in dots if math.isfinite(dot[1])]
    axis.plot(*zip(*finite, strict=True), "o", color=colour, markersize=3.5 if coincides else 6, zorder=2.6)
    lost = [x for x, each in dots if not math.isfinite(each)]
    if lost:
        look = {"color": colour, "markersize": 6 if coincides else 9, "markeredgewidth": 2}
        axis.plot(lost, [1] * len(lost), "x", **look, transform=axis.get_xaxis_transform(), clip_on=False)


def _handle(marker: str, label: str, **look: Any) -> Line2D:
    return Line2D([], [], color=QUIET, linestyle="none", marker=marker, label=label, **look)


def _plain_log(axis: Axis, subs: tuple[float, ...]) -> None:
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _crossing(share: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    seeds = len(share["per_seed"])
    if not math.isfinite(share["low"]):
        return f"{share['mean']:.0%} of AdamW's tokens (one seed)"
    interval = f"{value['confidence']:.0%} interval {share['low']:.0%} to {share['high']:.0%}, {seeds} seeds"
    return f"{share['mean']:.0%} of AdamW's tokens\n({interval})"


def _no_crossing(value: Mapping[str, Any]) -> str:
    budgets = sorted(value["muon"]["budgets"], key=lambda budget: budget["share"])
    target = value["adamw"]["loss"]
    first, last = budgets[0], budgets[-1]
    if all(loss <= other for loss, other in zip(first["loss"], target, strict=True)):
        return f"With {first['share']:.0%} of the tokens Muon is down to AdamW's loss already; less was not measured."
    reached = [any(budget["loss"][seed] <= loss for budget in budgets) for seed, loss in enumerate(target)]
    if not any(reached):
        return f"Muon does not reach AdamW's loss with up to {last['share']:.0%} of the tokens."
    return "Not every seed crosses AdamW's loss within the budgets measured: no share is given."


def _reference(share: float) -> str:
    return f"{share:.0%}: Moonlight (arXiv 2502.16982), share of AdamW's training FLOPs"


def _difference(difference: Mapping[str, Any]) -> str:
    if not math.isfinite(difference["mean"]):
        return "diverged"
    if not any(difference["per_seed"]):
        return "exactly 0"
    mean, low, high = (f"{difference[key]:+.3f}".replace("-", "−") for key in ("mean", "low", "high"))
    return f"{mean} (one seed)" if not math.isfinite(difference["low"]) else f"{mean} ({low} to {high})"


def _clipped(shares: Sequence[float]) -> str:
    """Mean over seeds, and their range where they differ."""
    mean, low, high = (f"{share:.0%}" for share in (statistics.fmean(shares), min(shares), max(shares)))
    return mean if low == high else f"{mean} ({low} to {high})"
