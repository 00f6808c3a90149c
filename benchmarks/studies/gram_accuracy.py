"""The Gram form's restarts, and the numbers of steps with which it may run: derived from its error.

The rule: on each momentum of a real training run, and on input of low rank and with decaying singular values,

    error of the Gram form ≤ max(2 · error of the standard form, 0.03 in bf16 or 0.0003 in float32)

where an error is ‖U − U₆₄‖ / ‖U₆₄‖ in the Frobenius norm, U₆₄ the same polynomials of the same input in float64. The
study tries limits to the product of a² between restarts, and shows for each set which numbers of steps keep the rule,
with a tenth to spare for processors that round in another order. `muonclip.core` has what follows from it:
`GRAM_GROWTH` and, in float32, `GRAM_GROWTH_WIDE`: the largest of these limits with which every set keeps the rule at
its default length; and, in bf16, each set's `gram_steps`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.execution.train import make_folder
from benchmarks.experiment.data import open_corpus
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.studies.momenta import SAVED, saved_momenta, train_momenta
from benchmarks.studies.spectra import hard_spectra
from benchmarks.training.timing import torch_threads
from muonclip.core import COEFFICIENT_SETS, gram_newton_schulz, newton_schulz, normalize
from muonclip.core.coefficients import GRAM_GROWTH, GRAM_GROWTH_WIDE, Polynomial, restarts_within
from muonclip.core.text_table import table
from muonclip.torch.update.products import PRODUCTS

GROWTHS = {
    torch.bfloat16: (20.0, 60.0, GRAM_GROWTH, 300.0, 600.0, 1800.0),
    torch.float32: (1e3, 1e4, GRAM_GROWTH_WIDE, 1e6, 1e7),
}
MOST_STEPS = 15
FACTOR = 2.0
FLOORS = {torch.bfloat16: 0.03, torch.float32: 0.0003}
KEPT = 0.9  # of the rule's limit
DIVERGED = 1e9
_FUSED = PRODUCTS["baddbmm"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The largest error of the Gram form as a share of the rule's limit, with the most growth between its restarts."""

    name: str
    dtype: str
    growth: float
    ns_steps: int
    restarts: tuple[int, ...]
    share: float


def run(options: argparse.Namespace) -> None:
    """Judge all sets. Writes gram_accuracy.json and, what it also prints, the table gram_accuracy.txt."""
    make_folder(options.out)
    if options.train:
        np.savez(SAVED, **train_momenta(open_corpus()))  # pyright: ignore[reportArgumentType]
    with torch_threads(1):
        judgements = judge(inputs())
    written = {"environment": environment(), "judgements": [asdict(each) for each in judgements]}
    atomic_files.write_json(options.out / "gram_accuracy.json", written)
    atomic_files.write_text(options.out / "gram_accuracy.txt", text := read_judgements(judgements))
    print(text)


def inputs() -> list[Tensor]:
    """Return stacks of normalised matrices m × n, m ≤ n: the momenta, and the hard spectra in two sizes."""
    wide = [momentum.mT if momentum.shape[0] > momentum.shape[1] else momentum for momentum in saved_momenta().values()]
    stacks = [torch.stack([each for each in wide if each.shape == shape]) for shape in {each.shape for each in wide}]
    stacks += [hard_spectra(24, 64).float(), hard_spectra(64, 256).float()]
    return [normalize(stack, _FUSED, xp=torch) for stack in stacks]


def judge(stacks: Sequence[Tensor]) -> list[Judgement]:
    """Judge every set, limit and number of steps."""
    judgements: list[Judgement] = []
    for name, known in COEFFICIENT_SETS.items():
        for ns_steps in range(1, 1 + (MOST_STEPS if known.tail else len(known.steps))):
            polynomials = known.polynomials(ns_steps)
            for dtype, growth in _limits():
                restarts = restarts_within(growth, polynomials, first_alone=dtype == torch.bfloat16)
                share = share_of_the_limit(polynomials, restarts, stacks, dtype)
                judgements.append(Judgement(name, _name(dtype), growth, ns_steps, restarts, share))
    return judgements


def share_of_the_limit(
    polynomials: Sequence[Polynomial], restarts: Sequence[int], stacks: Sequence[Tensor], dtype: torch.dtype
) -> float:
    """Return the largest error of the Gram form in a dtype over the rule's limit, at most `DIVERGED`."""
    worst = 0.0
    for x in (stack.to(dtype) for stack in stacks):
        exact = newton_schulz(x.double(), polynomials)
        standard = _error(newton_schulz(x, polynomials, products=_FUSED), exact)
        gram = _error(gram_newton_schulz(x, polynomials, xp=torch, products=_FUSED, restarts=restarts), exact)
        share = gram / (FACTOR * standard).clamp(min=FLOORS[dtype])
        worst = max(worst, share.nan_to_num(nan=DIVERGED).max().clamp(max=DIVERGED).item())
    return worst


def read_judgements(judgements: Sequence[Judgement]) -> str:
    """Write a table of the numbers of steps that keep the rule, by set and limit."""
    rows = []
    for name, known in COEFFICIENT_SETS.items():
        for dtype, growth in _limits():
            own = [each for each in judgements if (each.name, each.dtype, each.growth) == (name, _name(dtype), growth)]
            if not own:
                continue
            default = next(each for each in own if each.ns_steps == known.default_steps)
            kept = [each.ns_steps for each in own if each.share <= KEPT]
            restarts = ", ".join(str(step + 1) for step in default.restarts)
            rows.append(
                (name, _name(dtype), f"{growth:g}", restarts or "none", f"{default.share:.2g}", _ranges(kept) or "none")
            )
    header = (
        "set",
        "products",
        "limit to ∏ a²",
        "restarts before step",
        "error / limit",
        "numbers of steps that keep the rule",
    )
    return table([header, *rows])


def _limits() -> Iterator[tuple[torch.dtype, float]]:
    return ((dtype, growth) for dtype, growths in GROWTHS.items() for growth in growths)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _error(u: Tensor, exact: Tensor) -> Tensor:
    return (u.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers, neighbours as a range: "1–3, 5"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    stops = [number for number in numbers if number + 1 not in numbers]
    ends = zip(starts, stops, strict=True)
    return ", ".join(f"{start}–{stop}" if start < stop else f"{start}" for start, stop in ends)
