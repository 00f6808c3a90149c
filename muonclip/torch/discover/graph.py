"""The autograd graph behind a tensor of a traced forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class NotDifferentiable(Exception):
    """A tensor cannot be attributed, because what computed it has no backward that works here."""


@dataclass(slots=True, eq=False)
class Ancestry:
    """The leaves of autograd behind a tensor, the names of the functions between, and the dtypes of what they made."""

    leaves: list[Tensor]
    functions: set[str]
    dtypes: set[torch.dtype]

    @property
    def precision(self) -> float:
        """The machine epsilon of the narrowest dtype."""
        return max(torch.finfo(dtype).eps for dtype in self.dtypes)


def ancestry(tensor: Tensor) -> Ancestry:
    """Walk the graph behind a tensor."""
    found = Ancestry([], set(), {tensor.dtype})
    if tensor.grad_fn is None:
        found.leaves = [tensor] if tensor.requires_grad else []
        return found
    leaves: dict[int, Tensor] = {}
    seen, open_nodes = {tensor.grad_fn}, [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
            found.dtypes.add(variable.dtype)
            continue
        found.functions.add(node.name())
        found.dtypes.update(each.dtype for each in node._input_metadata if each.dtype.is_floating_point)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                open_nodes.append(following)
    found.leaves = list(leaves.values())
    return found


def differentiate(tensor: Tensor, leaves: Sequence[Tensor], probe: Tensor) -> Sequence[Tensor | None]:
    """Return the gradients of ⟨probe, tensor⟩ by its leaves.

    Raises NotDifferentiable where somebody's own backward does not work here.
    """
    try:
        return torch.autograd.grad(tensor, leaves, probe, retain_graph=True, allow_unused=True)
    except Exception as error:  # whatever it raises
        raise NotDifferentiable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
