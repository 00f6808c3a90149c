"""Observers of a trained model: its attention calls fill the statistics of the modules that make them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]; imports the compiler when called

from muonclip.torch.logits import (
    AttentionMask,
    MaxLogits,
    RingStep,
    Unobservable,
    divided_heads,
    local_queries_and_keys,
    measure_max_logits,
    statistic_dtype,
    unseen,
)
from muonclip.torch.mesh import is_dtensor
from muonclip.torch.observe.attention_call import AttentionCall, broadcast_heads
from muonclip.torch.observe.handled_run import HandledRun
from muonclip.torch.observe.score_mod import ScoreMod
from muonclip.torch.observe.unclaimed import Unclaimed
from muonclip.torch.observe.whole_logits import whole_logits

_whole_logits = unseen(whole_logits)


class Observer:
    """Fills the statistics of the attentions that one module calls, in the order of its calls; where there is only one
    statistic, from all of its calls.

    `whole`: which of them are of whole logits, with what is added. `head_axis`: of the queries, from the end. `calls`:
    how many it was seen to make in a run; empty where any number is of the same attention. `written_out`: the module
    writes its attention out. `of_one_sequence`: it was found on calls that do not tell heads from sequences in their
    axis. `reads`: False where calls are made and not observed, because their logits cannot be read or the module is
    ignored. `unclaimed`: who is told what was not seen before. `owner`: on whose behalf. Where `active` is False, it
    has been taken off amid a forward.
    """

    def __init__(
        self,
        statistics: Sequence[MaxLogits],
        *,
        calls: Collection[int],
        written_out: bool,
        whole: Sequence[bool] = (),
        head_axis: int = -3,
        of_one_sequence: bool = False,
        reads: bool = True,
        unclaimed: Unclaimed | None = None,
        owner: object = None,
    ) -> None:
        self.statistics, self.calls, self.written_out, self.owner = list(statistics), calls, written_out, owner
        self.most_calls = max(calls, default=math.inf)
        self.whole = list(whole) or [False] * len(self.statistics)
        self.head_axis, self.of_one_sequence, self.reads = head_axis, of_one_sequence, reads
        self.unclaimed = unclaimed or Unclaimed()
        self.active = True

    def become(self, other: Observer) -> None:
        """Observe as another one of the same module does, also in the runs that are under way."""
        owner = self.owner
        vars(self).update(vars(other))
        self.owner = owner

    def __deepcopy__(self, memo: object) -> None:
        """Leave a copy of the model unobserved by the optimizer of the original."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


class ObserverRun(HandledRun):
    """One run of an observed module. `observes`: whether it was entered with gradients, as the training does."""

    def __init__(self, observer: Observer, *, observes: bool) -> None:
        super().__init__()
        self.observer, self.observes, self.owner = observer, observes, observer.owner
        self.calls = 0

    def attention(self, call: AttentionCall) -> Any:
        """Make a call and take it into its statistic."""
        if not self.observer.active or not self.observer.reads:
            return call.run()
        if call.problem and not call.kernel.written_out:
            self.observer.unclaimed.note(
                f"QK-Clip could not observe an attention as it was called in this step: {call.problem}. Call it as in "
                "the first step, or declare the attention and fill its MaxLogits yourself."
            )
            return call.run()
        if call.problem and not _is_readable(call):
            self.observer.unclaimed.note(
                f"QK-Clip cannot watch an attention whose logits {call.problem} before the {call.kernel.weights_by}: "
                "which of its pairs are masked is not known. Leave it alone, QKClip(model, ignore=(name,))."
            )
            return call.run()
        statistic, is_whole = self._next_statistic(call.with_heads_from(self.observer.head_axis))
        call = call.with_heads_from(self.observer.head_axis)
        if is_whole:
            return self._with_added(call, statistic)
        if call.by_pair:
            self.observer.unclaimed.note(
                "QK-Clip: the logits of an attention were multiplied by a factor of each pair of query and key in this "
                "step, and not when it was found. Give example_inputs that reach this, too."
            )
            return call.run()
        if call.run_in_ring is not None:
            return call.run_in_ring(functools.partial(self._take_step, call, statistic))
        if call.run_with_max is not None:
            result, maxima = call.run_with_max()
            statistic.update(maxima)
            return result
        if call.run_with_lse is None:
            self._take_in(call, statistic, None)  # first: it may raise before other ranks are waited for
            return call.run()
        result, lse = call.run_with_lse()
        self._take_in(call, statistic, lse)
        return result

    def _take_in(self, call: AttentionCall, statistic: MaxLogits, lse: Tensor | None) -> None:
        """Take a call into a statistic; what is wrong with it is left to the next step, unless ranks would wait."""
        divided = divided_heads()
        if divided is not None:
            statistic.sequence_ranks |= divided.ranks
        try:
            take_in(call, statistic, lse)
        except (ValueError, RuntimeError) as error:
            is_ours = not isinstance(error, torch.OutOfMemoryError) and not torch.compiler.is_compiling()
            if not is_ours or is_dtensor(call.q):
                raise
            self.observer.unclaimed.note(str(error))

    def _take_step(self, call: AttentionCall, statistic: MaxLogits, step: RingStep) -> None:
        statistic.sequence_ranks |= step.ranks
        self._take_in(replace(call, q=step.q, k=step.k, is_causal=step.is_causal), statistic, None)

    def _with_added(self, call: AttentionCall, statistic: MaxLogits) -> Any:
        logits = _whole_logits(call, statistic.heads_in(call.heads_first(call.q)))
        result = call.run()
        if logits is None:
            self.observer.unclaimed.note(
                "QK-Clip: what is added to the logits of an attention depended on its queries when the attention was "
                "found, and was not to be seen in this step. Call it as in the first step."
            )
            return result
        statistic.update(logits.amax((0, 2, 3)))
        return result

    def leave_out(self, reason: Unobservable) -> None:
        """Remember why a call was not observed."""
        if not self.observer.active or not self.observer.reads:
            return
        self.calls += 1
        self._statistic()[0].leave_out(reason)

    def check_calls(self) -> None:
        """Have the forward searched at the end of a run that made another number of calls than any that was seen: which
        heads they were is not known.

        A run without any call is not one of the module's attention.
        """
        if self.calls:
            self._search_while(lambda: bool(self.observer.calls) and self.calls not in self.observer.calls)

    def _next_statistic(self, call: AttentionCall) -> tuple[MaxLogits, bool]:
        self.calls += 1
        if self.calls > self.observer.most_calls:
            self._search_while(lambda: self.calls > self.observer.most_calls)
        if self.observer.of_one_sequence and not self._is_of_one_sequence(call):
            self._search_while(lambda: self.observer.of_one_sequence)
        return self._statistic()

    def _statistic(self) -> tuple[MaxLogits, bool]:
        index = min(self.calls, len(self.observer.statistics)) - 1
        return self.observer.statistics[index], self.observer.whole[index]

    def _is_of_one_sequence(self, call: AttentionCall) -> bool:
        if call.q.ndim == 4 or call.q.is_nested:
            return True
        q = call.heads_first(call.q)
        return math.prod(q.shape[:-2]) <= self.observer.statistics[0].heads_in(q)

    def _search_while(self, is_new: Callable[[], bool]) -> None:
        """Have the forward searched as long as something in it is new. What stays so is left to the step to say; where
        nothing can be searched, all calls of a module of one attention are of that one."""
        unclaimed = self.observer.unclaimed
        searched: bool | None = not torch.compiler.is_compiling() or None
        while searched and is_new():
            searched = unclaimed.search_again()
        if is_new() and (searched is not None or len(self.observer.statistics) > 1 or self.observer.of_one_sequence):
            unclaimed.note(self._unexpected())

    def _unexpected(self) -> str:
        if self.observer.of_one_sequence and self.calls in (self.observer.calls or (self.calls,)):
            return (
                "QK-Clip: an attention was found on a single sequence, in an axis with its heads, and was called with "
                "several now. Whether heads or sequences come first is not known: give example_inputs of several."
            )
        seen = " or ".join(map(str, sorted(self.observer.calls)))
        return (
            f"QK-Clip: a module called attention {self.calls} times where it was seen to call it {seen}. Which heads "
            "these are is not known: let each attention be a module of its own, or give example_inputs that reach all "
            "of them."
        )


