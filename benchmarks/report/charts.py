"""Charts before they are drawn, by pictures and page: lines over the steps, and maps of every head.

A chart is made from the records of an experiment, once; `plots` and `head_maps` draw it with Matplotlib, `page` with
Plotly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.run_records import RunRecords
from benchmarks.records.summary import Results, bits

SMOOTHING = 25  # steps
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Line:
    """Points of an arm: one seed's, the mean over seeds, or marks without a line."""

    arm: str
    colour: str
    kind: Literal["seed", "mean", "marks"]
    x: Floats
    y: Floats
    dashed: bool = False  # it coincides with an earlier one, so that both are seen


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    note: str
    lines: tuple[Line, ...]
    log: bool = False
    y_range: tuple[float, float] | None = None
    taus: tuple[float, ...] = ()  # drawn as thresholds
    whole: bool = False  # values are whole numbers


class Quantity(NamedTuple):
    """A column of `RunRecords.steps`, and how it is shown."""

    column: str
    title: str
    note: str
    smoothed: bool = False


QUANTITIES = (
    Quantity("max_logit", "Maximum attention logit", "over layers and heads"),
    Quantity("loss", "Train loss", f"nats per token, mean of {SMOOTHING} steps", smoothed=True),
    Quantity("val_loss", "Validation loss", "{unit}, after the update"),
    Quantity("clipped_heads", "Clipped heads", f"of {{heads}}, mean of {SMOOTHING} steps", smoothed=True),
    Quantity("attention_entropy", "Attention entropy", "nats, mean over queries, layers and heads"),
    Quantity("query_norm", "Query weights", "spectral norm of a head's rows of W_q, largest over layers and heads"),
    Quantity("key_norm", "Key weights", "spectral norm of a head's rows of W_k, largest over layers and heads"),
    Quantity("update_rms", "Update size", "root mean square of the change of the layers' matrices, by the rate"),
)


def charts(results: Results, top: float, quantities: Sequence[Quantity] = QUANTITIES) -> list[Chart]:
    """Make a chart for each quantity that was measured; `top` is where axes of logits end."""
    made = (_chart(results, quantity, top) for quantity in quantities)
    return [chart for chart in made if chart.lines]


def top_of_logits(results: Sequence[Results]) -> float:
    """Return the upper end of every axis and colour scale of logits, so that charts can be compared."""
    peaks = [run["max_logit_peak"] for result in results for runs in result.summaries.values() for run in runs.values()]
    taus = [arm.training.tau for result in results for arm in result.experiment.arms]
    return max([peak for peak in peaks if math.isfinite(peak)] + [2 * tau for tau in taus])


def floor_of_logits(tau: float) -> float:
    """Return where axes of logits begin: 1, or less where τ is small itself."""
    return min(1.0, tau / 10)


