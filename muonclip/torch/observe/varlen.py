"""torch's `varlen_attn`, at the operator that it calls: users may have imported the function by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.handlers import handled
from muonclip.torch.observe.packed_sequences import packed_pairs


def _read(
    host: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> AttentionCall:
    run = functools.partial(
        host,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        is_causal,
        scale,
        window_size,
        enable_gqa,
        seqused_k,
        block_table,
        num_splits,
    )
    pages = {
        "seqused_k": seqused_k is not None,
        "block_table": block_table is not None,
        "no cu_seq_k": cu_seq_k is None,
    }
    if any(pages.values()):
        named = ", ".join(name for name, given in pages.items() if given)
        problem, pairs = f"it calls varlen_attn with {named}, whose keys are not in the order of their sequences", {}
    else:
        assert cu_seq_k is not None
        problem, pairs = "", packed_pairs(cu_seq_q, cu_seq_k, (len(query), len(key)))
    left, right = (None if side < 0 else side for side in window_size or (-1, -1))
    return AttentionCall(
        KERNEL,
        run,
        query[None],
        key[None],
        value[None],
        scale,
        is_causal=is_causal,
        window=(left, right),
        layout="positions, heads",
        run_with_lse=functools.partial(_run_with_lse, run, query),
        run_in_trace=functools.partial(_run_in_trace, query, value),
        problem=problem,
        **pairs,
    )


def _run_with_lse(run: Callable[[], Any], query: Tensor) -> tuple[Any, Tensor | None]:
    result = run()
    lse = result[1].detach()
    return result, lse[None] if lse.shape == (query.shape[1], query.shape[0]) else None


def _run_in_trace(query: Tensor, value: Tensor) -> Any:
    """Return zeros as the operator would return its results, which only a GPU computes."""
    total, heads, _ = query.shape
    out = query.new_zeros(total, heads, value.shape[-1])
    return out, query.new_zeros(heads, total, dtype=torch.float32), query.new_zeros(2, dtype=torch.uint64)


KERNEL = AttentionKernel(
    "varlen_attn",
    "torch.nn.attention.varlen:torch.ops.torch_attn._varlen_attn",
    handled(_read),
    on_cpu="row LSE or norm bound, then exact rows",
    on_cuda="row LSE and norm bound, then tiles",
)
