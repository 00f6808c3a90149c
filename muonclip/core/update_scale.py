"""The scale of an orthogonalised update, from the shape of its matrix.

An orthogonalised m × n matrix has entries of RMS 1/√max(m, n), whatever the gradient; the scale undoes that.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from muonclip.core.arguments import check_whole, plain_number, shown

AdjustLR: TypeAlias = Literal["original", "match_rms_adamw"] | float | None


def update_scale(fan_out: int, fan_in: int, adjust_lr_fn: AdjustLR) -> float:
    """Return what the update of one logical matrix (fan_out × fan_in) is multiplied by, besides the rate.

    "original" (or None): √max(1, fan_out/fan_in) (K. Jordan 2024). "match_rms_adamw": 0.2 √max(fan_out, fan_in), the
    RMS of AdamW's updates, so that its decay carries over and rates are near its own (Moonlight, arXiv 2502.16982,
    §2.2; Kimi K2). A number is taken as it is. The shape is that of the block, not of a parameter that stores several.
    Raises ValueError for another name and for numbers that are not positive and finite.
    """
    for name, size in (("fan_out", fan_out), ("fan_in", fan_in)):
        if not (type(size) is int and size > 0):
            check_whole(name, size, 0)  # of an array that holds nothing
    is_name = isinstance(adjust_lr_fn, str)  # and not an array, which compares by its elements
    if adjust_lr_fn is None or (is_name and adjust_lr_fn == "original"):
        return math.sqrt(max(1.0, fan_out / fan_in))
    if is_name and adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(fan_out, fan_in))
    number = plain_number("adjust_lr_fn", adjust_lr_fn)
    if number is not None and 0 < number < math.inf:
        return float(number)
    raise ValueError(f"adjust_lr_fn={shown(adjust_lr_fn)}; use 'original', 'match_rms_adamw' or a positive number.")
