"""Finished runs from folders of results, without training anything: while a command runs there, or after it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.folders import CONFIG
from benchmarks.records.summary import Results, collect


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


def _read(folder: Path) -> Results:
    path = folder / CONFIG
    try:
        recorded = json.loads(path.read_text())
        experiment = Experiment.from_json(recorded["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("DIR", f"{path} is not a configuration that this version wrote ({error}).") from error
    return collect(experiment, folder, recorded["environment"])
