"""Errors that were found on an accelerator, which must not be waited for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredErrors:
    """Gathered on the device, in place, so that a replayed CUDA graph gathers as well; after each step a copy is on its
    way to the host."""

    def __init__(self) -> None:
        self.found = self.on_host = torch.zeros(0, device="cpu")
        self._copied: torch.cuda.Event | None = None

    def add(self, errors: Tensor) -> None:
        """Those of one step, other than 0 where there is one; of the same shape in each step."""
        if self.on_host is self.found or self.found.shape != errors.shape:
            self.found = torch.zeros_like(errors, device="cpu").to(errors.device)
            self.on_host = torch.zeros_like(errors, device="cpu", pin_memory=errors.device.type == "cuda")
        self.found.copy_(torch.maximum(self.found, errors))
        self.on_host.copy_(self.found, non_blocking=True)
        if errors.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def take(self, *, wait: bool, alike: bool) -> Tensor | None:
        """Those gathered since they were last taken, or None; without `wait`, only what has reached the host by now.
        `alike`: what the last step has copied, so that all ranks take them at the same time."""
        if alike and self._copied is not None and not torch.cuda.is_current_stream_capturing():
            self._copied.synchronize()
        errors = (self.found.cpu() if wait else self.on_host).clone()
        if not bool(errors.any()):
            return None
        self.found.zero_()
        self.on_host.zero_()
        return errors

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copied": None}  # an event of the device; the errors themselves are there
