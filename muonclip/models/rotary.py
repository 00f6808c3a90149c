"""Rotary frequencies, and YaRN's extension of them to longer contexts (arXiv 2309.00071); plain floats.

Pair i of a head of width D turns by `position · θ^(−2i/D)` (RoFormer, arXiv 2104.09864). YaRN divides by s the
frequencies of pairs that turn seldom within the original length, keeps those that turn often, and blends in between.
"""

from __future__ import annotations

import math


def rotary_frequencies(
    dim: int, *, theta: float, factor: float, original_seq_len: int, beta_fast: float, beta_slow: float
) -> list[float]:
    """Return the radians per position of each of the dim / 2 pairs, fastest first.

    A pair turns `r = original_seq_len · frequency / 2π` times within the original length. r ≥ beta_fast: kept; r ≤
    beta_slow: divided by `factor`; between them the share is linear in the index of the pair, from the bounds rounded
    outwards, as in the authors' code and in DeepSeek's.
    """
    frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if factor == 1:
        return frequencies
    last_kept, first_divided = (
        dim * math.log(original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (beta_fast, beta_slow)
    )
    start, end = max(math.floor(last_kept), 0), min(math.ceil(first_divided), dim - 1)
    width = max(end - start, 1e-3)  # beta_fast == beta_slow can leave no room: a step then

    def divided_share(i: int) -> float:
        return min(max((i - start) / width, 0.0), 1.0)

    return [f * (1 - divided_share(i)) + f / factor * divided_share(i) for i, f in enumerate(frequencies)]


def yarn_mscale(factor: float, weight: float) -> float:
    """Return `0.1 · weight · ln(s) + 1` for s > 1, else 1: YaRN's √(1/t) (eq. 22); DeepSeek-V2 added the weight."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
