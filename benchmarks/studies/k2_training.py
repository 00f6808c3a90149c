"""Training as Kimi K2 and K2 Thinking were: activations kept in FP8, and experts in INT4.

The reference mixture of experts is trained by MuonClip at its best rate, each way from the same weights and on the same
batches. Losses are those of the weights that the way would serve: rounded ones where it rounds.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import choices
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment, made_with
from benchmarks.records.intervals import interval
from benchmarks.records.summary import bits
from benchmarks.training.activation_memory import held_bytes
from benchmarks.training.timing import torch_threads
from benchmarks.training.torch_learner import TorchLearner, first_model
from muonclip.core.text_table import in_bytes
from muonclip.models import MoEConfig
from muonclip.models.recompute import recompute
from muonclip.models.torch import Layer, MoE

TRAINING = replace(OWN_RATE, steps=100)
PLAIN, INT4 = "muonclip", "int4-experts"
LATE = 0.8
"""The share of the steps after which the weights of experts are rounded, where that begins late."""


Options = dict[str, Any]


class Way(NamedTuple):
    words: str
    share: float = 1.0  # of the steps that are trained without rounding
    rounds: bool = False  # at the end
    recompute: Options | None = None


WAYS = {
    "plain": Way("nothing rounded, nothing computed again"),
    "float8": Way('`store_activations="float8"`', recompute={"store_activations": "float8"}),
    "int4": Way("`expert_weight_bits=4`", 0.0, True),
    "int4-late": Way(f"`expert_weight_bits=4` in the last {1 - LATE:.0%} of the steps", LATE, True),
    "rounded": Way("not trained for it: the first row's weights, rounded at the end", 1.0, True),
}
KEPT: dict[str, Options | None] = {
    "nothing computed again": None,
    "`recompute(layer)`": {},
    '`recompute(layer, store_activations="float8")`': {"store_activations": "float8"},
}
SEEDS = (0, 1, 2)


def run(options: argparse.Namespace) -> None:
    """Train all ways on all seeds. Writes k2_training.json and, what it also prints, the tables k2_training.md."""
    make_folder(options.out)
    training, seeds = TRAINING, SEEDS
    if options.quick:
        training, seeds = replace(TRAINING, steps=5, validation_batches=1), SEEDS[:2]
    corpus, rows = open_corpus(), list[dict[str, Any]]()
    protocol = Experiment.on(
        corpus, name="", title="", chosen=choices(PLAIN, INT4), seeds=seeds,
        model=MoEConfig.cpu(vocab_size=corpus.vocab_size), training=training,
    )  # fmt: skip
    shared = {"steps": training.steps, "lr": training.lr[PLAIN], "batch_size": training.batch_size}
    with torch_threads(1):
        memory = {words: kept_bytes(protocol, corpus, how) for words, how in KEPT.items()}
        figures = {"environment": environment() | {"threads": 1}, "training": shared, "memory": memory, "rows": rows}
        for seed in seeds:
            for way, loss in losses(protocol, corpus, seed).items():
                rows.append({"way": way, "seed": seed, "loss": loss})
                print(rows[-1], file=sys.stderr, flush=True)
            atomic_files.write_json(options.out / "k2_training.json", figures)
    atomic_files.write_text(options.out / "k2_training.md", text := table(figures))
    print(text)


def losses(protocol: Experiment, corpus: Corpus, seed: int) -> dict[str, float]:
    """Train all ways on a seed; return their validation losses at the end, in bits per byte.

    Rounding late goes on from what the first way has by then, weights and state.
    """
    found: dict[str, float] = {}
    training = protocol.training
    late = round(LATE * training.steps)
    for name in ("float8", "int4"):
        learner = begin(protocol, INT4 if WAYS[name].rounds else PLAIN, seed, WAYS[name].recompute)
        train(learner, corpus, seed, range(training.steps))
        found[name] = validation_loss(learner, corpus)
    plain = begin(protocol, PLAIN, seed)
    train(plain, corpus, seed, range(late))
    rounding = begin(protocol, INT4, seed)
    rounding.restore(copy.deepcopy(plain.state()))
    train(plain, corpus, seed, range(late, training.steps))
    found["plain"] = validation_loss(plain, corpus)
    train(rounding, corpus, seed, range(late, training.steps))
    found["int4-late"] = validation_loss(rounding, corpus)
    rounding.model.load_state_dict(plain.model.state_dict())
    found["rounded"] = validation_loss(rounding, corpus)
    return {name: found[name] for name in WAYS}


def begin(protocol: Experiment, arm: str, seed: int, how: Options | None = None) -> TorchLearner:
    """Make a learner; `how`: the options of recomputation, None for none."""
    learner = TorchLearner(protocol, protocol.arm(arm), seed)
    computing_again(learner.model, how)
    return learner


def computing_again(model: MoE, how: Options | None) -> MoE:
    if how is not None:
        for layer in model.layers:
            assert isinstance(layer, Layer)
            recompute(layer, **how)
    return model


def train(learner: TorchLearner, corpus: Corpus, seed: int, steps: range) -> None:
    arm, training = learner.arm, learner.arm.training
    for done in steps:
        windows = corpus.batch(seed=seed, step=done, batch_size=training.batch_size, length=arm.model.max_seq_len)
        learner.step(windows, done, arm.lr * training.schedule(done))


def validation_loss(learner: TorchLearner, corpus: Corpus) -> float:
    training, length = learner.arm.training, learner.arm.model.max_seq_len
    windows = (
        corpus.validation_batch(index=index, batch_size=training.validation_batch_size, length=length)
        for index in range(training.validation_batches)
    )
    return bits(fmean(map(learner.loss, windows)))


def kept_bytes(protocol: Experiment, corpus: Corpus, how: Options | None) -> int:
    """Count the bytes that a forward of a training batch keeps for its backward pass; nothing observes the model."""
    model, training = computing_again(first_model(protocol, protocol.arm(PLAIN), 0), how), protocol.training
    windows = corpus.batch(seed=0, step=0, batch_size=training.batch_size, length=protocol.model.max_seq_len)
    return held_bytes(model, torch.from_numpy(windows))


def table(figures: Mapping[str, Any]) -> str:
    """Write the mean loss of each way and its difference to the first on the same seeds; then the bytes kept."""
    ways: dict[str, list[float]] = {}
    for row in figures["rows"]:
        ways.setdefault(row["way"], []).append(row["loss"])
    lines = ["| training | loss | difference to the first row | verdict |", "|---|---|---|---|"]
    for way, own in ways.items():
        apart = interval([loss - before for loss, before in zip(own, ways["plain"], strict=True)])
        said = ("", "") if way == "plain" else (str(apart), apart.verdict)
        lines.append(f"| {WAYS[way].words} | {fmean(own):.3f} | {said[0]} | {said[1]} |")
    memory = figures["memory"]
    whole = memory["nothing computed again"]
    kept = ["| kept from a forward to its backward pass | bytes | |", "|---|---|---|"]
    kept += [f"| {words} | {in_bytes(size)} | {size / whole:.0%} |" for words, size in memory.items()]
    of, seeds = figures["training"], sorted({row["seed"] for row in figures["rows"]})
    notes = (
        f"Validation loss in bits per byte after {of['steps']} steps at the rate {of['lr']:g}, a mean over "
        f"{len(seeds)} seeds; differences are of the same seed, with their 95 % intervals. Losses of rounded experts "
        "are those with them rounded.",
        f"Bytes of a batch of {of['batch_size']} windows, logits included, counted in PyTorch's allocator.",
        f"Made with {made_with(figures['environment'])}.",
    )
    return "\n".join([*lines, "", notes[0], "", *kept, "", *notes[1:], ""])
