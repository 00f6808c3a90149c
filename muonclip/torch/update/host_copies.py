"""Copies between host memory and a device. On CUDA they go along a stream of their own, next to the computation.

This is all that depends on the device where states are kept in host memory: on a processor the copies are made at once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


class HostCopies:
    """The copies for one device, in the order in which they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, held: Tensor) -> Tensor:
        """Begin to copy a tensor to the device; `arrive` before its first use."""
        if self._stream is None:
            return held.to(self.device, copy=True)
        with torch.cuda.stream(self._stream):
            working = held.to(self.device, copy=True, non_blocking=True)
        working.record_stream(torch.cuda.current_stream(self.device))
        return working

    def arrive(self) -> None:
        """Let the computation wait for what was fetched."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def give_back(self, working: Tensor, held: Tensor) -> None:
        """Begin to copy a tensor back, once the computation up to here is done."""
        if self._stream is None:
            held.copy_(working)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            held.copy_(working, non_blocking=True)
        working.record_stream(self._stream)

    def finish(self) -> None:
        """Let the host wait for what was given back: it may be read now."""
        if self._stream is not None:
            self._stream.synchronize()


@lru_cache(maxsize=64)
def copies_to(device: torch.device) -> HostCopies:
    """Return the copies for a device, the same at each call."""
    return HostCopies(device)


def on_host(value: Tensor) -> Tensor:
    """Return a copy in host memory, contiguous, and pinned where a CUDA device may read it."""
    held = torch.empty(value.shape, dtype=value.dtype, pin_memory=torch.cuda.is_available(), device="cpu")
    return held.copy_(value)
