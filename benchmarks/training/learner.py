"""Learners: a model and its optimizer, in one framework. The rest of a run is in `benchmarks.training.run`."""

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
        """Return which windows of a batch `step` and `loss` take: all, unless ranks divide them."""
        return range(batch_size)

    @abstractmethod
    def step(self, windows: Windows, done: int, lr: float) -> dict[str, Any]:
        """Take the update that follows `done` others, and return its part of the record.

        That is `loss`, `grad_norm`, `max_logits` and `clipped_heads`. Where loss or norm is not finite, there are no
        logits and no clipped heads, and training ends.
        """

    @abstractmethod
    def loss(self, windows: Windows) -> float:
        """Return the mean nats per token, with nothing learnt or counted."""

    @abstractmethod
    def reference(self) -> MoE:
        """Return the model in PyTorch with its present weights, to measure; the next call may change it in place."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return `model`, a state dict as PyTorch's MoE has it, and `optimizer`; only what `atomic_files` can save."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved `state()`, to the same bits."""
