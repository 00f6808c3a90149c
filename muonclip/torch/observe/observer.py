"""Observers of a trained model: its attention calls fill the statistics of the modules that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muonclip.torch.logits import (
    AttentionMask,
    MaxLogits,
    Unobservable,
    local_queries_and_keys,
    measure_max_logits,
    statistic_dtype,
    unseen,
)
from muonclip.torch.observe.attention_call import AttentionCall, broadcast_heads
from muonclip.torch.observe.eager import ScoreTracker
from muonclip.torch.observe.handlers import current_handler, graph_task
from muonclip.torch.observe.score_mod import ScoreMod
from muonclip.torch.observe.whole_logits import whole_logits

_whole_logits = unseen(whole_logits)


class Observer:
    """Fills the statistics of the attentions that one module calls, in the order of its calls; where there is only one
    statistic, from all of its calls.

    `whole`: which of them are of whole logits, with what is added. `head_axis`: of the queries, from the end. `calls`:
    how many it makes in a run; None where that varies. `written_out`: the module writes its attention out. `owner`: on
    whose behalf. Where `active` is False, calls are made and not observed: it has been taken off amid a forward of
    another thread, or its module is ignored.
    """

    def __init__(
        self,
        statistics: Sequence[MaxLogits],
        *,
        calls: int | None,
        written_out: bool,
        whole: Sequence[bool] = (),
        head_axis: int = -3,
        owner: object = None,
    ) -> None:
        self.statistics, self.expected, self.written_out, self.owner = list(statistics), calls, written_out, owner
        self.whole = list(whole) or [False] * len(self.statistics)
        self.head_axis, self.active = head_axis, True

    def __deepcopy__(self, memo: object) -> None:
        """Leave a copy of the model unobserved by the optimizer of the original."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


class ObserverRun:
    """One run of an observed module. `observes`: whether it was entered with gradients, as the training does."""

    def __init__(self, observer: Observer, *, observes: bool) -> None:
        self.observer, self.observes, self.owner = observer, observes, observer.owner
        self.graph_task = graph_task()
        self.calls = 0
        self.tracker: ScoreTracker | None = None

    def follow_products(self) -> None:
        """See attention that is written out, until `end`."""
        self.tracker = ScoreTracker(self._written_out)
        self.tracker.__enter__()

    def end(self) -> None:
        """Look no more."""
        if self.tracker is not None:
            self.tracker.__exit__(None, None, None)
            self.tracker = None

    def attention(self, call: AttentionCall) -> Any:
        """Make a call and take it into its statistic."""
        if not self.observer.active:
            return call.run()
        if call.problem and not self.observer.written_out:
            raise RuntimeError(
                f"QK-Clip cannot observe an attention as it is called now: {call.problem}. Call it as in the first "
                "step, or declare the attention and fill its MaxLogits yourself."
            )
        statistic, is_whole = self._next_statistic()
        call = call.with_heads_from(self.observer.head_axis)
        if is_whole:
            return self._with_added(call, statistic)
        if call.by_pair:
            raise RuntimeError(
                "QK-Clip: the logits of an attention are multiplied by a factor of each pair of query and key now, and "
                "were not when it was found. Give example_inputs that reach this, too."
            )
        if call.run_with_max is not None:
            result, maxima = call.run_with_max()
            statistic.update(maxima)
            return result
        if call.run_with_lse is None:
            take_in(
                call, statistic, None
            )  # first: what cannot be observed is refused before other ranks are waited for
            return call.run()
        result, lse = call.run_with_lse()
        take_in(call, statistic, lse)
        return result

    def _with_added(self, call: AttentionCall, statistic: MaxLogits) -> Any:
        logits = _whole_logits(call, statistic.heads_in(call.heads_first(call.q)))
        if logits is None:
            raise RuntimeError(
                "QK-Clip: what is added to the logits of an attention depended on its queries when the attention was "
                "found, and is not to be seen now. Call it as in the first step."
            )
        result = call.run()
        statistic.update(logits.amax((0, 2, 3)))
        return result

    def leave_out(self, reason: Unobservable) -> None:
        """Remember why a call was not observed."""
        if not self.observer.active:
            return
        statistic, _ = self._next_statistic()
        statistic.leave_out(reason)

    def check_calls(self) -> None:
        """Raise RuntimeError at the end of a run that made too few calls to know which heads they were.

        A run without any call is not one of the module's attention.
        """
        if self.observer.expected is not None and 0 < self.calls < self.observer.expected:
            raise RuntimeError(self._unexpected())

    def _written_out(self, call: AttentionCall) -> None:
        if current_handler() is self:
            self.attention(call)

    def _next_statistic(self) -> tuple[MaxLogits, bool]:
        self.calls += 1
        if self.observer.expected is not None and self.calls > self.observer.expected:
            raise RuntimeError(self._unexpected())
        index = min(self.calls, len(self.observer.statistics)) - 1
        return self.observer.statistics[index], self.observer.whole[index]

    def _unexpected(self) -> str:
        return (
            f"QK-Clip: a module called attention {self.calls} times where it was seen to call it "
            f"{self.observer.expected}, or one inside it did that was not seen before. Which heads these are is not "
            "known: let each attention be a module of its own, or give example_inputs that reach all of them."
        )


class Unclaimed:
    """The calls in a model that no module makes which is known to call attention."""

    def __init__(self) -> None:
        self.calls = 0
        self.left_out: Unobservable | None = None


class UnclaimedRun:
    """One forward of a model, in which unclaimed calls are counted."""

    observes = True

    def __init__(self, owner: Unclaimed) -> None:
        self.owner: object = owner
        self.unclaimed, self.graph_task = owner, graph_task()

    def attention(self, call: AttentionCall) -> Any:
        """Make a call."""
        self.unclaimed.calls += 1
        return call.run()

    def leave_out(self, reason: Unobservable) -> None:
        """Remember why a call was not observed, if gradients may come from it."""
        if reason.trains:
            self.unclaimed.left_out = reason
            self.unclaimed.calls += 1


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
    if isinstance(q, DTensor):
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


@torch.compiler.disable(reason="QK-Clip reads the score_mod of FlexAttention")
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


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
