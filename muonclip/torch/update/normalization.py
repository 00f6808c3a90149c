"""The normalisation of a stack of matrices that this rank holds whole, in the dtype of the products.

On a processor one pass finds the norm and one applies it. Where a sum of squares may have under- or overflown,
`core.normalize` takes that matrix alone; on other devices, where to look would wait for the device, it takes all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from muonclip.core import Products, normalize

_SURE = 1e-10, 1e18
"""Norms between these are right in float32: squares that underflow there are too small to count."""


_SMALL = 2**16
"""Elements of a matrix that is widened first, and normalised with its neighbours; larger ones are taken row by row."""


def normalized(stack: Tensor, products: Products, dtype: torch.dtype, floor: float) -> Tensor:
    """Return x / max(‖x‖_F, floor) for each matrix of (matrices, m, n) in a dtype; may write into the stack."""
    if stack.device.type != "cpu" or type(stack) is not Tensor or not stack.numel():
        return normalize(stack, products, xp=torch, eps=floor).to(dtype)
    wide = torch.float64 if stack.dtype == torch.float64 else torch.float32
    small = stack[0].numel() <= _SMALL
    lines = stack.to(wide).flatten(1) if small else stack
    parts = torch.linalg.vector_norm(lines, dim=-1, dtype=wide)
    norms = (parts if small else torch.linalg.vector_norm(parts, dim=-1, dtype=torch.float64)).tolist()
    sure = [_SURE[0] < norm < _SURE[1] for norm in norms]
    careful = {
        index: normalize(stack[index : index + 1], products, xp=torch, eps=floor).to(dtype)
        for index, is_sure in enumerate(sure)
        if not is_sure
    }
    factors = [1 / max(norm, floor) if is_sure else 1.0 for norm, is_sure in zip(norms, sure, strict=True)]
    if small:
        by_matrix = factors[0] if len(factors) == 1 else torch.tensor(factors, dtype=wide, device=stack.device)[:, None]
        result = lines.mul_(by_matrix).to(dtype).view_as(stack)
    elif stack.dtype == dtype:
        result = stack
        torch._foreach_mul_(list(stack), factors)  # pyright: ignore[reportPrivateImportUsage]
    else:
        result = torch.empty_like(stack, dtype=dtype)
        for each, matrix, factor in zip(result, stack, factors, strict=True):
            torch.mul(matrix, factor, out=each)
    for index, matrix in careful.items():
        result[index : index + 1] = matrix
    return result
