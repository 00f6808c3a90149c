"""The factors of all heads from their maxima, and the scaling of rows by factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from muonclip.core import ClipFactors, clip_factors
from muonclip.torch.clip.frozen import is_held, scaled_factors
from muonclip.torch.clip.reduction import JointMaxima, constant
from muonclip.torch.clip.report import LayerReport
from muonclip.torch.clip.second_copies import SecondCopies
from muonclip.torch.heads import Axes, HeadRows, QKProjection, scale_heads
from muonclip.torch.mesh import drop_kept_scale, local_part, placed_like
from muonclip.torch.update import joined, split_into


def decide(
    maxima: JointMaxima,
    projections: Mapping[str, QKProjection],
    tau: float | Tensor,
    alpha: float,
    *,
    clip_frozen: bool,
) -> tuple[dict[str, ClipFactors], dict[str, LayerReport]]:
    """Return the factors of each attention's heads, and what to report of them.

    `tau`: of all heads, or of each, [heads of all]. A head without anything to scale keeps 1.
    """
    factors = clip_factors(maxima.maximum, tau, alpha, xp=torch)
    each = projections.values()
    clips = _of_heads([bool(scaled_factors(one, clip_frozen=clip_frozen)) for one in each], maxima)
    frozen = (maxima.maximum > tau) & _of_heads([is_held(one, clip_frozen=clip_frozen) for one in each], maxima)
    factors = ClipFactors(*(torch.where(clips, factor, 1.0) for factor in factors))
    bound = maxima.upper_bound
    exact = bound <= maxima.maximum
    seen = torch.where(exact, maxima.maximum, math.nan)
    reported = zip(*(each.split(maxima.sizes) for each in (seen, factors.gamma, exact, bound, frozen)), strict=True)
    decided = zip(*(each.split(maxima.sizes) for each in factors), strict=True)
    return (
        {name: ClipFactors(*layer) for name, layer in zip(projections, decided, strict=True)},
        {name: LayerReport(*layer) for name, layer in zip(projections, reported, strict=True)},
    )


def scale(
    projections: Mapping[str, QKProjection],
    factors: Mapping[str, ClipFactors],
    copies: SecondCopies,
    *,
    clip_frozen: bool,
    skip_quiet: bool,
) -> None:
    """Scale the rows of every head by its factors; each rank those that it has, without communication.

    `copies`: those of parameters, which are scaled with them. `skip_quiet`: read the factors, and skip
    attentions of which no head is above τ.
    """
    loud = {name: each for name, each in factors.items() if not skip_quiet or bool((each.gamma < 1).any())}
    for rows, by_head in scaled_rows(projections, loud, clip_frozen=clip_frozen):
        _scale_rows(rows, by_head, copies)


def scaled_rows(
    projections: Mapping[str, QKProjection], factors: Mapping[str, ClipFactors], *, clip_frozen: bool
) -> Iterator[tuple[HeadRows, Tensor]]:
    """Yield the rows that these factors scale, each with its factor for every head."""
    for name, factor in factors.items():
        projection = projections[name]
        for part, own in scaled_factors(projection, clip_frozen=clip_frozen).items():
            yield from ((rows, getattr(factor, own)) for rows in getattr(projection, part))


def _of_heads(flags: Sequence[bool], maxima: JointMaxima) -> Tensor:
    """Repeat what holds of each attention for its heads; bool [heads of all]."""
    values = tuple(flag for flag, heads in zip(flags, maxima.sizes, strict=True) for _ in range(heads))
    return constant(values, torch.bool, maxima.maximum.device)


def _scale_rows(rows: HeadRows, factors: Tensor, copies: SecondCopies) -> None:
    for parameter, axis in rows.parameters():
        errors = copies.errors_of(parameter)
        weights = copies.of(parameter)
        if errors:
            _scale_master(rows, parameter, axis, factors, errors)
        else:
            weights = [parameter, *weights]
        for weight in weights:
            scale_heads(rows, weight, axis, factors.to(weight.device))
        drop_kept_scale(parameter)


@torch.no_grad()
def _scale_master(rows: HeadRows, parameter: Tensor, axis: Axes, factors: Tensor, errors: Sequence[Tensor]) -> None:
    """Scale a master that is in two parts: the parameter becomes the rounding of the scaled one."""
    weight, held = local_part(parameter), [local_part(each) for each in errors]
    own = [each.to(weight.device) for each in held]
    master = placed_like(parameter, joined(weight, own))
    scale_heads(rows, master, axis, factors.to(weight.device))
    split_into(local_part(master), weight, own)
    for each, new in zip(held, own, strict=True):
        if new is not each:
            each.copy_(new)
