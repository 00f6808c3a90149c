"""The products of the Newton–Schulz iteration on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from muonclip.core import Products, plain_products
from muonclip.torch.update.quack_products import check_device, check_installed, quack_products
from muonclip.torch.update.symmetric_products import divides, symmetric_product, symmetric_sum


def _gram(x: torch.Tensor) -> torch.Tensor:
    """XXᵀ; a batch of one as a plain product, which reads the transpose where the batched one copies it."""
    return (x[0] @ x[0].mT)[None] if x.shape[0] == 1 else x @ x.mT


# The addition rides in the matrix product: fewer passes over memory, and one rounding less in bf16.
_BADDBMM = Products(
    sum_squares=lambda x: x.square().sum((-2, -1), keepdim=True),
    gram=_gram,
    polynomial=lambda gram, b, c: torch.baddbmm(gram, gram, gram, beta=b, alpha=c),
    update=lambda x, polynomial, a: torch.baddbmm(x, polynomial, x, beta=a),
)


# The same sums for a single matrix (m, n), with less work for the host.
_ADDMM = Products(
    sum_squares=_BADDBMM.sum_squares,
    gram=lambda x: x @ x.mT,
    polynomial=lambda gram, b, c: torch.addmm(gram, gram, gram, beta=b, alpha=c),
    update=lambda x, polynomial, a: torch.addmm(x, polynomial, x, beta=a),
)


def _halved_gram(x: torch.Tensor) -> torch.Tensor:
    return symmetric_product(x, x) if divides(x) else _gram(x)


def _halved_polynomial(gram: torch.Tensor, b: float, c: float) -> torch.Tensor:
    if divides(gram):
        return symmetric_sum(gram, gram, gram, beta=b, alpha=c)
    return _BADDBMM.polynomial(gram, b, c)


def _halved_update(x: torch.Tensor, polynomial: torch.Tensor, a: float) -> torch.Tensor:
    if divides(x):
        return symmetric_sum(x, polynomial, x, beta=a, alpha=1.0)
    return _BADDBMM.update(x, polynomial, a)


PRODUCTS: Mapping[str, Products] = MappingProxyType(
    {
        "plain": plain_products(torch),
        "baddbmm": _BADDBMM,
        "halves": replace(_BADDBMM, gram=_halved_gram, polynomial=_halved_polynomial, symmetric_update=_halved_update),
    }
)


def for_one_matrix(products: Products, stack: torch.Tensor) -> Products | None:
    """Return products of a matrix (m, n) that make the same sums as these of a stack of one; None where there are none.

    Where a product is not divided, it is a whole one.
    """
    same = products is _BADDBMM or (products is PRODUCTS["halves"] and not divides(stack))
    return _ADDMM if same and stack.shape[0] == 1 else None


def choose_products(name: str | None, device_type: str) -> Products:
    """Return the products by name; None takes the fastest of those that are measured on a device type."""
    if name == "quack":
        return quack_products(_BADDBMM)
    return PRODUCTS[name or ("halves" if device_type == "cpu" else "baddbmm")]


def check_products(name: str | None) -> None:
    """Raise ValueError for a name that is not known, or of a package that is not installed."""
    if name is not None and not (isinstance(name, str) and name in (*PRODUCTS, "quack")):
        raise ValueError(f"products={name!r} is not known; use None, {', '.join(map(repr, PRODUCTS))} or 'quack'.")
    if name == "quack":
        check_installed()


def check_products_on(device: torch.device, name: str | None, dtype: torch.dtype) -> None:
    """Raise ValueError for products that a device does not make in a dtype; where "meta" will be is not known."""
    if name == "quack" and device.type != "meta":
        check_device(device, dtype)
