"""The arms: how each one updates a model. Everything else about a run is shared.

The maximum logits are measured in every arm, by a clip that never acts where the arm has none, so all pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.panel import Precision, Training
from muonclip.torch import MuonClip, QKClip


@dataclass(frozen=True, slots=True)
class Update:
    """What an arm does after the backward pass."""

    optimizer: torch.optim.Optimizer
    qk_clip: QKClip
    clips_itself: bool  # whether the optimizer's step includes the clip's

    def step(self) -> None:
        self.optimizer.step()
        if not self.clips_itself:
            self.qk_clip.step()


@dataclass(frozen=True, slots=True)
class Arm:
    """`build(model, training, lr, precision)`; pictures show `label` and `colour` (Okabe–Ito, colour-blind safe)."""

    label: str
    colour: str
    build: Callable[[nn.Module, Training, float, Precision], Update]


def _adamw(model: nn.Module, training: Training, lr: float, precision: Precision) -> Update:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=training.betas, eps=1e-8)
    return Update(optimizer, QKClip(model, tau=math.inf), clips_itself=False)


def _muon(model: nn.Module, training: Training, lr: float, precision: Precision) -> Update:
    return _muon_with_clip(model, training, lr, precision, tau=math.inf)


def _muonclip(model: nn.Module, training: Training, lr: float, precision: Precision) -> Update:
    return _muon_with_clip(model, training, lr, precision, tau=training.tau)


def _muon_with_clip(model: nn.Module, training: Training, lr: float, precision: Precision, *, tau: float) -> Update:
    optimizer = MuonClip(
        model,
        lr=lr,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        nesterov=training.nesterov,
        qk_clip=QKClip(model, tau=tau),
        adamw={"betas": training.betas, "eps": 1e-8},
        ns_dtype=getattr(torch, precision.ns_dtype),
    )
    assert optimizer.qk_clip is not None
    return Update(optimizer, optimizer.qk_clip, clips_itself=True)


ARMS: dict[str, Arm] = {
    "adamw": Arm("AdamW", "#0072B2", _adamw),
    "muon": Arm("Muon", "#D55E00", _muon),
    "muonclip": Arm("MuonClip", "#009E73", _muonclip),
}
