"""The cost of QK-Clip, end to end: `clip_cost_bench` measures it; here are the facts and, by a template, the tables.

No number of the page is typed by hand: its tables are written between two marks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.execution.train import make_folder
from benchmarks.experiment.errors import UsageError
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.records.intervals import CONFIDENCE
from benchmarks.studies.clip_cost_bench import DTYPES, MODELS, PLANS, QUICK, REGIMES, TAU, Bench, Plan, build
from benchmarks.studies.host_time import FIRST_STEPS, MATRICES, QUICK_STEPS, first_steps, host_time, import_times
from benchmarks.studies.templates import render, write_between_marks
from benchmarks.training.timing import torch_threads

Json = Mapping[str, Any]


def run(options: argparse.Namespace) -> None:
    """Measure, or write what was measured into a page."""
    written = options.out / f"{options.device}.json"
    if options.page is not None:
        write_into(options.page, written)
        return
    if options.host or options.imports:
        _measure_host(written, imports_alone=not options.host)
        return
    with torch_threads(options.threads):
        result = _measure(
            options.models, options.device, QUICK if options.quick else PLANS[options.device], options.out
        )
    atomic_files.write_json(written, result)
    print(read_clip_cost(result))
    print(f"figures  {written}", file=sys.stderr)


def read_clip_cost(result: Json) -> str:
    """Write the sections, one for each regime, from the object that `DEVICE.json` holds."""
    regimes = {each.name: [cell for cell in result["cells"] if cell["regime"] == each.name] for each in REGIMES}
    names = {"MODELS": MODELS, "DTYPES": DTYPES, "MATRICES": MATRICES}
    return render("clip_cost.md", **result, **names, regimes=regimes, target_facts=target_facts, sources=_sources)


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """A regime's rows against its target: the range of their ratios and of the added operations, and which miss it."""

    target: float
    ratios: tuple[float, float]
    added: tuple[float, float]
    rows: int
    missed: tuple[str, ...]  # rows whose ratio is above the target, the worst first
    surely: int  # of these, those whose whole interval is


def target_facts(cells: Sequence[Json]) -> TargetFacts:
    target, worst_first = cells[0]["target"], sorted(cells, key=lambda cell: -cell["ratio"]["median"])
    ratios, added = ([cell[name]["median"] for cell in cells] for name in ("ratio", "added"))
    over = [cell for cell in worst_first if cell["ratio"]["median"] > target]
    surely = sum((cell["ratio"]["low"] or 0) > target for cell in over)
    return TargetFacts(
        target, (min(ratios), max(ratios)), (min(added), max(added)), len(cells), tuple(map(_name, over)), surely
    )


def write_into(page: Path, written: Path) -> None:
    """Put the sections between the marks of the page. Raises UsageError without marks, or what is to be written."""
    if not written.exists():
        raise UsageError("--page", f"needs {written}, which the same command without --page measures.")
    write_between_marks(page, read_clip_cost(atomic_files.read_record(written)))


def _measure(models: Sequence[str], device: str, plan: Plan, out: Path) -> dict[str, Any]:
    """Measure all cells. Raises UsageError where device, transformers or `out` fail."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", f"torch {torch.__version__} sees no CUDA device; --device cpu measures without.")
    for model in models:
        build(model, width=QUICK.width, layers=1, length=8)  # now rather than after minutes
    make_folder(out)
    cells: list[dict[str, Any]] = []
    for model, (batch, length), dtype in itertools.product(models, plan.tokens, plan.dtypes):
        for cell in Bench(model, batch, length, dtype, device, plan).measure():
            figures = {name: round(cell[name]["median"], 4) for name in ("ratio", "control", "added")}
            print(_name(cell), cell["regime"], figures, file=sys.stderr, flush=True)
            cells.append(cell)
    config = {"tau": TAU, "optimizer": "AdamW(lr=0, fused=True)", "confidence": CONFIDENCE} | asdict(plan)
    made_with = environment(device) | {"threads": torch.get_num_threads()}
    return {"config": config, "environment": made_with, "cells": cells, "host": _host(plan)}


def _host(plan: Plan) -> dict[str, Any]:
    shapes = QUICK_STEPS if plan is QUICK else FIRST_STEPS
    with torch_threads(1):
        made_with = environment("cpu") | {"threads": 1}
        measured = {"us": host_time(plan.rounds), "first_steps": first_steps(shapes, min(plan.rounds, 5))}
    return {"environment": made_with} | measured | {"imports": _imports(plan)}


def _imports(plan: Plan) -> dict[str, Any]:
    return {"environment": environment("cpu")} | import_times(1 if plan is QUICK else min(plan.rounds, 9))


def _measure_host(written: Path, *, imports_alone: bool) -> None:
    """Measure the host's time anew, or that of the imports, in what was measured before."""
    option = "--imports" if imports_alone else "--host"
    if not written.exists():
        raise UsageError(option, f"needs {written}, which the same command without {option} measures.")
    result, plan = atomic_files.read_record(written), PLANS["cpu"]
    result = result | {"host": result["host"] | {"imports": _imports(plan)} if imports_alone else _host(plan)}
    atomic_files.write_json(written, result)
    print(f"figures  {written}", file=sys.stderr)


def _name(cell: Json) -> str:
    return f"{MODELS[cell['model']]}, {cell['length']} tokens, {DTYPES[cell['model']][cell['dtype']]}"


def _sources(cells: Sequence[Json]) -> list[tuple[str, str, int]]:
    """Return model, source and the number of attentions that have it, once each."""
    counted = [(cell["model"], *found) for cell in cells for found in Counter(cell["sources"].values()).items()]
    return list(dict.fromkeys(counted))
