"""The calls in a trace of operations whose inside is not seen, each kind of which is put to the test once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.discover.applied_functions import host_apply
from muonclip.torch.discover.opaque_operations import Operation, is_linear, judge, may_be_attention, operation_of
from muonclip.torch.discover.weighed_sums import NO_LOGITS, PROJECTED, Mark, Sighting, WeighedSums, joint_of, tensors_in
from muonclip.torch.observe import handling


class OpaqueCalls:
    """Makes these calls for `sums`, to which they say what their results are. `claims`: returns how many attentions
    the tracer has recorded by now, which it may see inside."""

    def __init__(self, sums: WeighedSums, claims: Callable[[], int]) -> None:
        self._sums, self._claims = sums, claims
        self._verdicts: dict[object, Any] = {}  # by the name of an operation and the kind of call

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator of another library than torch."""
        name = str(func.overloadpacket)
        return self._call(name, func, args, kwargs, partial(func, *args, **kwargs), lambda _: False)

    def applied(self, function: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """Call an autograd function, whose inside is seen unless its result comes from nowhere."""
        if not torch._C._len_torch_dispatch_stack():  # nothing is to be seen
            return run()
        return self._call(function.__name__, host_apply(function), args, kwargs, run, self._comes_of_inputs)

    def _call(
        self, name: str, function: Any, args: Any, kwargs: Any, run: Callable[[], Any], is_seen: Callable[[Any], bool]
    ) -> Any:
        sums = self._sums
        with torch._C.DisableTorchFunction(), sums.paused():
            operation = operation_of(function, args, kwargs, self._is_projected)
            marks = [sums.known(each) for each in operation.values if isinstance(each, Tensor)]
            joint = joint_of(marks) if marks else Mark()
            of_scores = [i for i in operation.projected if sums.known(operation.values[i]).scores]
            key = name, operation.kind, *of_scores
            if key not in self._verdicts and (of_scores or may_be_attention(operation)):
                operation.keep_values()  # it may write to them
        before = self._claims(), sums.events
        result = run()
        with torch._C.DisableTorchFunction(), sums.paused():
            if is_seen(result):
                return result
            if (self._claims(), sums.events) != before:
                sums.project(result)
                return result
            mark = PROJECTED if joint.varies else joint
            if of_scores:
                mark = self._of_scores(name, operation, key, of_scores[0], joint)
            elif may_be_attention(operation):
                self._take_verdict(name, operation, key)
            for each in tensors_in(result):
                if each.is_floating_point():
                    sums.put(each, mark)
        return result

    def _of_scores(self, name: str, operation: Operation, key: object, index: int, joint: Mark) -> Mark:
        """Return what is left of scores: scores, where it is linear in them, or weights."""
        if key not in self._verdicts:
            with handling(None):
                self._verdicts[key] = is_linear(operation, index)
        mark = PROJECTED._replace(scores=joint.scores)
        return mark if self._verdicts[key] else self._sums.nonlinear(name, mark)

    def _take_verdict(self, name: str, operation: Operation, key: object) -> None:
        if key not in self._verdicts:
            with handling(None):
                self._verdicts[key] = judge(operation)
        if self._verdicts[key] == "attention":
            self._sums.found(self._sums.innermost(), f"calls {name}, whose results are those of attention")
        elif self._verdicts[key] == "linear":
            self._note(f"{NO_LOGITS} ({name}, linear in its arguments)")
        elif len(operation.projected) > 2:
            self._note(f"not clipped ({name}, out of sight, has not the results of attention)")

    def _note(self, what: str) -> None:
        self._sums.without_logits.append(Sighting(self._sums.innermost(), what))

    def _is_projected(self, value: Any) -> bool:
        is_matrix = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        return is_matrix and self._sums.known(value).projected

    def _comes_of_inputs(self, result: Any) -> bool:
        marks = [self._sums.mark(each) for each in tensors_in(result) if each.is_floating_point()]
        return all(mark is not None and mark.varies and not mark.from_nowhere for mark in marks)
