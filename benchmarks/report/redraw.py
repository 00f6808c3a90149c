"""The command `python -m benchmarks report`: pictures and pages from finished runs, and several folders compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.experiment.errors import UsageError
from benchmarks.records.summary import Results, read_folder
from benchmarks.report import head_maps, page, plots, tensorboard

COMPARISON = Path("comparison")  # in the current folder: a comparison belongs to none of the folders it compares


def redraw(folders: Sequence[Path], out: Path | None = None, *, events: bool = False) -> None:
    """Draw each folder's results into it, and those of all together into `out`.

    The latter where `out` is given or they are several. `events` also writes files for TensorBoard. Raises UsageError
    before anything is written.
    """
    if events:
        tensorboard.require()
    if len(folders) > 1 and out is None:
        out = COMPARISON
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("DIR", "a folder is named twice.")
    if out is not None and out.resolve() in (folder.resolve() for folder in folders):
        raise UsageError("--out", f"{out} is one of the folders, and its own page would be lost; choose another.")
    results = {folder: read_folder(folder) for folder in folders}
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError("--out", f"{out} cannot be made a folder: {error.strerror}.") from error
    for folder, found in results.items():
        draw(found, folder)
        for result in found:
            if events:
                tensorboard.write(result, folder / "tensorboard" / result.experiment.name)
            for arm, seed in result.missing:
                print(
                    f"{folder}, {result.experiment.title}: {arm.label}, seed {seed}, is not finished.", file=sys.stderr
                )
        if events:
            print(f"events   {folder / 'tensorboard'}")
    if out is not None:
        titles = dict.fromkeys(result.experiment.title for found in results.values() for result in found)
        named = [_named(result, folder, len(found)) for folder, found in results.items() for result in found]
        draw(named, out, title=" · ".join(titles))


def draw(results: Sequence[Results], folder: Path, *, title: str | None = None) -> None:
    """Write curves.png, heads.png and report.html of all, next to each other where they are several.

    summary.png and summary-dark.png are of the first and the last.
    """
    plots.draw(results, folder / "curves.png")
    for name, dark in (("summary.png", False), ("summary-dark.png", True)):
        plots.draw_summary(results, folder / name, dark=dark)
    head_maps.draw(results, folder / "heads.png")
    page.write(results, folder / "report.html", title=title)
    print(f"report   {folder / 'report.html'}")


def _named(result: Results, folder: Path, experiments: int) -> Results:
    """Give a title that distinguishes the folders: the folder, and the experiment where it has several."""
    title = str(folder) if experiments == 1 else f"{folder}: {result.experiment.title}"
    return replace(result, experiment=replace(result.experiment, title=title))
