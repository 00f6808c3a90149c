"""Attention of torch's context parallelism, in which the keys of other ranks pass in a ring, observed step by step.

Each rank keeps the queries of its part of the sequences and attends, in one step after the other, to the keys that
pass; torch merges what the steps return. Every pair that causality allows is in one step of one rank, however the
sequence was ordered, and a step leaves out what is masked: so the maximum over steps and ranks is exact, and nothing is
sent for it. Torch makes all steps, of whichever kernel and in whichever way the keys are sent, by
`_templated_ring_attention`, below DTensor and autograd.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]; imports the compiler when called

from muonclip.torch.mesh import is_dtensor

RING = "torch.distributed.tensor.experimental._context_parallel._attention"
"""The module of torch in which `_templated_ring_attention` is, and `_ContextParallel`, which makes DTensors for it."""
UNSEEN_RING = (
    "QK-Clip: attention got queries and keys that are parts of sequences, and saw none of the steps in which the keys "
    "of other ranks pass. Divide them by torch's context_parallel (torch 2.13 was seen), or gather the keys before "
    "attention, as its FlexAttention does."
)

R = TypeVar("R")


class RingStep(NamedTuple):
    """One step: queries [B, H, Tq, d] and keys [B, G, Tk, d] of this rank now; `is_causal`: query i sees keys j ≤ i;
    `ranks`: those between which the sequences are divided."""

    q: Tensor
    k: Tensor
    is_causal: bool
    ranks: frozenset[int]


class _OfThread(threading.local):
    take: Callable[[RingStep], None] | None = None
    whole = False


_of_thread = _OfThread()


def is_in_ring(q: Tensor) -> bool:
    """Tell whether queries [B, H, Tq, d] are a part of sequences whose other parts are on other ranks."""
    if not is_dtensor(q):
        return False
    from torch.distributed.tensor import Shard

    return Shard(2) in q.placements


def is_context_parallel() -> bool:
    """Tell whether torch's `context_parallel` is in the place of `scaled_dot_product_attention`."""
    return not attends_alone() and _is_of_engine(F.scaled_dot_product_attention)


def _is_of_engine(function: Callable[..., Any]) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("torch.distributed")


_is_of_engine._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
# As `torch.compiler.assume_constant_result` marks it; of another function it is asked anew.


@_disable_dynamo
def run_ring(run: Callable[[], R], take: Callable[[RingStep], None]) -> R:
    """Run attention whose keys pass in a ring, and hand over each of its steps.

    Raises ValueError where no step was seen.
    """
    steps = 0

    def count(step: RingStep) -> None:
        nonlocal steps
        steps += 1
        take(step)

    before, _of_thread.take = _of_thread.take, count
    try:
        result = run()
    finally:
        _of_thread.take = before
    if not steps:
        raise ValueError(UNSEEN_RING)
    return result


def attends_alone() -> bool:
    """Tell whether this thread's attention is that of a single process, see `on_own_sequences`."""
    return _of_thread.whole


@contextmanager
def on_own_sequences() -> Iterator[None]:
    """Let this thread attend as a single process does meanwhile: to parts of sequences as if they were whole."""
    before, _of_thread.whole = _of_thread.whole, True
    try:
        yield
    finally:
        _of_thread.whole = before


def seen_in_steps(ring: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes the place of `_templated_ring_attention`, whose steps it shows to `run_ring`."""

    @functools.wraps(ring)
    def run(group: Any, seq_dim: int, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        take = _of_thread.take
        if take is None:
            return ring(group, seq_dim, op, *args, **kwargs)
        ranks = frozenset(dist.get_process_group_ranks(group))

        def step(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, **options: Any) -> Any:
            take(RingStep(query, key, bool(is_causal), ranks))
            return op(query, key, value, is_causal=is_causal, **options)

        return ring(group, seq_dim, step, *args, **kwargs)

    return run


def left_whole(inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes the place of `_ContextParallel.sdpa_input_fn`, which divides nothing in `on_own_sequences`."""

    @functools.wraps(inputs)
    def run(self: Any, module: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
        return (args, kwargs) if attends_alone() else inputs(self, module, args, kwargs, mesh)

    return run
