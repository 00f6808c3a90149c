"""Orthogonalisation of many matrices at once: those of one shape, of any parameter, are iterated as one stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from muonclip.core import Products, iterate, normalize, resolve_coefficients
from muonclip.core.arguments import check_choice
from muonclip.core.coefficients import Coefficients, checked_gram_restarts
from muonclip.core.cost_model import Form, choose_form
from muonclip.optax.arguments import check_dtype
from muonclip.optax.dtypes import wide

_CPU_STACK_BYTES, _STACK_BYTES = 2**19, 2**28


def _gram(x: jax.Array) -> jax.Array:
    """Compute XXᵀ without materialising the transpose."""
    batch, last = tuple(range(x.ndim - 2)), (x.ndim - 1,)
    return jax.lax.dot_general(x, x, ((last, last), (batch, batch)))


def _sum(addend: jax.Array, a: jax.Array, b: jax.Array, beta: float, alpha: float) -> jax.Array:
    """Compute β addend + α ab, rounded once: in bf16, roundings of the terms send some small matrices to infinity."""
    dtype = wide(addend.dtype)
    product = jnp.matmul(a, b, preferred_element_type=dtype)
    return (beta * addend.astype(dtype) + alpha * product).astype(addend.dtype)


PRODUCTS = Products(
    sum_squares=lambda x: jnp.sum(x * x, axis=(-2, -1), keepdims=True),
    gram=_gram,
    polynomial=lambda gram, b, c: _sum(gram, gram, gram, b, c),
    update=lambda x, polynomial, a: _sum(x, polynomial, x, a, 1.0),
)


@dataclass(frozen=True, slots=True)
class NewtonSchulz:
    """Options by which matrices are orthogonalised; see `muonclip.core.orthogonalize`.

    `dtype` None: bfloat16 where the default device is an accelerator, float32 on the CPU; float64 stays float64.
    `form` None: the cheaper one for each shape, see `core.cost_model`.
    `stack_bytes`: the most that one stack takes. None: what fits a processor's cache on the CPU, where larger stacks
    are slower than single matrices, else 256 MiB.
    """

    ns_coefficients: Coefficients = "jordan"
    ns_steps: int | None = None
    eps: Any = 0.0
    dtype: Any = None
    form: Form | None = None
    stack_bytes: int | None = None

    def check(self) -> None:
        """Raise ValueError for polynomials and forms that do not exist, or may not be combined."""
        resolve_coefficients(self.ns_coefficients, self.ns_steps)
        check_choice("ns_form", self.form, "standard", "gram", None)
        check_dtype("ns_dtype", self.dtype)
        if self.form == "gram":
            checked_gram_restarts(self.ns_coefficients, self.ns_steps)

    def products_dtype(self, dtype: Any) -> Any:
        """Return the dtype of the products, for matrices of `dtype`."""
        if self.dtype is not None:
            return jnp.dtype(self.dtype)
        if dtype == jnp.float64:
            return jnp.dtype(jnp.float64)
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)

    def form_of(self, m: int, n: int, dtype: Any) -> Form:
        """Return the form in which matrices m × n of `dtype`, m ≤ n, are iterated; square ones in the standard form."""
        if m == n:
            return "standard"
        polynomials = resolve_coefficients(self.ns_coefficients, self.ns_steps)
        name = self.products_dtype(dtype).name
        return self.form or choose_form(m, n, name, jax.default_backend(), polynomials, None)

    def __call__(self, batches: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the polar factors of batches [count, m, n] of any shapes, in the dtype of the products."""
        shapes: dict[tuple[Any, ...], list[int]] = {}
        for index, batch in enumerate(batches):
            shapes.setdefault((*sorted(batch.shape[1:]), batch.dtype), []).append(index)
        results: dict[int, list[jax.Array]] = {index: [] for index in range(len(batches))}
        for (m, n, dtype), members in shapes.items():
            for stack in _stacks([batches[index].shape[0] for index in members], self._stack_size(m, n, dtype)):
                pieces = [batches[members[member]][start:stop] for member, start, stop in stack]
                done = self._orthogonalize([_lying(piece) for piece in pieces])
                for (member, _, _), piece, result in zip(stack, pieces, done, strict=True):
                    result = result.mT if piece.shape[1] > piece.shape[2] else result
                    results[members[member]].append(result)
        return [parts[0] if len(parts) == 1 else jnp.concatenate(parts) for parts in results.values()]

    def _orthogonalize(self, pieces: list[jax.Array]) -> list[jax.Array]:
        """Orthogonalise batches of one shape m × n, m ≤ n."""
        stack = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
        alone = len(stack) == 1  # a product of two matrices is faster than a batch of one
        x = normalize(stack[0] if alone else stack, PRODUCTS, xp=jnp, eps=self.eps)
        x = x.astype(self.products_dtype(stack.dtype))
        m, n = stack.shape[1:]
        form = self.form_of(m, n, stack.dtype)
        x = iterate(x, self.ns_coefficients, self.ns_steps, form=form, xp=jnp, products=PRODUCTS)
        x = x[None] if alone else x
        edges = [sum(len(piece) for piece in pieces[:i]) for i in range(1, len(pieces))]
        return jnp.split(x, edges)

    def _stack_size(self, m: int, n: int, dtype: Any) -> int:
        limit = self.stack_bytes or (_CPU_STACK_BYTES if jax.default_backend() == "cpu" else _STACK_BYTES)
        return max(1, limit // (m * n * wide(dtype).itemsize))


def _lying(x: jax.Array) -> jax.Array:
    return x.mT if x.shape[1] > x.shape[2] else x


def _stacks(counts: Sequence[int], size: int) -> list[list[tuple[int, int, int]]]:
    """Divide batches of these counts into stacks of at most `size`: lists of (batch, start, stop)."""
    stacks: list[list[tuple[int, int, int]]] = []
    room = 0
    for batch, count in enumerate(counts):
        start = 0
        while start < count:
            if not room:
                stacks.append([])
                room = size
            taken = min(room, count - start)
            stacks[-1].append((batch, start, start + taken))
            start, room = start + taken, room - taken
    return stacks
