"""The time of a jitted update by `muonclip.optax.scale_by_muon` and by `optax.contrib.scale_by_muon`.

Both have the same gradients, momentum and polynomial; calls alternate in one process. "loop" is ours with every matrix
iterated by itself: what stacking is worth. The last row is the reference model's whole tree, updated by the aliases
`muonclip` without its clip and `optax.contrib.muon`, with the same Adam on the same parameters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.studies.templates import render
from benchmarks.training.timing import in_turn, milliseconds, seconds
from muonclip.models import MoEConfig
from muonclip.models import jax as moe
from muonclip.optax import muonclip, scale_by_muon

SHAPES = {
    "cpu": ((64, 64, 128), (16, 256, 512), (8, 512, 1792), (1, 1024, 1024)),
    "gpu": ((64, 64, 128), (16, 256, 512), (8, 512, 1792), (1, 1024, 1024), (8, 2048, 7168)),
}
MODEL, MODEL_SIZES = "reference MoE", dict[str, int]()  # the preset cpu

Run = Callable[[], Any]


def run(options: argparse.Namespace) -> None:
    """Measure on JAX's default device. Writes DEVICE.json and, what it also prints, the table DEVICE.md."""
    device, out, rounds = jax.default_backend(), options.out, options.rounds
    cases: list[dict[str, Any]] = []
    for count, m, n in SHAPES["cpu" if device == "cpu" else "gpu"]:
        cases.append(_case(f"{count} × {m}×{n}" if count > 1 else f"{m}×{n}", _matrices(count, m, n), rounds))
    cases.append(_case(MODEL, _model(), rounds))
    versions = {"jax": jax.__version__, "optax": optax.__version__, "device": jax.devices()[0].device_kind}
    result = {"environment": environment() | versions, "rounds": rounds, "cases": cases}
    out.mkdir(parents=True, exist_ok=True)
    atomic_files.write_json(out / f"{device}.json", result)
    atomic_files.write_text(out / f"{device}.md", table := read_optax_speed(result))
    print(table)


def read_optax_speed(result: dict[str, Any]) -> str:
    """Write a Markdown table, and what made it."""
    return render("optax_speed.md", **result)


def compare(shapes: Sequence[tuple[int, int, int]], rounds: int) -> Iterator[dict[str, Any]]:
    """Measure raw seconds of both, and of ours a second time, at (count, m, n); on JAX's own threads."""
    for count, m, n in shapes:
        theirs, (ours, _), _ = _matrices(count, m, n).values()
        candidates = {"muonclip": ours, "muonclip, again": ours, "optax.contrib.muon": theirs[0]}
        timed = {name: lambda run=run: seconds(run) for name, run in candidates.items()}
        yield {"name": f"{count} × {m}×{n}", "seconds": in_turn(timed, rounds, warm_up=2)}


def _matrices(count: int, m: int, n: int) -> dict[str, tuple[Run, float]]:
    gradients = {str(i): jax.random.normal(jax.random.key(i), (m, n)) for i in range(count)}
    numbers = dict.fromkeys(gradients, MuonDimensionNumbers())

    def loop(updates: Any, state: Any) -> Any:
        done = {name: ours.update({name: g}, state[name]) for name, g in updates.items()}
        return {name: update for name, (update, _) in done.items()}, {name: own for name, (_, own) in done.items()}

    ours, theirs = scale_by_muon(), optax.contrib.scale_by_muon(weight_dimension_numbers=numbers)
    return {
        "optax": _compiled(theirs.update, gradients, theirs.init(gradients)),
        "muonclip": _compiled(ours.update, gradients, ours.init(gradients)),
        "loop": _compiled(loop, gradients, {name: ours.init({name: g}) for name, g in gradients.items()}),
    }


def _model() -> dict[str, tuple[Run, float]]:
    config = MoEConfig.cpu(**MODEL_SIZES)
    params = moe.init(config, jax.random.key(0))
    gradients = {name: jax.random.normal(jax.random.key(i), x.shape) for i, (name, x) in enumerate(params.items())}
    numbers: Any = {
        name: None if layout is None else MuonDimensionNumbers(-1, -2)  # gate and up unsplit, which Optax cannot say
        for name, layout in moe.matrix_layouts(config).items()
    }
    adam = {"b2": 0.999, "nesterov": True, "mask": None}  # as Optax's half has it
    ours = muonclip(1e-3, qk_projections=None, muon_weight_dimension_numbers=numbers, adamw=adam)
    theirs = optax.contrib.muon(
        1e-3, weight_decay=0.1, adam_weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=numbers
    )
    return {
        "optax": _compiled(theirs.update, gradients, theirs.init(params), params),
        "muonclip": _compiled(ours.update, gradients, ours.init(params), params),
    }


def _compiled(update: Callable[..., Any], *arguments: Any) -> tuple[Run, float]:
    begun = time.perf_counter()
    program = jax.jit(update).lower(*arguments).compile()
    seconds = time.perf_counter() - begun
    return lambda: jax.block_until_ready(program(*arguments)), seconds


def _case(name: str, candidates: dict[str, tuple[Run, float]], rounds: int) -> dict[str, Any]:
    return {
        "name": name,
        "milliseconds": milliseconds({candidate: run for candidate, (run, _) in candidates.items()}, rounds),
        "compile_seconds": {candidate: round(compiling, 2) for candidate, (_, compiling) in candidates.items()},
    }
