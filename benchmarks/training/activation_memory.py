"""Bytes that a forward pass leaves behind for the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from muonclip.models.torch import MoE


def held_bytes(model: MoE, windows: Tensor) -> int:
    """Return what the allocator of PyTorch holds more after a forward than before it; the backward pass follows.

    That is activations, logits, and what is made of weights for the products. The model must be on a processor: what an
    offload moves is counted there too.

    Args:
        model: Its gradients are zeroed, then those of the windows.
        windows: int64 [B, T + 1]: tokens, and one position later their targets.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    model.loss(tokens, targets).backward()  # what is made once is there by then
    model.zero_grad(set_to_none=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = model.loss(tokens, targets)
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events: list[Any] = seen.profiler.kineto_results.events()  # the stubs have no `nbytes`
    loss.backward()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")
