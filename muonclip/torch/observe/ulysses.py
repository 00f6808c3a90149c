"""Ulysses of DeepSpeed, for Hugging Face models: each rank attends with its part of the heads, to whole sequences.

Accelerate and the Trainer of transformers use it, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from muonclip.torch.logits import DividedHeads, attends_alone, heads_divided

ULYSSES = "deepspeed.runtime.sequence_parallel.ulysses_sp"
"""The module of DeepSpeed in which `UlyssesSPAttentionHF` is, and the function around it that Hugging Face calls."""


def with_its_heads(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes the place of `UlyssesSPAttentionHF.forward`, which says whose heads the attention in it has;
    where this rank attends alone, it is that attention itself."""

    @functools.wraps(forward)
    def run(self: Any, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if attends_alone():
            # Which DeepSpeed changes, of a model with fewer key heads than ranks.
            vars(module)["num_key_value_groups"] = query.shape[1] // key.shape[1]
            return self.attn(module, query, key, *args, **kwargs)
        if self.disable_in_eval and not module.training:
            return forward(self, module, query, key, *args, **kwargs)
        ranks = frozenset(dist.get_process_group_ranks(self.process_group))
        with heads_divided(DividedHeads(self.sp_rank, self.world_size, ranks)):
            return forward(self, module, query, key, *args, **kwargs)

    return run
