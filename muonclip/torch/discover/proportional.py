"""Sets of tensors to which another one is proportional: scaling them by γ together scales it by γ.

Euler's identity says so without scaling anything. For q computed from y, and any cotangent r,

    ⟨r, q⟩ = Σ ⟨∂⟨r, q⟩ / ∂y, y⟩  over the set   ⇔   q(γ y) = γ q(y)          (homogeneous of degree one)

A term of the sum is called the share of its tensor. The share of a tensor behind a norm is zero up to the norm's
epsilon, however large its entries; that of a tensor which adds a little to q is small, and belongs to the sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_MOST_SETS = 8
_MOST_TRIALS = 4096
_OF_A_NORM = 1e-3
"""The largest share, compared with its entries, of what is behind a norm with an epsilon."""
_FLOAT32 = torch.finfo(torch.float32).eps


@dataclass(slots=True, eq=False)
class Shares:
    """The shares of some tensors in each of several products ⟨r, q⟩, all lists [products][tensors].

    `noise`: the rounding errors of each share. `is_zero`: by tensor, whether its shares cancel in every product.
    """

    values: list[list[float]]
    noise: list[list[float]]
    totals: list[float]
    total_noise: list[float]
    is_zero: list[bool]

    @classmethod
    def from_gradients(
        cls,
        tensor: Tensor,
        leaves: Sequence[Tensor],
        probes: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor | None]],
        precision: float,
    ) -> Self:
        """Compute the shares of `leaves` from the gradients of ⟨probe, tensor⟩, computed with this machine epsilon."""
        values, noise, totals, total_noise = [], [], [], []
        is_zero = [True] * len(leaves)
        for probe, by_leaf in zip(probes, gradients, strict=True):
            total = _sums(probe, tensor)
            sums = [(0.0, 0.0, 0.0) if g is None else _sums(g, leaf) for g, leaf in zip(by_leaf, leaves, strict=True)]
            totals.append(total[0])
            total_noise.append(_noise(total, precision))
            values.append([share for share, _, _ in sums])
            noise.append([_noise(each, precision) for each in sums])
            small = [abs(each[0]) <= _OF_A_NORM * each[2] + _noise(each, precision) for each in sums]
            is_zero = [so_far and now for so_far, now in zip(is_zero, small, strict=True)]
        return cls(values, noise, totals, total_noise, is_zero)

    def add_up(self, chosen: Collection[int]) -> bool:
        """Tell whether the shares of these tensors add up to every product, up to rounding."""
        for values, noise, total, own in zip(self.values, self.noise, self.totals, self.total_noise, strict=True):
            if abs(sum(values[i] for i in chosen) - total) > own + sum(noise[i] for i in chosen):
                return False
        return True


def proportional_sets(shares: Shares, matrices: Sequence[int]) -> list[tuple[int, ...]]:
    """Find the sets that add up, the largest first: with as many of `matrices` as possible, the later ones rather than
    the earlier, and as few of the other tensors. Then those of the other tensors alone, and last those with what has no
    share.
    """
    others = [i for i in range(len(shares.is_zero)) if i not in set(matrices)]
    without_share = [i for i in matrices if shares.is_zero[i]]
    with_share = [i for i in matrices if not shares.is_zero[i]]
    found: list[tuple[int, ...]] = []
    for chosen in itertools.islice(_in_order(with_share, without_share, others), _MOST_TRIALS):
        candidate = tuple(sorted(chosen))
        if candidate and candidate not in found and shares.add_up(candidate):
            found.append(candidate)
            if len(found) == _MOST_SETS:
                break
    return found


def _in_order(with_share: Sequence[int], without_share: Sequence[int], others: Sequence[int]) -> Iterator[list[int]]:
    for dropped in _subsets(with_share):
        kept = [i for i in with_share if i not in dropped]
        if kept:
            yield from ([*kept, *few] for few in _subsets(others))
    yield from (list(few) for few in _subsets(others))
    if with_share and without_share:
        yield from ([*with_share, *without_share, *few] for few in _subsets(others))


def _subsets(of: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield all subsets, small ones first."""
    return itertools.chain.from_iterable(itertools.combinations(of, size) for size in range(len(of) + 1))


def _sums(gradient: Tensor, value: Tensor) -> tuple[float, float, float]:
    """Return the sum of the products of two tensors' entries, the root of the sum of their squares, and that of their
    absolute values."""
    dtype = torch.promote_types(torch.promote_types(gradient.dtype, value.dtype), torch.float32)
    products = gradient.to(dtype) * value.detach()
    norms = torch.linalg.vector_norm(products), torch.linalg.vector_norm(products, 1)
    share, spread, size = torch.stack([products.sum(), *norms]).tolist()
    return share, spread, size


def _noise(sums: tuple[float, float, float], precision: float) -> float:
    """Bound the rounding error of a share: a few independent ones in each of its terms, and of float32 in the sum."""
    _, spread, size = sums
    return 16 * precision * spread + 64 * min(precision, _FLOAT32) * size
