"""Clipping gradients next to Muon: all by their joint norm, AdamW's half by its own, or none.

Muon's update does not see the size of its gradient, so that a joint norm may do no more than make AdamW's gradients
small where Muon's are large (Megatron-LM, issue 5394; xtuner, pull request 2001). The reference mixture of experts is
trained by MuonClip at its best rate, each way from the same weights and on the same batches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import choices, resolve
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.experiment.settings import Precision, Training
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment, made_with
from benchmarks.records.intervals import interval
from benchmarks.records.summary import bits
from benchmarks.training.timing import torch_threads
from benchmarks.training.torch_learner import make_optimizer
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch.distributed import clip_grad_norm_

WAYS = (("none", 0.0), ("joint", 1.0), ("adamw", 1.0), ("joint", 0.1), ("adamw", 0.1))
"""Whose gradients are clipped, by which norm."""
WORDS = {"none": "nothing", "joint": "all, by the joint norm", "adamw": "AdamW's, by their own norm"}
TRAINING = replace(OWN_RATE, steps=150)
SEEDS = (0, 1, 2)


def run(options: argparse.Namespace) -> None:
    """Train all ways on all seeds. Writes grad_clipping.json and, what it also prints, the table grad_clipping.md."""
    make_folder(options.out)
    training, seeds = (
        (replace(TRAINING, steps=2, validation_batches=1), SEEDS[:1]) if options.quick else (TRAINING, SEEDS)
    )
    corpus, rows = open_corpus(), []
    with torch_threads(1):
        for only, max_norm in WAYS:
            for seed in seeds:
                rows.append(
                    {"clipped": only, "max_norm": max_norm, "seed": seed}
                    | train(corpus, training, only, max_norm, seed)
                )
                print(rows[-1], file=sys.stderr, flush=True)
    shared = {"steps": training.steps, "lr": training.lr["muonclip"], "batch_size": training.batch_size}
    figures = {"environment": environment() | {"threads": 1}, "training": shared, "rows": rows}
    atomic_files.write_json(options.out / "grad_clipping.json", figures)
    atomic_files.write_text(options.out / "grad_clipping.md", text := table(figures))
    print(text)


def train(corpus: Corpus, training: Training, only: str, max_norm: float, seed: int) -> dict[str, float]:
    """Train one way; return the validation loss at its end in bits per byte, and means over the steps.

    `share`: of the squared joint norm, what AdamW's gradients are. `times`: the share of the steps that were clipped.
    """
    (arm,) = resolve(choices("muonclip"), MoEConfig.cpu(vocab_size=corpus.vocab_size), training)
    torch.manual_seed(seed)
    model = MoE(arm.model)
    optimizer, _ = make_optimizer(model, arm, Precision())
    optimizer.register_step_post_hook(model.step_hook)
    windows: dict[str, Any] = {"seed": seed, "batch_size": training.batch_size, "length": arm.model.max_seq_len}
    shares: list[float] = []
    times = 0
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = arm.lr * training.schedule(step)
        optimizer.zero_grad()
        tokens = torch.from_numpy(corpus.batch(step=step, **windows))
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        joint, adamw = (clip_grad_norm_(optimizer, torch.inf, only=half).item() for half in (None, "adamw"))
        shares.append((adamw / joint) ** 2)
        if only != "none":
            times += clip_grad_norm_(optimizer, max_norm, only=None if only == "joint" else "adamw").item() > max_norm
        optimizer.step()
    return {
        "loss": validation_loss(model.eval(), corpus, training),
        "share": fmean(shares),
        "times": times / training.steps,
    }


def table(figures: Mapping[str, Any]) -> str:
    """Write the mean losses of each way, and their differences to clipping nothing on the same seeds."""
    ways = {(row["clipped"], row["max_norm"]): [] for row in figures["rows"]}
    for row in figures["rows"]:
        ways[row["clipped"], row["max_norm"]].append(row)
    plain = [row["loss"] for row in ways["none", 0.0]]
    lines = ["| clipped | norm | steps that were clipped | loss | difference to none |", "|---|---|---|---|---|"]
    for (only, norm), rows in ways.items():
        apart = "" if only == "none" else str(interval(_differences([row["loss"] for row in rows], plain)))
        cells = (WORDS[only], f"{norm:g}" if norm else "", f"{fmean(row['times'] for row in rows):.0%}" if norm else "")
        lines.append(f"| {' | '.join(cells)} | {fmean(row['loss'] for row in rows):.3f} | {apart} |")
    share = fmean(row["share"] for row in figures["rows"])
    of, seeds = figures["training"], sorted({row["seed"] for row in figures["rows"]})
    notes = (
        f"Bits per byte after {of['steps']} steps at the rate {of['lr']:g}, {len(seeds)} seeds; differences are "
        f"paired, with their 95 % intervals. AdamW's gradients are {share:.0%} of the squared joint norm, on average.",
        f"Made with {made_with(figures['environment'])}.",
    )
    return "\n".join([*lines, "", *notes, ""])


def _differences(losses: Sequence[float], plain: Sequence[float]) -> list[float]:
    return [loss - before for loss, before in zip(losses, plain, strict=True)]


@torch.no_grad()
def validation_loss(model: MoE, corpus: Corpus, training: Training) -> float:
    """Return the model's loss on the validation windows in bits per byte."""
    size, length = training.validation_batch_size, model.config.max_seq_len
    losses: list[float] = []
    for index in range(training.validation_batches):
        tokens = torch.from_numpy(corpus.validation_batch(index=index, batch_size=size, length=length))
        losses.append(model.loss(tokens[:, :-1], tokens[:, 1:]).item())
    return bits(fmean(losses))
