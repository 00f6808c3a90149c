"""Attention written out: a product of queries and keys that reaches a softmax, or a sigmoid that weighs values.

    softmax(scale · q kᵀ + bias, masked)            logits S = scale · q_i · k_j, over the pairs that are not masked

`ScoreTracker` follows the product through what happens to it before the softmax (`score_rules.py`), and behind a
sigmoid (`sigmoid_weights.py`). What it cannot follow before is a problem of the attention that comes of it, and never a
reason to lose it.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muonclip.torch.logits import InnermostMode, unobservable, unseen
from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel
from muonclip.torch.observe.score import KERNEL, Score
from muonclip.torch.observe.score_rules import (
    MIXTURES,
    OF_THE_FIRST,
    OTHERS,
    PRODUCTS,
    SOFTMAX,
    Use,
    after,
    divided,
    mixed,
    overwritten,
    product,
)
from muonclip.torch.observe.sigmoid_weights import KERNEL as OF_A_SIGMOID
from muonclip.torch.observe.sigmoid_weights import SIGMOID, SigmoidWeights, Weights
from muonclip.torch.observe.torch_functions import bind, writes


class _Tracked(weakref.ref[Tensor]):
    """A reference to a tensor with its score, and the id of the tensor, by which it is found."""

    __slots__ = ("key", "score")
    key: int
    score: Score


class ScoreTracker(InnermostMode):
    """Calls `on_attention` for every attention that is written out while it is entered."""

    def __init__(self, on_attention: Callable[[AttentionCall], object]) -> None:
        super().__init__()
        self.on_attention = on_attention
        self._scores: dict[int, _Tracked] = {}  # by the id of their tensor, as long as that is there
        self._forget = functools.partial(_forget, self._scores)
        self._weights = SigmoidWeights()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.inside(func, *args, **kwargs)
        result = self.run(func, args, kwargs)
        if (self._scores or func in PRODUCTS) and unobservable() is None:
            self.follow(func, args, kwargs, result)
        return result

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def running_modules(self) -> object:
        """Return the modules that are running now, for the score of a product that is made in them."""
        return None

    def inside(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a function of torch that is made of others, and see those."""
        # With names of its own, among them one that keeps it from coming here for ever; other threads keep theirs.
        names = {**func.__globals__, "has_torch_function": lambda *_: False}
        own = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        own.__kwdefaults__ = func.__kwdefaults__
        with self:
            return own(*args, **kwargs)

    @unseen
    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record what became of a score, or a new one, without being seen."""
        self.record(func, args, kwargs, result)

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record what became of a score, or a new one."""
        if self._weights:
            weights = self._weights.follow(func, args, kwargs, result)
            if weights is not None:
                self.claim(weights.logits)
                self._attend(weights.logits, weights.score, -1, OF_A_SIGMOID)
                return
        if func in PRODUCTS:
            score = product(func, args, kwargs, result, self.running_modules())
            if score is not None:
                self._track(result, score)
                return
        if not self._scores:
            return
        tracked = self._tracked(args[:1] if func in OF_THE_FIRST else args, kwargs)
        if not tracked or func in OTHERS:
            return
        tensor, score = min(tracked, key=lambda each: bool(each[1].problem))  # a relative bias is rearranged
        if func in SOFTMAX:
            if score.are_logits(tensor.shape):
                self.claim(tensor)
            elif score.may_be_of_other_heads(tensor.shape):
                self.weights_of_mixed(score, result, "softmax")
            self._attend(tensor, score, bind(func, args, kwargs).get("dim"))
        elif writes(func):
            arguments = bind(func, args, kwargs)
            self._overwrite(Use(func, arguments, tensor, score, tracked, arguments["input"]))
        elif isinstance(result, Tensor):
            if func in SIGMOID:
                if score.are_logits(tensor.shape):
                    self._weights.enter(result, Weights(tensor.detach(), score))
                elif score.may_be_of_other_heads(tensor.shape):
                    self.weights_of_mixed(score, result, "sigmoid")
            if result.is_floating_point():  # else it is a mask, or indices
                if func not in MIXTURES:
                    use = Use(func, bind(func, args, kwargs), tensor, score, tracked, result)
                    self._track(result, after(use))
                elif tensor.ndim > 3:  # the output of an attention has three axes when it is projected
                    self._track(result, mixed(func, score))
        elif isinstance(result, tuple | list):
            results = [each for each in result if isinstance(each, Tensor) and each.is_floating_point()]
            if results:
                use = Use(func, bind(func, args, kwargs), tensor, score, tracked, results[0])
                for each, part in zip(results, divided(use, results), strict=True):
                    self._track(each, part)

    def claim(self, scores: Tensor) -> None:
        """Note that a tensor has the logits of an attention which is reported."""

    def weights_of_mixed(self, score: Score, weights: Tensor, function: str) -> None:
        """Note what a function has made of what may be the scores of heads that were mixed into another number."""

    def _attend(self, tensor: Tensor, score: Score, dimension: int | None, kernel: AttentionKernel = KERNEL) -> None:
        """Report the attention of a softmax, unless another softmax has had the same pairs, as for an entropy."""
        if not score.are_logits(tensor.shape) or all(block.pairs.were_observed() for block in score.blocks):
            return
        for block in score.blocks:
            block.pairs.observed = True
        self.on_attention(score.call(tensor, dimension, kernel))

    def _overwrite(self, use: Use) -> None:
        """Record what became of a tensor that was changed in place, and of all that have its memory."""
        target, before = use.result, self._score_of(use.result)
        if before is None:
            now = use.score.rearranged("are copied into another tensor")
        elif use.function is Tensor.__setitem__:
            now = overwritten(use, before)
        else:
            now = after(use)
        self._track(target, now)
        if before is None and target._base is not None and self._score_of(target._base) is None:
            self._track(target._base, now)
        for tracked in list(self._scores.values()):
            other = tracked()
            if other is not None and other is not target and _share_memory(target, other):
                tracked.score = _carried(target, before, now, other, tracked.score)

    def _tracked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, Score]]:
        """Return the scores among some arguments, those in lists of tensors included."""
        found, scores = [], self._scores
        for value in (*args, *kwargs.values()) if kwargs else args:
            for each in value if type(value) in (list, tuple) else (value,):
                if isinstance(each, Tensor) and id(each) in scores:
                    found.append((each, scores[id(each)].score))
        if len(found) > 1:  # what was mixed is only followed for itself
            found = [each for each in found if not each[1].mixed] or found
        return found

    def _score_of(self, tensor: Tensor) -> Score | None:
        tracked = self._scores.get(id(tensor))
        return None if tracked is None else tracked.score

    def _track(self, tensor: Tensor, score: Score) -> None:
        tracked = _Tracked(tensor, self._forget)
        tracked.key, tracked.score = id(tensor), score
        self._scores[tracked.key] = tracked


def _forget(scores: dict[int, _Tracked], tracked: _Tracked) -> None:
    scores.pop(tracked.key, None)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return torch._C._storage_address(one) == torch._C._storage_address(other)  # pyright: ignore


def _carried(target: Tensor, before: Score | None, now: Score, other: Tensor, score: Score) -> Score:
    """Return what became of a score whose memory `target` has a part of, which was changed in place."""
    if before is None:
        return score.with_problem("are changed in part")
    if now is before:
        return score
    is_masked_only = now.blocks is before.blocks and now.problem == before.problem
    same_elements = (
        (other.shape[-2:] == target.shape[-2:] and other.numel() == target.numel())
        and other.storage_offset() == target.storage_offset()
        and (other.is_contiguous() and target.is_contiguous())
    )
    if same_elements and (is_masked_only or not score.problem):
        forbidden = now.reshaped(target.shape, other.shape).forbidden
        whole = score if is_masked_only else replace(score, blocks=now.blocks, problem=now.problem)
        return whole.forbid(forbidden)
    if is_masked_only and now.part is not None and now.part.whole() is other:
        return now.put_back(other, now.part.index, score)
    return score.with_problem("are changed in part")
