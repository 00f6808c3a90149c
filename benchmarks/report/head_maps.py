"""The picture of every head: heat maps of maximum logits, heads grouped by layer over the steps, one map per arm.

A pixel cannot hold less than itself, so long runs and models of many heads are binned, and always by the maximum: one
step of one head above τ is what the clip acts on, and a mean would hide it. The note under the maps says how much a
cell holds.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, pyplot
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from benchmarks.experiment.arms import appearance, model_changes, setup
from benchmarks.experiment.experiment import Panel
from benchmarks.records.summary import PanelResult, Record
from benchmarks.report.style import DPI, INK, QUIET, STYLE, caption, save

_WIDTH = 10.8  # inches, as all below
_ROW, _LEAST = 0.15, 1.35  # height of a head's row, and of a map at least
_FRAME, _LINE, _AROUND = (
    0.54,
    0.2,
    1.0,
)  # height of what is above and below a map, of a line of titles, and of a panel's
_MOST_ROWS = 512  # of a map
_MOST_COLUMNS = 1080  # of all maps side by side: each cell at least a pixel wide
_LEGIBLE = 0.08  # height of a row in which the marks of the clip can be seen,
_SEPARABLE = 0.03  # and of one beside which a line between layers can stand
_TITLE = {1: 130, 2: 65, 3: 42}  # letters in a line, by columns
_COLOURS = colormaps["inferno"].with_extremes(bad="#DADADA")
_CLIPPED = "#7FE7FF"


class Cells(NamedTuple):
    """Maxima of a run by head and step, binned: `values[row, column]`, NaN where nothing was recorded."""

    values: NDArray[np.float64]
    clipped: NDArray[np.bool_]  # whether the clip rescaled a head of the cell
    layers: list[str]  # names, from the top
    steps: int  # of a cell
    heads: int  # of a cell


def draw(results: Sequence[PanelResult], path: Path) -> None:
    """Write the PNG: the first seed of every arm that has runs, one colour scale for all."""
    with pyplot.rc_context(STYLE):
        save(figure(results), path, [result.environment for result in results])


def figure(results: Sequence[PanelResult]) -> Figure:
    """The drawing itself. The maps are the axes labelled with their arm's name."""
    grids = [_grid(len(_runs(result))) for result in results]
    maps = [cells(result, columns) for result, (_, columns) in zip(results, grids, strict=True)]
    taus = sorted({setup(result.panel, arm).training.tau for result in results for arm, _ in _runs(result)})
    norm = _norm([cell for of in maps for cell in of], taus)
    heights = [
        rows * (_FRAME + _LINE * lines + _height(of[0])) + _AROUND
        for (rows, columns), of, result in zip(grids, maps, results, strict=True)
        for lines in [max(_title(result.panel, arm, columns).count("\n") for arm, _ in _runs(result))]
    ]
    drawn = pyplot.figure(figsize=(_WIDTH, sum(heights) + 1.4), layout="constrained")
    subjects = dict.fromkeys(result.panel.subject for result in results)
    drawn.suptitle("\n".join(["Maximum attention logit of every head", *subjects]), x=0.01, ha="left")
    parts = drawn.subfigures(len(results) + 1, 1, height_ratios=[*heights, 0.75], squeeze=False)[:, 0]
    for part, result, of, grid in zip(parts, results, maps, grids, strict=False):
        _draw_panel(part, result, of, norm, grid)
    marked = any(cell.clipped.any() and _shows_clips(cell) for of in maps for cell in of)
    _draw_scale(parts[-1], norm, taus, marked)
    return drawn


def cells(result: PanelResult, columns: int) -> list[Cells]:
    """By arm, the first seed's maxima in cells small enough for maps in so many columns side by side."""
    runs = [(result.records[arm][seed], setup(result.panel, arm).training) for arm, seed in _runs(result)]
    shape = {name: len(heads) for run, _ in runs for record in run for name, heads in record["max_logits"].items()}
    shape = shape or {"": result.panel.model.num_heads}  # no step had finite logits
    longest = max(training.steps for _, training in runs)
    return [_cells(run, shape, training.tau, columns, longest) for run, training in runs]


