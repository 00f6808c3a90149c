"""Bf16 weights with and without masters, against float32 weights: loss, and bytes of parameters and state.

The reference mixture of experts is trained by MuonClip at its best rate, each way from the same weights (rounded to
bf16 where they are kept so) and on the same batches. The model computes in bf16 in all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

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
from muonclip.torch import MuonClip


class Way(NamedTuple):
    """The dtype of the parameters, and options of MuonClip."""

    words: str
    dtype: torch.dtype
    options: Mapping[str, Any]


WAYS = {
    "float32": Way("float32, products in bf16 by autocast", torch.float32, {}),
    "32": Way("bf16, `master_weight_bits=32`", torch.bfloat16, {"master_weight_bits": 32}),
    "24": Way("bf16, `master_weight_bits=24`", torch.bfloat16, {"master_weight_bits": 24}),
    "24, bf16 momentum": Way(
        "bf16, `master_weight_bits=24`, `momentum_dtype=torch.bfloat16`",
        torch.bfloat16,
        {"master_weight_bits": 24, "momentum_dtype": torch.bfloat16},
    ),
    "bf16": Way("bf16, no masters", torch.bfloat16, {}),
}
SEEDS = (0, 1, 2)


def run(options: argparse.Namespace) -> None:
    """Train all ways on all seeds. Writes master_weights.json and, what it also prints, the table master_weights.md."""
    make_folder(options.out)
    training, seeds = (
        (replace(OWN_RATE, steps=2, validation_batches=1), SEEDS[:1]) if options.quick else (OWN_RATE, SEEDS)
    )
    corpus, rows = open_corpus(), list[dict[str, Any]]()
    shared = {"steps": training.steps, "lr": training.lr["muonclip"], "batch_size": training.batch_size}
    figures = {"environment": environment() | {"threads": 1}, "training": shared, "rows": rows}
    with torch_threads(1):
        for seed in seeds:
            for way in WAYS:
                rows.append({"way": way, "seed": seed} | train(corpus, training, WAYS[way], seed))
                print(rows[-1], file=sys.stderr, flush=True)
                atomic_files.write_json(options.out / "master_weights.json", figures)
    atomic_files.write_text(options.out / "master_weights.md", text := table(figures))
    print(text)


def train(corpus: Corpus, training: Training, way: Way, seed: int) -> dict[str, float]:
    """Train one way; return the validation loss at its end in bits per byte, and the bytes that are kept for it.

    `bytes`: of parameters and state, for each number of the model. Gradients, of the parameters' dtype, come on top.
    """
    (arm,) = resolve(choices("muonclip"), MoEConfig.cpu(vocab_size=corpus.vocab_size), training)
    torch.manual_seed(seed)
    model = MoE(arm.model).to(way.dtype)
    optimizer, _ = make_optimizer(model, replace(arm, options=way.options), Precision())
    assert isinstance(optimizer, MuonClip)
    optimizer.register_step_post_hook(model.step_hook)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = arm.lr * training.schedule(step)
        optimizer.zero_grad()
        tokens = torch.from_numpy(
            corpus.batch(seed=seed, step=step, batch_size=training.batch_size, length=arm.model.max_seq_len)
        )
        _loss(model, tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
    parameters = list(model.parameters())
    held = [value for each in parameters for value in (each, *optimizer.state[each].values()) if value.ndim]
    return {
        "loss": _validation_loss(model.eval(), corpus, training),
        "bytes": sum(value.nbytes for value in held) / sum(each.numel() for each in parameters),
    }


def table(figures: Mapping[str, Any]) -> str:
    """Write bytes and mean losses of each way, and the differences to float32 parameters on the same seeds."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in figures["rows"]:
        ways.setdefault(row["way"], []).append(row)
    plain = [row["loss"] for row in ways["float32"]]
    lines = ["| parameters | bytes kept | loss | difference to float32 |", "|---|---|---|---|"]
    for way, rows in ways.items():
        losses = [row["loss"] for row in rows]
        apart = "" if way == "float32" else str(interval(_differences(losses, plain)))
        lines.append(f"| {WAYS[way].words} | {rows[0]['bytes']:.2f} | {fmean(losses):.3f} | {apart} |")
    of, seeds = figures["training"], sorted({row["seed"] for row in figures["rows"]})
    notes = (
        "Bytes of parameters and state for each number of the model; gradients come on top. Bits per byte after "
        f"{of['steps']} steps at the rate {of['lr']:g}, {len(seeds)} seeds; differences are paired, with their 95 % "
        "intervals.",
        f"Made with {made_with(figures['environment'])}.",
    )
    return "\n".join([*lines, "", *notes, ""])


def _differences(losses: Sequence[float], plain: Sequence[float]) -> list[float]:
    return [loss - before for loss, before in zip(losses, plain, strict=True)]


def _loss(model: MoE, tokens: torch.Tensor) -> torch.Tensor:
    wide = next(model.parameters()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=wide):
        return model.loss(tokens[:, :-1], tokens[:, 1:])


@torch.no_grad()
def _validation_loss(model: MoE, corpus: Corpus, training: Training) -> float:
    size, length = training.validation_batch_size, model.config.max_seq_len
    losses: list[float] = []
    for index in range(training.validation_batches):
        tokens = torch.from_numpy(corpus.validation_batch(index=index, batch_size=size, length=length))
        losses.append(_loss(model, tokens).item())
    return bits(fmean(losses))
