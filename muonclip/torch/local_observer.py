"""Observes attention whose heads are divided among ranks: the queries are this rank's heads, or a DTensor of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from muonclip.torch.attention_mask import AttentionMask
from muonclip.torch.interception import Observer, with_heads
from muonclip.torch.local_attention import local_queries_and_keys


class LocalObserver(Observer):
    """An `Observer` that takes what it sees for the heads of this rank."""

    def see(self, q: Tensor, k: Tensor, scale: float | None, lse: Tensor | None = None, **mask: Any) -> None:
        statistic = self.statistic()
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if q.is_meta:
            return
        if q.is_nested:
            raise RuntimeError("QK-Clip cannot observe nested tensors. Use padded or packed sequences with a mask.")
        q, k = q.detach(), k.detach()
        if isinstance(q, DTensor):
            q, k = local_queries_and_keys(q, k)
        mask = {name: each.to_local() if isinstance(each, DTensor) else each for name, each in mask.items()}
        q, k, dense = with_heads(q, k, mask.pop("attn_mask", None), statistic.heads_in(q))
        allowed = AttentionMask(q.shape[-2], k.shape[-2], attn_mask=dense, **mask)
        statistic.observe(q, k, scale=scale, mask=allowed, lse=lse)

    def sdpa(self, call: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        if not isinstance(arguments["query"], DTensor):
            return super().sdpa(call, arguments)
        y = call(**arguments)
        mask = {name: arguments[name] for name in ("attn_mask", "is_causal")}
        self.see(arguments["query"], arguments["key"], arguments["scale"], **mask)
        return y
