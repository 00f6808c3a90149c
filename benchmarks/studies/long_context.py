"""A longer context for a trained model, by YaRN, as Kimi K2 went from 4k to 32k; here from 64 tokens to 512.

The reference mixture of experts is trained by MuonClip on short windows. Weights and state then go on in a model of the
long context, on long windows at the last rate: with YaRN, and with the rotation left as it was. The same heads are
clipped throughout; YaRN multiplies their logits by mscale² at the switch.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import Arm, choices
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment, made_with
from benchmarks.records.intervals import interval
from benchmarks.records.summary import bits
from benchmarks.training.timing import torch_threads
from benchmarks.training.torch_learner import TorchLearner
from muonclip.models import MoEConfig

ARM = "muonclip"
FACTOR = 8
TRAINING = replace(OWN_RATE, tau=5.0)
"""A threshold at which some heads are clipped when the switch comes."""
BATCH, WINDOWS = 4, 32
SEEDS = (0, 1, 2)
AROUND = 3
"""How many steps are written before and after the switch."""
WORDS = {"rope": "the rotation as it was", "yarn": "YaRN"}


Row = dict[str, Any]


class Sizes(NamedTuple):
    """The steps of the short stage, and of the long one."""

    short: int = 100
    long: int = 30


def run(options: argparse.Namespace) -> None:
    """Train both stages on all seeds. Writes long_context.json and, what it also prints, the tables long_context.md."""
    make_folder(options.out)
    sizes, seeds = (Sizes(AROUND, AROUND), SEEDS[:2]) if options.quick else (Sizes(), SEEDS)
    corpus, rows, steps = open_corpus(), list[Row](), list[Row]()
    protocol = Experiment.on(
        corpus, name="", title="", chosen=choices(ARM), seeds=seeds,
        model=MoEConfig.cpu(vocab_size=corpus.vocab_size), training=replace(TRAINING, steps=sizes.short),
    )  # fmt: skip
    corpus.require(FACTOR * protocol.model.max_seq_len)
    of = {"short": sizes.short, "long": sizes.long, "batch": [TRAINING.batch_size, BATCH], "tau": TRAINING.tau}
    lengths = [protocol.model.max_seq_len, FACTOR * protocol.model.max_seq_len]
    figures = {"environment": environment() | {"threads": 1}, "training": of | {"lengths": lengths}}
    figures |= {"rows": rows, "switch": steps}
    with torch_threads(1):
        for seed in seeds:
            stages(protocol, corpus, seed, sizes, rows, steps)
            print(*rows[-4:], sep="\n", file=sys.stderr, flush=True)
            atomic_files.write_json(options.out / "long_context.json", figures)
    atomic_files.write_text(options.out / "long_context.md", text := table(figures))
    print(text)


def extended(model: MoEConfig, way: str) -> MoEConfig:
    """Return the configuration of the long context: "yarn" as Kimi K2 sets it, or "rope", which changes no rotation."""
    longer = replace(model, max_seq_len=FACTOR * model.max_seq_len)
    if way == "rope":
        return longer
    return replace(longer, yarn_factor=FACTOR, yarn_original_seq_len=model.max_seq_len, yarn_beta_fast=1.0)


def stages(protocol: Experiment, corpus: Corpus, seed: int, sizes: Sizes, rows: list[Row], steps: list[Row]) -> None:
    """Train a seed: the short stage, then each way of the long one from its end; add what is measured."""
    arm = protocol.arm(ARM)
    short = TorchLearner(protocol, arm, seed)
    for done in range(sizes.short):
        measured = step(short, corpus, seed, done)
        if done >= sizes.short - AROUND:
            steps += [{"way": way, "seed": seed, "step": done - sizes.short + 1} | measured for way in WORDS]
    for way in WORDS:
        long = go_on(protocol, arm, way, short)
        rows.append({"way": way, "seed": seed, "steps": 0, "loss": losses(long, corpus)})
        for done in range(sizes.long):
            measured = step(long, corpus, seed, sizes.short + done, BATCH)
            if done < AROUND:
                steps.append({"way": way, "seed": seed, "step": done + 1} | measured)
        rows.append({"way": way, "seed": seed, "steps": sizes.long, "loss": losses(long, corpus)})


def go_on(protocol: Experiment, arm: Arm, way: str, short: TorchLearner) -> TorchLearner:
    """Begin the long stage with the weights and the optimizer's state of the short one."""
    long = TorchLearner(protocol, replace(arm, model=extended(arm.model, way)), 0)
    long.restore(copy.deepcopy(short.state()))
    return long


