"""Float32 weights in two parts: the bf16 parameter that the model computes with, and the error of its rounding.

A bf16 number is the upper half of a float32 one. `weight` is the bf16 number nearest to the master, the one further
from zero of two equally near; the error is the distance between both, counted in the last place of the master: int8 for
a master rounded (half to even) to 24 bits: a sign, 8 bits of exponent and 15 of significand. For all 32 bits the 8 that
follow are kept next to it, in uint8: two states of 8 bits, as neither NCCL nor gloo moves int16. Each weight with its
errors is one master, and each master that is a number is one weight with its errors.

What anything else writes into the parameter is therefore the weight from then on: a master cannot overwrite it. The
error that is left is at most half a unit of the parameter's last place. (TransformerEngine keeps 16 bits so, as
`store_param_remainders`; FlashOptim 16 or 8, `master_weight_bits`, arXiv 2602.23349.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

MasterWeightBits: TypeAlias = Literal[24, 32]
"""How many bits a master has, the 16 of its parameter included."""

WEIGHT_ERRORS: Mapping[str, torch.dtype] = {"weight_error": torch.int8, "weight_error_low": torch.uint8}
"""The names of the errors in an optimizer's state, the upper 8 bits first, and their dtypes."""


def has_master(parameter: Tensor, bits: int | None) -> bool:
    """Tell whether a parameter gets a master: those that are wider than bf16 are their own."""
    return bits is not None and parameter.dtype == torch.bfloat16


def error_dtypes(bits: int) -> dict[str, torch.dtype]:
    """Return the names and dtypes of the errors of masters of 24 or 32 bits: one, or two."""
    return dict([*WEIGHT_ERRORS.items()][: (bits - 16) // 8])


def missing_errors(state: Mapping[str, Any], parameter: Tensor, bits: int | None) -> dict[str, Tensor]:
    """Return as zeros the errors that a parameter with a master has not yet; none for one without a master."""
    wanted = error_dtypes(bits) if bits is not None and has_master(parameter, bits) else {}
    return {
        name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        for name, dtype in wanted.items()
        if name not in state
    }


def errors_of(state: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the errors in a parameter's state, the upper 8 bits first."""
    return tuple(state[name] for name in WEIGHT_ERRORS if name in state)


def joined(weight: Tensor, errors: Sequence[Tensor]) -> Tensor:
    """Return the float32 masters of bf16 weights, a new tensor. `errors`: one for 24 bits, two for 32.

    Weights that something else has set to zero or to infinity have an error that goes with neither; it counts as none.
    """
    given = errors[0].to(torch.int32)
    for lower in errors[1:]:
        given = (given << 8) + lower
    given = torch.where(weight == 0, given.clamp(min=0), given)
    given = torch.where(weight.isinf(), given.clamp(max=0), given)
    return ((weight.view(torch.int16).to(torch.int32) << 16) + (given << _unused(errors))).view(torch.float32)


def split_into(master: Tensor, weight: Tensor, errors: Sequence[Tensor]) -> None:
    """Write float32 masters into bf16 weights and their errors: one for 24 bits, two for 32."""
    shift = _unused(errors)
    is_number = ~master.isnan()
    bits = torch.where(is_number, master, 0.0).view(torch.int32)
    if shift:  # half to even
        bits = (bits + (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift
    kept = 16 - shift
    upper = (bits + (1 << (kept - 1))) >> kept
    error = bits - (upper << kept)
    for lower in errors[:0:-1]:
        lower.copy_(error & 0xFF)
        error = error >> 8
    errors[0].copy_(error)
    weight.copy_(torch.where(is_number, upper.to(torch.int16).view(torch.bfloat16), torch.nan))


def _unused(errors: Sequence[Tensor]) -> int:
    """Return how many of the last bits of a float32 number its masters do not have."""
    return 16 - 8 * len(errors)
