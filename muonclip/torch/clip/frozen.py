"""Weights that are not trained: what is left to scale where they must keep their values, and what is said of it.

`requires_grad` may change while a model is trained, so it is read at every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from muonclip.core.head_parts import FACTOR_OF, Factor, Part, factors_of
from muonclip.torch.clip.errors import DeferredErrors
from muonclip.torch.clip.report import LayerReport
from muonclip.torch.heads import QKProjection


def scaled_factors(projection: QKProjection, *, clip_frozen: bool) -> dict[Part, Factor]:
    """Return the factor that each part of an attention is scaled by; empty where none is.

    A part is scaled where all of its weights are trained: with a frozen base and a trained adapter, q = (W + BA) x, no
    factor of B alone scales q. `clip_frozen`: scale it all the same, unless the whole attention is frozen.
    """
    if projection.reason or not projection.trains():
        return {}
    parts: list[Part] = [part for part in FACTOR_OF if getattr(projection, part)]
    frozen: list[Part] = [] if clip_frozen else [part for part in parts if not _is_trained(projection, part)]
    return factors_of(parts, (*projection.fixed, *frozen))


def is_held(projection: QKProjection, *, clip_frozen: bool) -> bool:
    """Tell whether an attention cannot be clipped because weights of its queries and keys are frozen."""
    return bool(projection.scaled_parts()) and not scaled_factors(projection, clip_frozen=clip_frozen)


def frozen_weights(projection: QKProjection) -> Iterator[Tensor]:
    """Yield the frozen weights that `clip_frozen` scales."""
    for part in scaled_factors(projection, clip_frozen=True):
        for rows in getattr(projection, part):
            yield from (parameter for parameter, _ in rows.parameters() if not parameter.requires_grad)


def clipping_in_words(projection: QKProjection, *, clip_frozen: bool) -> str:
    """Say in a few words when an attention is clipped, for the plan."""
    if projection.reason or not projection.trains():
        return projection.reason or "frozen: observed only"
    scaled, all_parts = (scaled_factors(projection, clip_frozen=each) for each in (clip_frozen, True))
    if not scaled:
        return "partly frozen: observed only"
    too = ", frozen weights too" if clip_frozen and any(True for _ in frozen_weights(projection)) else ""
    if projection.fixed:
        return f"above tau, by the keys alone{too}: the queries feed something else"
    if scaled.keys() == all_parts.keys():
        return f"above tau{too}"
    return f"above tau, by the {'keys' if 'key' in scaled else 'queries'} alone: the others are frozen"


class FrozenWarning:
    """Warns once, when a head is first seen above τ that cannot be clipped because a part of its weights is frozen.

    What an accelerator has found reaches the host some steps later, without a wait.
    """

    def __init__(self) -> None:
        self._deferred = DeferredErrors()
        self._given = False

    def add(
        self, projections: Mapping[str, QKProjection], layers: Mapping[str, LayerReport], *, clip_frozen: bool
    ) -> None:
        """Note the heads above τ of partly frozen attentions; those of a wholly frozen one are reported, no more."""
        if self._given:
            return
        names = tuple(
            name for name, each in projections.items() if each.trains() and is_held(each, clip_frozen=clip_frozen)
        )
        if names:
            self._deferred.add(torch.stack([layers[name].frozen.any() for name in names])[:, None], names)

    def give(self, *, wait: bool) -> None:
        """Warn, where there is a reason that was not said before."""
        if self._given:
            return
        names = self._deferred.names
        found = self._deferred.take(wait=wait)
        if found is None:
            return
        self._given = True
        loud = [name or "the model" for name, each in zip(names, found[:, 0].tolist(), strict=True) if each]
        warnings.warn(
            f"QK-Clip: heads of {', '.join(loud)} are above tau and cannot be clipped: weights behind their queries "
            "and keys are frozen, and those are never changed. report() lists such heads. Train all weights of the "
            "queries or of the keys, merge the adapter, or let the clip scale frozen weights too, "
            "QKClip(model, clip_frozen=True); then save these with the adapter.",
            stacklevel=2,
        )


def _is_trained(projection: QKProjection, part: Part) -> bool:
    return all(parameter.requires_grad for rows in getattr(projection, part) for parameter, _ in rows.parameters())
