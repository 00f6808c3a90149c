"""Variants of Muon and polynomials, compared by one protocol: which of them help.

The reference mixture of experts is trained by MuonClip and by each variant, from the same weights on the same batches.
Every arm gets the same number of rates, tried on one seed; those of hyperball and Muown are of another kind.
The best of them is then trained on two more, and what counts is the difference to MuonClip seed by seed.
AdamW's half has one rate for all.

    polynomials    the CPU time of one optimizer step, all in turn, on this model and on a Llama of 5M parameters
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import choices, choose
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.records import atomic_files
from benchmarks.records.environment import made_with
from benchmarks.records.intervals import interval, median_interval
from benchmarks.studies.clip_cost_bench import build
from benchmarks.studies.trials import TINY, Trials
from benchmarks.training.timing import in_turn, seconds, torch_threads
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip
from muonclip.torch.update.cost_model import iteration_dtype

BASELINE = "muonclip"
VARIANTS = ("normuon", "hyperball", "muown", "cautious", "per-head", "per-head-pairs")
POLYNOMIALS = (
    *(("polar_express", steps) for steps in (5, 6, 8, 16)),  # the last is that of the recipe `nvidia`
    ("you", 5),
)
RATES = (5e-3, 7e-3, 1e-2)
OWN_RATES = {"normuon": (7e-3, 1e-2, 1.4e-2), "muown": (1e-2, 2e-2, 4e-2), "hyperball": (2e-2, 4e-2, 8e-2)}
"""Of arms whose best was the highest of a lower grid: three around the best. The raw rows hold all that were tried."""
ADAMW_RATE = OWN_RATE.lr["muonclip"]
SEARCH_SEEDS, SEEDS = (100,), (0, 1)
TRAINING = replace(OWN_RATE, steps=150, lr={})
ROUNDS = 6
TIMED: Mapping[str, Callable[[], nn.Module]] = {
    "reference MoE": lambda: MoE(MoEConfig.cpu()),
    "Llama, 5M": partial(build, "llama", width=256, layers=6, length=64),
}
Arm = tuple[str, str | None, int | None]
"""An entry, a polynomial and its number of steps; None: the default's."""
ARMS: tuple[Arm, ...] = (
    (BASELINE, None, None),
    *((entry, None, None) for entry in VARIANTS),
    *((BASELINE, *polynomial) for polynomial in POLYNOMIALS),
)


def run(options: argparse.Namespace) -> None:
    """Search the rates, train the best, time the polynomials. Writes variants.json and, printed too, variants.md."""
    make_folder(options.out)
    corpus, training, seeds, rounds, timed = open_corpus(), TRAINING, SEEDS, ROUNDS, TIMED
    model = MoEConfig.cpu(vocab_size=corpus.vocab_size)
    if options.quick:
        training, seeds, rounds = replace(TRAINING, steps=2, batch_size=2, validation_batches=1), SEEDS[:2], 1
        model, timed = replace(model, **TINY), {"tiny MoE": lambda: MoE(MoEConfig.cpu(**TINY))}
    protocol = Experiment.on(corpus, name="", title="", chosen=(), seeds=(), model=model, training=training)
    trials = Trials(protocol, options.out / "variants.jsonl", options.jobs or 1)
    searched = {arm: [named(arm, lr) for lr in rates_of(arm)] for arm in ARMS}
    tried = trials.losses([name for names in searched.values() for name in names], SEARCH_SEEDS)
    best = {arm: min(names, key=lambda name: fmean(tried[name])) for arm, names in searched.items()}
    losses = trials.losses([*best.values()], (*SEARCH_SEEDS, *seeds))
    arms = [
        {
            "entry": arm[0],
            "polynomial": arm[1],
            "ns_steps": arm[2],
            "rates": [{"lr": lr, "loss": fmean(tried[name])} for lr, name in zip(rates_of(arm), names, strict=True)],
            "best": rates_of(arm)[names.index(best[arm])],
            "loss": losses[best[arm]],
        }
        for arm, names in searched.items()
    ]
    figures = {
        "environment": trials.environment,
        "training": protocol.to_json()["training"] | {"adamw_lr": ADAMW_RATE},
        "seeds": {"search": SEARCH_SEEDS, "differences": (*SEARCH_SEEDS, *seeds)},
        "arms": arms,
        "milliseconds": step_times(timed, rounds),
        "products": str(iteration_dtype("cpu", torch.float32, None)).removeprefix("torch."),
        "rows": trials.rows,
    }
    atomic_files.write_json(options.out / "variants.json", figures)
    atomic_files.write_text(options.out / "variants.md", text := table(figures))
    print(text)


