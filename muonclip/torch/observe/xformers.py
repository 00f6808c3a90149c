"""`memory_efficient_attention` of xFormers, at the autograd function that it ends at.

Checked with 0.0.33, and with 0.0.35, whose functions are those of the package mslk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.autograd_functions import at_functions
from muonclip.torch.observe.packed_sequences import packed_pairs


class _Kind(NamedTuple):
    """A kind of `attn_bias`. `windows`: the names of the attributes that have the left and the right side of a window;
    of one name it is that of the number of keys, the query's own included."""

    is_causal: bool = False
    bottom_right: bool = False
    is_packed: bool = False
    windows: tuple[str, ...] = ()


_KINDS = {
    "LowerTriangularMask": _Kind(is_causal=True),
    "LowerTriangularMaskWithTensorBias": _Kind(is_causal=True),
    "LowerTriangularFromBottomRightMask": _Kind(is_causal=True, bottom_right=True),
    "LowerTriangularFromBottomRightLocalAttentionMask": _Kind(
        is_causal=True, bottom_right=True, windows=("_window_size",)
    ),
    "LocalAttentionFromBottomRightMask": _Kind(bottom_right=True, windows=("window_left", "window_right")),
    "BlockDiagonalMask": _Kind(is_packed=True),
    "BlockDiagonalCausalMask": _Kind(is_causal=True, is_packed=True),
    "BlockDiagonalCausalFromBottomRightMask": _Kind(is_causal=True, bottom_right=True, is_packed=True),
    "BlockDiagonalCausalLocalAttentionMask": _Kind(is_causal=True, is_packed=True, windows=("_window_size",)),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _Kind(
        is_causal=True, bottom_right=True, is_packed=True, windows=("_window_size",)
    ),
}


def _read(kernel: AttentionKernel, names: tuple[str, ...], host: Callable[..., Any], *args: Any) -> AttentionCall:
    """Read a call with q, k, v [B, T, heads, d] or [B, T, groups, heads, d].

    One head, [N, T, 1, d], may be each of B · heads.
    """
    first = next(index for index, value in enumerate(args) if isinstance(value, Tensor))  # behind the operators
    inputs: list[Any] = [*args[first:], None, None, None]
    query, key, value, bias, _, scale = inputs[:6]
    has_one_head = query.shape[-2] == query.shape[2] == 1
    q, k, v = (t.squeeze(2) if has_one_head else t.flatten(2, -2) for t in (query, key, value))
    pairs, problem = _pairs(bias, q, k)
    return AttentionCall(
        kernel,
        functools.partial(host, *args),
        q,
        k,
        v,
        scale,
        layout="heads, positions" if has_one_head else "positions, heads",
        run_with_lse=None if pairs.get("attn_mask") is not None else functools.partial(_run_with_lse, host, args, q),
        run_in_trace=functools.partial(_run_in_trace, query, value, "op_bw" in names),
        problem=problem,
        **pairs,
    )


def _pairs(bias: Any, q: Tensor, k: Tensor) -> tuple[dict[str, Any], str]:
    """Return which pairs a bias allows, as arguments of `AttentionMask`, and what is not understood of it."""
    if bias is None:
        return {}, ""
    if isinstance(bias, Tensor):
        return {"attn_mask": _of_heads(bias, q)}, ""
    name = type(bias).__name__
    kind = _KINDS.get(name)
    if kind is None:
        return {}, f"it calls memory_efficient_attention of xFormers with a {name}, which QK-Clip does not know"
    pairs: dict[str, Any] = {"is_causal": kind.is_causal}
    if name == "LowerTriangularMaskWithTensorBias":
        pairs["attn_mask"] = _of_heads(bias._bias, q)
    if len(kind.windows) == 2:
        pairs["window"] = tuple(getattr(bias, side) for side in kind.windows)
    elif kind.windows:
        pairs["window"] = (getattr(bias, kind.windows[0]) - 1, None)
    lengths = (q.shape[1], k.shape[1])
    if kind.is_packed:
        of_queries = _starts(bias.q_seqinfo, q)
        of_keys = of_queries if bias.k_seqinfo is bias.q_seqinfo else _starts(bias.k_seqinfo, k)
        pairs |= packed_pairs(of_queries, of_keys, lengths, bottom_right=kind.bottom_right)
    elif kind.bottom_right:
        pairs["query_offset"] = lengths[1] - lengths[0]
    return pairs, ""


def _of_heads(bias: Tensor, q: Tensor) -> Tensor:
    """Return a bias [B, (groups,) heads, Tq, Tk], as q has its heads."""
    bias = bias.flatten(1, 2) if bias.ndim == 5 else bias
    return bias.squeeze(1) if q.ndim == 3 and bias.ndim == 4 else bias


def _starts(info: Any, tensor: Tensor) -> Tensor:
    starts = info.seqstart if hasattr(info, "seqstart") else info.cu_seqlen  # before 0.0.17
    return starts.to(tensor.device)


def _run_with_lse(host: Callable[..., Any], args: tuple[Any, ...], q: Tensor) -> tuple[Any, Tensor | None]:
    """Return what the call returns, and the log-sum-exp [B, heads, Tq] where it returns that in this form."""
    result = host(*args)
    lse = result[1] if isinstance(result, tuple) else None
    if lse is None or q.ndim != 4 or lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        return result, None
    return result, lse.detach()


def _run_in_trace(query: Tensor, value: Tensor, returns_lse: bool) -> Any:
    """Return zeros as the function would return its result, which takes a GPU."""
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    lse = query.new_zeros(*query.shape[:1], *query.shape[2:-1], query.shape[1], dtype=torch.float32)
    return (out, lse) if returns_lse else out


_KERNEL = AttentionKernel(
    "memory_efficient_attention of xFormers",
    on_cpu="row LSE or norm bound, then exact rows",
    on_cuda="row LSE and norm bound, then tiles",
)
KERNELS: list[AttentionKernel] = [
    *at_functions(_KERNEL, _read, "xformers.ops.fmha", "_fMHA"),
    *at_functions(_KERNEL, _read, "mslk.attention.fmha", "_fMHA"),
]
