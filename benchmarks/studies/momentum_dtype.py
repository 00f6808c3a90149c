"""Compares the forms in which Muon's momentum is stored: the loss at the end of a training, bytes of state, and time.

The reference mixture of experts is trained by MuonClip at its best rate, with the momentum in each form, from the same
weights and on the same batches. Steps of the optimizer are timed on frozen sets of shapes, all forms in turn.
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

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import ARMS, choose
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.records import atomic_files
from benchmarks.records.environment import made_with
from benchmarks.records.intervals import interval, median_interval
from benchmarks.studies.speed_sets import SETS, weights_of
from benchmarks.studies.trials import Trials
from benchmarks.training.timing import in_turn, seconds, torch_threads
from muonclip.core.text_table import in_bytes
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import Muon, MuonClip
from muonclip.torch.update.cost_model import iteration_dtype

FLOAT32 = "muonclip"
FORMS = (FLOAT32, "bf16", "bf16-stochastic", "int8", "int8-stochastic")
"""The arms, of which the first is what the others are compared with."""
TRAINING, RATE = replace(OWN_RATE, lr={}), OWN_RATE.lr[FLOAT32]
SEEDS = (0, 1, 2)
TIMED = ("64 × (64×128)", "8 × (512×1792)", "reference MoE")
ROUNDS = 9


def run(options: argparse.Namespace) -> None:
    """Train all arms on all seeds. Writes momentum_dtype.json and, what it also prints, momentum_dtype.md."""
    make_folder(options.out)
    corpus, training, seeds, rounds = open_corpus(), TRAINING, SEEDS, ROUNDS
    if options.quick:
        training, seeds, rounds = replace(TRAINING, steps=2, validation_batches=1), SEEDS[:2], 1
    model = MoEConfig.cpu(vocab_size=corpus.vocab_size)
    protocol = Experiment.on(corpus, name="", title="", chosen=(), seeds=(), model=model, training=training)
    trials = Trials(protocol, options.out / "momentum_dtype.jsonl", options.jobs or 1)
    names = {arm: choose(arm, lr=RATE).name for arm in FORMS}
    losses = trials.losses([*names.values()], seeds)
    shared = {"steps": training.steps, "lr": RATE, "batch_size": training.batch_size}
    figures = {
        "environment": trials.environment,
        "training": shared,
        "arms": {arm: {"loss": losses[names[arm]], "state_bytes": state_bytes(model, arm)} for arm in FORMS},
        "milliseconds": step_times(rounds),
        "products": str(iteration_dtype("cpu", torch.float32, None)).removeprefix("torch."),
        "rows": trials.rows,
    }
    atomic_files.write_json(options.out / "momentum_dtype.json", figures)
    atomic_files.write_text(options.out / "momentum_dtype.md", text := table(figures))
    print(text)


def state_bytes(model: MoEConfig, arm: str) -> int:
    """Count the bytes of the state of Muon's half, as the plan has them."""
    plan = MuonClip(MoE(model), qk_clip=None, **ARMS[arm].options).plan
    return sum(sum(states.values()) for states in plan.state_bytes.values())


def step_times(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return by set and arm the milliseconds of the CPU of one step of Muon's half, one for each round."""
    found: dict[str, dict[str, list[float]]] = {}
    with torch_threads(1):
        for name in TIMED:
            timed = in_turn({arm: partial(seconds, _step(name, arm), time.thread_time) for arm in FORMS}, rounds)
            found[name] = {arm: [round(1e3 * each, 3) for each in values] for arm, values in timed.items()}
            print(name, {arm: median(values) for arm, values in found[name].items()}, file=sys.stderr)
    return found


def _step(name: str, arm: str) -> Callable[[], object]:
    """Return one step on the matrices of a set, on gradients that stay."""
    torch.manual_seed(0)
    weights = [each for each in weights_of(SETS[name]) if each.layout is not None]
    named = [(f"{index}", torch.nn.Parameter(torch.randn(each.shape))) for index, each in enumerate(weights)]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    group = {"params": named, "layout": [each.layout for each in weights]}
    return Muon([group], 1e-6, **ARMS[arm].options).step


def table(figures: Mapping[str, Any]) -> str:
    """Write the mean loss of each arm, and its difference to float32 on the same seeds."""
    arms = figures["arms"]
    wide = arms[FLOAT32]
    times = figures["milliseconds"]
    heads = ["momentum", "state", "loss", "difference to float32", "verdict", *(f"step, {name}" for name in times)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, own in arms.items():
        apart = interval([loss - before for loss, before in zip(own["loss"], wide["loss"], strict=True)])
        said = ("", "") if arm == FLOAT32 else (str(apart), apart.verdict)
        dtype = ARMS[arm].options.get("momentum_dtype")
        words = f'`momentum_dtype="{dtype}"`' if dtype else "float32, as the weights are"
        kept = f"{in_bytes(own['state_bytes'])}, {own['state_bytes'] / wide['state_bytes']:.0%}"
        lines.append(f"| {words} | {kept} | {fmean(own['loss']):.3f} | {said[0]} | {said[1]} |{_times(times, arm)}")
    of = figures["training"]
    notes = (
        f"Validation loss in bits per byte after {of['steps']} steps at the rate {of['lr']:g}, a mean over "
        f"{len(wide['loss'])} seeds; differences are of the same seed, with their 95 % intervals. The state is that of "
        f"Muon's half. Times are those of one step of it, products in {figures['products']}, on one thread: the median "
        "and its ratio to that of float32 with its 95 % interval.",
        f"Made with {made_with(figures['environment'])}.",
    )
    return "\n".join([*lines, "", *notes, ""])


def _times(times: Mapping[str, Mapping[str, Sequence[float]]], arm: str) -> str:
    cells: list[str] = []
    for of in times.values():
        ratio = median_interval([own / other for own, other in zip(of[arm], of[FLOAT32], strict=True)])
        bounds = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
        ratios = "" if arm == FLOAT32 else f", {ratio['median']:.2f}{bounds}"
        cells.append(f" {median(of[arm]):.1f} ms{ratios} |")
    return "".join(cells)
