"""The arms: how each one updates a model, and for some which model. Everything else about a run is shared.

An arm that changes the model starts from the same weights wherever the shapes agree.
The maximum logits are measured in every arm, by a clip that never acts where the arm has none, so all pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.panel import Panel, Precision, Training
from muonclip.models import MoEConfig
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
    """`build(model, training, lr, precision)` for the model that `model(config, training)` gives the sizes of.

    Pictures show `label` and `colour` (Okabe–Ito, colour-blind safe).
    """

    label: str
    colour: str
    build: Callable[[nn.Module, Training, float, Precision], Update]
    model: Callable[[MoEConfig, Training], MoEConfig] = lambda config, training: config


def model_changes(panel: Panel, arm: str) -> dict[str, Any]:
    """The fields that the arm's model has otherwise than the panel's, with its values."""
    own, shared = asdict(ARMS[arm].model(panel.model, panel.training)), asdict(panel.model)
    return {name: value for name, value in own.items() if value != shared[name]}


def _adamw(model: nn.Module, training: Training, lr: float, precision: Precision, *, clips: bool = False) -> Update:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=training.betas, eps=1e-8)
    return Update(optimizer, QKClip(model, tau=training.tau if clips else math.inf), clips_itself=False)


def _muon(
    model: nn.Module,
    training: Training,
    lr: float,
    precision: Precision,
    *,
    clips: bool = False,
    per_head: bool = False,
) -> Update:
    optimizer = MuonClip(
        model,
        lr=lr,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        nesterov=training.nesterov,
        per_head=per_head,
        qk_clip=QKClip(model, tau=training.tau if clips else math.inf),
        adamw={"betas": training.betas, "eps": 1e-8},
        ns_dtype=getattr(torch, precision.ns_dtype),
    )
    assert optimizer.qk_clip is not None
    return Update(optimizer, optimizer.qk_clip, clips_itself=True)


ARMS: dict[str, Arm] = {
    "adamw": Arm("AdamW", "#0072B2", _adamw),
    "muon": Arm("Muon", "#D55E00", _muon),
    "muonclip": Arm("MuonClip", "#009E73", partial(_muon, clips=True)),
    "per-head": Arm("MuonClip per head", "#CC79A7", partial(_muon, clips=True, per_head=True)),
    "adamw-clip": Arm("AdamW + QK-Clip", "#56B4E9", partial(_adamw, clips=True)),
    "qk-norm": Arm("Muon, QK-norm", "#E69F00", _muon, lambda config, _: replace(config, qk_norm=True)),
    "softcap": Arm("Muon, soft cap", "#000000", _muon, lambda config, training: replace(config, softcap=training.tau)),
}
DEFAULT_ARMS = ("adamw", "muon", "muonclip")  # the claim itself; the others are what it is compared with
