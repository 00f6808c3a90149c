"""Products of activations with weights, cut out of the graph, and the rows of parameters behind their outputs.

In a traced forward (`tracer.py`) the output of every such product is a leaf of autograd. A gradient that reaches it
is handed on to the rows of its weight: by their position, where the weight is a parameter or a view of one, else by
computing the product again with the graph of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from muonclip.torch.discover.graph import ancestry, differentiate
from muonclip.torch.discover.proportional import Shares, proportional_sets


@dataclass(slots=True, eq=False)
class ReachedRows:
    """The rows of a parameter, counted along `axes` together, that several gradients reach.

    `sizes`: [gradients, rows], the sum of the absolute values in each row.
    """

    parameter: nn.Parameter
    axes: tuple[int, ...]
    sizes: Tensor

    @classmethod
    def from_gradients(cls, parameter: nn.Parameter, axes: tuple[int, ...], gradients: Sequence[Tensor]) -> Self:
        """Sum gradients of a parameter over the axes that count no rows."""
        others = [axis for axis in range(parameter.ndim) if axis not in axes]
        sizes = [_absolute_sum(gradient, others).flatten() for gradient in gradients]
        return cls(parameter, axes, torch.stack(sizes))


@dataclass(slots=True, eq=False)
class PartOfWeight:
    """Rows of a parameter by their `rows`, int64, counted along `axes` together."""

    parameter: nn.Parameter
    axes: tuple[int, ...]
    rows: Tensor

    @classmethod
    def from_view(cls, tensor: Tensor, axis: int, parameters: frozenset[int]) -> Self | None:
        """Read a tensor, one of these parameters by id or a view of one, as its rows along `axis`; None if it is not.

        A row must be whole: all entries of the parameter along the axes that do not count rows.
        """
        parameter = tensor if id(tensor) in parameters else tensor._base
        if not isinstance(parameter, nn.Parameter) or id(parameter) not in parameters:
            return None
        columns = {
            dim
            for each, dim in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
            if each != axis and dim[0] > 1
        }
        dims = list(zip(parameter.shape, parameter.stride(), strict=True))
        inner = [each for each, dim in enumerate(dims) if dim in columns]
        axes = [each for each, (size, _) in enumerate(dims) if size > 1 and each not in inner]
        axes = axes or [each for each, (size, _) in enumerate(dims) if size == 1][:1]
        if not axes or len(inner) != len(columns):
            return None
        offset = torch.arange(tensor.shape[axis], device="cpu") * tensor.stride(axis)
        offset += int(tensor.storage_offset() - parameter.storage_offset())
        rows = torch.zeros_like(offset)
        for each in sorted(range(len(dims)), key=lambda each: -dims[each][1]):
            size, stride = dims[each]
            place = offset.div(stride, rounding_mode="floor") if size > 1 else torch.zeros_like(offset)
            offset = offset - place * stride
            if each in axes:
                rows += place * math.prod(dims[later][0] for later in axes if later > each)
            elif bool(place.any()):  # the tensor begins within a row
                return None
        return cls(parameter, tuple(axes), rows.to(parameter.device))


@dataclass(slots=True, eq=False)
class Product:
    """A product of activations with a weight, cut off: its output depends on nothing.

    `name`: of the function. `order`: of products, the how many-th it is. `block`: the run of a module in which it was
    made. `projected_in`: those in which a product was made of its output. `parts`: the weight and the bias, whose rows
    are the positions along `axis` of the output; without them, `recompute` makes an output like it with the graph of
    the weights: all of it, or with other positions than the last axis's (`by_columns`).
    """

    name: str
    order: int = 0
    block: int = 0
    parts: tuple[PartOfWeight, ...] = ()
    axis: int = -1
    recompute: Callable[[], Tensor] | None = None
    by_columns: bool = False
    projected_in: set[int] = field(default_factory=set)
    is_proportional: bool = True  # to its parameters, as far as `reached` has seen

    def reached(self, gradients: Sequence[Tensor]) -> list[ReachedRows]:
        """Return the rows of parameters behind the positions of the output that have gradients."""
        if self.parts:
            others = [axis for axis in range(gradients[0].ndim) if axis != self.axis % gradients[0].ndim]
            columns = torch.stack([_absolute_sum(gradient, others) for gradient in gradients])
            found = []
            for part in self.parts:
                sizes = columns.new_zeros(len(gradients), math.prod(part.parameter.shape[axis] for axis in part.axes))
                sizes[:, part.rows] = columns
                found.append(ReachedRows(part.parameter, part.axes, sizes))
            return found
        return self._recomputed(gradients)

    def _recomputed(self, gradients: Sequence[Tensor]) -> list[ReachedRows]:
        assert self.recompute is not None
        if not bool(gradients[0].any()):
            return []
        with torch.enable_grad():
            output = self.recompute()
        behind = ancestry(output)
        parameters = [leaf for leaf in behind.leaves if isinstance(leaf, nn.Parameter)]
        if not parameters:
            return []
        if self.by_columns:
            noise = (0.5 + torch.rand_like(output, dtype=torch.float32)) * output.detach().sign()
            others = list(range(gradients[0].ndim - 1))
            gradients = [(_absolute_sum(each, others) * noise).to(output.dtype) for each in gradients]
        by_gradient = [differentiate(output, parameters, gradient) for gradient in gradients]
        one = torch.zeros_like(output).flatten()
        one[gradients[0].abs().argmax()] = 1
        of_one = differentiate(output, parameters, one.view_as(output))
        axes = [() if each is None else _axes_of_rows(each) for each in of_one]
        # The weight may be computed from parameters; those that it is proportional to can be scaled, by the same rule.
        shares = Shares.from_gradients(output, parameters, gradients, by_gradient, behind.precision)
        sets = proportional_sets(shares, [index for index, of_rows in enumerate(axes) if of_rows])
        self.is_proportional &= bool(sets)
        found = []
        for index in sets[0] if sets else range(len(parameters)):
            parameter = parameters[index]
            of_all = [torch.zeros_like(parameter) if (g := each[index]) is None else g for each in by_gradient]
            found.append(ReachedRows.from_gradients(parameter, axes[index] or (0,), of_all))
        return found


def _axes_of_rows(of_one: Tensor) -> tuple[int, ...]:
    """Name the axes of a parameter that count rows, from the gradient of one entry of an output: it is in one row."""
    nonzero = of_one != 0
    counts = [(size, int(_any_over_others(nonzero, axis).sum())) for axis, size in enumerate(of_one.shape)]
    return tuple(axis for axis, (size, count) in enumerate(counts) if size > 1 and count == 1)


def _any_over_others(mask: Tensor, axis: int) -> Tensor:
    return mask.movedim(axis, 0).flatten(1).any(1) if mask.ndim > 1 else mask


def _absolute_sum(gradient: Tensor, axes: Sequence[int]) -> Tensor:
    """Sum absolute values over some axes, in float32 or wider: exactly 2^n times as much of a gradient times 2^n."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, 1, tuple(axes), dtype=dtype) if axes else gradient.abs().to(dtype)
