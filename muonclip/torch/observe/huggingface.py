"""The attention interface of Hugging Face models: each of them looks its attention up there at every forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from muonclip.torch.mesh import is_block_mask
from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.handlers import current_handler, handling
from muonclip.torch.observe.packed_sequences import packed_pairs
from muonclip.torch.observe.ulysses import ULYSSES


def _patch(host: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
        function = host(self, attn_implementation, default)
        # In both of them a kernel is called that is observed by itself: with its LSE, or with the heads of this rank.
        has_a_kernel = attn_implementation == "sdpa" or function.__module__ == ULYSSES
        if current_handler() is None or has_a_kernel:
            return function
        return functools.partial(_handled, function, attn_implementation)

    return get_interface


def _handled(
    function: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    handler = current_handler()
    call = functools.partial(function, module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)
    if handler is None:
        return call()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _mask(implementation, module, query, key, attention_mask, kwargs)
    run, in_trace = functools.partial(_run, call), functools.partial(_run_in_trace, call)
    return handler.attention(AttentionCall(KERNEL, run, query, key, None, scale, run_in_trace=in_trace, **mask))


def _run(call: Callable[[], Any]) -> Any:
    with handling(None):  # an implementation may call a kernel that is observed by itself
        return call()


def _run_in_trace(call: Callable[[], Any]) -> Any:
    with torch.no_grad():  # not every implementation has a backward on the CPU
        return _run(call)


def _mask(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the mask as `AttentionMask` takes it; each implementation has its own way to give it."""
    if is_block_mask(mask):
        return {"attn_mask": mask}
    if implementation == "eager" or (isinstance(mask, Tensor) and mask.ndim == 4):
        return {"attn_mask": None if mask is None else mask[..., : key.shape[-2]]}
    # FlashAttention: causal and window by flags, aligned at the last position; padding [B, Tk]; packed sequences by
    # their ends or positions.
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = kwargs.get("sliding_window")
    return {
        "is_causal": bool(causal),
        "window": None if window is None or window < 1 else int(window),
        "attn_mask": None if mask is None else mask.bool()[:, None, None, :],
        "query_offset": key.shape[-2] - query.shape[-2],
        **_packed(query, key, kwargs),
    }


def _packed(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return which of the sequences packed into one row, if any, each position belongs to."""
    starts, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    lengths = query.shape[-2], key.shape[-2]
    if starts is not None:
        of_keys = kwargs.get("cu_seq_lens_k")
        return packed_pairs(starts, starts if of_keys is None else of_keys, lengths)
    if positions is not None and positions.shape == (1, lengths[0]) and query.shape[0] == 1:
        return {"document_ids": (positions == 0).cumsum(-1)} if lengths[0] == lengths[1] else {}
    return {}


KERNEL = AttentionKernel(
    "Hugging Face attention interface", "transformers.modeling_utils:AttentionInterface.get_interface", _patch
)
