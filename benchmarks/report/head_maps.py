"""The picture of every head: heat maps of maximum logits, heads grouped by layer over the steps, one map per arm.

Long runs and models of many heads are binned by the maximum (`charts.HeadMap`); the note under the maps says how much a
cell holds.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.summary import Results
from benchmarks.report.charts import HeadMap, head_map
from benchmarks.report.style import DPI, INK, QUIET, picture

_WIDTH = 10.8  # inches, as all below
_ROW, _LEAST = 0.15, 1.35  # height of a head's row, and of a map at least
_FRAME, _LINE, _AROUND = 0.54, 0.2, 1.0  # height around a map, of a line of titles, and around an experiment's maps
_MOST_ROWS = 512  # of a map
_MOST_COLUMNS = 1080  # of all maps side by side: each cell at least a pixel wide
_LEGIBLE = 0.08  # height of a row in which the marks of the clip can be seen,
_SEPARABLE = 0.03  # and of one next to which there is room for a line between layers
_TITLE = {1: 130, 2: 65, 3: 42}  # letters in a line, by columns
_COLOURS = colormaps["inferno"].with_extremes(bad="#DADADA")
_CLIPPED = "#7FE7FF"


@dataclass(frozen=True, slots=True)
class Map:
    """The first finished seed of an arm."""

    arm: Arm
    seed: int
    cells: HeadMap
    diverged_at: int | None

    @property
    def height(self) -> float:
        """The height of the map: each row at least a pixel."""
        rows = len(self.cells.values)
        return max(_LEAST, min(rows * _ROW, 2.4), 1.02 * rows / DPI)

    @property
    def row_height(self) -> float:
        return self.height / len(self.cells.values)

    def title(self, columns: int) -> str:
        """Return the caption, broken after commas and before brackets only."""
        kept = re.sub(r"(?<!,) (?!\()", "\N{NO-BREAK SPACE}", self.arm.caption)
        return textwrap.fill(kept, _TITLE[columns], break_on_hyphens=False).replace("\N{NO-BREAK SPACE}", " ")


def draw(results: Sequence[Results], path: Path) -> None:
    """Write the PNG: the first seed of every arm that has runs, one colour scale for all."""
    subjects = dict.fromkeys(result.experiment.subject for result in results)
    title = "\n".join(["Maximum attention logit of every head", *subjects])
    with picture(path, [result.environment for result in results], title, figsize=(_WIDTH, 1)) as figure:
        draw_maps(figure, results)


def draw_maps(figure: Figure, results: Sequence[Results]) -> None:
    """Set the figure's height and fill it. The maps are the axes labelled with their arm's name."""
    grids = [_grid(len(result.finished)) for result in results]
    shown = [maps(result, columns) for result, (_, columns) in zip(results, grids, strict=True)]
    taus = sorted({each.arm.training.tau for of in shown for each in of})
    norm = _norm([each.cells for of in shown for each in of], taus)
    heights = [
        rows * (_FRAME + _LINE * max(each.title(columns).count("\n") for each in of) + of[0].height) + _AROUND
        for (rows, columns), of in zip(grids, shown, strict=True)
    ]
    figure.set_figheight(sum(heights) + 1.4)
    parts = figure.subfigures(len(results) + 1, 1, height_ratios=[*heights, 0.75], squeeze=False)[:, 0]
    for part, result, of, grid in zip(parts, results, shown, grids, strict=False):
        _draw_experiment(part, result.experiment, of, norm, grid)
    marked = any(each.cells.clipped.any() and each.row_height >= _LEGIBLE for of in shown for each in of)
    _draw_scale(parts[-1], norm, taus, marked)


def maps(results: Results, columns: int) -> list[Map]:
    """Make the maps by arm, in cells small enough for so many maps next to each other."""
    made = []
    for arm in results.finished:
        seed = next(seed for seed in results.experiment.seeds if seed in results.records[arm.name])
        records, tau = results.records[arm.name][seed], arm.training.tau
        cells = head_map(records, results.experiment, tau, columns=_MOST_COLUMNS // columns, rows=_MOST_ROWS)
        made.append(Map(arm, seed, cells, records.diverged_at))
    return made


def _grid(arms: int) -> tuple[int, int]:
    columns = {1: 1, 2: 2, 4: 2}.get(arms, 3)
    return math.ceil(arms / columns), columns


def _norm(cells: Sequence[HeadMap], taus: Sequence[float]) -> LogNorm:
    """Return the colour scale: from 1 (less where all is far below it) to the largest maximum, and every τ inside."""
    finite = [cell.values[np.isfinite(cell.values)].max(initial=0) for cell in cells]
    top = max(*finite, 1.3 * max(taus))
    return LogNorm(min(1.0, top / 100), top, clip=True)


def _draw_experiment(
    part: SubFigure, experiment: Experiment, shown: Sequence[Map], norm: LogNorm, grid: tuple[int, int]
) -> None:
    part.suptitle(experiment.heading, x=0.01, ha="left", fontweight="bold", size=11.5)
    part.supxlabel(_note(experiment, shown), x=0.01, ha="left", size=10, color=QUIET)
    axes = part.subplots(*grid, squeeze=False, sharex=True, sharey=True)
    for position, (axis, each) in enumerate(zip(axes.flat, shown, strict=False)):
        axis.set_label(each.arm.name)
        _draw_map(axis, each, norm)
        axis.set_title(each.title(grid[1]), size=10.5, pad=9)
        axis.spines["top"].set(visible=True, color=each.arm.colour, linewidth=3, position=("outward", 3))
        if each.diverged_at is not None:
            _mark_end(axis, each.diverged_at, experiment.steps)
        if position + grid[1] >= len(shown):
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


def _draw_map(axis: Axes, shown: Map, norm: LogNorm) -> None:
    cells, (rows, columns) = shown.cells, shown.cells.values.shape
    in_layer, layers = rows // len(cells.layers), len(cells.layers)
    extent = (0.5, columns * cells.steps + 0.5, rows, 0)
    axis.imshow(cells.values, norm=norm, cmap=_COLOURS, aspect="auto", interpolation="nearest", extent=extent)
    axis.set_xlim(extent[:2])
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)  # they would cover the first step and the last head
    for layer in range(1, layers):
        if shown.row_height >= _SEPARABLE:
            axis.axhline(layer * in_layer, color="white", linewidth=1.2)
        else:  # next to the map: no line is thin enough to leave a row visible
            axis.axhline(layer * in_layer, -0.012, -0.002, color=QUIET, linewidth=0.5, clip_on=False)
    labelled = range(0, layers, 1 if layers <= 8 else 2 if layers <= 16 else 10)
    axis.yaxis.set_major_locator(FixedLocator([(layer + 0.5) * in_layer for layer in labelled]))
    axis.set_yticklabels([cells.layers[layer] for layer in labelled])
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if shown.row_height >= _LEGIBLE:
        axis.add_collection(LineCollection(_marks(cells), colors=_CLIPPED, linewidths=1.1, capstyle="butt"))


def _mark_end(axis: Axes, step: int, longest: int) -> None:
    side, shift = ("right", -5) if step > 0.7 * longest else ("left", 5)
    axis.axvline(step, color=INK, linewidth=1)
    axis.annotate(
        "diverged", (step, 0.5), (shift, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha=side, va="center", size=9.5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )  # fmt: skip


def _marks(cells: HeadMap) -> list[list[tuple[float, float]]]:
    """Draw a line along the foot of the row through each stretch of clipped cells."""
    lines = []
    for row, clipped in enumerate(cells.clipped):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], clipped, [False])).astype(np.int8)))
        for ends in edges.reshape(-1, 2).tolist():
            lines.append([(0.5 + end * cells.steps, row + 0.8) for end in ends])
    return lines


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
