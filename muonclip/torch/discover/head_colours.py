"""The rows behind each head, from a few gradients in which each head has a colour of its own.

A gradient is linear in its cotangent. Where the cotangent of head h is multiplied by 2^a_h, so is, bit for bit, the
gradient of every row that is behind this head alone. Two gradients tell sixteen heads from each other, three 256.
Only where a row is behind several heads, each head takes a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muonclip.torch.discover.graph import Ancestry, differentiate
from muonclip.torch.discover.products import ReachedRows


@dataclass(slots=True, eq=False)
class Rows:
    """The rows of one parameter behind each head: `masks`, bool [heads, rows], counted along `axes` together."""

    parameter: nn.Parameter
    axes: tuple[int, ...]
    masks: Tensor

    def entries(self) -> Tensor:
        """Return which entries of the parameter are behind any head, bool, broadcastable to its shape."""
        shape = [size if axis in self.axes else 1 for axis, size in enumerate(self.parameter.shape)]
        return self.masks.any(0).view(shape)


@dataclass(slots=True, eq=False)
class RowsOfHeads:
    """The rows behind the heads of a tensor, by leaf of its graph. `are_private`: no row is behind two heads."""

    by_leaf: list[list[Rows]]
    are_private: bool

    def of(self, leaves: Iterable[int]) -> list[Rows]:
        """Return the rows behind these leaves, those of one parameter together."""
        found: dict[tuple[int, tuple[int, ...]], Rows] = {}
        for leaf in leaves:
            for rows in self.by_leaf[leaf]:
                key = id(rows.parameter), rows.axes
                known = found.get(key)
                masks = rows.masks if known is None else known.masks | rows.masks
                found[key] = Rows(rows.parameter, rows.axes, masks)
        return list(found.values())


class HeadGradients:
    """The gradients of a tensor [B, heads, T, d] by the leaves of its graph, where `probe` is not zero, in colours.

    `probes`, `gradients`: the cotangents and what they give, the first of one colour. Of heads that repeat the ones
    before them, keys for their queries, the first are looked at here, and the others for a comparison in `rows`.
    """

    def __init__(self, tensor: Tensor, behind: Ancestry, probe: Tensor) -> None:
        self.tensor, self._behind, self._probe = tensor, behind, probe
        self._repeats = _repeats(tensor)
        self._take(self._repeats)

    def rows(self, leaves: Sequence[int]) -> RowsOfHeads:
        """Find the rows behind each head that these leaves lead to, in their order."""
        found = self._decoded(leaves, self.gradients, self._colours)
        if found is not None and self._repeats > 1:
            heads = self.tensor.shape[1]
            others = torch.arange(heads, device=self.tensor.device) % self._repeats != 0
            _, gradients = self._differentiated(self._probe * others[:, None, None])
            if (again := self._decoded(leaves, gradients, self._colours)) is not None and _are_equal(found, again):
                return RowsOfHeads(found, are_private=False)
            self._take(1)
            found = self._decoded(leaves, self.gradients, self._colours)
        return RowsOfHeads(self._by_head(leaves), False) if found is None else RowsOfHeads(found, self._repeats == 1)

    def _take(self, repeats: int) -> None:
        heads, device = self.tensor.shape[1], self.tensor.device
        self._repeats = repeats
        self._colours = _Colours.of_groups(heads, repeats, device, narrow=torch.float16 in self._behind.dtypes)
        first = torch.arange(heads, device=device) % repeats == 0
        probe = self._probe if repeats == 1 else self._probe * first[:, None, None]
        self.probes, self.gradients = self._differentiated(probe)

    def _differentiated(self, probe: Tensor) -> tuple[list[Tensor], list[Sequence[Tensor | None]]]:
        colours = [each.to(probe.dtype)[:, None, None] for each in self._colours.factors]
        probes = [probe, *(probe * each for each in colours)]
        return probes, [differentiate(self.tensor, self._behind.leaves, each) for each in probes]

    def _decoded(
        self, leaves: Sequence[int], gradients: Sequence[Sequence[Tensor | None]], colours: _Colours
    ) -> list[list[Rows]] | None:
        """Read the rows by their colours; None where a row has several."""
        found: list[list[Rows]] = []
        for leaf in leaves:
            of_leaf: list[Rows] = []
            for each in _reached(self._behind.leaves[leaf], [of_all[leaf] for of_all in gradients]):
                masks = colours.masks(each.sizes)
                if masks is None:
                    return None
                of_leaf.append(Rows(each.parameter, each.axes, masks))
            found.append(of_leaf)
        return found

    def _by_head(self, leaves: Sequence[int]) -> list[list[Rows]]:
        """Find the rows by a gradient of each head."""
        heads = self.tensor.shape[1]
        wanted = [self._behind.leaves[leaf] for leaf in leaves]
        found: list[dict[tuple[int, tuple[int, ...]], Rows]] = [{} for _ in leaves]
        for head in range(heads):
            only = torch.zeros(heads, dtype=self._probe.dtype, device=self.tensor.device)
            only[head] = 1
            of_head = differentiate(self.tensor, wanted, self._probe * only[:, None, None])
            for rows_of_leaf, leaf, gradient in zip(found, wanted, of_head, strict=True):
                for each in _reached(leaf, [gradient]):
                    masks = torch.zeros(heads, each.sizes.shape[1], dtype=torch.bool, device=each.sizes.device)
                    rows = Rows(each.parameter, each.axes, masks)
                    rows = rows_of_leaf.setdefault((id(each.parameter), each.axes), rows)
                    rows.masks[head] |= each.sizes[0] != 0
        return [list(of_leaf.values()) for of_leaf in found]


def rows_of_any(tensor: Tensor, behind: Ancestry, probe: Tensor) -> list[Rows]:
    """Find the rows behind `tensor` where `probe` is not zero, as of one head."""
    gradients = differentiate(tensor, behind.leaves, probe)
    reached = [_reached(leaf, [gradient]) for leaf, gradient in zip(behind.leaves, gradients, strict=True)]
    return [Rows(each.parameter, each.axes, each.sizes != 0) for of_leaf in reached for each in of_leaf]


@dataclass(slots=True, eq=False)
class _Colours:
    """Digits that number groups of heads, `group` [heads], in a base; each gradient shows one digit of each group."""

    group: Tensor
    base: int
    factors: list[Tensor]

    @classmethod
    def of_groups(cls, heads: int, repeats: int, device: torch.device, *, narrow: bool) -> _Colours:
        group, base = torch.arange(heads, device=device) // repeats, 8 if narrow else 16
        factors, rest = [], group
        while not factors or bool(rest.any()):
            factors.append(2.0 ** (rest % base - base // 2))
            rest = rest // base
        return cls(group, base, factors)

    def masks(self, sizes: Tensor) -> Tensor | None:
        """Read sizes of gradients [1 + digits, rows] as masks [heads, rows]; None where a row has several colours."""
        touched = (sizes != 0).any(0)
        mantissas, exponents = torch.frexp(sizes)
        digits = exponents[1:] - exponents[0] + self.base // 2
        is_one = (mantissas == mantissas[0]).all(0) & (digits >= 0).all(0) & (digits < self.base).all(0)
        if bool((touched & ~is_one).any()):
            return None
        number = sum(digit.long() * self.base**place for place, digit in enumerate(digits))
        assert isinstance(number, Tensor)
        if bool((touched & (number > self.group.max())).any()):
            return None
        return (number == self.group[:, None].to(number.device)) & touched


def _reached(leaf: Tensor, gradients: Sequence[Tensor | None]) -> list[ReachedRows]:
    """Return the rows that gradients reach through a leaf."""
    present = [each for each in gradients if each is not None]
    product = getattr(leaf, "product", None)
    if len(present) < len(gradients):
        return []
    if product is not None:
        return product.reached(present)
    if not isinstance(leaf, nn.Parameter):
        return []
    axes = tuple(axis for axis, size in enumerate(leaf.shape) if size > 1) or (0,)
    return [ReachedRows.from_gradients(leaf, axes, present)]


def _repeats(tensor: Tensor) -> int:
    """Return how often each head follows itself, with the same values: keys that were repeated for their queries."""
    heads, values = tensor.shape[1], tensor.detach()
    few = values[:1, :, :1]
    changes = (few[:, 1:] != few[:, :-1]).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    repeats = changes[0] + 1 if changes else heads
    if repeats == 1 or heads % repeats or changes != list(range(repeats - 1, heads - 1, repeats)):
        return 1
    grouped = values.unflatten(1, (-1, repeats))
    return repeats if torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)) else 1


def _are_equal(found: list[list[Rows]], others: list[list[Rows]]) -> bool:
    return all(
        len(one) == len(other)
        and all(
            a.parameter is b.parameter and a.axes == b.axes and torch.equal(a.masks, b.masks)
            for a, b in zip(one, other, strict=True)
        )
        for one, other in zip(found, others, strict=True)
    )
