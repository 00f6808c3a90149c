"""The rule of which values of a tensor that is added to the logits forbid a pair of query and key.

Models forbid pairs with −inf, with the lowest number of a dtype (float16: −65504), with −1e9, −1e4 (GPT-2, Megatron),
−1000 or −100 (Swin). A bias only makes a pair less likely, and its logit counts; ALiBi is −100 at 200 positions and
−1e4 at 20000. So the number alone does not tell, and the tensor that was added is judged as a whole:

1. −1e8 and less, and the lowest number of float16, forbid in any tensor. No bias is so low.
2. A mask has exactly two other values, 0 and one that is at most −50, which forbids.
3. A mask and a bias that all sequences share (Swin: all windows) may have been added up before. Where the first of four
   axes counts sequences, what each is below the highest of them is the mask, by rule 2 up to rounding.
4. In other tensors −9984 (−1e4) and less forbid, with what a bias made of them (up to −8985.6), if a gap divides these
   values from the others that is about as wide as either group is. A bias by itself has no such gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from muonclip.core.newton_schulz import Array

UNREACHABLE = -1e8
MASKED = -9984.0
"""−1e4 as bfloat16 stores it; float16 and float32 hold it exactly."""
TWO_VALUED = -50.0
BETWEEN_VALUES = TWO_VALUED / 2
BETWEEN_GROUPS = 0.9 * MASKED


def is_masked(added: Array, *, xp: Any) -> Array:
    """Tell which values of a tensor of floats that is added to the logits forbid their pair: bool, one by one.

    Give the whole tensor, as it is before it meets the logits. NaN forbids nothing.
    """
    return added <= highest_masked(mask_levels(added, xp=xp), added.dtype, xp=xp)


def replaces(value: Array | float) -> Array:
    """Tell whether a value that takes the place of a logit forbids the pair, whose product counts no more.

    That is decided by the place that it takes, and any value forbids but a positive one, which caps the logits.
    """
    return value <= 0


def forbids_nothing(lowest: float, highest: float) -> bool:
    """Tell of the lowest and highest value of an added tensor whether that is enough to know that none is masked."""
    return lowest > BETWEEN_VALUES and highest - lowest < 0.9 * -TWO_VALUED


def forbids_as_mask_alone(lowest: float, shape: Sequence[int]) -> bool:
    """Tell of the lowest value and the shape of an added tensor whether only rule 2 can forbid pairs."""
    return lowest > MASKED and not _has_sequences(shape)


def mask_levels(added: Array, *, xp: Any) -> list[Array]:
    """Return what `highest_masked` needs to know of an added tensor that is not empty: maxima of some of its values.

    Those of a tensor are the maxima of those of its parts, where each part has all sequences.
    """

    def highest(values: Array, where: Array) -> Array:
        return xp.amax(xp.where(where, values, -math.inf))

    lowest = unreachable(added.dtype, xp)
    counts = added > lowest
    far, near = counts & (added <= BETWEEN_VALUES), added > BETWEEN_VALUES
    levels = [highest(-added, far), highest(added, far), highest(-added, near), highest(added, near)]
    levels += [highest(-added, added > BETWEEN_GROUPS), highest(added, counts & (added <= BETWEEN_GROUPS))]
    if _has_sequences(added.shape):
        finite = xp.where(counts, added, lowest)
        steps = finite - xp.amax(finite, 0, keepdims=True)
        far, near = counts & (steps <= BETWEEN_VALUES), counts & (steps > BETWEEN_VALUES)
        levels += [highest(-steps, far), highest(steps, far), highest(-steps, near)]
        levels += [highest(added, far), highest(-added, near)]
    return levels


def highest_masked(levels: Sequence[Array], dtype: Any, *, xp: Any) -> Array:
    """Return the number [] at and below which the values of an added tensor of this dtype forbid their pairs."""
    neg_lowest, highest_far, neg_lowest_near, highest_near, neg_lowest_above, highest_below = levels[:6]
    highest = xp.maximum(highest_far, highest_near)
    lowest_above = xp.minimum(-neg_lowest_above, highest)  # where all are below, there is no gap
    gap = lowest_above - highest_below
    are_two_groups = (gap >= highest - lowest_above) & (gap * 1.5 >= highest_below + neg_lowest)
    number = xp.where(are_two_groups & (neg_lowest >= -MASKED), highest_below, unreachable(dtype, xp))
    if len(levels) > 6:
        neg_lowest_step, highest_step, neg_lowest_near_step, highest_masked, neg_lowest_allowed = levels[6:]
        rounding = 2 * xp.finfo(dtype).eps * neg_lowest_step
        is_sum = (neg_lowest_step >= -TWO_VALUED - rounding) & (highest_step + neg_lowest_step <= rounding)
        is_sum = is_sum & (neg_lowest_near_step <= rounding) & (highest_masked < -neg_lowest_allowed)
        number = xp.where(is_sum, highest_masked, number)
    is_mask = (neg_lowest >= -TWO_VALUED) & (highest_far == -neg_lowest)
    is_mask = is_mask & (neg_lowest_near == 0) & (highest_near == 0)
    return xp.where(is_mask, highest_far, number)


def unreachable(dtype: Any, xp: Any) -> float:
    """Return the number at and below which the values of a dtype forbid in any tensor."""
    return max(UNREACHABLE, float(xp.finfo(dtype).min))


def _has_sequences(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[0] > 1
