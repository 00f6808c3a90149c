"""What a step of QK-Clip saw and did, as a table, numbers and scalars to log."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerReport:
    """One attention in the last step; every field [heads].

    `max_logits`: the largest finite logit seen (−inf: none); NaN where the head was only certified. `gamma`: the factor
    its logits were scaled by. `exact`: whether `max_logits` is the maximum itself. `bound`: what the maximum cannot
    exceed; equal to it where it is exact.
    """

    max_logits: Tensor
    gamma: Tensor
    exact: Tensor
    bound: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QKClipReport:
    """What the last `QKClip.step()` saw and did; `layers` by module name. `steps`: how many there were by then;
    `last_clipped_step`: the last one that rescaled a head, counted from 1; 0 if none did."""

    tau: float
    layers: dict[str, LayerReport]
    steps: int = 0
    last_clipped_step: int = 0

    @property
    def max_logit(self) -> float:
        """The largest exact maximum over all layers and heads; −inf where there is none."""
        exact = [layer.max_logits[layer.exact] for layer in self.layers.values()]
        return max((maxima.max().item() for maxima in exact if maxima.numel()), default=-math.inf)

    @property
    def bound(self) -> float:
        """No logit of the last step was larger; −inf before the first step."""
        return max((layer.bound.max().item() for layer in self.layers.values()), default=-math.inf)

    @property
    def clipped_heads(self) -> int:
        """How many heads were rescaled."""
        return sum(int((layer.gamma < 1).sum()) for layer in self.layers.values())

    @property
    def heads(self) -> int:
        """How many heads there are."""
        return sum(layer.gamma.numel() for layer in self.layers.values())

    @property
    def status(self) -> str:
        """When τ last mattered: K2's heads were clipped in the first 30 % of its training only."""
        if self.steps == 0:
            return "no step yet"
        if self.last_clipped_step == self.steps:
            return "active"
        return f"inactive since step {self.last_clipped_step + 1}"

    def scalars(self, prefix: str = "qk_clip/") -> dict[str, float]:
        """Numbers to log at each step, for `SummaryWriter.add_scalar`, `wandb.log` and their like. `max_logit` is left
        out where no maximum was computed."""
        values = {
            "bound": self.bound,
            "clipped_heads": float(self.clipped_heads),
            "min_gamma": min((layer.gamma.min().item() for layer in self.layers.values()), default=1.0),
            "last_clipped_step": float(self.last_clipped_step),
        }
        if self.max_logit > -math.inf:
            values["max_logit"] = self.max_logit
        return {prefix + name: value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists; NaN where a head was only certified."""
        layers = {
            name: {
                "max_logits": layer.max_logits.tolist(),
                "gamma": layer.gamma.tolist(),
                "exact": layer.exact.tolist(),
                "bound": layer.bound.tolist(),
            }
            for name, layer in self.layers.items()
        }
        return dict(
            tau=self.tau,
            steps=self.steps,
            last_clipped_step=self.last_clipped_step,
            clipped_heads=self.clipped_heads,
            layers=layers,
        )

    def __str__(self) -> str:
        """A table: the maximum of each head, or ≤ what bounds it."""
        lines = [f"QK-Clip: {self.clipped_heads} of {self.heads} heads clipped at tau = {self.tau:g}, {self.status}"]
        for name, layer in self.layers.items():
            values = zip(layer.max_logits.tolist(), layer.exact.tolist(), layer.bound.tolist(), strict=True)
            logits = " ".join(f"{value:8.2f}" if exact else f"≤{bound:7.2f}" for value, exact, bound in values)
            gammas = " ".join(f"{value:8.3f}" for value in layer.gamma.tolist())
            lines += [f"  {name}", f"    max logit {logits}", f"    gamma     {gammas}"]
        return "\n".join(lines)


class StepCount:
    """Counts steps and the last one that rescaled a head, on the device and in place: nobody waits, and a replayed CUDA
    graph counts as well."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2, dtype=torch.int64, device="cpu")

    def add(self, clipped: Tensor) -> None:
        """Count a step; `clipped`, bool []: whether it rescaled a head."""
        if self._counts.device != clipped.device:
            self._counts = self._counts.to(clipped.device)
        taken, last = self._counts[:1], self._counts[1:]
        taken += 1
        last.copy_(torch.where(clipped, taken, last))

    def read(self) -> tuple[int, int]:
        """The steps taken, and the number of the last that rescaled a head; waits for the device."""
        taken, last = self._counts.tolist()
        return taken, last
