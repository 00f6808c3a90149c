"""Float32 weights in two parts: the bf16 parameter that the model computes with, and the error of its rounding.

A bf16 number is the upper half of a float32 one. `weight` is the bf16 number nearest to the master, the one further
from zero of two equally near; `error` is the distance between both, counted in the last place of the master: int16 for
all 32 bits of it, int8 for a master rounded (half to even) to 24: a sign, 8 bits of exponent and 15 of significand.
Each pair is one master, and each master that is a number is one pair.

What anything else writes into the parameter is therefore the weight from then on: a master cannot overwrite it. The
error that is left is at most half a unit of the parameter's last place. (TransformerEngine keeps 16 bits so, as
`store_param_remainders`; FlashOptim 16 or 8, `master_weight_bits`, arXiv 2602.23349.)
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

MasterWeightBits: TypeAlias = Literal[24, 32]
"""How many bits a master has, the 16 of its parameter included."""

WEIGHT_ERROR = "weight_error"
"""The name of the error in an optimizer's state."""

_DTYPES = {24: torch.int8, 32: torch.int16}


def has_master(parameter: Tensor, bits: int | None) -> bool:
    """Tell whether a parameter gets a master: those that are wider than bf16 are their own."""
    return bits is not None and parameter.dtype == torch.bfloat16


def error_dtype(bits: int) -> torch.dtype:
    """Return the dtype of the error of masters of 24 or 32 bits."""
    return _DTYPES[bits]


def joined(weight: Tensor, error: Tensor) -> Tensor:
    """Return the float32 masters of bf16 weights, a new tensor.

    Weights that something else has set to zero or to infinity have an error that goes with neither; it counts as none.
    """
    given = error.to(torch.int32)
    given = torch.where(weight == 0, given.clamp(min=0), given)
    given = torch.where(weight.isinf(), given.clamp(max=0), given)
    return ((weight.view(torch.int16).to(torch.int32) << 16) + (given << _unused(error))).view(torch.float32)


def split_into(master: Tensor, weight: Tensor, error: Tensor) -> None:
    """Write float32 masters into bf16 weights and their errors."""
    shift = _unused(error)
    is_number = ~master.isnan()
    bits = torch.where(is_number, master, 0.0).view(torch.int32)
    if shift:  # half to even
        bits = (bits + (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift
    kept = 16 - shift
    upper = (bits + (1 << (kept - 1))) >> kept
    error.copy_(bits - (upper << kept))
    weight.copy_(torch.where(is_number, upper.to(torch.int16).view(torch.bfloat16), torch.nan))


def _unused(error: Tensor) -> int:
    """Return how many of the last bits of a float32 number its masters do not have."""
    return 16 - 8 * error.itemsize
