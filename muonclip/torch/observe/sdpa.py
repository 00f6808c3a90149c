"""`torch.nn.functional.scaled_dot_product_attention`, with the log-sum-exp of its rows where its kernel keeps them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from muonclip.torch.logits import host_sdpa, is_in_ring, run_ring, sdpa_with_lse
from muonclip.torch.mesh import is_dtensor
from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.handlers import handled
from muonclip.torch.observe.jagged import is_jagged, packed


def _read(
    host: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    arguments: dict[str, Any] = dict(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    is_torchs_own = host is host_sdpa and not is_dtensor(query)  # and not somebody's kernel in its place
    call = AttentionCall(
        KERNEL,
        run := functools.partial(host, **arguments),
        query,
        key,
        value,
        scale,
        attn_mask=attn_mask,
        is_causal=is_causal,
        run_with_lse=functools.partial(sdpa_with_lse, **arguments) if is_torchs_own and not query.is_nested else None,
        run_in_ring=functools.partial(run_ring, run) if is_in_ring(query) else None,
    )
    return packed(call) if is_jagged(query) else call


KERNEL = AttentionKernel(
    "scaled_dot_product_attention",
    "torch.nn.functional:scaled_dot_product_attention",
    handled(_read),
    on_cpu="row LSE or norm bound, then exact rows",
)
