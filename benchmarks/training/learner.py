"""What trains in a run: a model and what updates it, in one framework. `benchmarks.train` is all the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muonclip.models.torch import MoE

Windows = NDArray[np.int64]  # [B, T + 1]: tokens, and one position later their targets


class Learner(ABC):
    """One arm and seed of an experiment. Every framework begins from the weights that PyTorch draws for the seed."""

    measurable: bool = True
    """Whether `reference()` can be had: not of a model too large for one device."""

    def rows(self, batch_size: int) -> range:
        """Which windows of a batch `step` and `loss` are to be given: all, but where ranks share them out."""
        return range(batch_size)

    @abstractmethod
    def step(self, windows: Windows, done: int, lr: float) -> dict[str, Any]:
        """The update that follows `done` others: `loss`, `grad_norm`, `max_logits` and `clipped_heads` of its record.

        Where loss or norm is not finite, there are no logits and no clipped heads, and training ends.
        """

    @abstractmethod
    def loss(self, windows: Windows) -> float:
        """Mean nats per token, with nothing learnt or counted."""

    @abstractmethod
    def reference(self) -> MoE:
        """The model in PyTorch with the weights of now, to measure; the next call may change it in place."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """`model`, a state dict as PyTorch's MoE has it, and `optimizer`; only what `checkpoint` can save."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved `state()`, to the same bits."""
