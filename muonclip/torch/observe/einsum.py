"""Queries and keys of a product that is written as an einsum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def queries_and_keys(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, str] | None:
    """q [..., Tq, d], k [..., Tk, d] of `torch.einsum(*args)`, and what was not understood of it, or "".

    None where it is not a product of two tensors with three axes or more.
    """
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if len(operands) != 2 or min(operand.ndim for operand in operands) < 3:
        return None
    unknown = operands[0], operands[1], f"come from an einsum that is not understood, {args[0]}"
    if not isinstance(args[0], str) or "->" not in args[0]:
        return unknown
    inputs, output = _without_ellipsis(args[0], operands).replace(" ", "").split("->")
    first, second = inputs.split(",")
    rows, columns = output[-2:-1], output[-1:]
    if rows in second:
        first, second, operands = second, first, operands[::-1]
    summed = set(first) & set(second) - set(output)
    if len(summed) != 1 or rows not in first or columns not in second or rows in second or columns in first:
        return unknown
    width = summed.pop()
    shared = output[:-2]
    if set(first) != {*shared, rows, width} or not set(second) <= {*shared, columns, width}:
        return unknown
    q = torch.einsum(f"{first}->{shared}{rows}{width}", operands[0])
    missing = "".join(letter for letter in shared if letter not in second)
    k = torch.einsum(f"{second}->{''.join(x for x in shared if x not in missing)}{columns}{width}", operands[1])
    for position, letter in enumerate(shared):
        if letter in missing:
            k = k.unsqueeze(position)
    return q, k, ""


def _without_ellipsis(equation: str, operands: Any) -> str:
    """Replace the dots of "...id,...jd->...ij" by letters."""
    letters = [letter for letter in "ABCDEFGHIJKLMNOP" if letter not in equation]
    inputs, output = equation.replace(" ", "").split("->")
    axes = max(x.ndim - len(part.replace("...", "")) for part, x in zip(inputs.split(","), operands, strict=True))
    return f"{inputs}->{output}".replace("...", "".join(letters[:axes]))
