"""`python -m benchmarks report`: pictures and pages again from finished runs, and several folders side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.experiment.arms import label
from benchmarks.experiment.errors import UsageError
from benchmarks.records import load_results as stored
from benchmarks.records.load_results import COMPARISON
from benchmarks.records.summary import PanelResult
from benchmarks.report import head_maps as heads
from benchmarks.report import page as report
from benchmarks.report import plots as plot
from benchmarks.report import tensorboard


def redraw(folders: Sequence[Path], out: Path | None = None, *, events: bool = False) -> None:
    """Draw each folder's results into it; and those of all together into `out`, where that is given or they are
    several. `events` also writes files for TensorBoard. Raises UsageError before anything is written."""
    if events:
        tensorboard.require()
    if len(folders) > 1 and out is None:
        out = COMPARISON
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("DIR", "a folder is named twice.")
    if out is not None and out.resolve() in (folder.resolve() for folder in folders):
        raise UsageError("--out", f"{out} is one of the folders, and its own page would be lost; choose another.")
    results = {folder: stored.read_folder(folder) for folder in folders}
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError("--out", f"{out} cannot be made a folder: {error.strerror}.") from error
    for folder, found in results.items():
        _write(found, folder)
        for result in found:
            if events:
                tensorboard.write(result, folder / "tensorboard" / result.panel.name)
            for arm, seed in stored.missing(result):
                print(f"{folder}, {result.panel.title}: {label(arm)}, seed {seed}, is not finished.", file=sys.stderr)
        if events:
            print(f"events   {folder / 'tensorboard'}")
    if out is not None:
        titles = dict.fromkeys(result.panel.title for found in results.values() for result in found)
        named = [_named(result, folder, len(found)) for folder, found in results.items() for result in found]
        _write(named, out, title=" · ".join(titles))


def _write(results: Sequence[PanelResult], folder: Path, *, title: str | None = None) -> None:
    shown = [
        replace(
            result, panel=replace(result.panel, arms=tuple(arm for arm in result.panel.arms if arm in result.records))
        )
        for result in results
    ]
    plot.draw(shown, folder / "curves.png")
    heads.draw(shown, folder / "heads.png")
    report.write(results, folder / "report.html", title=title)
    print(f"report   {folder / 'report.html'}")


def _named(result: PanelResult, folder: Path, panels: int) -> PanelResult:
    """A title that tells the folders apart: the folder, and the panel where it has several."""
    title = str(folder) if panels == 1 else f"{folder}: {result.panel.title}"
    return replace(result, panel=replace(result.panel, title=title))
