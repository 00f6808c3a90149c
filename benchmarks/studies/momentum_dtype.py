"""How Muon's momentum is stored: the loss at the end of a training, and the bytes of the state.

The reference mixture of experts is trained by MuonClip at its best rate, with the momentum in each form, from the same
weights and on the same batches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import ARMS, choices
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import OWN_RATE, PRESETS
from benchmarks.experiment.settings import Training
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment, made_with
from benchmarks.records.intervals import interval
from benchmarks.records.summary import bits
from benchmarks.training.timing import torch_threads
from benchmarks.training.torch_learner import TorchLearner
from muonclip.core.text_table import in_bytes

FLOAT32 = "muonclip"
FORMS = (FLOAT32, "bf16", "bf16-stochastic", "int8", "int8-stochastic")
"""The arms, of which the first is what the others are compared with."""
TRAINING = replace(OWN_RATE, steps=150)
SEEDS = (0, 1, 2)


def run(options: argparse.Namespace) -> None:
    """Train all arms on all seeds. Writes momentum_dtype.json and, what it also prints, momentum_dtype.md."""
    make_folder(options.out)
    training, seeds = (
        (replace(TRAINING, steps=2, validation_batches=1), SEEDS[:1]) if options.quick else (TRAINING, SEEDS)
    )
    shared = {"steps": training.steps, "lr": training.lr[FLOAT32], "batch_size": training.batch_size}
    corpus, rows = open_corpus(), []
    figures = {"environment": environment() | {"threads": 1}, "training": shared, "rows": rows}
    with torch_threads(1):
        for seed in seeds:
            for arm in FORMS:
                rows.append({"arm": arm, "seed": seed} | train(corpus, training, arm, seed))
                atomic_files.write_json(options.out / "momentum_dtype.json", figures)
                print(rows[-1], file=sys.stderr, flush=True)
    atomic_files.write_text(options.out / "momentum_dtype.md", text := table(figures))
    print(text)


def train(corpus: Corpus, training: Training, name: str, seed: int) -> dict[str, float]:
    """Train one arm; return the validation loss at its end in bits per byte, and the bytes of Muon's state."""
    model = PRESETS["cpu"].model(vocab_size=corpus.vocab_size)
    own = {"name": "momentum-dtype", "title": "The momentum's form", "chosen": choices(name), "seeds": (seed,)}
    experiment = Experiment.on(corpus, model=model, training=training, **own)
    (arm,) = experiment.arms
    learner, length = TorchLearner(experiment, arm, seed), model.max_seq_len
    for done in range(training.steps):
        windows = corpus.batch(seed=seed, step=done, batch_size=training.batch_size, length=length)
        learner.step(windows, done, training.schedule(done) * arm.lr)
    size = training.validation_batch_size
    losses = [
        learner.loss(corpus.validation_batch(index=index, batch_size=size, length=length))
        for index in range(training.validation_batches)
    ]
    kept = sum(sum(states.values()) for states in learner.optimizer.plan.state_bytes.values())
    return {"loss": bits(fmean(losses)), "state_bytes": kept}


def table(figures: Mapping[str, Any]) -> str:
    """Write the mean loss of each arm, and its difference to float32 on the same seeds."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(figures["rows"], key=lambda row: row["seed"]):
        rows.setdefault(row["arm"], []).append(row)
    wide = rows[FLOAT32]
    lines = ["| momentum | state | loss | difference to float32 |", "|---|---|---|---|"]
    for arm, own in rows.items():
        differences = [row["loss"] - before["loss"] for row, before in zip(own, wide, strict=True)]
        apart = "" if arm == FLOAT32 else str(interval(differences))
        dtype = ARMS[arm].options.get("momentum_dtype")
        words = f'`momentum_dtype="{dtype}"`' if dtype else "float32, as the weights are"
        lines.append(
            f"| {words} | {in_bytes(own[0]['state_bytes'])} | {fmean(row['loss'] for row in own):.3f} | {apart} |"
        )
    of = figures["training"]
    notes = (
        f"Bits per byte after {of['steps']} steps at the rate {of['lr']:g}, {len(wide)} seeds; differences are "
        "paired, with their 95 % intervals. The state is that of Muon's half.",
        f"Made with {made_with(figures['environment'])}.",
    )
    return "\n".join([*lines, "", *notes, ""])
