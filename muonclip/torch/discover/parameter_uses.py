"""The uses of parameters that a traced forward shows: whose product the model returns.

An output head is a matrix whose product, but for a scale, a cap and another shape, is returned or enters the loss, and
that has not as many rows as the residual stream has features. Of a matrix that is alone nothing tells what it is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from muonclip.torch.discover.products import PartOfWeight, Product

_SHAPES = (
    *("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Unsqueeze", "Squeeze", "Expand", "Clone"),
    *("Alias", "Slice", "Select", "Index", "Split", "SplitWithSizes", "Unbind", "ToCopy", "Contiguous", "Gather"),
)
_CAPS_AND_LOSSES = (
    *("Tanh", "Sigmoid", "Softmax", "LogSoftmax", "Clamp", "ClampMin", "ClampMax", "Neg", "Softplus"),
    *("NllLoss", "NllLoss2D", "MseLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "SmoothL1Loss"),
)
_WITH_OTHERS = ("Mul", "Div", "Add", "Sub", "MaskedFill", "Where")
_ONE, _ALL = frozenset(_SHAPES + _CAPS_AND_LOSSES), frozenset(_WITH_OTHERS)


def returned_parameters(outputs: Any, matrices: Mapping[int, tuple[int, int]]) -> set[int]:
    """Return the ids of the output heads, from what a traced forward has returned.

    `matrices`: (rows, columns) of each parameter that was multiplied by, by id.
    """
    heads: set[int] = set()
    for output in _tensors(outputs):
        product = _product(output.grad_fn)
        for part in () if product is None else product.parts:
            of_all = matrices.get(id(part.parameter))
            if of_all is not None and len(matrices) > 1 and of_all[0] not in _widths(matrices, id(part.parameter)):
                heads.add(id(part.parameter))
    return heads


def size_of(part: PartOfWeight) -> tuple[int, int]:
    """Return the numbers of rows and columns of the parameter that a part is of."""
    rows = 1
    for axis in part.axes:
        rows *= part.parameter.shape[axis]
    return rows, part.parameter.numel() // max(rows, 1)


def _widths(matrices: Mapping[int, tuple[int, int]], candidate: int) -> set[int]:
    """Return the width of the residual stream, which most matrices read; the widths of several that as many read."""
    counts = Counter(columns for key, (_, columns) in matrices.items() if key != candidate)
    most = max(counts.values(), default=0)
    return {columns for columns, count in counts.items() if count == most}


def _tensors(outputs: Any) -> Iterator[Tensor]:
    for each in tree_leaves(outputs):
        if isinstance(each, Tensor):
            yield each
        elif dataclasses.is_dataclass(each) and not isinstance(each, type):
            yield from _tensors([getattr(each, field.name) for field in dataclasses.fields(each)])


def _product(node: Any) -> Product | None:
    """Return the product that a function of autograd returns, but for a scale, a cap and another shape."""
    while node is not None:
        if hasattr(node, "variable"):
            return getattr(node.variable, "product", None)
        name = node.name().partition("Backward")[0]
        following = [each for each, _ in node.next_functions if each is not None]
        if not following:
            return None
        if name in _ALL and len(following) > 1:
            found = next(filter(None, map(_product, following)), None)
            return found if found is not None and _is_alone(found, following) else None
        if name not in _ONE and name not in _ALL:
            return None
        node = following[0]
    return None


def _is_alone(product: Product, nodes: Iterable[Any]) -> bool:
    """Tell whether these functions come from this product alone."""
    open_nodes = list(nodes)
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if getattr(getattr(node, "variable", None), "product", product) is not product:
            return False
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        open_nodes += new
    return True
