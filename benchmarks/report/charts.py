"""Charts before they are drawn, by pictures and page: lines over the steps, and maps of every head.

A chart is made from the records of an experiment, once; `plots` and `head_maps` draw it with Matplotlib, `page` with
Plotly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.run_records import Frame, RunRecords
from benchmarks.records.summary import Results, bits

SMOOTHING = 25  # steps
Floats = NDArray[np.float64]
Kind = Literal["seed", "mean", "marks"]


@dataclass(frozen=True, slots=True)
class Line:
    """Points of an arm: one seed's, the mean over seeds, or marks without a line."""

    arm: str
    colour: str
    kind: Kind
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
    disturbed: tuple[float, float] | None = None  # the first and the last of the steps that were disturbed


class Quantity(NamedTuple):
    """A column of `RunRecords.steps`, and how it is shown."""

    column: str
    title: str
    note: str
    smoothed: bool = False


QUANTITIES = (
    Quantity("max_logit", "Maximum attention logit", "over layers and heads"),
    Quantity("probe_loss", "Loss of a fixed held-out sample", "nats per token, after every update"),
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
    training = results.experiment.training
    disturbance, ends = training.disturbance, None
    if disturbance:
        ends = (disturbance.after + 1, min(disturbance.after + disturbance.steps, training.steps))
    made = (_chart(results, quantity, top) for quantity in quantities)
    return [replace(chart, disturbed=ends) for chart in made if chart.lines]


def quantities(*columns: str) -> tuple[Quantity, ...]:
    """Return those of these columns."""
    return tuple(quantity for quantity in QUANTITIES if quantity.column in columns)


def main_quantities(results: Results) -> tuple[Quantity, ...]:
    """Return the four that tell most: of the losses, that of a fixed sample where it was measured."""
    loss = "probe_loss" if results.experiment.training.probe_windows else "loss"
    return quantities("max_logit", loss, "val_loss", "clipped_heads")


def top_of_logits(results: Sequence[Results]) -> float:
    """Return the upper end of every axis and colour scale of logits, so that charts can be compared."""
    peaks = [run["max_logit_peak"] for result in results for runs in result.summaries.values() for run in runs.values()]
    taus = [arm.training.tau for result in results for arm in result.experiment.arms]
    return max([peak for peak in peaks if math.isfinite(peak)] + [2 * tau for tau in taus])


def floor_of_logits(tau: float) -> float:
    """Return where axes of logits begin: 1, or less where τ is small itself."""
    return min(1.0, tau / 10)


def thin(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """Keep at most so many points (4 or more): both ends, and the lowest and the highest of equal stretches."""
    if len(x) <= most:
        return x, y
    stretches = pd.Series(y).groupby(np.arange(len(y)) * ((most - 2) // 2) // len(y))
    at = np.unique([0, *stretches.idxmin(), *stretches.idxmax(), len(y) - 1])
    return x[at], y[at]


def spikes_of(arm: Arm, records: RunRecords) -> Frame:
    """Return the finite losses that spike, by step."""
    loss, training = records.steps["loss"], arm.training
    return loss[records.spikes(training.spike_window, training.spike_threshold) & np.isfinite(loss)]


def _chart(results: Results, quantity: Quantity, top: float) -> Chart:
    experiment, lines, means = results.experiment, list[Line](), list[Frame]()
    for arm in results.finished:
        curves = _curves(results.records[arm.name], quantity)
        if curves.shape[1] > 1:
            lines += [_line(arm, "seed", curves[seed]) for seed in curves]
        if curves.size:
            means.append(curves.dropna().mean(axis=1))  # a diverged run ends early, and the mean with it
            lines.append(_line(arm, "mean", means[-1], dashed=any(map(means[-1].equals, means[:-1]))))
    heads = experiment.model.num_layers * experiment.model.num_heads
    chart = Chart(quantity.title, quantity.note.format(unit=experiment.data.unit, heads=heads), tuple(lines))
    match quantity.column:
        case "max_logit":
            clipping = [arm for arm in results.finished if arm.clips] or results.finished
            taus = tuple(sorted({arm.training.tau for arm in clipping}))
            capped = ", before a soft cap" * any(arm.capped for arm in results.finished)
            low = min(map(floor_of_logits, taus), default=1.0)
            ends = (low, top * (top / low) ** 0.05)
            return replace(chart, note=chart.note + capped, log=True, y_range=ends, taus=taus)
        case "probe_loss":
            seen = [y for line in lines for y in line.y[line.x >= experiment.training.warmup_steps]]
            return replace(chart, y_range=(min(seen) - 0.05, max(seen) + 0.05) if seen else None)
        case "loss":
            runs = [(arm, records) for arm in results.finished for records in results.records[arm.name].values()]
            spikes = [line for of in runs if (line := _line(of[0], "marks", spikes_of(*of))).x.size]
            after = experiment.training.steps // 8  # the first drop would flatten all that follows
            seen = [y for line in lines + spikes for y in line.y[line.x >= after]]
            ends = (min(seen) - 0.15, max(seen) + 0.15) if seen else None
            note = chart.note + "; × spikes" * bool(spikes)
            return replace(chart, note=note, lines=(*lines, *spikes), y_range=ends)
        case "clipped_heads":
            return replace(chart, y_range=(-0.03 * heads, 1.03 * heads), whole=True)
    return chart


def _curves(runs: Mapping[int, RunRecords], quantity: Quantity) -> Frame:
    """Return a column for each seed that has values: finite, and above 0 where the axis is logarithmic."""
    values: Frame = pd.DataFrame({seed: records.steps[quantity.column] for seed, records in runs.items()})
    values = values.where(np.isfinite(values) & ((values > 0) | (quantity.column != "max_logit")))
    if quantity.column == "val_loss":
        values = bits(values)
    if quantity.smoothed:
        values = values.rolling(SMOOTHING, min_periods=1).mean().mask(values.isna())
    return values.dropna(how="all").dropna(how="all", axis=1)


def _line(arm: Arm, kind: Kind, values: Frame, *, dashed: bool = False) -> Line:
    values = values.dropna()
    return Line(arm.name, arm.colour, kind, values.index.to_numpy(np.float64), values.to_numpy(), dashed)


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
    every = pd.RangeIndex(1, experiment.steps + 1)
    maxima, clipped = records.heads["max_logits"].reindex(every), records.clipped(tau).reindex(every, fill_value=False)
    if not maxima.columns.size:  # no step had finite logits
        maxima = pd.DataFrame(math.nan, every, [("", head) for head in range(experiment.model.num_heads)])
        clipped = maxima.notna()
    attentions = list(dict.fromkeys(attention for attention, _ in maxima))
    steps = math.ceil(len(every) / columns)
    heads = _divisor(maxima.shape[1] // len(attentions), math.ceil(maxima.shape[1] / rows))

    def binned(cells: Frame) -> NDArray[Any]:
        by_step = cells.set_axis(range(cells.shape[1]), axis=1).groupby((every - 1) // steps).max()
        return by_step.T.groupby(lambda head: head // heads).max().to_numpy()

    return HeadMap(binned(maxima), binned(clipped), [_layer(name) for name in attentions], steps, heads)


def _divisor(number: int, least: int) -> int:
    """Return the smallest divisor that is at least so large; the number itself where there is none."""
    return next((size for size in range(least, number) if number % size == 0), number)


def _layer(attention: str) -> str:
    """Shorten the name of an attention: `layers.2.attn` → "layer 2"."""
    number = re.search(r"\d+", attention)
    return f"layer {number[0]}" if number else attention
