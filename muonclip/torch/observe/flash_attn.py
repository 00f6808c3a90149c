"""The functions of flash-attn 2, 3 and 4, where each of them ends: at an autograd function.

Versions differ in what they take, so that arguments are read by the names of the parameters of `forward`; one that is
given and not known here is a problem by its name. Checked with 2.8.4 and with 3 and 4 of the same date, August 2026.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.autograd_functions import at_functions
from muonclip.torch.observe.packed_sequences import packed_pairs

_READ = {
    *("q", "k", "v", "kv", "qkv", "num_heads_q", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"),
    *("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "learnable_sink", "return_softmax", "return_lse", "dropout_p"),
}
_OF_NO_LOGIT = {  # how it is computed, not what
    *("max_seqlen", "max_seqlen_q", "max_seqlen_k", "min_seqlen_k", "deterministic", "num_splits", "pack_gqa"),
    *("sm_margin", "is_grad_enabled", "v_descale", "score_mod_bwd", "block_sparse_tensors_bwd"),
    *("scheduler_metadata", "seqlen_k_per_split", "disable_scheduler_metadata"),
}
_Arguments = dict[str, Any]


def _read(kernel: AttentionKernel, names: tuple[str, ...], host: Callable[..., Any], *args: Any) -> AttentionCall:
    arguments = dict(zip(names, args, strict=False))
    q, k, v = _queries_keys_values(arguments)
    problem = _problem(arguments)
    starts = arguments.get("cu_seqlens")
    starts_of_queries, starts_of_keys = arguments.get("cu_seqlens_q", starts), arguments.get("cu_seqlens_k", starts)
    pairs: _Arguments = {}
    if starts_of_queries is not None and starts_of_keys is not None:
        q, k, v = (t[None] for t in (q, k, v))
        pairs = packed_pairs(starts_of_queries, starts_of_keys, (q.shape[1], k.shape[1]))
    elif starts_of_queries is not None or starts_of_keys is not None:
        problem = problem or _problem_of("cu_seqlens_q, or cu_seqlens_k, without the other")
    else:
        pairs["query_offset"] = k.shape[-3] - q.shape[-3]
    left, right = arguments.get("window_size") or (None, None)
    return AttentionCall(
        kernel,
        functools.partial(host, *args),
        q,
        k,
        v,
        arguments["softmax_scale"],
        is_causal=bool(arguments["causal"]),
        window=(_limit(left), _limit(right)),
        layout="positions, heads",
        run_with_lse=functools.partial(_run_with_lse, host, names, args) if _lse_is_of_logits(arguments) else None,
        run_in_trace=functools.partial(_run_in_trace, arguments, q, v),
        problem=problem,
        **pairs,
    )


def _queries_keys_values(arguments: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [(B,) T, heads, d], whichever of them are packed into one tensor."""
    if "qkv" not in arguments:
        k, v = arguments["kv"].unbind(-3) if "kv" in arguments else (arguments["k"], arguments["v"])
        q = arguments["q"]
        return (arguments["qv"], v, v) if q is None or k is None else (q, k, v)
    qkv, heads = arguments["qkv"], arguments.get("num_heads_q")
    if heads is None:
        return qkv.unbind(-3)
    groups = (qkv.shape[-2] - heads) // 2
    return qkv.split([heads, groups, groups], -2)


def _problem(arguments: _Arguments) -> str:
    """Say which argument is given that this module does not know the meaning of, or which it cannot read."""
    if arguments.get("v") is not None and arguments.get("k") is arguments["v"] and arguments["v"].shape[-1] == 512:
        return _problem_of("the same tensor as k and v, of width 512, which version 4 takes for latents")
    for name, value in arguments.items():
        is_given = isinstance(value, Tensor) or bool(value)
        if is_given and name not in _READ and name not in _OF_NO_LOGIT:
            return _problem_of(name)
    return ""


def _problem_of(what: str) -> str:
    return f"it calls flash-attn with {what}, of which QK-Clip does not know what it does to the logits"


def _limit(of_side: int | None) -> int | None:
    return None if of_side is None or of_side < 0 else of_side


def _lse_is_of_logits(arguments: _Arguments) -> bool:
    """Tell whether the kernel's log-sum-exp is that of S; a sink makes it larger, and a bound all the same.

    Dropout is in the way because version 2 then writes out what was dropped.
    """
    return not arguments.get("softcap") and arguments.get("alibi_slopes") is None and not arguments.get("dropout_p")


def _run_with_lse(host: Callable[..., Any], names: tuple[str, ...], args: tuple[Any, ...]) -> tuple[Any, Tensor | None]:
    """Return what the call returns, and the log-sum-exp fp32 [B, heads, Tq].

    The kernel computes it in any case. Versions 2 and 3 hand it out on request, version 4 always.
    """
    arguments = dict(zip(names, args, strict=False))
    is_asked_for = arguments.get("return_softmax") is False
    if is_asked_for:
        arguments["return_softmax"] = True
    result = host(*arguments.values())
    lse = result[1] if isinstance(result, tuple) else None
    q = _queries_keys_values(arguments)[0]
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    if lse is not None:
        lse = lse.detach().reshape(-1, *shape[-2:]) if lse.shape == shape else None
    return result[0] if is_asked_for else result, lse


def _run_in_trace(arguments: _Arguments, q: Tensor, v: Tensor) -> Any:
    """Return zeros as the kernel would return its result: it takes half precision on a GPU alone."""
    is_packed = arguments.get("cu_seqlens_q", arguments.get("cu_seqlens")) is not None
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_zeros(q.shape[:-1], dtype=torch.float32).transpose(1, 2)
    out, lse = (out[0], lse[0]) if is_packed else (out, lse)
    if "return_lse" in arguments:
        return out, lse
    if not arguments.get("return_softmax"):
        return out
    return (out, lse, q.new_zeros(0)) if "dropout_p" in arguments else (out, lse)


def _kernels(name: str, module: str, *functions: str) -> list[AttentionKernel]:
    kernel = AttentionKernel(
        name, on_cpu="row LSE or norm bound, then exact rows", on_cuda="row LSE and norm bound, then tiles"
    )
    return at_functions(kernel, _read, module, *functions)


KERNELS: list[AttentionKernel] = [
    *_kernels(
        "flash-attn 2",
        "flash_attn.flash_attn_interface",
        "FlashAttnFunc",
        "FlashAttnKVPackedFunc",
        "FlashAttnQKVPackedFunc",
        "FlashAttnVarlenFunc",
        "FlashAttnVarlenKVPackedFunc",
        "FlashAttnVarlenQKVPackedFunc",
    ),
    *_kernels("flash-attn 3", "flash_attn_interface", "FlashAttnFunc", "FlashAttnQKVPackedFunc", "FlashAttnVarlenFunc"),
    *_kernels("flash-attn 4", "flash_attn.cute.interface", "FlashAttnFunc", "FlashAttnVarlenFunc"),
]
