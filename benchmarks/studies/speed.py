"""The speed of MuonClip next to every other implementation that is installed: `python -m benchmarks speed`.

Five parts, saved row by row and measured anew by name: `sets` and `others`, updates of frozen shapes; `compiled`, the
sets once more, with the peers that compile, which takes them minutes per set; `steps`, whole training steps; `jax`,
next to `optax.contrib.muon`. The page is written from the JSON file, between two marks; none of its numbers is typed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.execution.train import make_folder
from benchmarks.experiment.errors import UsageError
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.studies import speed_sets, speed_steps, speed_updates
from benchmarks.studies.speed_peers import PEERS, versions
from benchmarks.studies.templates import render, write_between_marks

Rows = Iterator[dict[str, Any]]
FILE = "cpu.json"


def run(options: argparse.Namespace) -> None:
    """Measure the parts that are asked for, or write what was measured into a page."""
    written: Path = options.out / FILE
    if options.page is None:
        measure(options, written)
    elif not written.exists():
        raise UsageError("--page", f"needs {written}, which the same command without --page measures.")
    result = atomic_files.read_record(written, "parts")
    if options.page is not None:
        write_between_marks(options.page, read_speed(result))
    else:
        print(read_speed(result))
        print(f"figures  {written}", file=sys.stderr)


def read_speed(result: Mapping[str, Any]) -> str:
    """Write the sections, one for each part that was measured, from the object that the JSON file holds."""
    parts = {
        name: dict(part, rows=[_with_facts(row) for row in part["rows"]]) for name, part in result["parts"].items()
    }
    parts = {name: part for name, part in parts.items() if part["rows"]}
    return render("speed.md", parts=parts, peers=list(PEERS), of_set=speed_updates.facts, of_step=speed_steps.facts)


def _with_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Add the medians of a row, and the peers that are faster in it."""
    medians = {name: statistics.median(of) for name, of in row.get("seconds", {}).items()}
    return {**row, "medians": medians, "faster_peers": speed_updates.facts(row)["faster"] if "memory" in row else {}}


def measure(options: argparse.Namespace, written: Path) -> None:
    make_folder(options.out)
    for part in options.parts:
        made_with = environment(framework="jax" if part == "jax" else "torch")
        made_with |= {"peers": versions(), "rounds": options.rounds}
        rows: list[dict[str, Any]] = []
        for row in PARTS[part](options):
            rows.append(row)
            result = atomic_files.read_record(written, "parts") if written.exists() else {"parts": {}}
            result["parts"][part] = {"environment": made_with, "rows": rows}
            atomic_files.write_json(written, result)


def _updates(options: argparse.Namespace, sets: Mapping[str, speed_sets.Weights], *, compiled: bool) -> Rows:
    for threads in options.threads:
        for name, made in (speed_sets.TINY if options.quick else sets).items():
            weights = speed_sets.weights_of(made)
            yield speed_updates.compare(name, weights, threads, options.rounds, compiled=compiled, tell=_tell)


def _sets(options: argparse.Namespace) -> Rows:
    return _updates(options, speed_sets.SETS, compiled=False)


def _compiled(options: argparse.Namespace) -> Rows:
    return _updates(options, speed_sets.SETS, compiled=not options.quick)


def _others(options: argparse.Namespace) -> Rows:
    return _updates(options, speed_sets.OTHERS, compiled=options.long)


def _steps(options: argparse.Namespace) -> Rows:
    cases = speed_steps.TINY if options.quick else speed_steps.CASES + (speed_steps.LONG if options.long else ())
    for case in cases:
        for dtype in ("float32", "bfloat16"):
            yield speed_steps.train(case, dtype, options.threads[0], options.rounds, _tell)


def _jax(options: argparse.Namespace) -> Rows:
    if any(importlib.util.find_spec(package) is None for package in ("jax", "optax")):
        return iter(())
    from benchmarks.studies.optax_speed import SHAPES, compare

    return compare(((2, 4, 6),) if options.quick else (*SHAPES["cpu"], (2, 1024, 1024)), options.rounds)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "sets": _sets,
    "compiled": _compiled,
    "others": _others,
    "steps": _steps,
    "jax": _jax,
}
