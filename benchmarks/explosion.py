"""Panels from options to results and pictures: what every command of the harness does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, heads, plot, precision, report, summary
from benchmarks.data import Corpus
from benchmarks.environment import available_cores, environment
from benchmarks.errors import UsageError
from benchmarks.panel import Panel, Precision, differences
from benchmarks.precision import PrecisionChoice
from benchmarks.runner import Job, locked, run_all
from benchmarks.worker import CONFIG


@dataclass(frozen=True, slots=True)
class Execution:
    """How the work is done; nothing here changes a number of the result."""

    out: Path
    jobs: int | None = None  # runs side by side; None: one per core
    precision: PrecisionChoice | Precision = "auto"  # "auto" decides at the first start; then what is recorded counts
    checkpoint_seconds: float = 20.0


def run_panels(panels: Sequence[Panel], corpus: Corpus, execution: Execution) -> list[summary.PanelResult]:
    """Train, summarise, draw: `train_panels`, then one picture and one page of all in `out`."""
    results = train_panels(panels, corpus, execution)
    plot.draw(results, execution.out / "curves.png")

    heads.draw(results, execution.out / "heads.png")
    report.write(results, execution.out / "report.html")
    return results


def train_panels(panels: Sequence[Panel], corpus: Corpus, execution: Execution) -> list[summary.PanelResult]:
    """Every panel has the folder of its name inside `out`, and there its runs and its summary.json.

    Raises UsageError where `out` cannot be used or holds a panel with other options.
    """
    out = execution.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", f"{out} cannot be made a folder: {error.strerror}.") from error
    folders = [out / panel.name for panel in panels]
    with locked(out) as lock:
        settled = [_settle(panel, corpus, folder, execution) for panel, folder in zip(panels, folders, strict=True)]
        jobs = [
            Job(panel, folder, arm, seed)
            for (panel, _), folder in zip(settled, folders, strict=True)
            for arm, seed in panel.runs()
        ]
        side_by_side = 1 if panels[0].device == "cuda" else max(1, available_cores() // panels[0].threads)
        workers = execution.jobs or side_by_side
        run_all(jobs, workers=workers, lock=lock, checkpoint_seconds=execution.checkpoint_seconds)
        results = [
            summary.collect(panel, folder, recorded) for (panel, recorded), folder in zip(settled, folders, strict=True)
        ]
        for result, folder in zip(results, folders, strict=True):
            checkpoint.write_json(folder / "summary.json", summary.to_json(result))
    return results


def _settle(panel: Panel, corpus: Corpus, folder: Path, execution: Execution) -> tuple[Panel, dict[str, Any]]:
    """The panel with its precision decided, and the environment of its first start; recorded in the folder then."""
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
    checkpoint.write_json(config, {"config": panel.to_json(), "environment": recorded})
    return panel, recorded