def step(learner: TorchLearner, corpus: Corpus, seed: int, done: int, batch_size: int | None = None) -> Row:
    """Take a step; return the largest maximum logit that it saw, the least γ and the number of clipped heads."""
    training, length = learner.arm.training, learner.arm.model.max_seq_len
    windows = corpus.batch(seed=seed, step=done, batch_size=batch_size or training.batch_size, length=length)
    rate = training.schedule(min(done, training.steps - 1))  # the long stage: that of the last step
    record = learner.step(windows, done, learner.arm.lr * rate)
    gammas = (layer.gamma.min().item() for layer in learner.qk_clip.report().layers.values())
    return {
        "max_logit": max(map(max, record["max_logits"].values())),
        "gamma": min(gammas),
        "clipped_heads": record["clipped_heads"],
    }


@torch.no_grad()
def losses(learner: TorchLearner, corpus: Corpus) -> list[float]:
    """Return the mean loss in bits at the positions of the short context, and of each doubling after it."""
    length = learner.arm.model.max_seq_len
    windows = torch.from_numpy(corpus.validation_batch(index=0, batch_size=WINDOWS, length=length))
    learner.model.eval()
    by_position = torch.zeros(length, dtype=torch.float64)
    for some in windows.split(BATCH):
        logits = learner.model(some[:, :-1])
        by_position += F.cross_entropy(logits.mT, some[:, 1:], reduction="none").double().sum(0) / WINDOWS
    learner.model.train()
    starts = [0, *(length // FACTOR << doubling for doubling in range(FACTOR.bit_length()))]
    return [bits(by_position[a:b].mean().item()) for a, b in pairwise(starts)]


def table(figures: Mapping[str, Any]) -> str:
    """Write the loss over positions before and after the long stage, then logits and factors around the switch."""
    of, seeds = figures["training"], sorted({row["seed"] for row in figures["rows"]})
    short, long = of["lengths"]
    ends = [short << doubling for doubling in range((long // short).bit_length())]
    spans = [f"{start} to {end - 1}" for start, end in zip([0, *ends], ends, strict=False)]
    lines = [f"| long stage | steps | {' | '.join(spans)} |", "|---" * (2 + len(spans)) + "|"]
    found: dict[tuple[str, int], list[list[float]]] = {}
    for row in figures["rows"]:
        found.setdefault((row["way"], row["steps"]), []).append(row["loss"])
    for (way, steps), each in sorted(found.items(), key=lambda item: item[0][1]):
        means = (f"{fmean(losses):.3f}" for losses in zip(*each, strict=True))
        lines.append(f"| {WORDS[way]} | {steps} | {' | '.join(means)} |")
    pairs = zip(found["yarn", of["long"]], found["rope", of["long"]], strict=True)
    apart = zip(*(_differences(*pair) for pair in pairs), strict=True)
    lines.append(
        f"| YaRN − the rotation as it was | {of['long']} | {' | '.join(str(interval(each)) for each in apart)} |"
    )
    heads = [
        "| step | largest S, YaRN | least γ | clipped heads | largest S, rotation as it was | least γ | clipped heads |"
    ]
    heads.append("|---" * 7 + "|")
    for number in sorted({row["step"] for row in figures["switch"]}):
        cells: list[str] = []
        for way in ("yarn", "rope"):
            seen = [row for row in figures["switch"] if (row["way"], row["step"]) == (way, number)]
            cells += [f"{fmean(row['max_logit'] for row in seen):.2f}", f"{fmean(row['gamma'] for row in seen):.3f}"]
            cells.append(f"{fmean(row['clipped_heads'] for row in seen):.1f}")
        heads.append(f"| {number} | {' | '.join(cells)} |")
    notes = (
        f"Bits per byte by position, means over {WINDOWS} held-out windows and {len(seeds)} seeds; differences are of "
        "the same seed, with their 95 % intervals.",
        f"Step 0 is the last of {of['short']} with {of['batch'][0]} windows of {short} tokens, step 1 the first of "
        f"{of['long']} with {of['batch'][1]} of {long}; τ = {of['tau']:g}. Means over the seeds.",
        f"Made with {made_with(figures['environment'])}.",
    )
    return "\n".join([*lines, "", notes[0], "", *heads, "", *notes[1:], ""])


def _differences(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    return [loss - other for loss, other in zip(losses, others, strict=True)]
