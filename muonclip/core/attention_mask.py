"""The numbers that forbid a pair of query and key.

A float mask is added to the logits, and written-out attention fills numbers in for them. Models forbid with −inf, with
the lowest number of a dtype (float16: −65504), with −1e9, or with −1e4 (GPT-2, Megatron). A bias (ALiBi: down to a few
thousands below zero) only makes a pair less likely, and its logit counts.
"""

from __future__ import annotations

from muonclip.core.newton_schulz import Array

MASKED = -9984.0
"""−1e4 as bfloat16 stores it, the largest number that forbids; float16 and float32 hold it exactly."""


def is_masked(value: Array | float) -> Array:
    """Tell whether a value forbids the pair that it is added to, or filled in for: bool, element by element.

    Ask it of the tensor or number that was added or filled in, not of the logits that come out: the same number may be
    a mask in one and a small logit in the other. NaN forbids nothing.
    """
    return value <= MASKED
