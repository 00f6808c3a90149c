"""The true logits of every softmax that a model takes, read below autograd.

Operators are seen as they run, whatever Python called them: `_softmax`, and fused attention, whose logits are computed
from its queries, keys, scale and mask. Nothing is taken from QK-Clip. Where logits come from is followed by storage: a
product of two tensors, neither of them a parameter, reaches a softmax through operators other than products. A sigmoid
that it reaches and whose results weigh other activations is taken for a softmax over the last axis.

A model is run again with the results of all its softmaxes, and what it chooses by `topk`, as in a first run. So each
attention gets the inputs that it had then, however the weights of queries and keys were changed, and its logits can be
compared. With the products set to zero, too, what is left of the logits is what was added to them:

    S = L − C        C: biases, masks, distances; under a soft cap c·tanh(·), L and C are c times what it receives
    allowed          C > −50, the lowest bias of so few tokens, and S ≠ 0: below are masks, and sinks have no product

The maximum of a row, which some models subtract before a softmax, is taken for zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MASKED = -50.0
_ATEN = torch.ops.aten
_SOFTMAX = {_ATEN._softmax, _ATEN._safe_softmax}
_FUSED = {_ATEN._scaled_dot_product_flash_attention_for_cpu}
_PRODUCTS = {_ATEN.mm: 0, _ATEN.bmm: 0, _ATEN.addmm: 1, _ATEN.baddbmm: 1}  # where the first factor is
_NEW = {_ATEN.embedding, _ATEN.native_layer_norm}  # whose results have nothing of logits
_CHOICES = {_ATEN.topk, _ATEN.sort}
_MAXIMA = {_ATEN.amax, _ATEN.max}
_CAPS = {_ATEN.tanh, _ATEN.tanh_}


@dataclass(frozen=True, slots=True, eq=False)
class Softmax:
    """A softmax of a run: the module that took it, the operator, its logits L with the keys last.

    `products`: the numbers of the products in L. `weighs`: whether its result is a factor of a product. `read`: L, or
    what a soft cap received. `result`: of the operator.
    """

    module: str
    operator: str
    logits: Tensor
    read: Tensor
    products: frozenset[int]
    result: Any
    weighs: bool = False
    capped: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """An attention of a run: its statistic S, the pairs that count, and L, all [..., queries, keys]."""

    module: str
    operator: str
    statistic: Tensor
    allowed: Tensor
    logits: Tensor

    @property
    def maximum(self) -> float:
        """The largest logit."""
        return self.maxima().max().item()

    def maxima(self, *, with_added: bool = False) -> Tensor:
        """Return the largest logit of each query, [..., queries]; −inf where it may see no key. `with_added`: of L."""
        read = self.logits if with_added else self.statistic
        return read.masked_fill(~self.allowed, -torch.inf).amax(-1)


class SoftmaxWitness:
    """Watches a model called on the same inputs each time: `call()` runs it."""

    def __init__(self, model: nn.Module, call: Callable[[], object]) -> None:
        self._model, self._call = model, call
        first = _Run(model)
        self.softmaxes = self._run(first)
        self._choices = first.choices
        self.unread = first.unread
        """The modules that normalise logits in another way than by a softmax, which are not read."""
        self._products = frozenset[int]().union(*(each.products for each in self.softmaxes))

    @property
    def other_softmaxes(self) -> list[Softmax]:
        """The softmaxes that are not over products, or whose results weigh nothing: routers, pooling, classes."""
        return [each for each in self.softmaxes if not _is_attention(each)]

    def attentions(self) -> list[Attention]:
        """Return the attentions with the weights of now and the inputs of the first run. Raises RuntimeError where the
        model does not do the same again."""
        pinned = [each.result for each in self.softmaxes]
        whole = self._run(_Run(self._model, pinned, self._choices))
        added = self._run(_Run(self._model, pinned, self._choices, self._products))
        if not len(self.softmaxes) == len(whole) == len(added):
            raise RuntimeError("the model takes another number of softmaxes in each run")
        found: list[Attention] = []
        for first, one, without in zip(self.softmaxes, whole, added, strict=True):
            if _is_attention(first):
                allowed = (without.logits > MASKED) & one.logits.isfinite()
                statistic = _difference(one.logits, without.logits)
                if one.capped:
                    moved = _difference(one.read.tanh(), without.read.tanh()).masked_fill(~allowed, 0).abs()
                    at = moved.argmax()
                    cap = (statistic.flatten()[at] / moved.flatten()[at]).abs()
                    statistic = cap * _difference(one.read, without.read)
                found.append(Attention(one.module, one.operator, statistic, allowed & (statistic != 0), one.logits))
        return found

    def _run(self, run: _Run) -> list[Softmax]:
        with run.naming_modules(), run:
            self._call()
        return run.softmaxes


class _Run(TorchDispatchMode):
    def __init__(
        self,
        model: nn.Module,
        pinned: list[Any] | None = None,
        chosen: list[Tensor] | None = None,
        zeroed: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self._chosen = chosen or []
        self.choices: list[Tensor] = []  # indices of the largest, as sparse attention picks its queries
        self._model, self._pinned, self._zeroed = model, pinned, zeroed
        self._parameters = {_storage(each) for each in model.parameters()}
        self._names = {module: name for name, module in model.named_modules()}
        self._inside: list[str] = []
        self._products = 0
        self._reached: dict[int, frozenset[int]] = {}  # by storage, the products in it
        self._capped: dict[int, Tensor] = {}  # what a soft cap received
        self._weights: dict[int, frozenset[int]] = {}  # the softmaxes whose results are in it
        self._alive: list[Tensor] = []  # so that no storage takes the place of another
        self.softmaxes: list[Softmax] = []
        self.unread: list[str] = []

    @contextlib.contextmanager
    def naming_modules(self) -> Iterator[None]:
        def enter(module: nn.Module, *_: Any) -> None:
            self._inside.append(self._names.get(module, ""))

        def leave(*_: Any) -> None:
            self._inside.pop()

        hooks = [module.register_forward_pre_hook(enter) for module in self._names]
        hooks += [module.register_forward_hook(leave) for module in self._names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, func.overloadpacket
        if operator in _SOFTMAX:
            logits = args[0].movedim(args[1], -1)
            return self._softmax(func, args, kwargs, logits, args[0])
        if operator in _FUSED:
            return self._fused(func, args, kwargs)
        if operator is _ATEN.sigmoid and self._reached.get(_storage(args[0])):
            return self._softmax(func, (args[0], -1), kwargs, args[0], args[0])
        if operator in _PRODUCTS:
            return self._product(func, list(args), kwargs, _PRODUCTS[operator])
        result = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self._alive += made
        if operator not in _NEW:
            self._pass_on(given, [each for each in made if each.is_floating_point()])
        if operator in _CHOICES:
            if len(self.choices) < len(self._chosen):
                made[1].copy_(self._chosen[len(self.choices)])
                at = 2 if operator is _ATEN.topk else 1
                axis = kwargs.get("dim", args[at] if len(args) > at else -1)
                made[0].copy_(given[0].gather(axis, made[1]))
            self.choices.append(made[1].clone())
        if operator is _ATEN.logsumexp and self._reached.get(_storage(given[0])):
            self.unread.append(self._inside[-1])
        if operator in _MAXIMA and self._pinned is not None and self._reached.get(_storage(given[0])):
            made[0].zero_()
        if operator in _CAPS and self._reached.get(_storage(given[0])):
            self._capped[_storage(made[0])] = given[0].clone()
        return result

    def _pass_on(self, given: list[Tensor], made: list[Tensor]) -> None:
        """Let results have what their arguments had; written in place, also what they had before."""
        of_given = [_storage(each) for each in given]
        for of_one in map(_storage, made):
            for known in (self._reached, self._weights):
                if joint := frozenset[int]().union(*(known.get(each, frozenset()) for each in [of_one, *of_given])):
                    known[of_one] = joint
            capped = next((self._capped[each] for each in of_given if each in self._capped), None)
            if capped is not None:
                self._capped[of_one] = capped

    def _product(self, func: Any, args: list[Any], kwargs: Any, at: int) -> Tensor:
        factors = [_storage(each) for each in args[at : at + 2]]
        product, of_activations = self._products, not self._parameters.intersection(factors)
        self._weighs(factors, of_activations=of_activations)
        self._products += of_activations
        if of_activations and product in self._zeroed:
            args[at] = torch.zeros_like(args[at])
        result = func(*args, **kwargs)
        self._alive.append(result)
        if of_activations:
            before = [self._reached.get(_storage(each), frozenset()) for each in args[:at]]
            self._reached[_storage(result)] = frozenset({product}).union(*before)
        return result

    def _fused(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(("query", "key", "value", "dropout", "is_causal"), args, strict=False)) | kwargs
        q, k, mask = given["query"], given["key"], given.get("attn_mask")
        scale = given.get("scale")
        product, self._products = self._products, self._products + 1
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if product in self._zeroed:
            logits = torch.zeros_like(logits)
        if given.get("is_causal"):
            logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
        of_mask: frozenset[int] = frozenset()
        if mask is not None:
            of_mask = self._reached.get(_storage(mask), frozenset())
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        self._weighs([_storage(each) for each in (given["query"], given["key"], given["value"])], of_activations=True)
        return self._softmax(func, args, kwargs, logits, None, frozenset({product}) | of_mask)

    def _softmax(
        self, func: Any, args: Any, kwargs: Any, logits: Tensor, source: Tensor | None,
        products: frozenset[int] = frozenset(),
    ) -> Any:  # fmt: skip
        number = len(self.softmaxes)
        is_sigmoid = func.overloadpacket is _ATEN.sigmoid
        result = func(*args[: 1 if is_sigmoid else None], **kwargs)
        if self._pinned is not None and number < len(self._pinned):
            result = self._pinned[number]
        read, is_capped = logits, False
        if source is not None:
            products = self._reached.get(_storage(source), frozenset())
            capped = self._capped.get(_storage(source))
            if capped is not None and capped.numel() == source.numel():
                read, is_capped = capped.reshape(source.shape).movedim(args[1], -1), True
        operator, fused = str(func.overloadpacket).removeprefix("aten."), source is None
        module = self._inside[-1] if self._inside else ""
        logits, read = logits.detach().clone(), read.detach().clone()
        self.softmaxes.append(Softmax(module, operator, logits, read, products, result, fused, is_capped))
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self._alive += outputs
        if not fused:
            self._weights[_storage(outputs[0])] = frozenset({number})
        return result

    def _weighs(self, factors: list[int], *, of_activations: bool) -> None:
        """Note that results of softmaxes weigh something; a sigmoid in front of a parameter is a gate."""
        for number in frozenset[int]().union(*(self._weights.get(each, frozenset()) for each in factors)):
            softmax = self.softmaxes[number]
            if not softmax.weighs and (of_activations or softmax.operator != "sigmoid"):
                self.softmaxes[number] = replace(self.softmaxes[number], weighs=True)


def _is_attention(softmax: Softmax) -> bool:
    return bool(softmax.products) and softmax.weighs


def _difference(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).nan_to_num(posinf=0, neginf=0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
