"""Panels from options to results and pictures: what every command of the harness does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.execution import sharded_checkpoints as sharded_checkpoint
from benchmarks.execution.rank_runs import Nodes, run_together
from benchmarks.execution.worker import CONFIG, run_folder
from benchmarks.execution.workers import Job, locked, run_all
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Panel, Precision, differences
from benchmarks.records import atomic_files as checkpoint
from benchmarks.records import summary
from benchmarks.records.environment import available_cores, environment
from benchmarks.training import precision
from benchmarks.training.precision import PrecisionChoice
from benchmarks.training.run import EVERY_20_SECONDS, Checkpoints

Settled = tuple[Panel, dict[str, Any]]
"""A panel with its precision decided, and the environment of its first start."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How the work is done; nothing here changes a number of the result."""

    out: Path
    jobs: int | None = None  # runs side by side; None: one per core
    precision: PrecisionChoice | Precision = "auto"  # "auto" decides at the first start; then what is recorded counts
    checkpoints: Checkpoints = EVERY_20_SECONDS
    nodes: Nodes | None = None  # under torchrun: all ranks on one run at a time


def run_panels(panels: Sequence[Panel], corpus: Corpus, execution: Execution) -> list[summary.PanelResult]:
    """Train, summarise, draw: `train_panels`, then one picture and one page of all in `out`."""
    results = train_panels(panels, corpus, execution)
    if not results:
        return results
    from benchmarks.report import head_maps as heads
    from benchmarks.report import page as report  # what they import costs seconds, and only who draws should pay
    from benchmarks.report import plots as plot

    plot.draw(results, execution.out / "curves.png")

    heads.draw(results, execution.out / "heads.png")
    report.write(results, execution.out / "report.html")
    return results


def train_panels(panels: Sequence[Panel], corpus: Corpus, execution: Execution) -> list[summary.PanelResult]:
    """Every panel has the folder of its name inside `out`, and there its runs and its summary.json.

    Under torchrun the first rank alone writes there and has the results; the others return none.
    Raises UsageError where `out` cannot be used or holds a panel with other options.
    """
    if execution.nodes is not None:
        return _train_on_nodes(panels, corpus, execution, execution.nodes)
    out = execution.out
    _make_folder(out)
    folders = [out / panel.name for panel in panels]
    with locked(out) as lock:
        settled = [_settle(panel, corpus, folder, execution) for panel, folder in zip(panels, folders, strict=True)]
        jobs = _jobs(settled, folders)
        side_by_side = 1 if panels[0].device == "cuda" else max(1, available_cores() // panels[0].threads)
        workers = execution.jobs or side_by_side
        _refuse_runs_of_nodes(jobs)
        run_all(jobs, workers=workers, lock=lock, checkpoints=execution.checkpoints)
        return _collect(settled, folders)


def _train_on_nodes(
    panels: Sequence[Panel], corpus: Corpus, execution: Execution, nodes: Nodes
) -> list[summary.PanelResult]:
    ranks, folders = nodes.ranks, [execution.out / panel.name for panel in panels]
    with contextlib.ExitStack() as held:

        def settle() -> list[Settled]:
            _make_folder(execution.out)
            held.enter_context(locked(execution.out))
            return [_settle(panel, corpus, folder, execution) for panel, folder in zip(panels, folders, strict=True)]

        for panel in panels:
            nodes.layout.check(panel, ranks.size)
        settled = ranks.on_first(settle)
        ranks.announce(execution.out)
        jobs = _jobs(settled, folders)
        run_together(jobs, corpus, nodes, execution.checkpoints)
        return _collect(settled, folders) if ranks.first else []


def _jobs(settled: Sequence[Settled], folders: Sequence[Path]) -> list[Job]:
    return [
        Job(panel, folder, arm, seed)
        for (panel, _), folder in zip(settled, folders, strict=True)
        for arm, seed in panel.runs()
    ]


def _collect(settled: Sequence[Settled], folders: Sequence[Path]) -> list[summary.PanelResult]:
    results = [
        summary.collect(panel, folder, recorded) for (panel, recorded), folder in zip(settled, folders, strict=True)
    ]
    for result, folder in zip(results, folders, strict=True):
        checkpoint.write_json(folder / "summary.json", summary.to_json(result))
    return results


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", f"{out} cannot be made a folder: {error.strerror}.") from error


def _refuse_runs_of_nodes(jobs: Sequence[Job]) -> None:
    for job in jobs:
        begun = run_folder(job.folder, job.arm, job.seed) / sharded_checkpoint.FOLDER
        if begun.exists() and not job.finished:
            raise UsageError(
                "--out",
                f"{begun} is of a run under torchrun that is not finished. Go on there with torchrun, on any number of "
                "processes (--nproc-per-node 1 is enough), or choose another folder.",
            )


def _settle(panel: Panel, corpus: Corpus, folder: Path, execution: Execution) -> Settled:
    """Recorded in the folder at its first start."""
    folder.mkdir(exist_ok=True)
    config = folder / CONFIG
    if config.exists():
        recorded = json.loads(config.read_text())
        decided = Precision(**recorded["config"]["precision"])
        if execution.precision != "auto":
            decided, _ = precision.choose(panel, corpus, execution.precision)
        panel = replace(panel, precision=decided)
        if lines := differences(recorded["config"], panel.to_json()):
            raise UsageError(
                "--out",
                f"{folder} holds runs with other options; choose another folder, or remove it to start again:\n  "
                + "\n  ".join(lines),
            )
        return panel, recorded["environment"]
    decided, measured = precision.choose(panel, corpus, execution.precision)
    panel = replace(panel, precision=decided)
    recorded = environment(panel.device, panel.framework) | {"precision_probe": measured}
    if execution.nodes is not None:
        recorded |= {"world_size": execution.nodes.ranks.size, "layout": execution.nodes.layout.to_json()}
    checkpoint.write_json(config, {"config": panel.to_json(), "environment": recorded})
    return panel, recorded
