"""A score: a tensor of logits on its way to a softmax, some of whose columns are products of queries and keys.

    [ … | scale₁ · q k₁ᵀ | … | scale₂ · q k₂ᵀ | … ]        the other columns, a sink perhaps, are not logits of keys

What a function of torch does to a score, `score_rules.py` says in the terms of this file.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.observe.attention_call import AttentionCall, AttentionKernel, heads_from

KERNEL = AttentionKernel(
    "product and softmax",
    if_unobserved=(
        " This attention is written out as a product and a softmax, which cannot be followed in code that "
        "torch.compile made: let it call scaled_dot_product_attention or muonclip.torch.attention."
    ),
    weights_by="softmax",
)


class Pairs:
    """The pairs of queries and keys of one product, or of some of its heads, that a tensor of this `shape` had.

    `observed`: a softmax has had them.
    """

    __slots__ = ("observed", "shape", "whole")

    def __init__(self, shape: Sequence[int], whole: Pairs | None = None) -> None:
        self.shape, self.whole, self.observed = shape, whole, False

    def were_observed(self) -> bool:
        """Tell whether a softmax has had them, or the pairs that they are a part of."""
        return self.observed or (self.whole is not None and self.whole.were_observed())


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A product in a score: the columns from `start` on are scale · q kᵀ. q [..., Tq, d], k [..., Tk, d].

    `scale`: a number, or a tensor [] that the host need not read.
    """

    q: Tensor
    k: Tensor
    pairs: Pairs
    scale: float | Tensor = 1.0
    start: int = 0

    def with_leading_axes(self, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        """Return q and k with the axes of the score in front of its last two; None where they are of another number."""
        own = torch.broadcast_shapes(self.q.shape[:-2], self.k.shape[:-2])
        if own == shape:
            return self.q, self.k
        if own.numel() != shape.numel():
            return None
        q, k = (t.expand(*own, *t.shape[-2:]).reshape(*shape, *t.shape[-2:]) for t in (self.q, self.k))
        return q, k


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A place in another score, `whole[index]`, with the blocks and the problem of the score that was taken there."""

    whole: weakref.ref[Tensor]
    index: Any
    blocks: tuple[Block, ...]
    problem: str


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """The products in a tensor on its way to a softmax, and what happened to it.

    `forbidden`: bool, broadcastable to the tensor, the pairs that were masked so far. `problem`: what was not
    understood on the way. `made_in`: the modules that were running when the product was made. `part`: where it was
    taken from, if it is a part of another score. `mixed`: it is behind a product with a matrix, where it may be
    logits whose heads were mixed, or what attention has weighed. `away`: the last two axes that its tensor had, and the
    function by which it has others for a while. `by_pair`: it was multiplied by a factor of each pair. `terms`: other
    products that were rearranged and added.
    """

    blocks: tuple[Block, ...]
    made_in: object = None
    forbidden: Tensor | None = None
    problem: str = ""
    part: Part | None = None
    mixed: bool = False
    away: tuple[torch.Size, str] | None = None
    by_pair: bool = False
    terms: tuple[Block, ...] = ()

    def with_problem(self, problem: str) -> Score:
        """Return the score with what was not understood, if it is the first."""
        return self if self.problem else replace(self, problem=problem)

    def rearranged(self, problem: str) -> Score:
        """Return the score of a tensor in which it is not known where each pair is."""
        return replace(self, problem=self.problem or problem, forbidden=None)

    def forbid(self, pairs: Any) -> Score:
        """Forbid pairs, bool, broadcastable to the tensor; anything but a tensor forbids none."""
        if not isinstance(pairs, Tensor):
            return self
        return replace(self, forbidden=pairs if self.forbidden is None else self.forbidden | pairs)

    def rescaled(self, rescale: Callable[[Any], Any]) -> Score:
        """Return the score with other scales."""
        return replace(self, blocks=tuple([replace(block, scale=rescale(block.scale)) for block in self.blocks]))

    def with_queries_rescaled(self, rescale: Callable[[Tensor], Tensor], shape: torch.Size) -> Score:
        """Return the score with other queries, by factors that have the axes of a tensor of this shape."""
        if self.problem:
            return self
        blocks = []
        for block in self.blocks:
            aligned = block.with_leading_axes(shape[:-2])
            if aligned is None:
                return self.with_problem(f"are multiplied by factors of each head in the shape {tuple(shape)}")
            blocks.append(replace(block, q=rescale(aligned[0]), k=aligned[1]))
        return replace(self, blocks=tuple(blocks))

    def reshaped(self, before: torch.Size, after: torch.Size) -> Score:
        """Return the score of a tensor that was reshaped."""
        if self.forbidden is None or before == after:
            return self
        return replace(self, forbidden=self.forbidden.expand(before).reshape(after))

    def viewed(self, before: torch.Size, after: torch.Size, name: str) -> Score:
        """Return the score of a tensor that has other axes now by the function `name`, with its elements in order."""
        home = self.away[0] if self.away else before[-2:]
        return replace(self.reshaped(before, after), away=None if after[-2:] == home else (home, name))

    def at(self, tensor: Tensor, index: Any, name: str) -> Score:
        """Return the score of `tensor[index]`, which the function `name` has taken of this score's tensor.

        Known are the heads and sequences that are taken by an index; queries or keys that are taken are a problem.
        """
        leading = None if self.problem or self.away else _leading(index, tensor.ndim)
        blocks = [] if leading is None else [block.with_leading_axes(tensor.shape[:-2]) for block in self.blocks]
        if leading is None or None in blocks:
            part = self.rearranged(f"pass through {name}")
        else:
            index = (*leading, slice(None), slice(None))
            taken = []
            for block, (q, k) in zip(self.blocks, blocks, strict=True):  # pyright: ignore[reportGeneralTypeIssues]
                q, k = (t.expand(*tensor.shape[:-2], *t.shape[-2:])[index] for t in (q, k))
                taken.append(replace(block, q=q, k=k, pairs=Pairs((*q.shape[:-1], k.shape[-2]), block.pairs)))
            forbidden = None if self.forbidden is None else self.forbidden.expand(tensor.shape)[index]
            part = replace(self, blocks=tuple(taken), forbidden=forbidden)
        return replace(part, part=Part(weakref.ref(tensor), index, part.blocks, part.problem))

    def is_of(self, tensor: Tensor, index: Any) -> bool:
        """Tell whether it is `tensor[index]`, to which nothing happened since but a mask or a bias."""
        part = self.part
        return (
            part is not None
            and part.whole() is tensor
            and (part.blocks is self.blocks and part.problem == self.problem)
            and (index is part.index or _same_index(index, part.index))
        )

    def put_back(self, tensor: Tensor, index: Any, whole: Score) -> Score:
        """Return the score of the whole tensor, with the pairs that this part of it forbids."""
        if self.forbidden is None:
            return whole
        forbidden = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
        forbidden[index] = self.forbidden
        return whole.forbid(forbidden)

    def terms_of_a_bias(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the operands of all products in it, [..., T, d] each."""
        return tuple([(block.q, block.k) for block in (*self.blocks, *self.terms)])

    def are_logits(self, shape: torch.Size) -> bool:
        """Tell whether a tensor of this shape can be logits: behind a mixture only with the axes of the product."""
        before = self.blocks[0].pairs.shape
        return not self.mixed or (shape.numel() == math.prod(before) and all(size in before for size in shape[-2:]))

    def may_be_of_other_heads(self, shape: torch.Size) -> bool:
        """Tell whether a tensor of this shape can be logits of the same pairs and another number of heads."""
        before = self.blocks[0].pairs.shape
        return self.mixed and len(shape) > 3 and sorted(shape[-2:]) == sorted(before[-2:])

    def call(self, tensor: Tensor, dimension: int | None, kernel: AttentionKernel = KERNEL) -> AttentionCall:
        """Return the attention that a softmax of the tensor over a dimension is, or another function of its elements
        that the kernel names."""
        logits, first = tensor.detach(), self.blocks[0]
        width = max([block.start + block.k.shape[-2] for block in self.blocks])
        problem = self.problem or (f"pass through {self.away[1]}" if self.away else "")
        fits = logits.ndim > 1 and logits.shape[-2] == first.q.shape[-2] and logits.shape[-1] >= width
        if dimension not in (-1, logits.ndim - 1) or not fits:
            problem = problem or f"of shape {tuple(logits.shape)} meet a softmax over dimension {dimension}"
        allowed = logits != -torch.inf
        if self.forbidden is not None and not problem:
            allowed = allowed & ~self.forbidden
        q, k, scale = first.q, first.k, first.scale
        if len(self.blocks) > 1 and not problem:
            leading = torch.broadcast_shapes(*(block.k.shape[:-2] for block in self.blocks))
            keys = [(block.k * block.scale).expand(*leading, *block.k.shape[-2:]) for block in self.blocks]
            k, scale = torch.cat(keys, -2), 1.0
            allowed = torch.cat([columns_of(allowed, block) for block in self.blocks], -1)
        elif allowed.shape[-1:] != k.shape[-2:-1]:
            allowed = columns_of(allowed, first)
        if allowed.shape[:-2] != q.shape[:-2] and not problem:  # after a reshape
            leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
            if allowed.shape[:-2].numel() == leading.numel():
                allowed = allowed.reshape(*leading, *allowed.shape[-2:])
        entering = columns_of(logits, first) if len(self.blocks) == 1 else None
        return AttentionCall(
            kernel,
            _nothing,
            q,
            k,
            None,
            scale,
            attn_mask=allowed,
            entering=entering,
            by_pair=self.by_pair,
            terms=tuple([(block.q, block.k) for block in self.terms]),
            problem=problem,
            made_in=self.made_in,
        )


def joined(parts: Sequence[tuple[Tensor, Score | None]], dimension: int, result: Tensor) -> Score:
    """Return the score of tensors that are joined along a dimension, of which some are scores."""
    scores = [score for _, score in parts if score is not None]
    first = max(scores, key=lambda score: bool(score.problem))
    if dimension not in (-1, result.ndim - 1):
        return first.rearranged(f"are joined along dimension {dimension}")
    blocks, masks, start = [], [], 0
    for tensor, score in parts:
        blocks += [] if score is None else [replace(block, start=block.start + start) for block in score.blocks]
        masks.append((tensor, None if score is None else score.forbidden))
        start += tensor.shape[-1]
    score = replace(first, blocks=tuple(blocks), forbidden=None, part=None)
    if not all(_same_tensor(block.q, blocks[0].q) for block in blocks):
        score = score.with_problem("are joined with those of other queries")
    if any(forbidden is not None for _, forbidden in masks):
        score = score.forbid(
            torch.cat(
                [
                    torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
                    if forbidden is None
                    else forbidden.expand(tensor.shape)
                    for tensor, forbidden in masks
                ],
                -1,
            )
        )
    return score


def summed(one: Score, other: Score) -> Score | None:
    """Return the score of the sum of two, q₁ k₁ᵀ + q₂ k₂ᵀ = [q₁ q₂] [k₁ k₂]ᵀ, whose tensors have the same shape.

    None where these are not two whole products of one attention.
    """
    if not len(one.blocks) == len(other.blocks) == 1 or one.made_in != other.made_in:
        return None
    if any(each.by_pair or each.part is not None or each.away is not None for each in (one, other)):
        return None
    a, b = one.blocks[0], other.blocks[0]
    leading = torch.broadcast_shapes(a.q.shape[:-2], a.k.shape[:-2])
    if leading != torch.broadcast_shapes(b.q.shape[:-2], b.k.shape[:-2]) or a.start or b.start:
        return None
    queries, scale = (a.q, b.q), a.scale
    if isinstance(a.scale, Tensor) or isinstance(b.scale, Tensor) or a.scale != b.scale:
        wide = torch.promote_types(a.q.dtype, torch.float32)
        queries, scale = (a.q.to(wide) * a.scale, b.q.to(wide) * b.scale), 1.0
    q, k = (
        torch.cat([each.to(queries[0].dtype).expand(*leading, *each.shape[-2:]) for each in both], -1)
        for both in (queries, (a.k, b.k))
    )
    score = replace(one, blocks=(Block(q, k, Pairs(a.pairs.shape), scale),), terms=(*one.terms, *other.terms))
    return score.forbid(other.forbidden)


def with_heads_from(axis: int, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Return products whose heads are on an axis, from the end, with them before the last two."""
    return tuple(replace(block, q=heads_from(axis, block.q), k=heads_from(axis, block.k)) for block in blocks)


def columns_of(tensor: Tensor, block: Block) -> Tensor:
    """Return the columns of a score that are one of its products."""
    return tensor[..., block.start : block.start + block.k.shape[-2]]


def _leading(index: Any, axes: int) -> tuple[Any, ...] | None:
    """Return the part of an index that is for the axes in front of the last two; None where it is not for them alone
    or does more than to take a part of an axis or to add one."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(each is None or each is Ellipsis or type(each) in (int, slice) for each in index):
        return None
    missing = [slice(None)] * (axes - sum(each is not None and each is not Ellipsis for each in index))
    where = index.index(Ellipsis) if Ellipsis in index else len(index)
    full = [*index[:where], *missing, *index[where + 1 :]]
    return tuple(full[:-2]) if full[-2:] == [slice(None), slice(None)] else None


def _same_index(one: Any, other: Any) -> bool:
    """Tell whether two indices are equal, of whose tensors the values are not read."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_index, one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return type(one) is type(other) and one == other


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are one, or views of the same elements."""
    if one is other:
        return True
    base = one if one._base is None else one._base
    return (
        base is (other if other._base is None else other._base)
        and (one.shape == other.shape and one.stride() == other.stride())
        and (one.storage_offset() == other.storage_offset() and one.dtype == other.dtype)
    )


def _nothing() -> None:
    """Run what is left of an attention that was found at its softmax."""