def rates_of(arm: Arm) -> Sequence[float]:
    return OWN_RATES.get(arm[0], RATES)


def named(arm: Arm, lr: float) -> str:
    entry, polynomial, ns_steps = arm
    own = {} if polynomial is None else {"ns_coefficients": polynomial, "ns_steps": ns_steps}
    return choose(entry, lr=lr, adamw_lr=ADAMW_RATE, **own).name


def step_times(models: Mapping[str, Callable[[], nn.Module]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return by model and polynomial the milliseconds of the CPU of one step of MuonClip, one for each round."""
    polynomials = [("jordan", 5), *POLYNOMIALS]
    found: dict[str, dict[str, list[float]]] = {}
    with torch_threads(1):
        for name, make in models.items():
            steps = {f"{of} × {count}": _step(make, of, count) for of, count in polynomials}
            timed = in_turn({of: partial(seconds, step, time.thread_time) for of, step in steps.items()}, rounds)
            found[name] = {of: [round(1e3 * each, 3) for each in values] for of, values in timed.items()}
            print(name, {of: median(values) for of, values in found[name].items()}, file=sys.stderr)
    return found


def _step(make: Callable[[], nn.Module], ns_coefficients: str, ns_steps: int) -> Callable[[], object]:
    """Return one step of MuonClip, without the clip, on gradients that stay."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return MuonClip(model, 1e-6, qk_clip=None, ns_coefficients=ns_coefficients, ns_steps=ns_steps).step


def table(figures: Mapping[str, Any]) -> str:
    """Write the two tables, of variants and of polynomials, with differences to MuonClip on the same seeds."""
    baseline, *others = figures["arms"]
    variants = [arm for arm in others if arm["polynomial"] is None]
    polynomials = [arm for arm in others if arm["polynomial"] is not None]
    lines = ["| variant | best of the rates | loss | difference to MuonClip | verdict |", "|---|---|---|---|---|"]
    lines += [_row(_label(arm), arm, baseline) for arm in (baseline, *variants)]
    times = figures["milliseconds"]
    heads = ["polynomial", "best of the rates", "loss", "difference to jordan × 5", "verdict", *times]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in (baseline | {"polynomial": "jordan", "ns_steps": 5}, *polynomials):
        name = f"{arm['polynomial']} × {arm['ns_steps']}"
        lines.append(_row(f"`{arm['polynomial']}` × {arm['ns_steps']}", arm, baseline) + _times(times, name))
    of, seeds = figures["training"], figures["seeds"]
    notes = (
        f"Validation loss in bits per byte after {of['steps']} steps of {of['batch_size']} windows, a mean over "
        f"{len(seeds['differences'])} seeds; differences are of the same seed, with their 95 % intervals. Each arm had "
        f"{len(baseline['rates'])} rates, tried on the first of them; AdamW's half has {of['adamw_lr']:g} everywhere. "
        f"Times are those of one optimizer step, products in {figures['products']}, on one thread: the median, and its "
        "ratio to that of `jordan` × 5 with its 95 % interval. In training, products are in float32.",
        f"Made with {made_with(figures['environment'])}.",
    )
    for note in notes:
        lines += ["", note]
    return "\n".join([*lines, ""])


def _row(label: str, arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    rates = [each["lr"] for each in arm["rates"]]
    edge = ", the lowest" if arm["best"] == min(rates) else ", the highest" if arm["best"] == max(rates) else ""
    pairs = zip(arm["loss"], baseline["loss"], strict=True)
    apart = interval([own - plain for own, plain in pairs])
    said = ("", "") if arm["entry"] == baseline["entry"] and arm["loss"] == baseline["loss"] else (apart, apart.verdict)
    return f"| {label} | {arm['best']:g}{edge} | {fmean(arm['loss']):.3f} | {said[0]} | {said[1]} |"


def _times(times: Mapping[str, Mapping[str, Sequence[float]]], name: str) -> str:
    cells: list[str] = []
    for of in times.values():
        plain = of["jordan × 5"]
        ratio = median_interval([own / other for own, other in zip(of[name], plain, strict=True)])
        bounds = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
        ratios = "" if name == "jordan × 5" else f", {ratio['median']:.2f}{bounds}"
        cells.append(f" {median(of[name]):.1f} ms{ratios} |")
    return "".join(cells)


def _label(arm: Mapping[str, Any]) -> str:
    return choices(arm["entry"])[0].label.removeprefix("MuonClip, ")
