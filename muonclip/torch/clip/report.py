"""The report of a step of QK-Clip, as a table, numbers and scalars to log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerReport:
    """One attention in the last step; every field [heads].

    Attributes:
        max_logits: The largest finite logit seen (−inf: none); NaN where a bound shows the head at most at τ.
        gamma: The factor its logits were scaled by; 1 where the head was not clipped.
        exact: Whether `max_logits` is the maximum itself.
        bound: An upper bound of the logits; equal to the maximum where that is exact.
        frozen: Whether it is above τ and cannot be clipped, because weights of its queries and keys are frozen.
    """

    max_logits: Tensor
    gamma: Tensor
    exact: Tensor
    bound: Tensor
    frozen: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QKClipReport:
    """The report of the last `QKClip.step()`.

    Attributes:
        tau: The largest logit a head may keep, or what each attention had in the last step where it has its own or τ is
            a function.
        layers: A report for each attention, by the name of its module.
        steps: How many steps there were by then.
        last_clipped_step: The last step that rescaled a head, counted from 1; 0 if none did.
    """

    tau: float | Mapping[str, float]
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
        """An upper bound of all logits of the last step; −inf before the first step."""
        return max((layer.bound.max().item() for layer in self.layers.values()), default=-math.inf)

    @property
    def clipped_heads(self) -> int:
        """Number of heads that were rescaled."""
        return sum(int((layer.gamma < 1).sum()) for layer in self.layers.values())

    @property
    def frozen_heads(self) -> int:
        """Number of heads above τ that cannot be clipped, because weights of their queries and keys are frozen."""
        return sum(int(layer.frozen.sum()) for layer in self.layers.values())

    @property
    def heads(self) -> int:
        """Number of heads."""
        return sum(layer.gamma.numel() for layer in self.layers.values())

    @property
    def status(self) -> str:
        """ "no step yet", "active" where the last step rescaled a head, since when none was, or that none ever was."""
        if self.steps == 0:
            return "no step yet"
        if self.last_clipped_step == self.steps:
            return "active"
        if self.last_clipped_step == 0:
            return "none in 1 step" if self.steps == 1 else f"none in {self.steps} steps"
        return f"inactive since step {self.last_clipped_step + 1}"

    def scalars(self, prefix: str = "qk_clip/") -> dict[str, float]:
        """Return numbers to log at each step, for `SummaryWriter.add_scalar`, `wandb.log` and similar.

        `max_logit` is left out where no maximum was computed.

        Args:
            prefix: Text in front of each name.
        """
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
        """Return everything as plain numbers and lists; NaN where a bound shows a head at most at τ."""
        layers = {
            name: {
                "max_logits": layer.max_logits.tolist(),
                "gamma": layer.gamma.tolist(),
                "exact": layer.exact.tolist(),
                "bound": layer.bound.tolist(),
                "frozen": layer.frozen.tolist(),
            }
            for name, layer in self.layers.items()
        }
        return dict(
            tau=dict(self.tau) if isinstance(self.tau, Mapping) else self.tau,
            steps=self.steps,
            last_clipped_step=self.last_clipped_step,
            clipped_heads=self.clipped_heads,
            layers=layers,
        )

    def __str__(self) -> str:
        """Write a table: the maximum of each head, or ≤ its upper bound."""
        own = self.tau if isinstance(self.tau, Mapping) else {}
        at = "their own tau" if isinstance(self.tau, Mapping) else f"tau = {self.tau:g}"
        lines = [f"QK-Clip: {self.clipped_heads} of {self.heads} heads clipped at {at}, {self.status}"]
        if self.frozen_heads:
            lines[0] += f"; {self.frozen_heads} above tau, cannot be clipped: frozen"
        for name, layer in self.layers.items():
            values = zip(layer.max_logits.tolist(), layer.exact.tolist(), layer.bound.tolist(), strict=True)
            logits = " ".join(f"{value:8.2f}" if exact else f"≤{bound:7.2f}" for value, exact, bound in values)
            gammas = " ".join(f"{value:8.3f}" for value in layer.gamma.tolist())
            heading = f"  {name}, tau = {own[name]:g}" if name in own else f"  {name}"
            lines += [heading, f"    max logit {logits}", f"    gamma     {gammas}"]
            frozen = layer.frozen.nonzero().flatten().tolist()
            if frozen:
                lines.append(f"    above tau, cannot be clipped: frozen (heads {', '.join(map(str, frozen))})")
        return "\n".join(lines)


def extremes_of(layers: Iterable[LayerReport]) -> Tensor:
    """Return bound, max_logit, clipped_heads and −min_gamma over these attentions, fp32 [4], on their device.

    The larger ones are those to keep; −inf, −inf, 0 and −1 where there is no attention. max_logit is −inf where no
    maximum was computed.
    """
    layers = list(layers)
    if not layers:
        return torch.tensor([-math.inf, -math.inf, 0.0, -1.0])
    device = layers[0].gamma.device
    max_logits, gamma, bound = (
        torch.cat([getattr(layer, name).to(device) for layer in layers]) for name in ("max_logits", "gamma", "bound")
    )
    certified_only = max_logits.isnan()
    highest = max_logits.masked_fill(certified_only, -math.inf).max()
    return torch.stack([bound.max(), highest, (gamma < 1).sum().float(), -gamma.min()])


class StepCount:
    """Counts steps and the last one that rescaled a head.

    It counts on the device and in place, so that the host need not wait and a replayed CUDA graph counts as well.
    """

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
        """Return the steps taken, and the number of the last that rescaled a head; waits for the device."""
        taken, last = self._counts.tolist()
        return taken, last
