"""The picture of every head: heat maps of maximum logits, heads grouped by layer over the steps, one map per arm.

Long runs and models of many heads are binned by the maximum (`charts.HeadMap`); the note under the maps says how much a
cell holds.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.summary import Results
from benchmarks.report.charts import HeadMap, head_map
from benchmarks.report.style import DPI, INK, QUIET, picture

_WIDTH, _LETTERS = 10.8, 130  # of a picture: inches (as all below), and letters of a title
_ROW, _LOWEST, _HIGHEST = 0.15, 1.35, 2.4  # a head's row and a map; more rows than fit are a pixel each
_AROUND_MAP, _LINE, _AROUND = 0.54, 0.2, 1.0  # around a map, a further line of its title, around an experiment's maps
_MOST_ROWS = 512  # of a map
_MOST_COLUMNS = 1080  # of all maps side by side: each cell at least a pixel wide
_LEGIBLE, _SEPARABLE = 0.08, 0.03  # a row in which the clip's marks can be seen, and one next to which a line can
_COLOURS = colormaps["inferno"].with_extremes(bad="#DADADA")
_CLIPPED = "#7FE7FF"


class Map(NamedTuple):
    """The first finished seed of an arm."""

    arm: Arm
    seed: int
    cells: HeadMap
    diverged_at: int | None

    @property
    def height(self) -> float:
        rows = len(self.cells.values)
        return max(_LOWEST, min(rows * _ROW, _HIGHEST), 1.02 * rows / DPI)

    @property
    def marked(self) -> bool:
        """True where it marks what the clip rescaled."""
        return bool(self.cells.clipped.any()) and self.height / len(self.cells.values) >= _LEGIBLE


def draw(results: Sequence[Results], path: Path) -> None:
    """Write the PNG: the first seed of every arm that has runs, one colour scale for all."""
    subjects = dict.fromkeys(result.experiment.subject for result in results)
    title = "\n".join(["Maximum attention logit of every head", *subjects])
    with picture(path, [result.environment for result in results], title, figsize=(_WIDTH, 1)) as figure:
        draw_maps(figure, results)


def draw_maps(figure: Figure, results: Sequence[Results]) -> None:
    """Set the figure's height and fill it. The maps are the axes labelled with their arm's name."""
    grids = [{1: 1, 2: 2, 4: 2}.get(len(result.finished), 3) for result in results]  # columns of each experiment
    shown = [_maps(result, columns) for result, columns in zip(results, grids, strict=True)]
    every = [each for maps in shown for each in maps]
    taus = sorted({each.arm.training.tau for each in every})
    top = max(*(np.nanmax(each.cells.values, initial=0) for each in every), 1.3 * max(taus))
    norm = LogNorm(min(1.0, top / 100), top, clip=True)
    heights = []
    for maps, columns in zip(shown, grids, strict=True):
        title = _LINE * max(_title(each, columns).count("\n") for each in maps)
        heights.append(math.ceil(len(maps) / columns) * (maps[0].height + title + _AROUND_MAP) + _AROUND)
    figure.set_figheight(sum(heights) + 1.4)
    parts = figure.subfigures(len(results) + 1, 1, height_ratios=[*heights, 0.75], squeeze=False)[:, 0]
    for part, result, maps, columns in zip(parts, results, shown, grids, strict=False):
        _draw_experiment(part, result.experiment, maps, columns, norm)
    _draw_scale(parts[-1], norm, taus, any(each.marked for each in every))


def _maps(results: Results, columns: int) -> list[Map]:
    """Make the maps by arm, in cells small enough for so many maps next to each other."""
    made = []
    for arm in results.finished:
        seed, records = min(results.records[arm.name].items(), key=lambda of: results.experiment.seeds.index(of[0]))
        tau = arm.training.tau
        cells = head_map(records, results.experiment, tau, columns=_MOST_COLUMNS // columns, rows=_MOST_ROWS)
        made.append(Map(arm, seed, cells, records.diverged_at))
    return made


def _title(shown: Map, columns: int) -> str:
    """Return the caption, with what is in brackets on a line of its own where it is too long for one."""
    caption, room = shown.arm.caption, _LETTERS // columns
    lines = [caption] if len(caption) <= room else caption.replace(" (", "\n(").split("\n")
    return "\n".join(textwrap.fill(line, room) for line in lines)


def _draw_experiment(
    part: SubFigure, experiment: Experiment, shown: Sequence[Map], columns: int, norm: LogNorm
) -> None:
    part.suptitle(experiment.heading, x=0.01, ha="left", fontweight="bold", size=11.5)
    part.supxlabel(_note(experiment, shown), x=0.01, ha="left", size=10, color=QUIET)
    axes = part.subplots(math.ceil(len(shown) / columns), columns, squeeze=False, sharex=True, sharey=True)
    for position, (axis, each) in enumerate(zip(axes.flat, shown, strict=False)):
        axis.set_label(each.arm.name)
        _draw_map(axis, each, norm, experiment.steps)
        axis.set_title(_title(each, columns), size=10.5, pad=9)
        axis.spines["top"].set(visible=True, color=each.arm.colour, linewidth=3, position=("outward", 3))
        if position + columns >= len(shown):
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)


def _note(experiment: Experiment, shown: Sequence[Map]) -> str:
    seeds, cells = sorted({each.seed for each in shown}), shown[0].cells
    which = f"seed {seeds[0]}" if len(seeds) == 1 else "the first finished seed of each"
    of = f" (of {', '.join(map(str, experiment.seeds))})" if len(experiment.seeds) > 1 else ""
    sizes = [f"{size} {what}" for size, what in ((cells.steps, "steps"), (cells.heads, "heads")) if size > 1]
    binned = f"a cell is the maximum over {' and '.join(sizes)}" if sizes else ""
    capped = "before a soft cap" if any(each.arm.capped for each in shown) else ""
    return " · ".join(filter(None, (which + of, binned, capped)))


def _draw_map(axis: Axes, shown: Map, norm: LogNorm, longest: int) -> None:
    cells, (rows, columns) = shown.cells, shown.cells.values.shape
    in_layer, layers = rows // len(cells.layers), len(cells.layers)
    extent = (0.5, columns * cells.steps + 0.5, rows, 0)
    axis.imshow(cells.values, norm=norm, cmap=_COLOURS, aspect="auto", interpolation="nearest", extent=extent)
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)  # they would cover the first step and the last head
    between = range(in_layer, rows, in_layer)
    if shown.height / rows >= _SEPARABLE:
        for row in between:
            axis.axhline(row, color="white", linewidth=1.2)
    else:
        axis.set_yticks(between, minor=True)
        axis.tick_params(axis="y", which="minor", length=5)
    every = math.ceil(layers / 8)
    axis.set_yticks([(layer + 0.5) * in_layer for layer in range(0, layers, every)], cells.layers[::every])
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if shown.marked:  # along the foot of the row, from the first to the last of neighbours
        edges = np.diff(np.pad(cells.clipped.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        (row, first), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
        axis.hlines(row + 0.8, 0.5 + first * cells.steps, 0.5 + end * cells.steps, color=_CLIPPED, linewidth=1.1)
    if (step := shown.diverged_at) is not None:
        side, shift = ("right", -5) if step > 0.7 * longest else ("left", 5)
        axis.axvline(step, color=INK, linewidth=1)
        axis.annotate(
            "diverged", (step, 0.5), (shift, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha=side, va="center", size=9.5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )  # fmt: skip


def _draw_scale(part: SubFigure, norm: LogNorm, taus: Sequence[float], marked: bool) -> None:
    axis, room = part.subplots(1, 2, width_ratios=[3, 2])

    def written(value: float, _: int | None) -> str:
        return f"{'≤ ' if math.isclose(value, float(norm.vmin or 0)) else ''}{value:g}"  # negative maxima included

    axis.set_label("scale")
    room.set_axis_off()
    bar = part.colorbar(ScalarMappable(norm, _COLOURS), cax=axis, orientation="horizontal", extend="min")
    bar.locator, bar.formatter = LogLocator(subs=(1.0, 3.0)), FuncFormatter(written)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
    for index, tau in enumerate(taus):
        axis.axvline(tau, color="white", linewidth=3)
        axis.axvline(tau, color=INK, linewidth=1.2)
        axis.annotate(f"{'' if index else 'τ = '}{tau:g}", (tau, 1), (0, 3), **where)
    if marked:
        room.plot([0, 0.08], [0.5, 0.5], color=_CLIPPED, linewidth=2)
        room.annotate("the clip rescaled the head", (0.1, 0.5), va="center", color=QUIET)
        room.set(xlim=(0, 1), ylim=(0, 1))
