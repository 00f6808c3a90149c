"""Learning-rate factors as functions of the step, for PyTorch and Optax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from muonclip.core.arguments import SHARE, check_number


@dataclass(frozen=True)  # without slots: LambdaLR saves a callable by its __dict__
class WarmupConstantCosine:
    """Linear warm-up, a constant stretch, a cosine down to `final`, and `final` from there on ("WSD").

    `schedule(step)` is the factor of the peak rate, step counted from 0, as
    `torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)` expects it. The first warm-up step has the factor 1/warmup,
    not 0. For a traced step pass the array namespace: `schedule(step, xp=jax.numpy)`.

    Args:
        warmup: Optimizer steps of the warm-up.
        constant: Optimizer steps at the peak rate.
        decay: Optimizer steps of the cosine.
        final: Share of the peak rate at the end, from 0 to 1.

    Raises:
        ValueError: For negative numbers of steps and `final` outside [0, 1].
    """

    warmup: int = 0
    constant: int = 0
    decay: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "constant", "decay"):
            check_number(name, getattr(self, name), ("a number of steps, zero or more", lambda x: x >= 0))
        check_number("final", self.final, SHARE, "the factor at the end of the decay.")

    @classmethod
    def k2(cls) -> WarmupConstantCosine:
        """Make Kimi K2's pre-training schedule: 500 warm-up steps, 2e-4 for 10T tokens, cosine to 2e-5 over 5.5T.

        Report §2.5, at 67M tokens per batch; multiply by the peak rate 2e-4.
        """
        tokens_per_step = 67e6
        return cls(
            warmup=500, constant=round(10e12 / tokens_per_step) - 500, decay=round(5.5e12 / tokens_per_step), final=0.1
        )

    @property
    def total_steps(self) -> int:
        """Number of steps from the first warm-up step to the last of the decay."""
        return self.warmup + self.constant + self.decay

    def __call__(self, step: Any, *, xp: Any = None) -> Any:
        cos, clip = (math.cos, _clip) if xp is None else (xp.cos, xp.clip)
        warmed = clip((step + 1) / max(self.warmup, 1), 0.0, 1.0)
        if not self.decay:
            return warmed
        decayed = clip((step - self.warmup - self.constant) / self.decay, 0.0, 1.0)
        return warmed * (self.final + (1 - self.final) * 0.5 * (1 + cos(math.pi * decayed)))


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)
