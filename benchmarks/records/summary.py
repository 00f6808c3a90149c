"""Summaries of runs from their records, and the results of an experiment: its finished runs with their summaries."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.errors import DamagedFile, UsageError
from benchmarks.experiment.experiment import Experiment
from benchmarks.records import atomic_files, metrics
from benchmarks.records.folders import CONFIG, METRICS, RESULT, Result, run_folder
from benchmarks.records.run_records import RunRecords, run_records


class RunSummary(TypedDict):
    """The summary of a run.

    Losses are in nats per token; bits per byte only where a token is a byte. Non-finite numbers: see `metrics`.
    """

    final_val_loss: float
    val_bits_per_byte: float | None
    max_logit_peak: float  # over steps and heads
    max_logit_median_last_quarter: float  # median over the last quarter of the steps of each step's maximum over heads
    clipped_head_steps: int  # clipped heads, summed over steps
    heads_ever_clipped: float  # share of all heads
    last_clipped_step: int | None  # None: no head was ever clipped
    loss_spikes: int  # steps; see `RunRecords.spikes`
    attention_entropy: float  # nats, mean over heads, at the end
    query_norm: float  # spectral norm of W_q, largest over heads, at the end
    key_norm: float
    update_rms: float  # median over the measured steps
    wall_seconds: float  # summed over the parts of an interrupted run
    tokens_per_second: float  # of the training steps, validation and checkpoints left out


@dataclass(frozen=True, slots=True)
class Results:
    """An experiment and its finished runs, by the arm's name and the seed."""

    experiment: Experiment
    records: dict[str, dict[int, RunRecords]]
    summaries: dict[str, dict[int, RunSummary]]
    environment: dict[str, Any] = field(default_factory=dict)  # what it was made with, recorded at the first start

    @property
    def missing(self) -> list[tuple[Arm, int]]:
        """The runs that are not finished."""
        return [(arm, seed) for arm, seed in self.experiment.runs() if seed not in self.summaries.get(arm.name, {})]

    @property
    def finished(self) -> list[Arm]:
        """The arms that have a finished run."""
        return [arm for arm in self.experiment.arms if self.summaries.get(arm.name)]

    def only(self, *names: str) -> Results:
        """Return the results of these arms alone."""
        chosen = tuple(choice for choice in self.experiment.chosen if choice.name in names)
        records = {name: runs for name, runs in self.records.items() if name in names}
        summaries = {name: runs for name, runs in self.summaries.items() if name in names}
        return Results(replace(self.experiment, chosen=chosen), records, summaries, self.environment)

    def to_json(self) -> dict[str, Any]:
        """Return what summary.json holds.

        `config.model_changes`: by arm, the fields of the model that it sets otherwise.
        """
        arms = {arm: {str(seed): run for seed, run in runs.items()} for arm, runs in self.summaries.items()}
        changes = {arm.name: arm.changes for arm in self.experiment.arms if arm.changes}
        config = self.experiment.to_json() | {"model_changes": changes}
        return metrics.to_json({"config": config, "environment": self.environment, "arms": arms})


def collect(experiment: Experiment, folder: Path, environment: dict[str, Any]) -> Results:
    """Read the finished runs of an experiment."""
    results = Results(experiment, {}, {}, environment)
    for arm in experiment.arms:
        for seed in experiment.seeds:
            run = run_folder(folder, arm.name, seed)
            if (run / RESULT).exists():
                ended, path = _read_result(run / RESULT), run / METRICS
                found = metrics.read(path) if path.exists() else []
                if not found or len(found) != ended["steps"]:
                    raise metrics.damaged(path, f"it has {len(found)} records of {ended['steps']} steps", path)
                for number, record in enumerate(found, 1):
                    for name, kind in (("loss", int | float), ("max_logits", dict)):
                        if not isinstance(record.get(name), kind):
                            raise metrics.damaged(f"{path}, line {number},", f"its {name} is not a measure", path)
                records = run_records(found)
                results.records.setdefault(arm.name, {})[seed] = records
                results.summaries.setdefault(arm.name, {})[seed] = summarise(experiment, arm, records, ended)
    return results


def read_folder(folder: Path) -> list[Results]:
    """Return the experiment of a folder, or those of its sub-folders, with the runs that are finished.

    Those without any are left out. Raises UsageError for a folder that holds no finished run, or not what this version
    wrote.
    """
    folders = [folder] if (folder / CONFIG).exists() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not folders:
        why = f"neither {CONFIG} nor a folder with one" if folder.is_dir() else "no such folder"
        raise UsageError("DIR", f"{folder} is not a folder of results ({why}). Name the --out of an earlier command.")
    results = [found for path in folders if (found := _read(path)).summaries]
    if not results:
        raise UsageError("DIR", f"{folder} holds no finished run yet. Let its command finish one, or start it again.")
    return results


def summarise(experiment: Experiment, arm: Arm, records: RunRecords, result: Result) -> RunSummary:
    training, model, steps = arm.training, experiment.model, records.steps
    maxima = steps["max_logit"].dropna()
    measured = [heads.dropna().tail(1).to_numpy().ravel().tolist() for heads in records.heads.values()][1:]
    entropies, query_norms, key_norms = measured
    acted = steps.index[steps["clipped_heads"] > 0]
    tokens = len(steps) * training.batch_size * model.max_seq_len
    return RunSummary(
        final_val_loss=result["final_val_loss"],
        val_bits_per_byte=bits(result["final_val_loss"]) if experiment.data.kind == "bytes" else None,
        max_logit_peak=maxima.max(),
        max_logit_median_last_quarter=maxima.tail(math.ceil(len(maxima) / 4)).median(),
        clipped_head_steps=int(steps["clipped_heads"].sum()),
        heads_ever_clipped=records.clipped(training.tau).any().sum() / (model.num_layers * model.num_heads),
        last_clipped_step=int(acted[-1]) if len(acted) else None,
        loss_spikes=int(records.spikes(training.spike_window, training.spike_threshold).sum()),
        attention_entropy=statistics.fmean(entropies or [math.nan]),
        query_norm=max(query_norms, default=math.nan),
        key_norm=max(key_norms, default=math.nan),
        update_rms=steps["update_rms"].median(),
        wall_seconds=round(result["wall_seconds"], 2),
        tokens_per_second=round(tokens / result["train_seconds"], 1),
    )


def bits(nats: Any) -> Any:
    """Convert losses per token to bits per token, or per byte where a token is one: the unit of `DataRecord.unit`."""
    return nats / math.log(2)


def _read(folder: Path) -> Results:
    path = folder / CONFIG
    try:
        recorded = json.loads(path.read_bytes())
        experiment, environment = Experiment.from_json(recorded["config"]), recorded["environment"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError("DIR", f"{path} is not a configuration that this version wrote ({error}).") from error
    return collect(experiment, folder, environment)


def _read_result(path: Path) -> Result:
    """Read how a run has ended. Raises DamagedFile for what is not a result."""
    again = f"Restore it, or remove it and start the command again: it goes on from the checkpoint in {path.parent}."
    result = metrics.from_json(atomic_files.read_json(path, again))
    if not isinstance(result, dict) or not Result.__required_keys__ <= result.keys():
        raise DamagedFile(path, "it is not the result of a run", again)
    for name, kind in (("steps", int), ("diverged", bool), ("final_val_loss", float), ("wall_seconds", float)):
        if type(result[name]) is not kind and not (kind is float and type(result[name]) is int):
            raise DamagedFile(path, f"its {name} is {result[name]!r}", again)
    return cast("Result", result)
