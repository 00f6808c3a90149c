"""Attribution of the heads of a query or key to rows of parameters, and the sets of rows that scale them.

In a traced forward (`trace.py`) every product with a weight is cut: its output y is a leaf of autograd. The computation
from y to a query q is then differentiated. The entries of y with a gradient from head h lead to the rows behind head
h (`head_colours.py`). And Euler's identity says which leaves together scale the head (`proportional.py`); what has a
path to q and a share of it belongs to them, however small. These sets are candidates: a detached norm, for one, looks
like a constant here. A norm between y and q makes the share of y zero: there the weights do not reach the logits, and
its gain may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from muonclip.torch.discover.graph import Ancestry, ancestry, differentiate
from muonclip.torch.discover.head_colours import HeadGradients, Rows, RowsOfHeads, rows_of_any
from muonclip.torch.discover.products import Product
from muonclip.torch.discover.proportional import Shares, proportional_sets

_MOST_LEAVES = 64
_MORE_PROBES = 8
_PERIOD = 4093  # of random numbers: drawing one for each entry would take longer than the rest


@dataclass(slots=True, eq=False)
class Source:
    """The rows that feed the heads of one side.

    `candidates`: the sets of rows that scale the heads in proportion, by their gradients, the most plausible first;
    `rows` is the first of them. `gains`: the rows of the norm's gain, where the side is `normalised`. `problem`: why
    the rows cannot be scaled, in words that follow "its queries". `are_private`: each row is behind one head only, in
    every sequence.
    """

    heads: int
    candidates: list[list[Rows]] = field(default_factory=list)
    gains: list[Rows] = field(default_factory=list)
    problem: str = ""
    normalised: bool = False
    are_private: bool = False

    @property
    def rows(self) -> list[Rows]:
        """The first candidate; empty where there is none."""
        return self.candidates[0] if self.candidates else []


CONSTANT = "depend on no parameter"
"""The problem of a side that is given, as keys from a cache are."""


def attribute(tensor: Tensor, *, blocks: frozenset[int] = frozenset(), with_values: bool = True) -> Source:
    """Attribute the heads of `tensor` [B, heads, T, d] to rows of parameters.

    `blocks`: the runs of modules in which it is used. What came into one of them and is projected there is a stream, so
    the products that made it are not the projections of the heads.
    Without `with_values` only from which rows, not whether in proportion (for values, which the clip never scales).
    """
    heads = tensor.shape[1]
    behind = ancestry(tensor)
    behind.leaves = [leaf for leaf in behind.leaves if not _is_stream(leaf, blocks)]
    behind.leaves.sort(key=lambda leaf: -1 if (product := product_of(leaf)) is None else product.order)
    if not behind.leaves:
        return Source(heads, problem=CONSTANT)
    if len(behind.leaves) > _MOST_LEAVES:
        return Source(heads, problem="depend on too many products to tell which of them is the projection")
    gradients = HeadGradients(tensor, behind, _probe(tensor))
    if not with_values:
        found = gradients.rows(range(len(behind.leaves)))
        return Source(heads, [found.of(range(len(behind.leaves)))], are_private=found.are_private)
    return _source(heads, behind, gradients)


def product_of(leaf: Tensor) -> Product | None:
    """Return the product whose output a leaf is; None where it is a parameter."""
    return getattr(leaf, "product", None)


def _is_stream(leaf: Tensor, blocks: frozenset[int]) -> bool:
    product = product_of(leaf)
    return product is not None and bool(product.projected_in & blocks - {product.block})


def rows_behind(tensor: Tensor, coordinates: Tensor, among: Sequence[Rows]) -> list[Rows]:
    """Return which of the rows `among` are behind some coordinates, bool [d], of each head of `tensor`."""
    behind = ancestry(tensor)
    every = range(len(behind.leaves))
    found = HeadGradients(tensor, behind, _probe(tensor) * coordinates).rows(every).of(every)
    wanted = {(id(rows.parameter), rows.axes) for rows in among}
    return [rows for rows in found if (id(rows.parameter), rows.axes) in wanted and rows.masks.any()]


def rows_behind_any(tensor: Tensor, coordinates: Tensor) -> list[Rows]:
    """Return the rows behind some coordinates, bool [d], of any head of `tensor`, as of one."""
    return rows_of_any(tensor, ancestry(tensor), _probe(tensor) * coordinates)


def positions_behind_leaves(tensor: Tensor) -> Tensor:
    """Return which positions of `tensor` [B, heads, T, d] depend on a leaf, bool [T]: others are given, as by a cache.

    Where what computed it cannot be differentiated twice, all of them.
    """
    cotangents = torch.zeros_like(tensor, requires_grad=True)
    try:
        by_leaf = torch.autograd.grad(tensor, ancestry(tensor).leaves, cotangents, create_graph=True, allow_unused=True)
        # These are linear in the cotangents; their derivative by those is how the tensor moves with its leaves.
        moves = [(each * torch.rand_like(each)).sum() for each in by_leaf if each is not None]
        moved = torch.autograd.grad(torch.stack(moves).sum(), cotangents)[0]
    except Exception:  # whatever somebody's own backward raises
        return torch.ones(tensor.shape[2], dtype=torch.bool, device=tensor.device)
    return moved.ne(0).any(3).any(1).any(0)


def feeds(masks: Tensor, heads: int) -> Tensor:
    """bool [heads, rows]: which of the rows behind each key head, [G, rows], each query head meets."""
    return masks.repeat_interleave(heads // masks.shape[0], 0)


def _source(heads: int, behind: Ancestry, gradients: HeadGradients) -> Source:
    """Choose the leaves that scale every head; without them, say why the rows cannot be scaled."""
    leaves = behind.leaves
    shares = Shares.from_gradients(gradients.tensor, leaves, gradients.probes, gradients.gradients, behind.precision)
    products = [leaf for leaf, each in enumerate(leaves) if product_of(each) is not None]
    _look_again(gradients.tensor, behind, shares, products)
    sets = proportional_sets(shares, products)
    if products and all(shares.is_zero[leaf] for leaf in products):
        gains = gradients.rows(sets[0]).of(range(len(sets[0]))) if sets else []
        return Source(heads, gains=gains, normalised=True)
    if not sets:
        contributing = [leaf for leaf in products if not shares.is_zero[leaf]]
        unscalable = _unscalable(leaves, gradients.rows(range(len(leaves))), contributing)
        return Source(heads, problem=unscalable or "do not depend linearly on the output of a projection")
    if any(word in name for name in behind.functions for word in ("Clamp", "Hardtanh", "Clip")):
        return Source(heads, problem="are clamped between the projection and the logits, so they do not scale with it")
    used = sorted({leaf for each in sets for leaf in each})
    found = gradients.rows(used)
    sets = [tuple(used.index(leaf) for leaf in each) for each in sets]
    leaves = [leaves[leaf] for leaf in used]
    usable = [each for each in sets if not _problem(leaves, found, each)]
    if not usable:
        return Source(heads, problem=_problem(leaves, found, sets[0]))
    candidates = [[rows for rows in found.of(each) if rows.masks.any()] for each in usable]
    candidates.sort(key=lambda rows: (_is_shared(rows), not _is_trained(rows)))
    return Source(heads, candidates, are_private=found.are_private)


def _look_again(tensor: Tensor, behind: Ancestry, shares: Shares, products: Sequence[int]) -> None:
    """Compute the shares of products that seem to have none with other cotangents: a small one may have cancelled, the
    more so in a narrow dtype. Where no product has a share they did not: the heads are normalised."""
    doubtful = [leaf for leaf in products if shares.is_zero[leaf]]
    if not doubtful or len(doubtful) == len(products):
        return
    leaves = [behind.leaves[leaf] for leaf in doubtful]
    probes = [_probe(tensor, mean=0.0) for _ in range(_MORE_PROBES)]
    gradients = [differentiate(tensor, leaves, probe) for probe in probes]
    again = Shares.from_gradients(tensor, leaves, probes, gradients, behind.precision)
    for leaf, is_zero in zip(doubtful, again.is_zero, strict=True):
        shares.is_zero[leaf] = is_zero


def _problem(leaves: Sequence[Tensor], found: RowsOfHeads, chosen: Sequence[int]) -> str:
    if any(not product.is_proportional for leaf in chosen if (product := product_of(leaves[leaf]))):
        return "come from a weight that is computed from its parameters and not proportional to them"
    return _unscalable(leaves, found, chosen)


def _unscalable(leaves: Sequence[Tensor], found: RowsOfHeads, chosen: Sequence[int]) -> str:
    """Say which of the leaves has no parameters behind it that could be scaled; "" where all have."""
    missing = [leaf for leaf in chosen if not any(rows.masks.any() for rows in found.by_leaf[leaf])]
    names = [product.name for leaf in missing if (product := product_of(leaves[leaf]))]
    where = f" ({names[0]})" if names else ""
    return f"come from a product{where} whose weight is not a parameter that could be scaled" if missing else ""


def _is_shared(candidate: Sequence[Rows]) -> bool:
    return any(bool((rows.masks.sum(0) > 1).any()) for rows in candidate)


def _is_trained(candidate: Sequence[Rows]) -> bool:
    return all(getattr(rows.parameter, "is_trained", True) for rows in candidate)


def _probe(tensor: Tensor, mean: float = 1.0) -> Tensor:
    """Return cotangents r with ⟨r, q⟩ well away from zero; with a `mean` of 0 of their factors, any."""
    q = tensor.detach()
    size = torch.linalg.vector_norm(q, dtype=torch.promote_types(q.dtype, torch.float32)) / max(q.numel(), 1) ** 0.5
    noise = torch.rand(_PERIOD, dtype=torch.float32, device=q.device) - 0.5 + mean
    noise = noise.repeat(-(-q.numel() // _PERIOD))[: q.numel()].view(q.shape).to(q.dtype)
    return (q + 0.1 * torch.where(size > 0, size, 1.0).to(q.dtype)) * noise
