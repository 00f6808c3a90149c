"""Finds heads that are clipped again and again and do not come down: other weights may make their logits.

A head with the maximum S that was clipped by γ has γ·S and what one step adds. If its weights do not reach its logits
it still has S. So has a head that grows by 1/γ in each step, the explosion that the clip is there for; only an
experiment can tell which of the two it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from muonclip.torch.clip.errors import DeferredErrors

_LOUD = 0.85
"""The largest factor after which S must fall: by more than maxima differ from batch to batch."""

_FELL = 0.5
"""The part of the way from S to γ·S, in logarithms, that counts as fallen."""

_TIMES = 3
"""How often in a row S must not have fallen."""

_PATIENCE = 4
"""How many times as often it must not fall until the head is found again, each time that it was found."""


class StuckHeads:
    """Counts, for each head, how often in a row a clip had no effect; on the device, which is not waited for.

    All ranks that clip together have the same maxima and find the same heads.
    """

    def __init__(self) -> None:
        self._deferred = DeferredErrors()
        self._names: tuple[str, ...]
        self._sizes: tuple[int, ...]
        self.reset()

    def reset(self) -> None:
        """Forget the heads: their weights are others now."""
        self._names, self._sizes = (), ()
        self._expected = self._times = self._needed = torch.empty(0, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def note(self, names: tuple[str, ...], sizes: tuple[int, ...], maxima: Tensor, gamma: Tensor) -> None:
        """Note a step: `maxima`, fp32, and `gamma` of all heads, one attention after the other, as many as `sizes`.

        A head that is only certified has its bound in place of the maximum. Of one that did not run, −inf, nothing is
        learned. With other attentions than in the step before all begin anew.
        """
        if (names, sizes) != (self._names, self._sizes) or self._expected.device != maxima.device:
            tensors = torch.full_like(maxima, torch.inf), torch.zeros_like(maxima), torch.full_like(maxima, _TIMES)
            self._expected, self._times, self._needed = tensors
            self._names, self._sizes = names, sizes  # behind what an interrupt may come into
        ran = maxima > -torch.inf
        failed = maxima > self._expected
        times = torch.where(failed, self._times + 1, 0.0)
        stuck = ran & (times >= self._needed)
        expected = torch.where(gamma <= _LOUD, maxima * gamma**_FELL, torch.inf)
        self._times.copy_(torch.where(ran, times, self._times).masked_fill(stuck, 0.0))
        self._needed.copy_(torch.where(stuck, self._needed * _PATIENCE, self._needed))
        self._expected.copy_(torch.where(ran, expected, self._expected))
        found = torch.stack([each.any() for each in stuck.split(sizes)])
        self._deferred.add(found[:, None], names)

    def take(self, *, wait: bool, on_all_ranks: bool = False) -> tuple[str, ...]:
        """Return the attentions with heads that were found since they were last taken.

        Without `wait`, those of which the host knows by now; `on_all_ranks`: the same on all of them.
        """
        names = self._deferred.names
        found = self._deferred.take(wait=wait, on_all_ranks=on_all_ranks)
        if found is None:
            return ()
        return tuple(name for name, each in zip(names, found[:, 0].tolist(), strict=True) if each)

    def __getstate__(self) -> dict[str, Any]:
        return StuckHeads().__dict__
