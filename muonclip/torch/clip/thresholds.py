"""τ of every attention in one step, and from which logit on its maxima have to be exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from muonclip.core.arguments import plain_number
from muonclip.core.qk_clip import check_tau
from muonclip.core.tau_rules import Tau, is_by_name, tau_rule
from muonclip.torch.clip.reduction import constant


@dataclass(frozen=True, slots=True)
class Thresholds:
    """τ by name in the step of this number, from 0. `always`: every maximum is to be exact."""

    tau: Tau
    always: bool = False
    step: int = 0

    def of(self, name: str) -> float:
        """Return τ of an attention. Raises ValueError where nothing is said of it, or its function gives no τ."""
        rule = tau_rule(self.tau, name)
        if not callable(rule):
            return rule
        value = rule(self.step)
        try:
            return float(plain_number("tau", check_tau(value)) or 0.0)
        except (TypeError, ValueError) as error:
            raise type(error)(f"tau, a function, at step {self.step}: {error}") from None

    def exact_from(self, name: str) -> float:
        """Return the logit from which on maxima must be exact.

        Without a finite τ none has to be, but whoever asks for that wants to see them: all are.
        """
        tau = self.of(name)
        return tau if not self.always and tau < math.inf else -math.inf

    def following(self) -> Self:
        """Return those of the next step."""
        return replace(self, step=self.step + 1)

    def of_heads(self, names: Sequence[str], sizes: Sequence[int], device: torch.device) -> float | Tensor:
        """Return τ of all heads, one attention after the other: a number where it is the same, else [heads of all]."""
        if not is_by_name(self.tau):
            return self.of("")
        taus = [self.of(name) for name in names]
        if len(set(taus)) == 1:
            return taus[0]
        each = tuple(tau for tau, heads in zip(taus, sizes, strict=True) for _ in range(heads))
        return constant(each, torch.float32, device)
