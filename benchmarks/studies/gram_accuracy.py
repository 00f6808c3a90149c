"""The Gram form's restarts, and the numbers of steps with which it may run: derived from its error in bf16.

The rule: on each momentum of a real training run, and on input of low rank and with decaying singular values,

    error of the Gram form ≤ max(2 · error of the standard form, 0.03)

where an error is ‖U − U₆₄‖ / ‖U₆₄‖ in the Frobenius norm, U₆₄ the same polynomials of the same input in float64. The
study tries limits to the product of a² between restarts, and shows for each set which numbers of steps keep the rule,
with a tenth to spare for processors that round in another order. `muonclip.core` has what follows from it:
`GRAM_GROWTH`, the largest of these limits with which every set keeps the rule at its default length, and each set's
`gram_steps`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from muonclip.core.coefficients import GRAM_GROWTH, Polynomial, restarts_within
from muonclip.core.text_table import table
from muonclip.torch.update.products import PRODUCTS

GROWTHS = (20.0, 60.0, GRAM_GROWTH, 300.0, 600.0, 1800.0)
MOST_STEPS = 15
FACTOR, FLOOR = 2.0, 0.03
KEPT = 0.9  # of the rule's limit
DIVERGED = 1e9
_FUSED = PRODUCTS["baddbmm"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The largest error of the Gram form as a share of the rule's limit, with the most growth between its restarts."""

    name: str
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
    """Return stacks of normalised matrices m × n, m ≤ n, bf16: the momenta, and the hard spectra in two sizes."""
    wide = [momentum.mT if momentum.shape[0] > momentum.shape[1] else momentum for momentum in saved_momenta().values()]
    stacks = [torch.stack([each for each in wide if each.shape == shape]) for shape in {each.shape for each in wide}]
    stacks += [hard_spectra(24, 64).float(), hard_spectra(64, 256).float()]
    return [normalize(stack, _FUSED, xp=torch).bfloat16() for stack in stacks]


def judge(stacks: Sequence[Tensor]) -> list[Judgement]:
    """Judge every set, limit and number of steps."""
    judgements: list[Judgement] = []
    for name, known in COEFFICIENT_SETS.items():
        for ns_steps in range(1, 1 + (MOST_STEPS if known.tail else len(known.steps))):
            polynomials = known.polynomials(ns_steps)
            for growth in GROWTHS:
                restarts = restarts_within(growth, polynomials)
                share = share_of_the_limit(polynomials, restarts, stacks)
                judgements.append(Judgement(name, growth, ns_steps, restarts, share))
    return judgements


def share_of_the_limit(polynomials: Sequence[Polynomial], restarts: Sequence[int], stacks: Sequence[Tensor]) -> float:
    """Return the largest error of the Gram form over the rule's limit, at most `DIVERGED`."""
    worst = 0.0
    for x in stacks:
        exact = newton_schulz(x.double(), polynomials)
        standard = _error(newton_schulz(x, polynomials, products=_FUSED), exact)
        gram = _error(gram_newton_schulz(x, polynomials, xp=torch, products=_FUSED, restarts=restarts), exact)
        share = gram / (FACTOR * standard).clamp(min=FLOOR)
        worst = max(worst, share.nan_to_num(nan=DIVERGED).max().clamp(max=DIVERGED).item())
    return worst


def read_judgements(judgements: Sequence[Judgement]) -> str:
    """Write a table of the numbers of steps that keep the rule, by set and limit."""
    rows = []
    for name, known in COEFFICIENT_SETS.items():
        for growth in GROWTHS:
            own = [each for each in judgements if (each.name, each.growth) == (name, growth)]
            if not own:
                continue
            default = next(each for each in own if each.ns_steps == known.default_steps)
            kept = [each.ns_steps for each in own if each.share <= KEPT]
            restarts = ", ".join(str(step + 1) for step in default.restarts)
            rows.append((name, f"{growth:g}", restarts, f"{default.share:.2g}", _ranges(kept) or "none"))
    header = ("set", "limit to ∏ a²", "restarts before step", "error / limit", "numbers of steps that keep the rule")
    return table([header, *rows])


def _error(u: Tensor, exact: Tensor) -> Tensor:
    return (u.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers, neighbours as a range: "1–3, 5"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    stops = [number for number in numbers if number + 1 not in numbers]
    ends = zip(starts, stops, strict=True)
    return ", ".join(f"{start}–{stop}" if start < stop else f"{start}" for start, stop in ends)
