"""Measures what one step does to the matrices of a parameter, on their device; nothing waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from muonclip.core import MatrixLayout

_ITERATIONS = 8


@dataclass(frozen=True, slots=True, eq=False)
class MatrixStatistics:
    """Numbers of each logical matrix of one parameter, fp32 [matrices]: an expert, head or fused block is one.

    - `relative_update`: ‖ΔW‖ / ‖W‖ in the Frobenius norm, W before the step; 0 where both are 0.
    - `update_rms`: the root mean square of the entries of ΔW, not divided by the rate.
    - `weight_spectral_norm`, `update_spectral_norm`: the largest singular values of W after the step and of ΔW; lower
      bounds, by eight power iterations from a random vector.
    - `stable_rank`: ‖W‖² / σ², from 1 to the smaller side; an upper bound, as σ is a lower one.
    - `momentum_norm`: the Frobenius norm of the momentum (`momentum_buffer`, `exp_avg`); NaN without one.
    """

    relative_update: Tensor
    update_rms: Tensor
    weight_spectral_norm: Tensor
    update_spectral_norm: Tensor
    stable_rank: Tensor
    momentum_norm: Tensor

    @classmethod
    def of_step(cls, layout: MatrixLayout, before: Tensor, after: Tensor, momentum: Tensor | None) -> MatrixStatistics:
        """Compare a parameter before a step with itself after it."""
        groups = zip(_matrices(layout, before), _matrices(layout, after), strict=True)
        moments = [None] * len(_matrices(layout, after)) if momentum is None else _matrices(layout, momentum)
        columns = [_of_group(*pair, moment) for pair, moment in zip(groups, moments, strict=True)]
        return cls(*(torch.cat(parts) for parts in zip(*columns, strict=True)))


def _matrices(layout: MatrixLayout, x: Tensor) -> list[Tensor]:
    """Return stacks [count, m, n] of the logical matrices, in fp32 or wider."""
    stacks = layout.split(x.to(torch.promote_types(x.dtype, torch.float32)), xp=torch)
    return [each.reshape(-1, *each.shape[-2:]) for each in stacks]


def _of_group(before: Tensor, after: Tensor, momentum: Tensor | None) -> tuple[Tensor, ...]:
    update = after - before
    size, moved, now = (each.square().sum((1, 2)).sqrt() for each in (before, update, after))
    weight_spectral_norm, update_spectral_norm = _largest_singular_values(after), _largest_singular_values(update)
    relative = moved / size.masked_fill((size == 0) & (moved == 0), 1)
    rank = (now / weight_spectral_norm.masked_fill(now == 0, 1)).square()
    nothing = torch.full_like(size, torch.nan)
    momentum_norm = nothing if momentum is None else momentum.square().sum((1, 2)).sqrt()
    rms = update.square().mean((1, 2)).sqrt()
    return tuple(
        each.float() for each in (relative, rms, weight_spectral_norm, update_spectral_norm, rank, momentum_norm)
    )


def _largest_singular_values(x: Tensor) -> Tensor:
    """Return a lower bound of σ₁ of each matrix [count, m, n]: ‖X v‖ after power iterations on XᵀX."""
    generator = torch.Generator().manual_seed(0)  # the same vector on every rank and in every step
    start = torch.randn(x.shape[2], 1, generator=generator, dtype=torch.float32).to(x)
    v = start.expand(len(x), -1, -1)
    for _ in range(_ITERATIONS):
        v = _normalized(x.mT @ _normalized(x @ v))
    return (x @ v).square().sum((1, 2)).sqrt()


def _normalized(v: Tensor) -> Tensor:
    return v / v.square().sum((1, 2), keepdim=True).sqrt().clamp(min=torch.finfo(v.dtype).tiny)
