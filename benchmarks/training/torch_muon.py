"""PyTorch's own Muon, and AdamW for what it does not take: the baseline that needs no library."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.experiment.arms import Arm
from muonclip.core.adam_defaults import ADAM_EPS

_ADAMWS = ("embed_tokens.weight", "lm_head.weight")


class TorchMuon(Optimizer):
    """`torch.optim.Muon` on hidden matrices, AdamW on embedding, head and norms, in one `step`.

    torch's Muon takes parameters of two axes alone: each expert of a stack is given to it as one, a view of the stack.
    Fused blocks stay the one matrix that they are stored as. The size of updates is `match_rms_adamw`, as MuonClip's.
    """

    def __init__(self, model: nn.Module, arm: Arm) -> None:
        training, named = arm.training, dict(model.named_parameters())
        hidden = [each for name, each in named.items() if each.ndim >= 2 and name not in _ADAMWS]
        rest = [named[name] for name in _ADAMWS] + [each for each in named.values() if each.ndim < 2]
        self.parts = [
            (each, [nn.Parameter(part) for part in each.detach().unbind()] if each.ndim > 2 else [each])
            for each in hidden
        ]
        self.muon = torch.optim.Muon(
            [matrix for _, parts in self.parts for matrix in parts],
            lr=arm.lr,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
            nesterov=training.nesterov,
            adjust_lr_fn="match_rms_adamw",
        )
        matrices, vectors = ([each for each in rest if (each.ndim > 1) == wide] for wide in (True, False))
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=arm.lr * arm.adamw_share,
            betas=training.betas,
            eps=ADAM_EPS,
        )
        for group in self.adamw.param_groups:
            group["use"] = "adamw"
        super().__init__(list(named.values()), {})
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for stack, _ in self.parts:
            stack.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for stack, parts in self.parts:
            if stack.ndim > 2 and stack.grad is not None:
                for part, grad in zip(parts, stack.grad.unbind(), strict=True):
                    part.grad = grad
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
