"""Notices that weights which the clip has scaled come back: something keeps a copy of them that the clip does not know.

After a clip by f the weights of a head are f·W, and (1 − f)·W is the way back. A copy that is written over them moves
all projections of the head along it, and hardly elsewhere. Between the steps of the optimizers no weight moves by
itself: what went this way there was written back. (Weights that were swapped out and in again have not moved.) Within a
step an explosion may lead the same way. There something was written back if the weights now are, to the bit, another
tensor that the optimizer keeps.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from muonclip.core import ClipFactors
from muonclip.torch.clip.errors import DeferredErrors
from muonclip.torch.clip.rescaling import scaled_rows
from muonclip.torch.heads import HeadRows, QKProjection, heads_of_rows, sample_rows

_COLUMNS = 16
"""How many numbers of each row are compared."""

_FIRM = 1 - 2.0**-6
"""The largest factor after which the way back is long enough to be told from rounding."""

_LEAST, _MOST, _STRAY = 0.125, 1.25, 0.5
"""How much of the way back weights must go, and how far from it they may stray, as a part of what they went."""

_TIMES = 2
"""How often weights must come back between steps: somebody may once have copied earlier ones for another reason."""

_Part: TypeAlias = tuple[str, HeadRows]


class ReturnedWeights:
    """Compares some of the weights with what the clip left, and warns once. `copies_of`: tensors kept for a parameter.

    What an accelerator has found reaches the host some steps later, without a wait.
    """

    def __init__(self, copies_of: Callable[[Tensor], Iterable[Tensor]]) -> None:
        self._copies_of = copies_of
        self._deferred = DeferredErrors()
        self._given = self._moves_within = False
        self.forget()

    def forget(self) -> None:
        """Forget the weights: others were loaded, or there was none yet."""
        self._weights: _Weights | None = None
        self._is_clips = self._stepping = self._stepped = False
        self._thread = 0

    def before_step(self) -> None:
        """Compare what an optimizer is about to change."""
        if threading.get_ident() != self._thread:
            return
        self._compare_between()
        self._is_clips, self._stepping = False, True

    @torch.no_grad()
    def after_step(self) -> None:
        """Take what an optimizer has changed as it is, unless the clip has been there since."""
        if threading.get_ident() != self._thread:
            return
        self._stepping, self._stepped = False, self._is_clips
        weights = None if self._given or self._is_clips else self._weights
        now = None if weights is None else weights.read()
        if weights is not None and now is not None:
            weights.within |= weights.moved_back(now)
            weights.take(now)
            self._stepped = True

    def before_clip_by_hand(self) -> None:
        """Compare what wraps an optimizer may have changed after its step. Others may step without a word."""
        if self._stepped and not self._stepping:
            self._compare_between()

    @torch.no_grad()
    def clip(
        self,
        projections: Mapping[str, QKProjection],
        factors: Mapping[str, ClipFactors],
        *,
        clip_frozen: bool,
        may_clip: bool,
        may_wait: bool,
    ) -> None:
        """Compare the weights after an update, which are scaled by the factors next.

        `may_clip`: whether a factor can be below 1. Nothing is compared before the first such step. `may_wait`: whether
        the host may read what it finds.
        """
        if self._given or (self._weights is None and not may_clip):
            return
        parts, by_head = list[_Part](), list[Tensor]()
        for name, each in factors.items():
            for rows, own in scaled_rows(projections, {name: each}, clip_frozen=clip_frozen):
                parts.append((name, rows))
                by_head.append(own)
        if not parts:
            return
        weights = self._weights
        now = None if weights is None or not weights.are_of(parts, by_head[0].device) else weights.read()
        if weights is None or now is None:
            weights = self._weights = _Weights(parts, by_head[0].device)
            now = weights.seen.clone()
        self._thread = threading.get_ident()
        moved = weights.within | weights.moved_back(now)
        self._moves_within |= may_wait and bool(moved.any())
        if self._moves_within:
            weights.times += _TIMES * (moved & weights.are_kept(self._copies_of))
        weights.scale(now, torch.cat([*by_head, torch.ones_like(by_head[0][:1])]))
        self._is_clips, self._stepped = True, False
        flags = torch.stack([weights.of_attentions(each) for each in (weights.times >= _TIMES, moved)], dim=1)
        self._deferred.add(flags, weights.names)

    def give(self, names_of: Callable[[Iterable[Tensor]], Sequence[str]], *, wait: bool) -> None:
        """Warn, where there is a reason that was not said before. `names_of`: the names of weights."""
        if self._given:
            return
        names = self._deferred.names
        found = self._deferred.take(wait=wait)
        if found is None:
            return
        self._moves_within |= bool(found[:, 1].any())
        if self._weights is None or not bool(found[:, 0].any()):
            return
        self._given = True
        attentions = {name for name, each in zip(names, found[:, 0].tolist(), strict=True) if each}
        names = names_of(next(rows.parameters())[0] for name, rows in self._weights.parts if name in attentions)
        warnings.warn(
            f"QK-Clip scales {', '.join(dict.fromkeys(names))}, and they come back: something keeps a second copy of "
            "these weights and writes it over them, so that heads above tau are not held. Attach the clip to the "
            "outermost optimizer, clip.attach(optimizer): slow weights, averages and masters that it knows are scaled, "
            "too. Else say which tensor is the copy of a parameter, QKClip(model, master_of=…).",
            stacklevel=2,
        )

    @torch.no_grad()
    def _compare_between(self) -> None:
        weights = None if self._given else self._weights
        now = None if weights is None else weights.read()
        if weights is not None and now is not None:
            weights.times += weights.moved_back(now)
            weights.take(now)

    def __getstate__(self) -> dict[str, Any]:
        copied = ReturnedWeights(self._copies_of)  # its weights are others
        copied._given = self._given
        return copied.__dict__


class _Weights:
    """A few numbers of each row of some weights: as they were last seen, and the way back from the last clip.

    A slot is a head in one of its weights; the last slot, and the last head, stand for rows of none. `seen`: the
    numbers, fp32. `times`, int64 [heads of all]: how often the weights of each head came back; `within`: whether they
    moved back in this update.
    """

    def __init__(self, parts: Sequence[_Part], device: torch.device) -> None:
        self.parts, self._device = tuple(parts), device
        self.names = tuple(dict.fromkeys(name for name, _ in parts))
        sizes = {name: rows.num_heads for name, rows in parts}
        first = {name: sum(sizes[each] for each in self.names[:index]) for index, name in enumerate(self.names)}
        none, heads = sum(rows.num_heads for _, rows in parts), sum(sizes.values())
        samples, slots, head_of_slot = self._samples(), list[Tensor](), list[int]()
        for (name, rows), sample in zip(parts, samples, strict=True):
            head = heads_of_rows(rows, *next(rows.parameters()))
            slot = torch.where(head < rows.num_heads, head + len(head_of_slot), none)
            slots.append(slot.to(device).repeat_interleave(sample.shape[1]))
            head_of_slot += range(first[name], first[name] + rows.num_heads)
        attentions = [index for index, name in enumerate(self.names) for _ in range(sizes[name])]
        self._shapes = [sample.shape for sample in samples]
        self._slots = torch.cat(slots)
        self._head_of_slot = torch.tensor([*head_of_slot, heads], device="cpu").to(device)
        self._attention_of_head = torch.tensor([*attentions, 0], device="cpu").to(device)
        self.times = torch.zeros(heads + 1, dtype=torch.int64, device=device)
        self.within = torch.zeros(heads + 1, dtype=torch.bool, device=device)
        self.seen = self._joined(samples)
        self._way = torch.zeros_like(self.seen)

    def are_of(self, parts: Sequence[_Part], device: torch.device) -> bool:
        """Tell whether they are numbers of these weights."""
        return self.parts == tuple(parts) and self._device == device

    def read(self) -> Tensor | None:
        """Return the numbers as they are now; None where an engine has put other weights there, maybe for a while."""
        if not all(isinstance(getattr(rows.module, rows.weight, None), Tensor) for _, rows in self.parts):
            return None
        samples = self._samples()
        return self._joined(samples) if [sample.shape for sample in samples] == self._shapes else None

    def take(self, now: Tensor) -> None:
        """See them as they are now."""
        self.seen.copy_(now)

    def scale(self, now: Tensor, by_slot: Tensor) -> None:
        """See them as they are now, scaled by the factor of each slot."""
        factors = by_slot[self._slots]
        self.seen.copy_(now * factors)
        self._way.copy_(torch.where(factors < _FIRM, now - self.seen, self._way))
        self.within.zero_()

    def moved_back(self, now: Tensor) -> Tensor:
        """Tell of which heads all weights have moved back since they were last seen; bool [heads].

        Weights that were never scaled do not count.
        """
        moved = now - self.seen
        products = torch.stack([self._way * self._way, self._way * moved, moved * moved])
        sums = products.new_zeros(3, len(self._head_of_slot)).index_add_(1, self._slots, products)
        length, along, size = sums
        part = along / length
        came = (part > _LEAST) & (part < _MOST) & (size - along * part < (_STRAY * part) ** 2 * length)
        return self._all_of_heads(came, length > 0)

    def are_kept(self, copies_of: Callable[[Tensor], Iterable[Tensor]]) -> Tensor:
        """Tell of which heads all weights are, to the bit, one of the tensors kept for them; bool [heads]."""
        equal: list[Tensor] = []
        for (_, rows), sample in zip(self.parts, self._samples(), strict=True):
            weight, axis = next(rows.parameters())
            same = torch.zeros(sample.shape, dtype=torch.bool, device=sample.device)
            for copy in copies_of(weight):
                other = sample_rows(copy, axis, _COLUMNS)
                if other.shape == sample.shape:
                    same |= other.to(sample) == sample
            equal.append(same.flatten().to(self._device))
        different = (~torch.cat(equal)).long()
        counts = torch.zeros_like(self._head_of_slot).index_add_(0, self._slots, different)
        return self._all_of_heads(counts == 0, torch.ones_like(counts, dtype=torch.bool))

    def of_attentions(self, heads: Tensor) -> Tensor:
        """Return the number of heads of each attention that are true; int64 [attentions]."""
        counts = torch.zeros(len(self.names), dtype=torch.int64, device=self._device)
        return counts.index_add_(0, self._attention_of_head, heads.long())

    def _all_of_heads(self, slots: Tensor, known: Tensor) -> Tensor:
        """Tell of which heads all slots that are known are true; those without one are not."""
        counts = torch.zeros(2, len(self._attention_of_head), dtype=torch.int64, device=self._device)
        counts.index_add_(1, self._head_of_slot, torch.stack([known, known & ~slots]).long())
        return (counts[0] > 0) & (counts[1] == 0)

    def _samples(self) -> list[Tensor]:
        return [sample_rows(*next(rows.parameters()), _COLUMNS) for _, rows in self.parts]

    def _joined(self, samples: Sequence[Tensor]) -> Tensor:
        return torch.cat([sample.flatten().to(self._device, torch.float32) for sample in samples])
