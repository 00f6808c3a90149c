"""The scale of an orthogonalised update, from the shape of its matrix.

An orthogonalised m × n matrix has entries of RMS 1/√max(m, n), whatever the gradient; the scale undoes that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast

from muonclip.core.adam_defaults import ADAM_BETAS
from muonclip.core.arguments import BELOW_ONE, check_number, check_whole, plain_number, shown

NamedScale: TypeAlias = Literal["original", "match_rms_adamw", "match_rms_adamw_closed_form", "spectral_unclamped"]
"""The scales that have a name, see `update_scale`."""

AdjustLR: TypeAlias = NamedScale | tuple[Literal["match_rms_adamw"], float] | float | None
"""The scale of an update: its name, see `update_scale`, or a number."""

MOONLIGHT_RMS = 0.2
"""The RMS of updates in Moonlight (arXiv 2502.16982, §2.2), which measured 0.2 to 0.4 for AdamW's."""


def update_scale(fan_out: int, fan_in: int, adjust_lr_fn: AdjustLR) -> float:
    """Return what the update of one logical matrix is multiplied by, besides the rate.

    - "original" (or None): √max(1, fan_out/fan_in) (K. Jordan 2024).
    - "spectral_unclamped": √(fan_out/fan_in), as in `torch.optim.Muon` from torch 2.14 on.
    - "match_rms_adamw": 0.2 √max(fan_out, fan_in), the RMS of AdamW's updates, so that its decay carries over and rates
      are near its own (Moonlight, arXiv 2502.16982, §2.2; Kimi K2).
    - ("match_rms_adamw", r): the same with the RMS r, 0.18 in DeepSeek-V4.
    - "match_rms_adamw_closed_form": with `adamw_update_rms()`, 0.229.
    - a number is taken as it is.

    The shape is that of the block, not of a parameter that stores several.

    Args:
        fan_out: Rows of the matrix.
        fan_in: Columns of the matrix.
        adjust_lr_fn: One of these.

    Raises:
        ValueError: For other names and for numbers that are not positive and finite.
    """
    for name, size in (("fan_out", fan_out), ("fan_in", fan_in)):
        if not (type(size) is int and size > 0):
            check_whole(name, size, 0)  # of an array that holds nothing
    if adjust_lr_fn is None or isinstance(adjust_lr_fn, str):  # and not an array, which compares by its elements
        if adjust_lr_fn in (None, "original"):
            return math.sqrt(max(1.0, fan_out / fan_in))
        if adjust_lr_fn == "spectral_unclamped":
            return math.sqrt(fan_out / fan_in)
        if adjust_lr_fn == "match_rms_adamw":
            return MOONLIGHT_RMS * math.sqrt(max(fan_out, fan_in))
        if adjust_lr_fn == "match_rms_adamw_closed_form":
            return adamw_update_rms() * math.sqrt(max(fan_out, fan_in))
    is_pair = isinstance(adjust_lr_fn, Sequence) and len(adjust_lr_fn) == 2 and adjust_lr_fn[0] == "match_rms_adamw"
    given = cast("Any", adjust_lr_fn)
    number = plain_number("adjust_lr_fn", given[1] if is_pair else given)
    if number is not None and 0 < number < math.inf:
        return float(number) * (math.sqrt(max(fan_out, fan_in)) if is_pair else 1.0)
    raise ValueError(
        f"adjust_lr_fn={shown(adjust_lr_fn)}; use 'original', 'spectral_unclamped', 'match_rms_adamw', "
        "'match_rms_adamw_closed_form', ('match_rms_adamw', RMS) or a positive number."
    )


def adamw_update_rms(beta1: float = ADAM_BETAS[0]) -> float:
    """Return √((1−β₁)/(1+β₁)), the RMS of AdamW's updates where gradients are noise: 0.229 at β₁ = 0.9.

    An average of independent gradients of variance v has the variance v (1−β₁)/(1+β₁) (J. Su 2025,
    https://kexue.fm/archives/11267).

    Args:
        beta1: AdamW's β₁.

    Raises:
        ValueError: For β₁ outside [0, 1).
    """
    check_number("beta1", beta1, BELOW_ONE)
    return math.sqrt((1 - beta1) / (1 + beta1))
