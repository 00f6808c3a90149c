"""The charts of the HTML report as plain data for Plotly; `report.js` gives them their colours and their size.

Every trace says in `meta` which arm it belongs to. Numbers have four significant digits and curves at most `POINTS`
points, so that the data stays small beside Plotly itself.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiment.arms import base_of, model_changes, setup
from benchmarks.records.summary import PanelResult, Record, max_logit, spikes
from benchmarks.report.curves import SMOOTHING, Curve, bits, curve, mean, smooth, thin
from benchmarks.report.verdicts import CLIPPING, unit_of

POINTS = 800  # of a curve
_COLUMNS, _CELLS = 240, 24_000  # of a heat map, at most
_SEED, _MEAN = {"width": 1}, {"width": 2.4}  # lines

Chart = dict[str, Any]  # title, note, and what `report.js` reads


def line_charts(result: PanelResult, colours: Mapping[str, str], largest_logit: float) -> list[Chart]:
    """One for each quantity that was measured; `largest_logit` is where the axis of the logits ends."""
    heads = result.panel.model.num_layers * result.panel.model.num_heads
    charts = [
        _max_logit(result, colours, largest_logit),
        _train_loss(result, colours),
        _chart(result, colours, "Validation loss", f"{unit_of(result.panel)}, after the update", bits),
        _chart(
            result,
            colours,
            "Clipped heads",
            f"of {heads}, mean of {SMOOTHING} steps",
            lambda record: record["clipped_heads"],
            change=smooth,
            axis={"range": [-0.03 * heads, 1.03 * heads]},
        ),
        _chart(
            result,
            colours,
            "Attention entropy",
            "nats, mean over queries, layers and heads",
            lambda record: _over_heads(record, "attention_entropy", statistics.fmean),
        ),
        _chart(
            result,
            colours,
            "Query weights",
            "spectral norm of a head's rows of W_q, largest over layers and heads",
            lambda record: _over_heads(record, "query_norms", max),
        ),
        _chart(
            result,
            colours,
            "Key weights",
            "spectral norm of a head's rows of W_k, largest over layers and heads",
            lambda record: _over_heads(record, "key_norms", max),
        ),
        _chart(
            result,
            colours,
            "Update size",
            "root mean square of the change of the layers' matrices, divided by the rate",
            lambda record: record.get("update_rms"),
        ),
    ]
    return [chart for chart in charts if chart["data"]]


def head_maps(result: PanelResult, labels: Mapping[str, str], largest_logit: float) -> list[Chart]:
    """The maximum logit of every head over the steps, one map per arm with all its seeds; cells hold maxima too."""
    maps: list[Chart] = []
    end = max(setup(result.panel, arm).training.steps for arm in result.panel.arms)
    for arm, runs in result.records.items():
        widths = {
            name: len(heads)
            for records in runs.values()
            for record in records
            for name, heads in record["max_logits"].items()
        }
        rows = [f"{name}, head {head}" for name, width in widths.items() for head in range(width)]
        if not rows:
            continue
        columns = min(_COLUMNS, max(1, _CELLS // len(rows)))
        bins = np.array_split(np.arange(end), min(columns, end))
        tau = setup(result.panel, arm).training.tau
        maps.append(
            {
                "kind": "heads",
                "title": labels[arm],
                "note": "before the soft cap" if "softcap" in model_changes(result.panel, arm) else "",
                "arm": arm,
                "tau": tau,
                "floor": _floor(tau),
                "top": largest_logit,
                "rows": rows,
                "layers": [[_layer(name), width] for name, width in widths.items()],
                "bins": [[int(steps[0]) + 1, int(steps[-1]) + 1] for steps in bins],
                "runs": {str(seed): _cells(records, widths, bins) for seed, records in runs.items()},
            }
        )
    return maps


def top_of_logits(results: Sequence[PanelResult]) -> float:
    """The upper end of every axis and colour scale of logits, so that charts can be compared."""
    peaks = [run["max_logit_peak"] for result in results for runs in result.summaries.values() for run in runs.values()]
    taus = [setup(result.panel, arm).training.tau for result in results for arm in result.panel.arms]
    return max([peak for peak in peaks if math.isfinite(peak)] + [2 * tau for tau in taus])


def _max_logit(result: PanelResult, colours: Mapping[str, str], top: float) -> Chart:
    clipping = [arm for arm in result.records if base_of(arm) in CLIPPING]
    taus = sorted({setup(result.panel, arm).training.tau for arm in clipping or result.panel.arms})
    capped = any("softcap" in model_changes(result.panel, arm) for arm in result.records)
    note = "the largest over layers and heads" + (", before a soft cap" if capped else "")
    low, high = math.log10(min(map(_floor, taus))), math.log10(top)
    chart = _chart(
        result,
        colours,
        "Maximum attention logit",
        note,
        # a logarithmic axis has no place for what is not above zero
        lambda record: logit if (logit := max_logit(record)) is not None and logit > 0 else None,
        axis={"type": "log", "range": [low, high + 0.05 * (high - low)]},
    )
    return chart | {"taus": taus}


def _train_loss(result: PanelResult, colours: Mapping[str, str]) -> Chart:
    crosses: list[dict[str, Any]] = []
    for arm, runs in result.records.items():
        training = setup(result.panel, arm).training
        for records in runs.values():
            losses = [record["loss"] for record in records]
            at = [
                i for i in spikes(losses, training.spike_window, training.spike_threshold) if math.isfinite(losses[i])
            ]
            points = np.array([[records[i]["step"], losses[i]] for i in at]).reshape(-1, 2).T
            if at:
                line = _trace(arm, colours, points, hoverinfo="skip")
                crosses.append(
                    line | {"mode": "markers", "marker": {"symbol": "x-thin", "size": 6, "line": {"width": 1}}}
                )
    note = f"nats per token, mean of {SMOOTHING} steps" + ("; × spikes" if crosses else "")
    chart = _chart(result, colours, "Train loss", note, lambda record: record["loss"], change=smooth)
    after = result.panel.training.steps // 8  # the first drop would flatten all that follows
    values = [y for trace in chart["data"] + crosses for x, y in zip(trace["x"], trace["y"], strict=True) if x >= after]
    if values:
        chart["layout"]["yaxis"]["range"] = [min(values) - 0.15, max(values) + 0.15]
    return chart | {"data": chart["data"] + crosses}


def _chart(
    result: PanelResult,
    colours: Mapping[str, str],
    title: str,
    note: str,
    value_of: Callable[[Record], float | None],
    *,
    change: Callable[[Curve], Curve] = lambda curve: curve,
    axis: Mapping[str, Any] | None = None,
) -> Chart:
    """Thin lines for seeds and a thick one for their mean; an arm that coincides with an earlier one is dashed."""
    data: list[dict[str, Any]] = []
    means: list[Curve] = []
    for arm, runs in result.records.items():
        curves = [change(found) for records in runs.values() if (found := curve(records, value_of)).size]
        if not curves:
            continue
        if len(curves) > 1:
            seeds = [_trace(arm, colours, thin(seed, POINTS), opacity=0.45, hoverinfo="skip") for seed in curves]
            data += [seed | _drawn(seed["x"], _SEED) for seed in seeds]
        bold = mean(curves)
        coincides = any(np.array_equal(bold, earlier) for earlier in means)
        line = _MEAN | {"dash": "6px,6px"} if coincides else _MEAN
        trace = _trace(arm, colours, thin(bold, POINTS))
        data.append(trace | _drawn(trace["x"], line))
        means.append(bold)
    steps = max(setup(result.panel, arm).training.steps for arm in result.panel.arms)
    layout = {"xaxis": {"range": [0, steps]}, "yaxis": dict(axis or {})}
    return {"kind": "lines", "title": title, "note": note, "data": data, "layout": layout}


def _drawn(steps: Sequence[int], line: Mapping[str, Any]) -> dict[str, Any]:
    """A line; a single point would not be seen as one."""
    if len(steps) > 1:
        return {"mode": "lines", "line": dict(line)}
    return {"mode": "markers", "marker": {"size": 3 * line["width"]}}


def _trace(arm: str, colours: Mapping[str, str], points: Curve, **more: Any) -> dict[str, Any]:
    steps, values = points
    trace = {"type": "scatter", "meta": {"arm": arm, "colour": colours[arm]}}
    return trace | {"x": [int(step) for step in steps], "y": [_rounded(value) for value in values]} | more


def _cells(
    records: Sequence[Record], widths: Mapping[str, int], bins: Sequence[NDArray[np.int_]]
) -> list[list[float | None]]:
    """Rows of maxima over the steps of each bin; None where nothing was measured."""
    steps = int(bins[-1][-1]) + 1
    values = np.full((sum(widths.values()), steps), -math.inf)
    for record in records:
        if record["max_logits"] and record["step"] <= steps:
            values[:, record["step"] - 1] = [logit for name in widths for logit in record["max_logits"][name]]
    starts = [int(of[0]) for of in bins]
    maxima = np.maximum.reduceat(np.where(np.isnan(values), -math.inf, values), starts, axis=1)
    return [[_rounded(value) if math.isfinite(value) else None for value in row] for row in maxima.tolist()]


def _over_heads(record: Record, field: str, reduce: Callable[[list[float]], float]) -> float | None:
    heads = [value for values in record.get(field, {}).values() for value in values]
    return reduce(heads) if heads else None


def _layer(attention: str) -> str:
    """`layers.2.attn` → "layer 2"."""
    number = re.search(r"\d+", attention)
    return f"layer {number[0]}" if number else attention


def _floor(tau: float) -> float:
    """Where axes of logits begin: 1, or less where τ is small itself."""
    return min(1.0, tau / 10)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
