"""Newton–Schulz: the polar factor of a matrix by matrix products alone.

    X ← aX + b(XXᵀ)X + c(XXᵀ)²X        from X₀ = M / ‖M‖_F

Each step applies an odd polynomial to the singular values and leaves the singular vectors alone
(K. Jordan et al., 2024; Kimi K2, arXiv 2507.20534, Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Number
from typing import Any, Literal, TypeAlias

from muonclip.core.arguments import (
    NOT_NEGATIVE,
    check_choice,
    check_floating,
    check_kind,
    check_number,
    is_array,
    kind,
    shown,
)
from muonclip.core.coefficients import Coefficients, Polynomial, checked_gram_restarts, resolve_coefficients

Array: TypeAlias = Any
"""An array of NumPy, PyTorch or JAX: anything with `@`, `.mT`, `*`, `+`, shape and dtype."""


@dataclass(frozen=True, slots=True)
class Products:
    """The four products that the iteration consists of; other devices and layouts supply others for the same loop.

    X is (..., m, n) with m ≤ n, the Gram matrix A = XXᵀ and the polynomial B = bA + cA² are (..., m, m).

    Args:
        sum_squares: X → Σ x², shape (..., 1, 1).
        gram: X → XXᵀ.
        polynomial: A, b, c → bA + cA².
        update: X, B, a → aX + BX.
        symmetric_update: The same for symmetric X (..., m, m) that commutes with B, where that is cheaper; None:
            `update`.
    """

    sum_squares: Callable[[Array], Array]
    gram: Callable[[Array], Array]
    polynomial: Callable[[Array, float, float], Array]
    update: Callable[[Array, Array, float], Array]
    symmetric_update: Callable[[Array, Array, float], Array] | None = None


def plain_products(xp: Any) -> Products:
    """Write the four products with the operators of an array namespace.

    Args:
        xp: The array namespace: `numpy`, `torch` or `jax.numpy`.
    """
    return Products(
        sum_squares=lambda x: xp.sum(x * x, axis=(-2, -1), keepdims=True),
        gram=lambda x: x @ x.mT,
        polynomial=lambda gram, b, c: b * gram + c * (gram @ gram),
        update=lambda x, polynomial, a: a * x + polynomial @ x,
    )


def newton_schulz(
    x: Array,
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int | None = None,
    *,
    products: Products | None = None,
) -> Array:
    """Apply the polynomials to the singular values of each matrix; returns a new array.

    The caller orients x, by the global shape where x is a shard. `orthogonalize` does everything around the iteration
    as well.

    Args:
        x: Matrices (..., m, n), m ≤ n, with ‖x‖ ≤ 1.
        ns_coefficients: The polynomials, see `resolve_coefficients`.
        ns_steps: The number of steps, see `resolve_coefficients`.
        products: The products of the iteration; None: the plain ones.

    Raises:
        ValueError: For a polynomial that does not exist.
    """
    check_floating("x", x)
    _check_products(products)
    products = products or plain_products(None)
    for a, b, c in resolve_coefficients(ns_coefficients, ns_steps):
        x = products.update(x, products.polynomial(products.gram(x), b, c), a)
    return x


def gram_newton_schulz(
    x: Array,
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int | None = None,
    *,
    xp: Any,
    products: Products | None = None,
    restarts: Sequence[int] | None = None,
) -> Array:
    """Apply the same polynomials by m × m products: cheaper the wider x is, less accurate in low precision.

        R = XXᵀ, Q = I;   per step Z = aI + bR + cR², Q ← ZQ, R ← ZRZ;   at the end X ← QX

    All of these commute and are symmetric, so `Products.symmetric_update` computes every product with Z.

    Args:
        x: Matrices (..., m, n), m ≤ n, with ‖x‖ ≤ 1.
        ns_coefficients: The polynomials, see `resolve_coefficients`.
        ns_steps: The number of steps, see `resolve_coefficients`.
        xp: The array namespace: `numpy`, `torch` or `jax.numpy`.
        products: The products of the iteration; None: the plain ones.
        restarts: Steps (from 0) before which X ← QX, R ← XXᵀ, Q ← I bounds the error; a step between two restarts is
            one of the standard form. None: `gram_restarts` in x's dtype.

    Raises:
        ValueError: For polynomials with which the form may not run.
    """
    check_floating("x", x)
    _check_products(products)
    products = products or plain_products(xp)
    wide = xp.finfo(x.dtype).eps < 1e-4
    restarts = checked_gram_restarts(ns_coefficients, ns_steps, wide=wide) if restarts is None else restarts
    coefficients = resolve_coefficients(ns_coefficients, ns_steps)
    for start, stop in pairwise((0, *restarts, len(coefficients))):
        x = _between_restarts(x, coefficients[start:stop], products, xp)
    return x


def _between_restarts(x: Array, steps: Sequence[Polynomial], products: Products, xp: Any) -> Array:
    gram = products.gram(x)
    a, b, c = steps[0]
    polynomial = products.polynomial(gram, b, c)
    if len(steps) == 1:  # a in front of X, not of I: rounded to bf16, aI + P would lose what is small in P
        return products.update(x, polynomial, a)
    update = products.symmetric_update or products.update
    device = getattr(x, "device", None)  # JAX: none while it traces
    q = a * xp.eye(x.shape[-2], dtype=x.dtype, device=device) + polynomial
    for following, b, c in steps[1:]:
        gram = update(update(gram, polynomial, a), polynomial, a)
        polynomial = products.polynomial(gram, b, c)
        a = following
        q = update(q, polynomial, a)
    return q @ x


def normalize(x: Array, products: Products, *, xp: Any, eps: float = 0.0, total: Array = None) -> Array:
    """Return x / max(‖x‖_F, eps) for each matrix of x, in float32 (float64 for float64); zero stays zero.

    Dividing by Σ|x| first keeps the squares from under- and overflowing, so that no floor is needed for small inputs.
    (`torch.optim.Muon` has one at 1e-7 and so swallows smaller gradients.)

    Args:
        x: Matrices (..., m, n).
        products: Only its `sum_squares` is called.
        xp: The array namespace: `numpy`, `torch` or `jax.numpy`.
        eps: The least norm to divide by.
        total: Σ|x| of the whole matrix, shape (..., 1, 1); give it where x is a shard, from which it cannot be
            computed.
    """
    x = x if x.dtype == xp.float64 else _cast(x, xp.float32, xp)
    total = xp.sum(abs(x), axis=(-2, -1), keepdims=True) if total is None else total
    scale = xp.where(total > 0, total, 1.0)
    x = x / scale
    norm = products.sum_squares(x) ** 0.5
    norm = xp.where(norm * scale > eps, norm, eps / scale)
    return x / xp.where(norm > 0, norm, 1.0)


def iterate(
    x: Array,
    ns_coefficients: Coefficients,
    ns_steps: int | None,
    *,
    form: Literal["standard", "gram"],
    xp: Any,
    products: Products,
) -> Array:
    """Run the iteration in the given form; square matrices, where the Gram form saves nothing, in the standard one.

    Args:
        x: Matrices (..., m, n), m ≤ n, with ‖x‖ ≤ 1.
        ns_coefficients: The polynomials, see `resolve_coefficients`.
        ns_steps: The number of steps, see `resolve_coefficients`.
        form: "standard" for `newton_schulz`, "gram" for `gram_newton_schulz`.
        xp: The array namespace: `numpy`, `torch` or `jax.numpy`.
        products: The products of the iteration.

    Raises:
        ValueError: As from `newton_schulz` and `gram_newton_schulz`.
    """
    if form == "gram" and x.shape[-2] < x.shape[-1]:
        return gram_newton_schulz(x, ns_coefficients, ns_steps, xp=xp, products=products)
    return newton_schulz(x, ns_coefficients, ns_steps, products=products)


def orthogonalize(
    x: Array,
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int | None = None,
    *,
    xp: Any,
    eps: float = 0.0,
    dtype: Any = None,
    form: Literal["standard", "gram"] = "standard",
    products: Products | None = None,
) -> Array:
    """Return the (approximate) polar factor U Vᵀ of each matrix of x = U S Vᵀ, a new array of x's shape and dtype.

    Args:
        x: Matrices (..., m, n), of any orientation; leading axes are a batch.
        ns_coefficients: The polynomials, see `resolve_coefficients`. They decide how close the singular values come to
            1.
        ns_steps: The number of steps, see `resolve_coefficients`.
        xp: The array namespace: `numpy`, `torch` or `jax.numpy`.
        eps: Floor of the Frobenius norm.
        dtype: The dtype of the products, after a normalisation in float32; None: float32, and float64 for float64.
        form: "gram" is cheaper the less square x is, see `gram_newton_schulz`.
        products: The products of the iteration; None: the plain ones of `xp`.

    Raises:
        ValueError: For a polynomial that does not exist and for x with fewer than two axes.
    """
    check_floating("x", x)
    check_choice("form", form, "standard", "gram")
    _check_products(products)
    if not hasattr(xp, "asarray") or not hasattr(xp, "float32"):
        raise TypeError(f"xp={shown(xp)} is a {kind(xp)}; give the namespace of the arrays: numpy, torch or jax.numpy.")
    if dtype is not None and (is_array(dtype) or isinstance(dtype, Number | bytes)):
        raise TypeError(f"dtype={shown(dtype)} is a {kind(dtype)}; give a floating dtype of xp, or None.")
    if not is_array(eps):
        check_number("eps", eps, NOT_NEGATIVE)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; orthogonalize needs a matrix (..., m, n).")
    products = products or plain_products(xp)
    tall = x.shape[-2] > x.shape[-1]
    wide = normalize(x.mT if tall else x, products, xp=xp, eps=eps)
    wide = wide if dtype is None else _cast(wide, dtype, xp)
    wide = iterate(wide, ns_coefficients, ns_steps, form=form, xp=xp, products=products)
    return _cast(wide.mT if tall else wide, x.dtype, xp)


def _check_products(products: Any) -> None:
    if products is not None:
        check_kind("products", products, Products, "Products, or None for the plain ones")


def _cast(x: Array, dtype: Any, xp: Any) -> Array:
    """Convert an array to a dtype on its own device; torch's `asarray` would move it to the default one."""
    to = getattr(x, "to", None)
    return xp.asarray(x, dtype=dtype) if to is None else to(dtype)
