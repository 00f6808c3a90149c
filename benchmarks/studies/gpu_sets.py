"""Muon's step on sets of matrices of Kimi K2, next to torch's, dion's and gram-newton-schulz's where installed.

All optimizers have the same parameters and gradients, and take their steps in turn. Ours runs twice: the ratio of the
two shows how far the others can be trusted.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.speed_peers import DECAY, LR, PEERS
from benchmarks.training.timing import in_turn, seconds, wall_clock
from muonclip.torch import Muon

Shapes = list[tuple[int, int]]
Step = Callable[[], object]
_OURS, _AGAIN = "muonclip", "muonclip, again"
_MLA: Shapes = [(1536, 7168), (12288, 1536), (576, 7168), (16384, 512), (7168, 8192)]
_EXPERT: Shapes = [(2048, 7168), (2048, 7168), (7168, 2048)]
SETS: dict[str, Shapes] = {"MLA of a layer": _MLA, "24 experts": _EXPERT * 24}
COMPILED: dict[str, Shapes] = {"MLA of a layer": _MLA, "4 experts": _EXPERT * 4}  # compiling unrolls all matrices
DRY: dict[str, Shapes] = {
    "MLA of a layer": [(n // 64, m // 64) for n, m in _MLA],
    "2 experts": [(32, 96), (96, 32)] * 2,
}


def records(dry_run: bool, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """Yield the milliseconds of a step by optimizer, medians, and their ratios to ours, for each set."""
    device = "cpu" if dry_run else "cuda"
    sets = DRY if dry_run else COMPILED if compiled else SETS
    with torch.compiler.set_stance("force_eager" if dry_run else "default"):
        for name, shapes in sets.items():
            torch.manual_seed(0)
            parameters = [nn.Parameter(torch.randn(shape, device=device) / 50) for shape in shapes]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            steps, absent = _steps(parameters, compiled)
            timed = {key: partial(seconds, step, lambda: wall_clock(device)) for key, step in steps.items()}
            times = in_turn(timed, 3 if dry_run else 9)
            yield {
                "ok": True,
                "set": name,
                "matrices": len(shapes),
                "ms": {key: 1e3 * statistics.median(values) for key, values in times.items()},
                "over_ours": {key: _ratio(values, times[_OURS]) for key, values in times.items()},
                "samples": times,
                "absent": absent,
                "peak_GB": 0.0 if dry_run else torch.cuda.max_memory_allocated() / 2**30,
            }


def _steps(matrices: list[nn.Parameter], compiled: bool) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the step of each optimizer that has taken one, and why the others have not."""
    ours = partial(Muon, matrices, lr=LR, weight_decay=DECAY)
    steps: dict[str, Step] = {_OURS: ours().step, _AGAIN: ours().step}
    if not compiled:
        steps["muonclip, Gram form"] = ours(ns_form="gram").step
    for step in steps.values():
        step()
    absent: dict[str, str] = {}
    for name, make in (_COMPILED if compiled else _EAGER).items():
        try:
            step = make(matrices)
            step()
        except Exception as error:  # of a package of others, whatever it is
            absent[name] = f"{type(error).__name__}: {error}".strip()[:400]
        else:
            steps[name] = step
    return steps, absent


def _ratio(values: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, ours, strict=True))


def _dion(matrices: Sequence[Tensor]) -> Step:
    own: dict[str, Any] = {"nesterov": True, "use_triton": True}
    return importlib.import_module("dion").Muon(matrices, lr=LR, weight_decay=DECAY, **own).step


def _gram_newton_schulz(matrices: Sequence[Tensor]) -> Step:
    return importlib.import_module("gram_newton_schulz").Muon(matrices, lr=LR, weight_decay=DECAY).step


def _quack(matrices: Sequence[Tensor]) -> Step:
    return Muon(matrices, lr=LR, weight_decay=DECAY, ns_form="gram", products="quack").step


_EAGER: dict[str, Callable[[Sequence[Tensor]], Step]] = {
    "muonclip, Gram form, quack": _quack,
    "torch": PEERS["torch.optim.Muon"].make,
    "dion": _dion,  # with the kernels that it has for GPUs
    "gram-newton-schulz": _gram_newton_schulz,
}
_COMPILED = {"torch, compiled": PEERS["torch.optim.Muon, compiled"].make}
