"""Finished runs from folders of results, without training anything: while a command runs there, or after it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.execution.worker import CONFIG
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Panel
from benchmarks.records.summary import PanelResult, collect

COMPARISON = Path("comparison")  # in the current folder: a comparison belongs to none of the folders it compares


def read_folder(folder: Path) -> list[PanelResult]:
    """The panel of a folder, or those of its sub-folders, with the runs that are finished; panels without any are left
    out. Raises UsageError for a folder that holds no finished run, or not what this version wrote."""
    folders = [folder] if (folder / CONFIG).exists() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not folders:
        why = f"neither {CONFIG} nor a folder with one" if folder.is_dir() else "no such folder"
        raise UsageError("DIR", f"{folder} is no folder of results ({why}). Name the --out of an earlier command.")
    results = [result for path in folders if (result := _read_panel(path)).summaries]
    if not results:
        raise UsageError("DIR", f"{folder} holds no finished run yet. Let its command finish one, or start it again.")
    return results


def missing(result: PanelResult) -> list[tuple[str, int]]:
    """The runs of the panel that are not finished."""
    return [(arm, seed) for arm, seed in result.panel.runs() if seed not in result.summaries.get(arm, {})]


def _read_panel(folder: Path) -> PanelResult:
    path = folder / CONFIG
    try:
        recorded = json.loads(path.read_text())
        panel = Panel.from_json(recorded["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("DIR", f"{path} is not a configuration that this version wrote ({error}).") from error
    return collect(panel, folder, recorded["environment"])
