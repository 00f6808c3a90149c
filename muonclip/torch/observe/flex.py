"""FlexAttention, whose kernel returns its exact maxima on CUDA where it has no `score_mod`.

Those of a kernel with one are of its whole result, biases included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.handlers import handled
from muonclip.torch.observe.score_mod import ScoreMod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def _read(
    host: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> AttentionCall:
    arguments: dict[str, Any] = dict(
        query=query,
        key=key,
        value=value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        kernel_options=kernel_options,
        return_aux=return_aux,
    )
    modified = None if score_mod is None else ScoreMod(score_mod, query, key)
    returns_output_alone = not return_lse and return_aux is None
    knows_maxima = returns_output_alone and score_mod is None and query.device.type == "cuda"
    return AttentionCall(
        KERNEL,
        functools.partial(host, **arguments),
        query,
        key,
        value,
        scale,
        attn_mask=block_mask,
        run_with_max=functools.partial(_run_with_max, host, arguments) if knows_maxima else None,
        run_in_trace=functools.partial(_run_in_trace, host, arguments, returns_output_alone),
        score_mod=modified,
        problem="" if modified is None else modified.problem,
    )


def _run_with_max(host: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Any, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    y, seen = host(**{**arguments, "return_aux": AuxRequest(max_scores=True)})
    return y, seen.max_scores.detach().amax((0, 2))


def _run_in_trace(host: Callable[..., Any], arguments: Mapping[str, Any], returns_output_alone: bool) -> Any:
    """Uncompiled it is slow, and it has no backward on the CPU."""
    q, v = arguments["query"].detach(), arguments["value"].detach()
    with torch.no_grad():
        if returns_output_alone:
            return q.new_zeros(*q.shape[:-1], v.shape[-1])
        return host(**{name: t.detach() if isinstance(t, Tensor) else t for name, t in arguments.items()})


KERNEL = AttentionKernel(
    "FlexAttention",
    "torch.nn.attention.flex_attention:flex_attention",
    handled(_read),
    on_cuda="max_scores of the kernel",
)
