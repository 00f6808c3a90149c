"""`DotProductAttention` of TransformerEngine, at the method of its class.

Checked with the source of August 2026. Arguments are read by their names; one that is given and not known here is a
problem by its name.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import get_world_size

from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.handlers import handled, handling

_READ = {
    *("query_layer", "key_layer", "value_layer", "attention_mask", "qkv_format", "attn_mask_type", "window_size"),
    *("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "bottom_right_diagonal"),
    *("core_attention_bias_type", "core_attention_bias", "alibi_slopes"),
}
_OF_NO_LOGIT = {  # how it is computed, not what
    *("max_seqlen_q", "max_seqlen_kv", "checkpoint_core_attention", "fast_zero_fill", "pad_between_seqs"),
    *("fp8_output", "bf16_backward", "num_splits", "qkv_interleave_dim"),
}
_MASKS = {"no_mask", "padding", "causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right"}
_Arguments = dict[str, Any]


def _read(signature: inspect.Signature, host: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = signature.bind(module, *args, **kwargs).arguments
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor) or bool(value)}
    problem = next((_problem_of(name) for name in [*given][1:] if name not in _READ | _OF_NO_LOGIT), "")
    query, key, value = (arguments[f"{name}_layer"] for name in ("query", "key", "value"))
    layout = given.get("qkv_format", module.qkv_format)
    q, k, v = (_batch_first(t, layout) for t in (query, key, value))
    kind = given.get("attn_mask_type", module.attn_mask_type).replace(",", "_")
    kind = "padding_causal" if kind == "causal_padding" else kind
    scale = _scale(module)
    if scale is None:
        problem = problem or _problem_of("a scale that is not an attribute of it or of its parts")
    if _is_divided(getattr(module, "cp_group", None)):
        problem = problem or _problem_of("sequences divided over ranks")
    if kind not in _MASKS | {"arbitrary"}:
        problem = problem or _problem_of(f"attn_mask_type={kind!r}")
    pairs = {} if problem else _pairs(module, given, kind, layout, q, k)
    run = functools.partial(_run, host, module, args, kwargs)
    has_bias = given.get("core_attention_bias_type", "no_bias") != "no_bias"
    return AttentionCall(
        KERNEL,
        run,
        q,
        k,
        v,
        scale,
        layout="positions, heads",
        run_with_max=functools.partial(_run_with_max, run)
        if getattr(module, "return_max_logit", False) and not has_bias and not problem
        else None,
        run_in_trace=functools.partial(_run_in_trace, query, value, bool(getattr(module, "return_max_logit", False))),
        problem=problem,
        **pairs,
    )


def _problem_of(what: str) -> str:
    return f"it calls DotProductAttention with {what}, of which QK-Clip does not know what it does to the logits"


def _batch_first(tensor: Tensor, layout: str) -> Tensor:
    """Return [B, T, heads, d] of a tensor with the axes of "sbhd", "bshd" or "thd"."""
    return tensor.transpose(0, 1) if layout == "sbhd" else tensor[None] if layout == "thd" else tensor


def _scale(module: Any) -> float | None:
    parts = (getattr(module, name, None) for name in ("flash_attention", "fused_attention", "unfused_attention"))
    scales = (getattr(part, "softmax_scale", None) for part in (module, *parts))
    return next((scale for scale in scales if scale is not None), None)


def _is_divided(groups: Any) -> bool:
    """Tell whether sequences are divided over ranks: over a process group, or a list of them."""
    groups = groups if isinstance(groups, list) else [groups]
    return math.prod(1 if group is None else get_world_size(group) for group in groups) > 1


def _pairs(module: Any, given: _Arguments, kind: str, layout: str, q: Tensor, k: Tensor) -> _Arguments:
    """Return which pairs the module allows, as arguments of `AttentionMask`."""
    is_causal = "causal" in kind
    window = given.get("window_size", module.window_size) or (-1, -1)
    if not is_causal and tuple(window) == (-1, 0):  # which it takes for no window
        window = (-1, -1)
    aligned = given.get("bottom_right_diagonal", getattr(module, "bottom_right_diagonal", None))
    bottom_right = "bottom_right" in kind or (kind not in ("causal", "padding_causal") and aligned in (None, True))
    pairs: _Arguments = {
        "is_causal": is_causal,
        "window": tuple(None if side < 0 else side for side in window),
    }
    mask: Any = given.get("attention_mask")
    bias = given.get("core_attention_bias")
    if bias is not None:
        pairs["attn_mask"] = bias
    if kind == "arbitrary":
        pairs["attn_mask"] = ~mask if bias is None else bias.masked_fill(mask, -math.inf)
    lengths = (q.shape[1], k.shape[1])
    if "padding" not in kind:
        return pairs | {"query_offset": lengths[1] - lengths[0] if bottom_right else 0}
    if layout == "thd":
        ends = [given["cu_seqlens_q"], given["cu_seqlens_kv"]]
        used = [each.diff() for each in ends]
        starts = [given.get(f"cu_seqlens_{side}_padded", end) for side, end in zip(("q", "kv"), ends, strict=True)]
    else:
        used = _used(given, mask)
        starts = [torch.arange(len(used[0]) + 1, device=q.device) * length for length in lengths]
    return pairs | _sequences(starts, used, lengths, len(q), bottom_right)


def _used(given: _Arguments, mask: Any) -> list[Tensor]:
    """Return how long each of the padded sequences of queries and keys is, int [B]; `mask` is true on the padding."""
    if "cu_seqlens_q" in given and "cu_seqlens_kv" in given:
        return [given["cu_seqlens_q"].diff(), given["cu_seqlens_kv"].diff()]
    of_queries, of_keys = mask if isinstance(mask, tuple) else (mask, mask)
    return [(~each).flatten(1).sum(1) for each in (of_queries, of_keys)]


def _sequences(
    starts: list[Tensor], used: list[Tensor], lengths: tuple[int, int], batch: int, bottom_right: bool
) -> _Arguments:
    """Return which pairs sequences allow that begin at `starts` and are as long as `used`, all rows as one of them.

    What is between two sequences is seen by nobody.
    """
    ids = []
    for side, (of_side, long, length) in enumerate(zip(starts, used, lengths, strict=True)):
        positions = torch.arange(batch * length, device=long.device, dtype=of_side.dtype)
        owner = torch.searchsorted(of_side[1:], positions, right=True)
        inside = owner.clamp(max=len(long) - 1)
        is_used = (owner < len(long)) & (positions - of_side[inside] < long[inside])
        ids.append((inside, owner.masked_fill(~is_used, -1 - side)))
    ends = [of_side[:-1] + long if bottom_right else of_side[:-1] for of_side, long in zip(starts, used, strict=True)]
    sequence, offset = ids[0][0], (ends[1] - ends[0])[ids[0][0]]
    if batch > 1:  # from positions among all rows to those of a row
        offset = offset - sequence * (lengths[1] - lengths[0])
    return {
        "document_ids": ids[0][1].view(batch, -1),
        "key_document_ids": ids[1][1].view(batch, -1),
        "query_offset": offset.view(batch, -1),
    }


def _run(host: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
    with handling(None):  # it may call flash-attn, which is observed by itself
        return host(module, *args, **kwargs)


def _run_with_max(run: Callable[[], Any]) -> tuple[Any, Tensor]:
    result = run()
    return result, result[1].detach()


def _run_in_trace(query: Tensor, value: Tensor, returns_maxima: bool) -> Any:
    """Return zeros as the module would return its result, which takes a GPU."""
    out = query.new_zeros(*query.shape[:-2], query.shape[-2] * value.shape[-1])
    return (out, query.new_zeros(query.shape[-2], dtype=torch.float32)) if returns_maxima else out


def _patch(host: Callable[..., Any]) -> Any:
    return handled(functools.partial(_read, inspect.signature(host)))(host)


KERNEL = AttentionKernel(
    "DotProductAttention of TransformerEngine",
    "transformer_engine.pytorch:DotProductAttention.forward",
    _patch,
    on_cuda="norm bound, then tiles; its own maxima with return_max_logit",
)
