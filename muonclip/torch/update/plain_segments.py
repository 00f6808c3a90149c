"""The step of many matrices at once, in lists: small ones cost the host more in calls than the arithmetic takes.

It is what `SegmentStep` does to each, by the same rule, for those that need nothing else: whole on this rank, with a
gradient, viewed where they are, and with the same options and dtypes as their neighbours.
"""

# pyright: reportPrivateImportUsage=false
# The list operations have no public names; torch.optim is built of them.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muonclip.core.update_rule import Momentum, MuonRule
from muonclip.torch.update.stages import WHOLE, SegmentStep, is_by_entry


class _Views(NamedTuple):
    """The matrices of one segment, where they are: (count, rows, columns), or one of (rows, columns)."""

    segment: SegmentStep
    weight: Tensor
    gradient: Tensor
    state: list[Tensor]

    def goes_with(self, other: _Views) -> bool:
        """Tell whether both can step together."""
        ours, theirs = self.segment, other.segment
        return (
            ours.step.options is theirs.step.options
            and ours.step.rule is theirs.step.rule
            and ours.tall == theirs.tall
            and self.weight.ndim == other.weight.ndim
            and self.weight.dtype == other.weight.dtype
            and self.gradient.dtype == other.gradient.dtype
        )


class PlainSegments:
    """Segments that step together; `advance` and `apply` as `SegmentStep` has them."""

    def __init__(self, views: Sequence[_Views]) -> None:
        self.views, self.first = views, views[0].segment
        self.counts = [each.segment.count for each in views]
        self.count = sum(self.counts)
        self.are_single = views[0].weight.ndim == 2

    def advance(self, start: int, stop: int, into: Tensor) -> None:
        """Let the gradients into the states; write what is orthogonalised of all matrices (matrices, m, n), m ≤ n."""
        del start, stop  # nobody shares them
        rule, options = self.first.step.rule, self.first.step.options
        gradients = [each.gradient for each in self.views]
        state = {state.name: [each.state[at] for each in self.views] for at, state in enumerate(rule.states)}
        momentum = Momentum(options.momentum, options.nesterov)
        state = rule.advance(gradients, state, momentum, _LISTS)
        directions = rule.direction(gradients, state, momentum, _LISTS)
        upright = into.new_empty(len(into), into.shape[2], into.shape[1]) if self.first.tall else into
        torch._foreach_copy_(self._parts(upright), directions)
        if self.first.tall:
            into.copy_(upright.mT)

    def apply(self, update: Tensor) -> None:
        """W ← W − η (U · scale + λ W), the scale by the shape of the matrix; U (matrices, m, n) with m ≤ n."""
        options = self.first.step.options
        if self.first.tall:
            update = update.mT.contiguous()
        weights = [each.weight for each in self.views]
        rate = float(options.lr)
        kept = 1 - rate * options.weight_decay
        if weights[0].dtype in (torch.float32, torch.float64):
            torch._foreach_mul_(weights, kept)
        else:  # where torch would round the factor to the dtype of the weights
            for each in weights:
                each.mul_(kept)
        torch._foreach_add_(weights, self._parts(update), alpha=-rate * self.first.scale)

    def _parts(self, stack: Tensor) -> list[Tensor]:
        return list(stack.unbind() if self.are_single else stack.split(self.counts))


def together(segments: Sequence[SegmentStep]) -> Iterator[SegmentStep | PlainSegments]:
    """Join neighbours that can step together."""
    run: list[_Views] = []
    for segment in segments:
        views = _views(segment)
        if run and not (views and views.goes_with(run[0])):
            yield _joined(run)
            run = []
        if views:
            run.append(views)
        else:
            yield segment
    if run:
        yield _joined(run)


def _joined(run: list[_Views]) -> SegmentStep | PlainSegments:
    return PlainSegments(run) if len(run) > 1 else run[0].segment


def _views(segment: SegmentStep) -> _Views | None:
    """Look at a segment's matrices; None where not all of them are plain views of one dtype."""
    step, rule, options, weight = segment.step, segment.step.rule, segment.step.options, segment.step.parameter
    if step.gradient is None or step.errors or step.rounding is not None or step.offloaded:
        return None
    if options.freeze_unused or not isinstance(options.lr, float):
        return None
    own = (type(rule).pull_back, type(rule).apply, type(rule).move)
    is_plain = own == (MuonRule.pull_back, MuonRule.apply, MuonRule.move)
    if not is_by_entry(rule) or not is_plain or options.cautious_decay:
        return None
    gradient, state = step.gradient, [step.state[each.name] for each in rule.states]
    if not segment.segment.shards.as_stored or weight.ndim != 2:
        opened = [segment.opened(each) for each in (weight, *state)]
        if any(write_back is not None for _, write_back in opened):
            return None
        weight, *state = (matrices for matrices, _ in opened)
        gradient = segment.gradient()
        assert gradient is not None
    for each in (gradient, *state):
        if each.dtype != gradient.dtype or type(each) is not Tensor:
            return None
    return _Views(segment, weight, gradient, state) if type(weight) in (Tensor, nn.Parameter) else None


def _average(into: list[Tensor], values: list[Tensor], weight: float) -> list[Tensor]:
    torch._foreach_lerp_(into, values, weight)
    return into


_LISTS = replace(WHOLE, lerp=torch._foreach_lerp, average=_average)