@unseen
def take_in(call: AttentionCall, statistic: MaxLogits, lse: Tensor | None) -> None:
    """Take a call into a statistic; its queries and keys are this rank's or, as DTensors, those of all ranks."""
    q, k, scale = call.q, call.k, call.scale_or_default()
    if q.is_meta:
        return
    if q.is_nested:
        raise RuntimeError(
            "QK-Clip cannot observe nested tensors of the strided layout. Use layout=torch.jagged, or padded or packed "
            "sequences with a mask."
        )
    q, k = call.heads_first(q.detach()), call.heads_first(k.detach())
    if is_dtensor(q):
        q, k = local_queries_and_keys(q, k)
    if isinstance(scale, Tensor):  # which is not read, because the host would wait for it
        dtype = statistic_dtype(q, k)
        q, k, scale = q.to(dtype) * _local(scale), k.to(dtype), 1.0
    q, k, dense = broadcast_heads(q, k, _local(call.dense_mask()), statistic.heads_in(q))
    mask = AttentionMask(
        q.shape[-2],
        k.shape[-2],
        call.is_causal,
        call.window,
        _local(call.document_ids),
        dense,
        _local(call.key_document_ids),
        _local(call.query_offset),
    )
    if call.score_mod is not None:
        _take_in_modified(call.score_mod, statistic, q, k, scale, mask)
    else:
        statistic.take(q, k, scale=scale, mask=mask, lse=lse)


@_disable_dynamo
def _take_in_modified(
    score_mod: ScoreMod, statistic: MaxLogits, q: Tensor, k: Tensor, scale: float, mask: AttentionMask
) -> None:
    """Take scores into a statistic as their score_mod leaves them."""
    scores = score_mod.modify(q, k, scale)
    mask = replace(mask, condition=scores.condition)
    if scores.slopes is None:
        statistic.observe(scores.q, scores.k, scale=scores.scale, mask=mask)
    else:
        maxima = measure_max_logits(scores.q, scores.k, scale=scores.scale, mask=mask, slopes=scores.slopes)
        statistic.update(maxima)


def _is_readable(call: AttentionCall) -> bool:
    """Tell whether the mask of a call is one of the pairs of its queries and keys."""
    if call.q.ndim < 2 or not isinstance(call.attn_mask, Tensor):
        return call.q.ndim >= 2
    leading = torch.broadcast_shapes(call.q.shape[:-2], call.k.shape[:-2])
    mask = call.attn_mask.shape
    alike = mask[:-2].numel() == leading.numel() or all(
        one in (1, other) for one, other in zip(reversed(mask[:-2]), reversed(leading), strict=False)
    )
    return alike and mask[-2:] == (call.q.shape[-2], call.k.shape[-2])


def _local(tensor: Any) -> Any:
    return tensor.to_local() if is_dtensor(tensor) else tensor