def _runs(result: PanelResult) -> list[tuple[str, int]]:
    """Of every arm that has runs the first."""
    first: dict[str, int] = {}
    for arm, seed in result.panel.runs():
        if seed in result.records.get(arm, {}):
            first.setdefault(arm, seed)
    return [(arm, first[arm]) for arm in result.panel.arms if arm in first]


def _cells(records: Sequence[Record], shape: dict[str, int], tau: float, columns: int, longest: int) -> Cells:
    per_layer = max(shape.values())
    values = np.full((len(shape), per_layer, longest), np.nan)
    acted = np.zeros(longest, dtype=bool)
    for record in records:
        for layer, name in enumerate(shape):
            heads = record["max_logits"].get(name, [])
            values[layer, : len(heads), record["step"] - 1] = heads
        acted[record["step"] - 1] = record["clipped_heads"] > 0
    clipped = acted & (values > tau)  # where the clip acts, it rescales all heads above τ and no others
    steps = math.ceil(longest / (_MOST_COLUMNS // columns))
    heads = _divisor(per_layer, math.ceil(len(shape) * per_layer / _MOST_ROWS))
    binned = _binned(_binned(values, heads, 1), steps, 2)
    marks = _binned(_binned(clipped.astype(np.float64), heads, 1), steps, 2) > 0
    rows = binned.shape[0] * binned.shape[1]
    return Cells(binned.reshape(rows, -1), marks.reshape(rows, -1), list(shape), steps, heads)


def _binned(values: NDArray[np.float64], size: int, axis: int) -> NDArray[np.float64]:
    """Maxima of `size` neighbours along the axis, NaN only where all of them are."""
    return np.fmax.reduceat(values, np.arange(0, values.shape[axis], size), axis=axis)


def _divisor(number: int, least: int) -> int:
    """The smallest divisor that is at least so large; the number itself where none is."""
    return next((size for size in range(least, number) if number % size == 0), number)


def _grid(arms: int) -> tuple[int, int]:
    columns = {1: 1, 2: 2, 4: 2}.get(arms, 3)
    return math.ceil(arms / columns), columns


def _height(cell: Cells) -> float:
    """Of a map: each row at least a pixel."""
    rows = len(cell.values)
    return max(_LEAST, min(rows * _ROW, 2.4), 1.02 * rows / DPI)


def _shows_clips(cell: Cells) -> bool:
    return _height(cell) / len(cell.values) >= _LEGIBLE


def _norm(maps: Sequence[Cells], taus: Sequence[float]) -> LogNorm:
    """From 1 (less where all is far below it) to the largest maximum, and every τ inside."""
    finite = [cell.values[np.isfinite(cell.values)].max(initial=0) for cell in maps]
    top = max(*finite, 1.3 * max(taus))
    return LogNorm(min(1.0, top / 100), top, clip=True)


def _draw_panel(
    part: SubFigure, result: PanelResult, maps: Sequence[Cells], norm: LogNorm, grid: tuple[int, int]
) -> None:
    panel, looks, runs = result.panel, appearance(result.panel), _runs(result)
    part.suptitle(panel.heading, x=0.01, ha="left", fontweight="bold", size=11.5)
    part.supxlabel(_note(panel, runs, maps[0]), x=0.01, ha="left", size=10, color=QUIET)
    axes = part.subplots(*grid, squeeze=False, sharex=True, sharey=True)
    longest = max(setup(panel, arm).training.steps for arm, _ in runs)
    for position, (axis, (arm, seed), cell) in enumerate(zip(axes.flat, runs, maps, strict=False)):
        axis.set_label(arm)
        _draw_map(axis, cell, norm)
        axis.set_title(_title(panel, arm, grid[1]), size=10.5, pad=9)
        axis.spines["top"].set(visible=True, color=looks[arm].colour, linewidth=3, position=("outward", 3))
        if not math.isfinite(result.records[arm][seed][-1]["loss"]):
            _mark_end(axis, result.records[arm][seed][-1]["step"], longest)
        if position + grid[1] >= len(runs):
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)


def _note(panel: Panel, runs: Sequence[tuple[str, int]], cell: Cells) -> str:
    shown = sorted({seed for _, seed in runs})
    seeds = f"seed {shown[0]}" if len(shown) == 1 else "the first finished seed of each"
    if len(panel.seeds) > 1:
        seeds += f" (of {', '.join(map(str, panel.seeds))})"
    sizes = [f"{size} {what}" for size, what in ((cell.steps, "steps"), (cell.heads, "heads")) if size > 1]
    binned = f"a cell is the maximum over {' and '.join(sizes)}" if sizes else ""
    capped = "before a soft cap" if any("softcap" in model_changes(panel, arm) for arm, _ in runs) else ""
    return " · ".join(filter(None, (seeds, binned, capped)))


def _title(panel: Panel, arm: str, columns: int) -> str:
    """Broken after commas and before brackets alone."""
    kept = re.sub(r"(?<!,) (?!\()", "\N{NO-BREAK SPACE}", caption(panel, arm))
    return textwrap.fill(kept, _TITLE[columns], break_on_hyphens=False).replace("\N{NO-BREAK SPACE}", " ")


def _draw_map(axis: Axes, cell: Cells, norm: LogNorm) -> None:
    rows, columns = cell.values.shape
    in_layer = rows // len(cell.layers)
    extent = (0.5, columns * cell.steps + 0.5, rows, 0)
    axis.imshow(cell.values, norm=norm, cmap=_COLOURS, aspect="auto", interpolation="nearest", extent=extent)
    axis.set_xlim(extent[:2])
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)  # they would cover the first step and the last head
    every = 1 if len(cell.layers) <= 8 else 2 if len(cell.layers) <= 16 else 10
    labelled = range(0, len(cell.layers), every)
    for layer in range(1, len(cell.layers)):
        if _height(cell) / rows >= _SEPARABLE:
            axis.axhline(layer * in_layer, color="white", linewidth=1.2)
        else:  # beside the map: no line is thin enough to leave a row visible
            axis.axhline(layer * in_layer, -0.012, -0.002, color=QUIET, linewidth=0.5, clip_on=False)
    numbers = [re.sub(r"\D*(\d+).*", r"\1", name) for name in cell.layers]
    axis.yaxis.set_major_locator(FixedLocator([(layer + 0.5) * in_layer for layer in labelled]))
    axis.set_yticklabels([f"layer {numbers[layer]}" for layer in labelled])
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if _shows_clips(cell):
        axis.add_collection(LineCollection(_marks(cell), colors=_CLIPPED, linewidths=1.1, capstyle="butt"))