def thin(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """Keep at most so many points (4 or more), so that no peak is lost.

    These are the first, the last, and between them the lowest and the highest of equal stretches.
    """
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(1, len(x) - 1), (most - 2) // 2):
        kept |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    at = sorted(kept)
    return x[at], y[at]


def _chart(results: Results, quantity: Quantity, top: float) -> Chart:
    experiment, lines, means = results.experiment, list[Line](), list[Floats]()
    for arm in results.finished:
        curves = [_curve(records, quantity) for records in results.records[arm.name].values()]
        curves = [curve for curve in curves if curve.size]
        if not curves:
            continue
        if len(curves) > 1:
            lines += [Line(arm.name, arm.colour, "seed", *curve) for curve in curves]
        shortest = min(curve.shape[1] for curve in curves)  # a diverged run ends early, and the mean with it
        mean = np.mean([curve[:, :shortest] for curve in curves], axis=0)
        lines.append(Line(arm.name, arm.colour, "mean", *mean, dashed=any(np.array_equal(mean, m) for m in means)))
        means.append(mean)
    heads = experiment.model.num_layers * experiment.model.num_heads
    note = quantity.note.format(unit=experiment.data.unit, heads=heads)
    match quantity.column:
        case "max_logit":
            clipping = [arm for arm in results.finished if arm.clips] or results.finished
            taus = tuple(sorted({arm.training.tau for arm in clipping}))
            capped = ", before a soft cap" * any(arm.capped for arm in results.finished)
            low = min(map(floor_of_logits, taus), default=1.0)
            return Chart(quantity.title, note + capped, tuple(lines), True, (low, top * (top / low) ** 0.05), taus)
        case "loss":
            spikes = [line for arm in results.finished for line in _spikes(results, arm)]
            after = experiment.training.steps // 8  # the first drop would flatten all that follows
            seen = [y for line in lines + spikes for y in line.y[line.x >= after]]
            y_range = (min(seen) - 0.15, max(seen) + 0.15) if seen else None
            return Chart(quantity.title, note + "; × spikes" * bool(spikes), (*lines, *spikes), y_range=y_range)
        case "clipped_heads":
            return Chart(quantity.title, note, tuple(lines), y_range=(-0.03 * heads, 1.03 * heads), whole=True)
    return Chart(quantity.title, note, tuple(lines))


def _curve(records: RunRecords, quantity: Quantity) -> Floats:
    """Return [2, points]: the steps that have a finite value, above 0 where the axis is logarithmic, and the values."""
    values = records.steps[quantity.column].replace([np.inf, -np.inf], np.nan).dropna()
    if quantity.column == "max_logit":
        values = values[values > 0]
    if quantity.column == "val_loss":
        values = values.map(bits)
    if quantity.smoothed:
        values = values.rolling(SMOOTHING, min_periods=1).mean()
    return np.stack((values.index.to_numpy(np.float64), values.to_numpy(np.float64)))


def _spikes(results: Results, arm: Arm) -> list[Line]:
    training, lines = arm.training, []
    for records in results.records[arm.name].values():
        loss = records.steps["loss"]
        at = loss[records.spikes(training.spike_window, training.spike_threshold) & np.isfinite(loss)]
        if len(at):
            lines.append(Line(arm.name, arm.colour, "marks", at.index.to_numpy(np.float64), at.to_numpy()))
    return lines


class HeadMap(NamedTuple):
    """Maxima of a run by head and step, binned by their maximum.

    A pixel cannot hold less than itself, and one step of one head above τ is what the clip acts on, which a mean would
    hide.
    """

    values: Floats  # [rows, columns], NaN where nothing was recorded
    clipped: NDArray[np.bool_]  # whether the clip rescaled a head of the cell
    layers: list[str]  # names, from the top
    steps: int  # of a cell
    heads: int  # of a cell


def head_map(records: RunRecords, experiment: Experiment, tau: float, *, columns: int, rows: int) -> HeadMap:
    """Make a map with at most so many columns and, where layers can be divided so, rows."""
    maxima, longest = records.heads["max_logits"], experiment.steps
    layers = list(dict.fromkeys(maxima.columns.get_level_values(0))) or [""]
    per_layer = max(maxima.shape[1] // len(layers), 1)
    every = range(1, longest + 1)
    values = maxima.reindex(every).to_numpy(np.float64).T
    clipped = records.clipped(tau).reindex(every, fill_value=False).to_numpy(np.float64).T
    if not maxima.shape[1]:  # no step had finite logits
        per_layer = experiment.model.num_heads
        values, clipped = np.full((per_layer, longest), np.nan), np.zeros((per_layer, longest))
    steps = math.ceil(longest / columns)
    heads = _divisor(per_layer, math.ceil(len(values) / rows))
    binned, marks = (_binned(_binned(cells, heads, 0), steps, 1) for cells in (values, clipped))
    return HeadMap(binned, marks > 0, [_layer(name) for name in layers], steps, heads)


def _binned(values: Floats, size: int, axis: int) -> Floats:
    """Take the maxima of `size` neighbours along the axis, NaN only where all of them are."""
    return np.fmax.reduceat(values, np.arange(0, values.shape[axis], size), axis=axis)


def _divisor(number: int, least: int) -> int:
    """Return the smallest divisor that is at least so large; the number itself where there is none."""
    return next((size for size in range(least, number) if number % size == 0), number)


def _layer(attention: str) -> str:
    """Shorten the name of an attention: `layers.2.attn` → "layer 2"."""
    number = re.search(r"\d+", attention)
    return f"layer {number[0]}" if number else attention
