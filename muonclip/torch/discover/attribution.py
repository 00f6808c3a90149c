"""Attribution of the heads of a query or key to rows of parameters, and the test whether they are proportional to them.

In a traced forward (`trace.py`) every product with a weight is cut: its output y is a leaf of autograd. The computation
from y to a query q is then differentiated: the columns of y with a gradient from head h are the rows behind head h.
And Euler's identity says whether scaling them by γ scales the head by γ, without scaling anything:

    ⟨r, q_h⟩ = ⟨∂⟨r, q_h⟩ / ∂y, y⟩  for every r   ⇔   q_h(γ y) = γ q_h(y)          (homogeneous of degree one)

A norm between y and q makes the right side zero: there the weights do not reach the logits, and its gain may.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_MOST_SOURCES = 7  # the subsets of more are not tried


@dataclass(slots=True, eq=False)
class Product:
    """A product of activations with a weight, cut off: its output depends on nothing.

    `name`: of the function. Where it is the usual one, [..., in] → [..., out]: `weight`, its `axis` of out, `bias`,
    and `first_row`, since the output may come of a part of the weight, as in nn.MultiheadAttention. Else `recompute`
    makes the output again with the graph of the weights: all of it, or of a few positions (`by_columns`).
    """

    name: str
    weight: nn.Parameter | None = None
    axis: int = 0
    bias: nn.Parameter | None = None
    first_row: int = 0
    recompute: Callable[[], Tensor] | None = None
    by_columns: bool = False
    is_proportional: bool = True  # to its parameters, as far as `entries` has seen

    def entries(self, gradient: Tensor) -> list[_Entries]:
        """Return the entries of parameters behind the positions of the output that have a gradient."""
        if self.weight is not None:
            columns = _any_over_others(gradient != 0, gradient.ndim - 1)
            found = []
            for parameter, axis in ((self.weight, self.axis), (self.bias, 0)):
                if parameter is not None:
                    mask = columns.new_zeros(parameter.shape[axis])
                    mask[self.first_row : self.first_row + len(columns)] = columns
                    found.append(_Entries(parameter, {axis: mask}))
            return found
        assert self.recompute is not None
        with torch.enable_grad():
            output = self.recompute()
            parameters = [leaf for leaf in leaves_of(output)[0] if isinstance(leaf, nn.Parameter)]
            if not parameters:
                return []
            if self.by_columns:
                gradient = (
                    _any_over_others(gradient != 0, gradient.ndim - 1)
                    * output.detach()
                    * (0.5 + torch.rand_like(output))
                )
            by_parameter = gradients(output, parameters, gradient)
        # The weight may be computed from parameters; those that it is proportional to can be scaled, by the same rule.
        total = float((gradient * output.detach()).sum())
        shares = [
            0.0 if g is None else float((g * p.detach()).sum()) for p, g in zip(parameters, by_parameter, strict=True)
        ]
        self.is_proportional &= abs(sum(shares) - total) <= 0.02 * abs(total)
        return [
            _Entries(parameter, {axis: _any_over_others(g != 0, axis) for axis in range(g.ndim)})
            for parameter, g, share in zip(parameters, by_parameter, shares, strict=True)
            if g is not None and (abs(share) > 1e-3 * abs(total) or len(parameters) == 1)
        ]


@dataclass(slots=True, eq=False)
class _Entries:
    """The indices of a parameter with an entry that counts, along each axis that they may be rows of."""

    parameter: nn.Parameter
    along: dict[int, Tensor]


@dataclass(slots=True, eq=False)
class Rows:
    """The rows of one parameter behind each head. `masks`: bool [heads, rows] along `axis`."""

    parameter: nn.Parameter
    axis: int
    masks: Tensor


@dataclass(slots=True, eq=False)
class Source:
    """The rows that feed the heads of one side.

    `gains`: the rows of the norm's gain, where the side is `normalised`. `problem`: why the rows cannot be scaled, in
    words that follow "its queries".
    """

    heads: int
    rows: list[Rows] = field(default_factory=list)
    gains: list[Rows] = field(default_factory=list)
    problem: str = ""
    normalised: bool = False


class NotDifferentiable(Exception):
    """A tensor cannot be attributed, because what computed it has no backward that works here."""


def leaves_of(tensor: Tensor) -> tuple[list[Tensor], set[str]]:
    """Return the leaves of autograd behind a tensor, and the names of the functions between."""
    if tensor.grad_fn is None:
        return ([tensor] if tensor.requires_grad else []), set()
    leaves: dict[int, Tensor] = {}
    names: set[str] = set()
    seen, open_nodes = {tensor.grad_fn}, [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        else:
            names.add(node.name())
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                open_nodes.append(following)
    return list(leaves.values()), names


@dataclass(slots=True, eq=False)
class _Contributions:
    """The part of each head that comes from each leaf: `shares` ⟨∂⟨r, q_h⟩ / ∂y, y⟩ [heads, leaves] of the `totals`
    ⟨r, q_h⟩ [heads], and the entries `reached` [leaf][head]. Shares are exact up to `tolerance`."""

    leaves: Sequence[Tensor]
    shares: Tensor
    totals: Tensor
    reached: list[list[list[_Entries]]]
    tolerance: float

    @classmethod
    def from_gradients(cls, tensor: Tensor, leaves: Sequence[Tensor]) -> _Contributions:
        heads = tensor.shape[1]
        narrow = any(each.dtype in (torch.bfloat16, torch.float16) for each in (tensor, *leaves))
        tolerance = 6e-2 if narrow else 2e-3
        shares = torch.zeros(heads, len(leaves), dtype=torch.float64, device="cpu")
        totals = torch.zeros(heads, dtype=torch.float64, device="cpu")
        found = cls(leaves, shares, totals, [[] for _ in leaves], tolerance)
        for head in range(heads):
            probe = _probe(tensor, head)
            by_leaf = gradients(tensor, leaves, probe)
            found.totals[head] = (probe.double() * tensor.detach().double()).sum()
            for index, (leaf, gradient) in enumerate(zip(leaves, by_leaf, strict=True)):
                found.reached[index].append(_entries_of(leaf, gradient))
                if gradient is not None:
                    shares[head, index] = (gradient.double() * leaf.detach().double()).sum()
        return found

    def product(self, leaf: int) -> Product | None:
        """Return the product whose output a leaf is; None where it is a parameter."""
        return getattr(self.leaves[leaf], "product", None)

    def adding_up(self, some: set[int], others: set[int]) -> set[int] | None:
        """Find the leaves to which every head is proportional, see `_proportional_to`."""
        return _proportional_to(self.shares, self.totals, some, others, self.tolerance)

    def rows(self, leaves: Iterable[int]) -> list[Rows]:
        """Return the rows behind these leaves."""
        return _rows_of([self.reached[leaf] for leaf in sorted(leaves)], len(self.totals))


def attribute(tensor: Tensor, *, with_values: bool = True) -> Source:
    """Attribute the heads of `tensor` [B, heads, T, d] to rows of parameters.

    Without `with_values` only from which rows, not whether in proportion (for values, which the clip never scales).
    """
    heads = tensor.shape[1]
    leaves, functions = leaves_of(tensor)
    if not leaves:
        return Source(heads, problem="depend on no parameter")
    if len(leaves) > 64:
        return Source(heads, problem="depend on too many products to tell which of them is the projection")
    contributions = _Contributions.from_gradients(tensor, leaves)
    if not with_values:
        return Source(heads, contributions.rows(range(len(leaves))))
    is_clamped = any(word in name for name in functions for word in ("Clamp", "Hardtanh", "Clip"))
    return _proportional_source(contributions, is_clamped=is_clamped)


def _proportional_source(found: _Contributions, *, is_clamped: bool) -> Source:
    """Choose the leaves to which every head is proportional; without them, say why the rows cannot be scaled."""
    heads = len(found.totals)
    products = {leaf for leaf in range(len(found.leaves)) if found.product(leaf)}
    vectors = set(range(len(found.leaves))) - products  # parameters themselves: learned queries, perhaps
    chosen = found.adding_up(products, vectors) if products else found.adding_up(vectors, set())
    unreached = {leaf for leaf, entries in enumerate(found.reached) if not any(entries)}
    unscalable = [product.name for leaf in sorted(unreached) if (product := found.product(leaf))]
    where = f" ({unscalable[0]})" if unscalable else ""
    of_no_parameter = f"come from a product{where} whose weight is not a parameter that could be scaled"
    if chosen is None:
        if unscalable:
            return Source(heads, problem=of_no_parameter)
        small = found.shares[:, sorted(products)].sum(1).abs() <= 0.3 * found.totals.abs()
        if products and bool(small.all()):
            gains = found.adding_up(vectors, set())
            return Source(heads, gains=[] if gains is None else found.rows(gains), normalised=True)
        return Source(heads, problem="do not depend linearly on the output of a projection")
    if is_clamped:
        problem = "are clamped between the projection and the logits, so they do not scale with it"
        return Source(heads, problem=problem)
    if any(not product.is_proportional for leaf in chosen if (product := found.product(leaf))):
        problem = "come from a weight that is computed from its parameters and not proportional to them"
        return Source(heads, problem=problem)
    if chosen & unreached:
        return Source(heads, problem=of_no_parameter)
    return Source(heads, [rows for rows in found.rows(chosen) if rows.masks.any()])


def rows_behind(tensor: Tensor, coordinates: Tensor) -> list[Rows]:
    """Return the rows behind some coordinates, bool [d], of each head of `tensor`."""
    leaves, _ = leaves_of(tensor)
    reached: list[list[list[_Entries]]] = [[] for _ in leaves]
    for head in range(tensor.shape[1]):
        probe = _probe(tensor, head) * coordinates
        for index, (leaf, gradient) in enumerate(zip(leaves, gradients(tensor, leaves, probe), strict=True)):
            reached[index].append(_entries_of(leaf, gradient))
    return _rows_of(reached, tensor.shape[1])


def feeds(masks: Tensor, heads: int) -> Tensor:
    """bool [heads, rows]: which of the rows behind each key head, [G, rows], each query head meets."""
    return masks.repeat_interleave(heads // masks.shape[0], 0)


def _proportional_to(
    shares: Tensor, totals: Tensor, some: set[int], others: set[int], tolerance: float
) -> set[int] | None:
    """Find the leaves whose shares [heads, leaves] add up to the totals [heads] in every head; None where none do.

    All of `some` are tried first, with as few of `others` as needed; then fewer of `some`, but at least one.
    """
    if len(some | others) > _MOST_SOURCES:
        return None

    def subsets(of: set[int]) -> list[set[int]]:
        return [set(c) for size in range(len(of) + 1) for c in itertools.combinations(sorted(of), size)]

    candidates = [a | b for a in reversed(subsets(some)) if a for b in subsets(others)]
    adds = ((shares.abs() > 0.02 * totals.abs()[:, None]) | (totals == 0)[:, None]).any(0)  # [leaves]
    for candidate in candidates:
        if not all(bool(adds[index]) for index in candidate & some):
            continue
        found = shares[:, sorted(candidate)].sum(1)
        if bool(((found - totals).abs() <= tolerance * totals.abs() + 1e-12).all()):
            return candidate
    return None


def _probe(tensor: Tensor, head: int) -> Tensor:
    """Cotangents r of one head with ⟨r, q⟩ well away from zero."""
    probe = torch.zeros_like(tensor)
    q = tensor.detach()[:, head]
    noise = torch.randn(q.shape, dtype=torch.float32, device=q.device)
    size = q.float().square().mean().sqrt()
    probe[:, head] = (q * (1 + 0.5 * torch.rand_like(noise)) + 0.1 * torch.where(size > 0, size, 1.0) * noise).to(
        q.dtype
    )
    return probe


def gradients(tensor: Tensor, leaves: Sequence[Tensor], probe: Tensor) -> Sequence[Tensor | None]:
    """Return the gradients of ⟨probe, tensor⟩ by its leaves.

    Raises NotDifferentiable where somebody's own backward does not work here.
    """
    try:
        return torch.autograd.grad(tensor, leaves, probe, retain_graph=True, allow_unused=True)
    except Exception as error:  # whatever it raises
        raise NotDifferentiable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error


def _entries_of(leaf: Tensor, gradient: Tensor | None) -> list[_Entries]:
    if gradient is None or not gradient.any():
        return []
    product = getattr(leaf, "product", None)
    if product is not None:
        return product.entries(gradient)
    if not isinstance(leaf, nn.Parameter):
        return []
    return [_Entries(leaf, {axis: _any_over_others(gradient != 0, axis) for axis in range(max(gradient.ndim, 1))})]


def _rows_of(reached: Sequence[Sequence[Sequence[_Entries]]], heads: int) -> list[Rows]:
    """Turn entries [leaf][head] into rows of each parameter, along the axis on which the heads differ."""
    by_parameter: dict[int, tuple[nn.Parameter, dict[int, list[Tensor]]]] = {}
    for per_head in reached:
        for head, entries in enumerate(per_head):
            for entry in entries:
                _, along = by_parameter.setdefault(id(entry.parameter), (entry.parameter, {}))
                for axis, mask in entry.along.items():
                    masks = along.setdefault(axis, [torch.zeros_like(mask) for _ in range(heads)])
                    masks[head] = masks[head] | mask
    rows = []
    for parameter, along in by_parameter.values():
        stacked = {axis: torch.stack(masks) for axis, masks in along.items()}
        axis = min(stacked, key=lambda axis: (_overlap(stacked[axis]), axis))
        rows.append(Rows(parameter, axis, stacked[axis]))
    return rows


def _overlap(masks: Tensor) -> float:
    """Return how many heads share a row on average: 1 where each has its own rows along the axis."""
    return float(masks.sum() / masks.any(0).sum().clamp(min=1))


def _any_over_others(mask: Tensor, axis: int) -> Tensor:
    if mask.ndim <= 1:
        return mask.reshape(-1)
    return mask.movedim(axis, 0).flatten(1).any(1)
