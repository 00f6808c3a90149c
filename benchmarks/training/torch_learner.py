"""A run's model and optimizer in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.settings import Precision
from benchmarks.training.learner import Learner, Windows
from benchmarks.training.torch_muon import TorchMuon
from muonclip.core.adam_defaults import ADAM_EPS
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip, QKClip


class TorchLearner(Learner):
    """`qk_clip` acts within the step of Muon's arms, and after that of AdamW's."""

    def __init__(self, experiment: Experiment, arm: Arm, seed: int) -> None:
        self.experiment, self.arm = experiment, arm
        self.model = first_model(experiment, arm, seed)
        self.optimizer, self.qk_clip = make_optimizer(self.model, arm, experiment.precision)
        self.optimizer.register_step_post_hook(self.model.step_hook)

    def step(self, windows: Windows, done: int, lr: float) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.arm.adamw_share if group.get("use") == "adamw" else lr
        self.optimizer.zero_grad()
        loss, norm = self._gradients(windows)
        measured = {"loss": loss, "grad_norm": norm}
        if not math.isfinite(loss + norm):
            return measured | {"max_logits": {}, "clipped_heads": 0}
        self.qk_clip.tau = self.arm.tau(done)
        self.optimizer.step()
        if not isinstance(self.optimizer, MuonClip):
            self.qk_clip.step()
        report = self.qk_clip.report()
        return measured | {
            "max_logits": {name: layer.max_logits.tolist() for name, layer in report.layers.items()},
            "clipped_heads": report.clipped_heads,
        }

    def _gradients(self, windows: Windows) -> tuple[float, float]:
        """Compute the gradients of the batch and clip them; return its loss, and their norm before."""
        loss = self._loss(windows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.arm.training.grad_clip)
        return loss.item(), norm.item()

    @torch.no_grad()
    def loss(self, windows: Windows) -> float:
        self.model.eval()
        loss = self._loss(windows).item()
        self.model.train()
        return loss

    def reference(self) -> MoE:
        return self.model

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _loss(self, windows: Windows) -> Tensor:
        tokens = torch.from_numpy(windows).to(self.experiment.device)
        with autocast(self.experiment):
            return self.model.loss(tokens[:, :-1], tokens[:, 1:])


def first_model(experiment: Experiment, arm: Arm, seed: int) -> MoE:
    """Make the model before its first step, the same for all arms of a seed except for what an arm changes."""
    torch.manual_seed(seed)
    return MoE(arm.model).to(experiment.device)


def autocast(experiment: Experiment) -> torch.autocast:
    narrow = experiment.precision.autocast == "bfloat16"
    return torch.autocast(experiment.device, dtype=torch.bfloat16, enabled=narrow)


def make_optimizer(
    model: nn.Module, arm: Arm, precision: Precision, *, foreach: bool | None = None
) -> tuple[torch.optim.Optimizer, QKClip]:
    """Make what updates the model, and the clip: within MuonClip's step, to be called after AdamW's.

    `foreach`: of AdamW alone; it cannot take parameters of several meshes at once.
    """
    training = arm.training
    if arm.optimizer == "torch-muon":
        return TorchMuon(model, arm), QKClip(model, tau=math.inf, observe="always")
    qk_clip = QKClip(model, tau=training.tau if arm.clips else math.inf, observe="always")
    if arm.optimizer == "adamw":
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=arm.lr, betas=training.betas, eps=ADAM_EPS, foreach=foreach), qk_clip
    muon = MuonClip(
        model,
        lr=arm.lr,
        momentum=training.momentum,
        nesterov=training.nesterov,
        per_head=arm.per_head,
        qk_clip=qk_clip,
        adamw={
            "lr": training.adamw_lr,
            "weight_decay": training.weight_decay,
            "betas": training.betas,
            "eps": ADAM_EPS,
        },
        ns_dtype=getattr(torch, precision.ns_dtype),
        **{"weight_decay": training.weight_decay, **arm.options},
    )
    return muon, qk_clip
