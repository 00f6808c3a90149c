"""From experiments to their results: folders, locks, what was recorded at the first start, and the runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.execution.rank_runs import Team, run_together
from benchmarks.execution.workers import Job, locked, run_all
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Experiment, differences
from benchmarks.experiment.settings import Precision
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.records.folders import CHECKPOINTS, CONFIG, SUMMARY
from benchmarks.records.summary import Results, collect
from benchmarks.training import precision
from benchmarks.training.precision import PrecisionChoice
from benchmarks.training.run import Schedule
from muonclip.selftest import available_cores

Begun = tuple[Experiment, dict[str, Any]]
"""An experiment with its precision decided, and the environment of its first start."""


@dataclass(frozen=True, slots=True)
class Execution:
    """Options of how the work is done; nothing here changes a number of the result."""

    out: Path
    jobs: int | None = None  # runs side by side; None: one per core
    precision: PrecisionChoice | Precision = "auto"  # "auto" decides at the first start; then what is recorded counts
    checkpoints: Schedule = field(default_factory=Schedule)
    team: Team | None = None  # under torchrun: all ranks on one run at a time


def train(experiments: Sequence[Experiment], corpus: Corpus, execution: Execution) -> list[Results]:
    """Train experiments; each has the folder of its name inside `out`, and there its runs and its summary.json.

    Under torchrun the first rank alone writes there and has the results; the others return none. Raises UsageError
    where `out` cannot be used or holds an experiment with other options.
    """
    out, team = execution.out, execution.team
    with contextlib.ExitStack() as held:

        def begin() -> tuple[list[Begun], int]:
            make_folder(out)
            lock = held.enter_context(locked(out))
            return [_begin(experiment, corpus, out / experiment.name, execution) for experiment in experiments], lock

        if team is None:
            begun, lock = begin()
            jobs = _jobs(begun, out)
            for job in jobs:
                if not job.finished and (kept := job.run / CHECKPOINTS).exists():
                    raise UsageError(
                        "--out",
                        f"{kept} is of a run under torchrun that is not finished. Go on there with torchrun, on any "
                        "number of processes (--nproc-per-node 1 is enough), or choose another folder.",
                    )
            cores = available_cores() // experiments[0].threads
            side_by_side = 1 if experiments[0].device == "cuda" else max(1, cores)
            run_all(jobs, workers=execution.jobs or side_by_side, lock=lock, checkpoints=execution.checkpoints)
        else:
            for experiment in experiments:
                team.layout.check(experiment, team.ranks.size)
            begun, _ = team.ranks.on_first(begin)
            team.ranks.announce(out)
            run_together(_jobs(begun, out), corpus, team, execution.checkpoints)
            if not team.ranks.first:
                return []
        results = [collect(experiment, out / experiment.name, recorded) for experiment, recorded in begun]
        for result in results:
            atomic_files.write_json(out / result.experiment.name / SUMMARY, result.to_json())
        return results


def make_folder(out: Path) -> None:
    """Make the folder. Raises UsageError where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", f"{out} cannot be made a folder: {error.strerror}.") from error


def _jobs(begun: Sequence[Begun], out: Path) -> list[Job]:
    return [Job(each, out / each.name, arm, seed) for each, _ in begun for arm, seed in each.runs()]


def _begin(experiment: Experiment, corpus: Corpus, folder: Path, execution: Execution) -> Begun:
    """Record it in the folder at its first start, and compare it with what is recorded there later."""
    folder.mkdir(exist_ok=True)
    config = folder / CONFIG
    if config.exists():
        try:
            recorded = json.loads(config.read_bytes())
            decided, made = Precision(**recorded["config"]["precision"]), recorded["environment"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{config} is damaged, or of another version ({error!r}). Restore it, or choose another folder."
            raise UsageError("--out", message) from error
        if execution.precision != "auto":
            decided, _ = precision.choose(experiment, corpus, execution.precision)
        experiment = replace(experiment, precision=decided)
        if lines := differences(recorded["config"], experiment.to_json()):
            message = f"{folder} holds runs with other options; choose another folder, or remove it to start again:"
            raise UsageError("--out", "\n  ".join([message, *lines]))
        return experiment, made
    decided, measured = precision.choose(experiment, corpus, execution.precision)
    experiment = replace(experiment, precision=decided)
    made = environment(experiment.device, experiment.framework) | {"precision_probe": measured}
    if team := execution.team:
        made |= {"world_size": team.ranks.size, "layout": team.layout.to_json()}
    atomic_files.write_json(config, {"config": experiment.to_json(), "environment": made})
    return experiment, made
