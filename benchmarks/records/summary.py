"""What a run's records come to, and the table of a panel."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.execution.worker import run_folder
from benchmarks.experiment.arms import appearance, model_changes, setup
from benchmarks.experiment.experiment import Panel
from benchmarks.records import metrics
from benchmarks.training.run import METRICS, RESULT, Result

Record = dict[str, Any]


class RunSummary(TypedDict):
    """Losses in nats per token; bits per byte only where a token is a byte. Non-finite numbers: see `metrics`."""

    final_val_loss: float
    val_bits_per_byte: float | None
    max_logit_peak: float  # over steps and heads
    max_logit_median_last_quarter: float  # median over the last quarter of the steps of each step's maximum over heads
    clipped_head_steps: int  # clipped heads, summed over steps
    heads_ever_clipped: float  # share of all heads
    last_clipped_step: int | None  # None: no head was ever clipped
    loss_spikes: int  # steps; see `spikes`
    attention_entropy: float  # nats, mean over heads, at the end
    query_norm: float  # spectral norm of W_q, largest over heads, at the end
    key_norm: float
    update_rms: float  # median over the measured steps
    wall_seconds: float  # summed over the parts of an interrupted run
    tokens_per_second: float  # of the training steps, validation and checkpoints left out


@dataclass(frozen=True, slots=True)
class PanelResult:
    panel: Panel
    records: dict[str, dict[int, list[Record]]]  # by arm and seed
    summaries: dict[str, dict[int, RunSummary]]
    environment: dict[str, Any] = field(default_factory=dict)  # what it was made with, recorded at the first start


def collect(panel: Panel, folder: Path, environment: dict[str, Any]) -> PanelResult:
    """Read the finished runs of a panel."""
    records: dict[str, dict[int, list[Record]]] = {}
    summaries: dict[str, dict[int, RunSummary]] = {}
    for arm in panel.arms:
        for seed in panel.seeds:
            run = run_folder(folder, arm, seed)
            if (run / RESULT).exists():
                records.setdefault(arm, {})[seed] = metrics.read(run / METRICS)
                result: Result = metrics.from_json(json.loads((run / RESULT).read_text()))
                summaries.setdefault(arm, {})[seed] = summarise(panel, arm, records[arm][seed], result)
    return PanelResult(panel, records, summaries, environment)


def summarise(panel: Panel, arm: str, records: Sequence[Record], result: Result) -> RunSummary:
    training, model = setup(panel, arm).training, panel.model
    measured = [record for record in records if "update_rms" in record]
    maxima = [maximum for maximum in map(max_logit, records) if maximum is not None]
    tokens = len(records) * training.batch_size * panel.model.max_seq_len
    spiking = spikes([record["loss"] for record in records], training.spike_window, training.spike_threshold)
    return RunSummary(
        final_val_loss=result["final_val_loss"],
        val_bits_per_byte=result["final_val_loss"] / math.log(2) if panel.data.kind == "bytes" else None,
        max_logit_peak=max(maxima, default=math.nan),
        max_logit_median_last_quarter=statistics.median(maxima[-math.ceil(len(maxima) / 4) :]) if maxima else math.nan,
        clipped_head_steps=sum(record["clipped_heads"] for record in records),
        heads_ever_clipped=len(ever_clipped(records, training.tau)) / (model.num_layers * model.num_heads),
        last_clipped_step=max((record["step"] for record in records if record["clipped_heads"]), default=None),
        loss_spikes=len(spiking),
        attention_entropy=statistics.fmean(_heads(measured[-1:], "attention_entropy") or [math.nan]),
        query_norm=max(_heads(measured[-1:], "query_norms"), default=math.nan),
        key_norm=max(_heads(measured[-1:], "key_norms"), default=math.nan),
        update_rms=statistics.median([record["update_rms"] for record in measured] or [math.nan]),
        wall_seconds=round(result["wall_seconds"], 2),
        tokens_per_second=round(tokens / result["train_seconds"], 1),
    )


def _heads(records: Sequence[Record], field: str) -> list[float]:
    return [value for record in records for heads in record[field].values() for value in heads]


def max_logit(record: Record) -> float | None:
    """The step's maximum over layers and heads; None for a step whose loss was not finite."""
    return max((logit for heads in record["max_logits"].values() for logit in heads), default=None)


def ever_clipped(records: Sequence[Record], tau: float) -> set[tuple[str, int]]:
    """(attention, head) of those clipped at any step: where an arm clips, all heads above τ are, and no others."""
    return {
        (attention, head)
        for record in records
        if record["clipped_heads"]
        for attention, heads in record["max_logits"].items()
        for head, logit in enumerate(heads)
        if logit > tau
    }


def spikes(losses: Sequence[float], window: int, threshold: float) -> list[int]:
    """Indices where a loss is not finite or exceeds the median of the `window` losses before it by `threshold` nats."""
    return [
        index
        for index, loss in enumerate(losses)
        if not math.isfinite(loss)
        or (index >= window and loss > statistics.median(losses[index - window : index]) + threshold)
    ]


def to_json(result: PanelResult) -> dict[str, Any]:
    """What summary.json holds; `config.model_changes`: by arm, the fields of the model that it sets otherwise."""
    arms = {arm: {str(seed): run for seed, run in runs.items()} for arm, runs in result.summaries.items()}
    changes = {arm: changed for arm in result.panel.arms if (changed := model_changes(result.panel, arm))}
    config = result.panel.to_json() | {"model_changes": changes}
    return metrics.to_json({"config": config, "environment": result.environment, "arms": arms})


def rows(result: PanelResult) -> list[tuple[str, ...]]:
    """The head of the table and a row per finished run; bits are per byte, per token for token ids."""
    panel = result.panel
    bits = "bits/byte" if panel.data.kind == "bytes" else "bits/token"
    head = (
        "arm",
        "seed",
        "rate",
        "val loss",
        bits,
        "peak logit",
        "last quarter",
        "clips",
        "spikes",
        "tokens/s",
        "time",
    )
    lines: list[tuple[str, ...]] = [head]
    looks = appearance(panel)
    for arm, seed in panel.runs():
        run = result.summaries.get(arm, {}).get(seed)
        if run is None:
            continue
        lines.append(
            (
                looks[arm].label,
                str(seed),
                f"{setup(panel, arm).lr:g}",
                f"{run['final_val_loss']:.3f}",
                f"{run['final_val_loss'] / math.log(2):.3f}",
                f"{run['max_logit_peak']:.1f}",
                f"{run['max_logit_median_last_quarter']:.1f}",
                str(run["clipped_head_steps"]),
                str(run["loss_spikes"]),
                f"{run['tokens_per_second']:.0f}",
                f"{run['wall_seconds']:.0f} s",
            )
        )
    return lines


def table(result: PanelResult) -> str:
    """The rows, then a line per arm that changes the model."""
    lines = rows(result)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([*text, "", *notes] if (notes := model_notes(result)) else text)


def model_notes(result: PanelResult) -> list[str]:
    """One line per arm that changes the model."""
    panel, looks = result.panel, appearance(result.panel)
    return [
        f"{looks[arm].label} changes the model: {', '.join(f'{name} = {value}' for name, value in changes.items())}"
        + ("; its logits are measured before the cap." if "softcap" in changes else ".")
        for arm in panel.arms
        if (changes := model_changes(panel, arm))
    ]
