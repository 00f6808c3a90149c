"""Operations whose inside cannot be seen are put to the test.

    gauge     f(2q, k/2, v) = f(q, k, v)     each logit is one query times one key; powers of two, so bits are compared
    linear    f(8q) − f(0) = 8 (f(q) − f(0))     then there is no softmax, and there are no logits
    weighs    f(8v) = 8 f(v)     without values it is a loss, which weighs nothing

They are operators of other libraries than torch, and autograd functions whose results come from nowhere that was seen:
from a Triton kernel, from NumPy. Each kind of call is tried once in a trace, on copies of what it writes to, with the
same random numbers. What raises then, or keeps none of these rules, is not said to be attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Verdict = Literal["attention", "linear", ""]
_CLOSE, _LINEAR = 2**-6, 0.02  # of the largest


@dataclass(slots=True)
class Operation:
    """A call of something opaque: how to make it, with the values among its arguments. `projected`: the places of those
    that come from projections."""

    call: Callable[[Sequence[Any]], Any]
    values: list[Any]
    projected: list[int]

    def keep_values(self) -> None:
        """Copy the values, for the test."""
        self.values = [each.detach().clone() if isinstance(each, Tensor) else each for each in self.values]

    @property
    def kind(self) -> object:
        """Describe it so that calls of the same kind are equal."""
        return tuple((v.shape, v.dtype) if isinstance(v, Tensor) else repr(v) for v in self.values), tuple(
            self.projected
        )


def may_be_attention(operation: Operation) -> bool:
    """Tell whether it has what could be queries and keys: tensors of one width, or three parts in one."""
    tensors = [operation.values[index] for index in operation.projected]
    widths = [each.shape[-1] for each in tensors]
    return len(set(widths)) < len(widths) or (len(tensors) == 1 and _axis_of_three(tensors[0]) is not None)


@torch.no_grad()
def judge(operation: Operation) -> Verdict:
    """Put an operation to the test."""
    experiment = _Experiment(operation)
    with suppress(Exception):  # whatever it raises on other numbers
        parts = experiment.parts
        for one, other in itertools.combinations(parts, 2):
            if experiment.width(one) == experiment.width(other) and experiment.is_attention(one, other):
                return "attention"
        linear = [each for each in parts if experiment.is_linear(each)]
        return "linear" if len(parts) > 2 and len(linear) > 1 else ""
    return ""


@torch.no_grad()
def is_linear(operation: Operation, index: int) -> bool:
    """Tell whether an operation is linear in one of its arguments. What cannot be tried is not."""
    with suppress(Exception):
        return _Experiment(operation).is_linear((index, None, 0))
    return False


Part = tuple[int, int | None, int]
"""An argument: its place; and the part of it that is at an index of an axis, if it is not the whole."""


class _Experiment:
    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self.parts: list[Part] = [(index, None, 0) for index in operation.projected]
        axis = _axis_of_three(operation.values[self.parts[0][0]]) if len(self.parts) == 1 else None
        if axis is not None:
            self.parts = [(self.parts[0][0], axis, number) for number in range(3)]
        self._base = self._run({})

    def width(self, part: Part) -> int:
        return self._operation.values[part[0]].shape[-1]

    def is_attention(self, one: Part, other: Part) -> bool:
        gauged = self._run({one: 2.0, other: 0.5})
        for factor, queries in ((1.0, one), (0.5, one), (2.0, other)):  # keys that are values, too, count twice
            if self._same(gauged, factor):
                others = [each for each in self.parts if each not in (one, other)]
                weighs = factor != 1 or any(self._moves(each, 8.0) for each in others)
                return weighs and not self._is_still(queries) and not self.is_linear(queries)
        return False

    def is_linear(self, part: Part) -> bool:
        zero, eightfold = self._run({part: 0.0})[0], self._run({part: 8.0})[0]
        wanted, found = 8 * (self._base[0] - zero), eightfold - zero
        return bool(wanted.any()) and bool((found - wanted).abs().max() <= _LINEAR * wanted.abs().max())

    def _moves(self, part: Part, factor: float) -> bool:
        """Tell whether the first result is multiplied as the part is."""
        wanted, found = self._base[0] * factor, self._run({part: factor})[0]
        return bool(wanted.any()) and bool((found - wanted).abs().max() <= _LINEAR * wanted.abs().max())

    def _is_still(self, part: Part) -> bool:
        return self._same(self._run({part: 8.0}), 1.0)

    def _same(self, results: Sequence[Tensor], factor: float) -> bool:
        pairs = [(found, base * factor) for found, base in zip(results[:1], self._base[:1], strict=True)]
        if all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
            return bool(self._base[0].isfinite().any())
        again = self._run({})
        if all(torch.equal(a, b) for a, b in zip(again, self._base, strict=True)):
            return False
        return all(bool((a - b).abs().max() <= _CLOSE * b.abs().max()) for a, b in pairs)  # it is not deterministic

    def _run(self, factors: dict[Part, float]) -> list[Tensor]:
        """Return the numbers that the operation returns, the first of them first, and those that it writes."""
        values = [each.detach().clone() if isinstance(each, Tensor) else each for each in self._operation.values]
        for (index, axis, number), factor in factors.items():
            part = values[index] if axis is None else values[index].select(axis, number)
            part.mul_(factor)
        before = [each.clone() if isinstance(each, Tensor) else None for each in values]
        state = torch.get_rng_state()
        torch.manual_seed(0)
        try:
            results = tree_flatten(self._operation.call(values))[0]
        finally:
            torch.set_rng_state(state)
        changed = [v for v, b in zip(values, before, strict=True) if b is not None and not torch.equal(v, b)]
        numbers = [each for each in (*results, *changed) if isinstance(each, Tensor) and each.is_floating_point()]
        return [each.detach().to(torch.promote_types(each.dtype, torch.float32)) for each in numbers]


def operation_of(
    function: Callable[..., Any], args: Any, kwargs: Any, is_projected: Callable[[Any], bool]
) -> Operation:
    """Make an operation of a call."""
    values, structure = tree_flatten((args, kwargs))

    def call(values: Sequence[Any]) -> Any:
        args, kwargs = tree_unflatten(values, structure)
        return function(*args, **kwargs)

    return Operation(call, values, [index for index, value in enumerate(values) if is_projected(value)])


def _axis_of_three(tensor: Tensor) -> int | None:
    """Return the axis that may have queries, keys and values."""
    return next((axis for axis, size in enumerate(tensor.shape[:-1]) if size == 3), None)
