"""Compares the forms in which Muon's momentum is stored: the loss at the end of a training, and the state's bytes.

The reference mixture of experts is trained by MuonClip at its best rate, with the momentum in each form, from the same
weights and on the same batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import ARMS, choose
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.records import atomic_files
from benchmarks.records.environment import made_with
from benchmarks.records.intervals import interval
from benchmarks.studies.trials import Trials
from muonclip.core.text_table import in_bytes
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

FLOAT32 = "muonclip"
FORMS = (FLOAT32, "bf16", "bf16-stochastic", "int8", "int8-stochastic")
"""The arms, of which the first is what the others are compared with."""
TRAINING, RATE = replace(OWN_RATE, lr={}), OWN_RATE.lr[FLOAT32]
SEEDS = (0, 1, 2)


def run(options: argparse.Namespace) -> None:
    """Train all arms on all seeds. Writes momentum_dtype.json and, what it also prints, momentum_dtype.md."""
    make_folder(options.out)
    corpus, training, seeds = open_corpus(), TRAINING, SEEDS
    if options.quick:
        training, seeds = replace(TRAINING, steps=2, validation_batches=1), SEEDS[:2]
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
        "rows": trials.rows,
    }
    atomic_files.write_json(options.out / "momentum_dtype.json", figures)
    atomic_files.write_text(options.out / "momentum_dtype.md", text := table(figures))
    print(text)


def state_bytes(model: MoEConfig, arm: str) -> int:
    """Count the bytes of the state of Muon's half, as the plan has them."""
    plan = MuonClip(MoE(model), qk_clip=None, **ARMS[arm].options).plan
    return sum(sum(states.values()) for states in plan.state_bytes.values())


def table(figures: Mapping[str, Any]) -> str:
    """Write the mean loss of each arm, and its difference to float32 on the same seeds."""
    arms = figures["arms"]
    wide = arms[FLOAT32]
    lines = ["| momentum | state | loss | difference to float32 | verdict |", "|---|---|---|---|---|"]
    for arm, own in arms.items():
        apart = interval([loss - before for loss, before in zip(own["loss"], wide["loss"], strict=True)])
        said = ("", "") if arm == FLOAT32 else (str(apart), apart.verdict)
        dtype = ARMS[arm].options.get("momentum_dtype")
        words = f'`momentum_dtype="{dtype}"`' if dtype else "float32, as the weights are"
        kept = f"{in_bytes(own['state_bytes'])}, {own['state_bytes'] / wide['state_bytes']:.0%}"
        lines.append(f"| {words} | {kept} | {fmean(own['loss']):.3f} | {said[0]} | {said[1]} |")
    of = figures["training"]
    notes = (
        f"Validation loss in bits per byte after {of['steps']} steps at the rate {of['lr']:g}, a mean over "
        f"{len(wide['loss'])} seeds; differences are of the same seed, with their 95 % intervals. The state is that of "
        "Muon's half.",
        f"Made with {made_with(figures['environment'])}.",
    )
    return "\n".join([*lines, "", *notes, ""])