def _mark_end(axis: Axes, step: int, longest: int) -> None:
    late = step > 0.7 * longest
    axis.axvline(step, color=INK, linewidth=1)
    axis.annotate(
        "diverged",
        (step, 0.5),
        (-5 if late else 5, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if late else "left",
        va="center",
        size=9.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )


def _marks(cell: Cells) -> list[list[tuple[float, float]]]:
    """A line along the foot of the row through each stretch of clipped cells."""
    lines = []
    for row, clipped in enumerate(cell.clipped):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], clipped, [False])).astype(np.int8)))
        for begin, end in edges.reshape(-1, 2).tolist():
            y = row + 0.8
            lines.append([(0.5 + begin * cell.steps, y), (0.5 + end * cell.steps, y)])
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
    for index, tau in enumerate(taus):
        axis.axvline(tau, color="white", linewidth=3)
        axis.axvline(tau, color=INK, linewidth=1.2)
        axis.annotate(
            f"{'' if index else 'τ = '}{tau:g}",
            (tau, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
        )
    if marked:
        room.plot([0, 0.08], [0.5, 0.5], color=_CLIPPED, linewidth=2)
        room.annotate("the clip rescaled the head", (0.1, 0.5), va="center", color=QUIET)
        room.set(xlim=(0, 1), ylim=(0, 1))
