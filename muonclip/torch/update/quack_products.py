"""The symmetric products of quack-kernels (T. Dao et al.), which computes one half of each and mirrors it, by name.

Its kernels are for NVIDIA GPUs from Ampere on, and for float16 and bfloat16. This file has run with a stand-in for the
package alone, on a processor; neither its results nor its speed on a GPU were measured.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from muonclip.core import Products

_CAPABILITIES = range(8, 13)
_TILE = 256
"""Rows up to which one tile holds a product, so that nothing is left out."""
_ALIGNED = 8
"""Elements of two bytes that its kernels load at once; every side is a multiple."""


def check_installed() -> None:
    """Raise ValueError where the package is missing."""
    if find_spec("quack") is None:
        raise ValueError(
            "products='quack' needs quack-kernels, which is not installed: pip install \"muonclip[hopper]\", or take "
            "products=None."
        )


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError for a device or a dtype of the products that the kernels are not made for."""
    if device.type != "cuda":
        raise ValueError(f"products='quack' is for NVIDIA GPUs, not for {device}. Take products=None.")
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or major not in _CAPABILITIES:
        raise ValueError(
            f"products='quack' is for NVIDIA GPUs of compute capability {_CAPABILITIES[0]}.0 to {_CAPABILITIES[-1]}.x; "
            f"{device} has {major}.{minor}. Take products=None."
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"products='quack' multiplies in bfloat16 or float16, not in {dtype}. Take another ns_dtype, or "
            "products=None."
        )


def quack_products(whole: Products) -> Products:
    """Return products of stacks (matrices, m, n): the symmetric ones by quack-kernels where it serves, else `whole`."""
    gemm_symmetric: Any = importlib.import_module("quack.gemm_interface").gemm_symmetric

    def gram(x: Tensor) -> Tensor:
        return gemm_symmetric(x, x.mT) if _is_served(x) else whole.gram(x)

    def polynomial(gram: Tensor, b: float, c: float) -> Tensor:
        if _is_served(gram):
            return gemm_symmetric(gram, gram, C=gram, alpha=c, beta=b)
        return whole.polynomial(gram, b, c)

    def symmetric_update(x: Tensor, polynomial: Tensor, a: float) -> Tensor:
        return gemm_symmetric(polynomial, x, C=x, beta=a) if _is_served(x) else whole.update(x, polynomial, a)

    return replace(whole, gram=gram, polynomial=polynomial, symmetric_update=symmetric_update)


def _is_served(x: Tensor) -> bool:
    rows, columns = x.shape[-2:]
    return rows > _TILE and rows % _ALIGNED == columns % _ALIGNED == 0
