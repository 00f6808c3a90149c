"""The time of whole training steps, forward, backward and optimizer, by AdamW, torch's Muon and MuonClip.

The limit of a ratio to AdamW is 1 + (the step's matrix products, run alone) / (AdamW's step): Newton–Schulz cannot be
had for less. With `tokens` a step and N parameters the model's operations are 6 · tokens · N, which a rule of thumb
compares those of the updates with.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.records.intervals import median_interval
from benchmarks.studies.clip_cost_bench import VOCABULARY, build
from benchmarks.studies.speed_limit import Products
from benchmarks.studies.speed_updates import clock
from benchmarks.training.timing import in_turn, seconds, torch_threads
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

ADAMW, AGAIN, TORCH, OURS, PRODUCTS = "AdamW", "AdamW, again", "torch.optim.Muon + AdamW", "MuonClip", "products alone"
LR, DECAY = 1e-6, 0.1


class Case(NamedTuple):
    """A model, the length of its sequences, and how many tokens a step and a forward have."""

    model: str
    tokens: int
    length: int = 256
    at_once: int = 2048


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "Llama, 5M": lambda length: build("llama", width=256, layers=6, length=length),
    "Llama, 50M": lambda length: build("llama", width=768, layers=8, length=length),
    "reference MoE": lambda length: MoE(MoEConfig.cpu(vocab_size=VOCABULARY, max_seq_len=length)),
    "tiny": lambda length: MoE(
        MoEConfig.cpu(vocab_size=VOCABULARY, max_seq_len=length, num_layers=1, num_dense_layers=0, num_experts=2)
    ),
}
CASES = (Case("Llama, 5M", 1024), Case("Llama, 5M", 8192), Case("reference MoE", 1024), Case("reference MoE", 8192))
LONG = (
    Case("Llama, 50M", 1024),
    *(Case(model, 32768) for model in MODELS if model != "tiny"),
    Case("Llama, 50M", 8192),
)
TINY = (Case("tiny", 32, length=8, at_once=16),)


def train(case: Case, dtype: str, threads: int, rounds: int, tell: Callable[[str], object]) -> dict[str, Any]:
    """Measure the steps of one model, size and precision ("bfloat16" is autocast): raw seconds, and ratios to AdamW."""
    torch.manual_seed(0)
    base = MODELS[case.model](case.length)
    batches = torch.randint(VOCABULARY, (case.tokens // case.length, case.length + 1)).split(
        max(1, case.at_once // case.length)
    )
    with torch_threads(threads):
        arms = {name: _arm(name, copy.deepcopy(base), batches, dtype) for name in (ADAMW, AGAIN, TORCH, OURS)}
        for forward_backward, update in arms.values():
            forward_backward()
            update()
        forward_backward, update = arms[OURS]
        forward_backward()
        with Products() as products:
            update()
        replay = products.replay()

        def step(name: str) -> float:
            forward_backward, update = arms[name]
            return seconds(forward_backward, clock()) + seconds(update, clock())

        candidates = {name: lambda name=name: step(name) for name in arms} | {
            PRODUCTS: lambda: seconds(replay, clock())
        }
        samples = in_turn(candidates, rounds, warm_up=1)
    row = {
        **case._asdict(),
        "dtype": dtype,
        "threads": threads,
        "parameters": sum(p.numel() for p in base.parameters()),
        "flops": products.flops,
        "seconds": samples,
        "ratios": {
            name: median_interval([of / adamw for of, adamw in zip(samples[name], samples[ADAMW], strict=True)])
            for name in arms
            if name != ADAMW
        },
    }
    tell(f"{case}, {dtype}, {threads} threads: {facts(row)}")
    return row


def facts(row: Mapping[str, Any]) -> dict[str, float]:
    """Derive what the page shows of a case from what was measured."""
    median = {name: statistics.median(of) for name, of in row["seconds"].items()}
    return {
        "adamw_ms": 1e3 * median[ADAMW],
        **{name: row["ratios"][name]["median"] for name in (AGAIN, TORCH, OURS)},
        "limit": 1 + median[PRODUCTS] / median[ADAMW],
        "rule": row["flops"] / (6 * row["tokens"] * row["parameters"]),
    }


def _arm(
    name: str, model: nn.Module, batches: Sequence[Tensor], dtype: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return forward with backward, over all batches of a step, and the update."""

    def forward_backward() -> None:
        model.zero_grad()
        for tokens in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                (_loss(model, tokens) / len(batches)).backward()

    if name != TORCH:
        optimizer = (
            MuonClip(model, LR, DECAY, adamw={"fused": True})
            if name == OURS
            else torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)
        )

        def update() -> None:
            optimizer.step()

        return forward_backward, update
    return forward_backward, _torch_muon(model)


def _torch_muon(model: nn.Module) -> Callable[[], None]:
    """Return the update by torch's Muon, for the same weights as by ours, each expert a matrix, and AdamW's."""
    planned = {each.name: each.use for each in MuonClip(model, qk_clip=None).plan.parameters}
    weights = [p for name, p in model.named_parameters() if planned[name] == "muon"]
    rest = [p for name, p in model.named_parameters() if planned[name] != "muon"]
    matrices = [nn.Parameter(matrix) for p in weights for matrix in _unbound(p.data)]
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY)
    adamw = torch.optim.AdamW(rest, lr=LR, weight_decay=DECAY, fused=True)

    def update() -> None:
        gradients = (matrix for p in weights if p.grad is not None for matrix in _unbound(p.grad))
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient
        muon.step()
        adamw.step()

    return update


def _unbound(x: Tensor) -> Sequence[Tensor]:
    return x.view(-1, *x.shape[-2:]).unbind()


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    if isinstance(model, MoE):
        return model.loss(tokens[:, :-1], tokens[:, 1:])
    return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
