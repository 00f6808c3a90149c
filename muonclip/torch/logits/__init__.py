"""The statistic of QK-Clip: the maximum attention logit of every head.

Here are its bounds, the masks it respects, the kernels that compute it, and attention that observes it. This package
knows queries and keys, but no model and no weight.
"""

from muonclip.torch.logits.added_mask import highest_masked_of_parts, is_masked
from muonclip.torch.logits.attention import attention
from muonclip.torch.logits.divided_heads import DividedHeads, divided_heads, heads_divided
from muonclip.torch.logits.exact_maxima import measure_max_logits, statistic_dtype
from muonclip.torch.logits.host_modes import (
    InnermostMode,
    Unobservable,
    is_exporting,
    outside_modes,
    saved_tensors_as_they_are,
    unobservable,
    unobserved,
    unseen,
)
from muonclip.torch.logits.host_sdpa import host_sdpa, sdpa_with_lse
from muonclip.torch.logits.mask import AttentionMask
from muonclip.torch.logits.max_logits import MaxLogits
from muonclip.torch.logits.pair_condition import PairCondition, at_pairs, indices, once, row_blocks
from muonclip.torch.logits.ring_attention import (
    RING,
    RingStep,
    attends_alone,
    is_context_parallel,
    is_in_ring,
    left_whole,
    on_own_sequences,
    run_ring,
    seen_in_steps,
)
from muonclip.torch.logits.sharded_attention import local_queries_and_keys

__all__ = [
    "RING",
    "AttentionMask",
    "DividedHeads",
    "InnermostMode",
    "MaxLogits",
    "PairCondition",
    "RingStep",
    "Unobservable",
    "at_pairs",
    "attends_alone",
    "attention",
    "divided_heads",
    "heads_divided",
    "highest_masked_of_parts",
    "host_sdpa",
    "indices",
    "is_context_parallel",
    "is_exporting",
    "is_in_ring",
    "is_masked",
    "left_whole",
    "local_queries_and_keys",
    "measure_max_logits",
    "on_own_sequences",
    "once",
    "outside_modes",
    "row_blocks",
    "run_ring",
    "saved_tensors_as_they_are",
    "sdpa_with_lse",
    "seen_in_steps",
    "statistic_dtype",
    "unobservable",
    "unobserved",
    "unseen",
]
