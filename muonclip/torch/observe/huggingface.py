"""The attention interface of Hugging Face models: every one looks its attention up there, and so it can be listened to.

Imported only where transformers is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import AttentionInterface

from muonclip.torch.observe.calls import dense_of, listener

_host_get_interface = AttentionInterface.get_interface


def interface_door() -> tuple[type, str, Callable[..., Any]]:
    """Return where to put what: the function by which every model looks its attention up."""
    return AttentionInterface, "get_interface", _get_interface


def _get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
    function = _host_get_interface(self, attn_implementation, default)
    if listener() is None or attn_implementation == "sdpa":  # which goes through a door of its own, with its LSE
        return function
    return functools.partial(_observed, function, attn_implementation)


def _observed(
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
    who = listener()
    call = functools.partial(function, module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)
    if who is None:
        return call()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return who.interface(call, query, key, scale, _mask(implementation, module, query, key, attention_mask, kwargs))


def _mask(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the mask as `AttentionMask` takes it; each implementation has its own way to give it."""
    if isinstance(mask, BlockMask):
        return {"attn_mask": dense_of(mask, query, key)}
    if implementation == "eager" or (isinstance(mask, Tensor) and mask.ndim == 4):
        return {"attn_mask": None if mask is None else mask[..., : key.shape[-2]]}
    # FlashAttention: causal and window by flags, padding [B, Tk], packed sequences by their ends or positions.
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    documents = _documents(query, kwargs)
    window = kwargs.get("sliding_window")
    return {
        "is_causal": bool(causal) and query.shape[-2] > 1,
        "window": None if window is None or window < 1 else int(window),
        "document_ids": documents,
        "attn_mask": None if mask is None else mask.bool()[:, None, None, :],
    }


def _documents(query: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Return which of the sequences packed into one row each position belongs to, int [1, T]."""
    ends, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    length = query.shape[-2]
    if ends is not None:
        return torch.searchsorted(ends[1:], torch.arange(length, device=query.device), right=True)[None]
    if positions is not None and positions.shape == (query.shape[0], length) and query.shape[0] == 1:
        return (positions == 0).cumsum(-1)
    return None
