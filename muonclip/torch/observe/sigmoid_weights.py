"""Attention whose weights are a sigmoid of each logit, seen where they multiply the values.

    y_i = Σ_j σ(S_ij + b) v_j        over the pairs that count; J. Ramapuram et al., 2409.04431, eq. 3

The logits are those of softmax attention. But a sigmoid of products may be anything, a gate or a probability: only what
weighs a third tensor is attention. Until then the weights are followed, and pairs whose weight is set to zero do not
count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.observe.attention_call import AttentionKernel
from muonclip.torch.observe.score import Score
from muonclip.torch.observe.score_rules import OVER, TIMES
from muonclip.torch.observe.torch_functions import bind, functions

KERNEL = AttentionKernel(
    "product and sigmoid",
    if_unobserved=(
        " This attention is written out as a product and a sigmoid, which cannot be followed in code that "
        "torch.compile made: leave it out of what is compiled."
    ),
    weights_by="sigmoid",
)
SIGMOID = functions("sigmoid") | {torch.special.expit}
"""Functions that make weights of logits."""

_PRODUCTS = functions("matmul", "bmm", "__matmul__", "einsum")
_SAME = functions(
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "dropout", "view",
    "reshape", "unflatten", "squeeze", "unsqueeze", "flatten", "view_as", "reshape_as", "expand", "__getitem__",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Weights of an attention that has not been seen yet: the logits that entered the sigmoid, and their score."""

    logits: Tensor
    score: Score

    def forbid(self, pairs: Any, shape: torch.Size) -> Weights:
        """Forbid pairs, bool, broadcastable to the weights in this shape."""
        if not isinstance(pairs, Tensor):
            return self
        pairs = pairs.expand(shape).reshape(self.logits.shape)
        return replace(self, score=self.score.forbid(pairs))


class SigmoidWeights:
    """The sigmoids of logits that are there now, by the id of their tensor."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[weakref.ref[Tensor], Weights]] = {}

    def __bool__(self) -> bool:
        return bool(self._weights)

    def enter(self, result: Tensor, weights: Weights) -> None:
        """Follow a tensor of weights from now on."""
        key, known = id(result), self._weights
        known[key] = weakref.ref(result, lambda _: known.pop(key, None)), weights

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Weights | None:
        """Return the weights by which a function has weighed a third tensor; else follow what it has made of them."""
        given = [each for value in (*args, *kwargs.values()) for each in _tensors_of(value)]
        tracked = next((each for each in given if id(each) in self._weights), None)
        if tracked is None or not isinstance(result, Tensor):
            return None
        weights = self._weights[id(tracked)][1]
        if func in _PRODUCTS:
            others = [each for each in given if each is not tracked]
            return weights if len(others) == 1 and others[0].ndim > 2 else None
        rule = _RULES.get(func)
        if rule is not None and result.shape[-2:] == tracked.shape[-2:] and result.numel() == weights.logits.numel():
            pairs = rule(bind(func, args, kwargs), tracked)
            self.enter(result, weights.forbid(pairs, result.shape))
        return None


def _tensors_of(value: Any) -> list[Tensor]:
    values = value if type(value) in (list, tuple) else (value,)
    return [each for each in values if isinstance(each, Tensor)]


def _all_stay(arguments: Mapping[str, Any], weights: Tensor) -> None:
    """Forbid nothing."""


def _multiplied(arguments: Mapping[str, Any], weights: Tensor) -> Any:
    factor = arguments["other"] if arguments["input"] is weights else arguments["input"]
    return factor.detach() == 0 if isinstance(factor, Tensor) and factor.numel() > 1 else None


def _filled(arguments: Mapping[str, Any], weights: Tensor) -> Any:
    value = arguments["value"]
    return arguments["mask"].bool() & (value.detach() == 0 if isinstance(value, Tensor) else value == 0)


def _chosen(arguments: Mapping[str, Any], weights: Tensor) -> Any:
    kept, other = arguments["condition"], arguments["other"]
    if other is weights:
        kept, other = ~kept, arguments["input"]
    return ~kept & (other.detach() == 0 if isinstance(other, Tensor) else other == 0)


def _lower(arguments: Mapping[str, Any], weights: Tensor) -> Tensor:
    kept = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device)
    return ~kept.tril(arguments.get("diagonal", arguments.get("1", 0)))


_RULES: dict[Any, Callable[[Mapping[str, Any], Tensor], Any]] = {
    function: rule
    for group, rule in (
        (_SAME | OVER, _all_stay),
        (TIMES, _multiplied),
        (functions("masked_fill", "masked_fill_"), _filled),
        (functions("where"), _chosen),
        (functions("tril", "tril_"), _lower),
    )
    for function in group
}
"""What functions that leave weights weights forbid."""
