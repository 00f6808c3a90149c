"""One run of a copy of a model, whose attentions are recorded or, by an earlier recording, get the same results again.

With the same results nothing behind an attention can tell that its weights were changed, unless these reach it by
another way.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from muonclip.core.attention_mask import replaces
from muonclip.torch.observe import (
    EAGER,
    AttentionCall,
    AttentionKernel,
    Block,
    Score,
    ScoreTracker,
    bind,
    derivatives_in_place,
    functions,
    graph_task,
    handling,
    heads_from,
    with_heads_from,
)
from muonclip.torch.prove.sample import Sample, some, tensors_in
from muonclip.torch.prove.thinned import Thinned, whole

_CAPS = functions("tanh", "tanh_", "clamp", "clamp_", "clamp_max", "clamp_max_", "minimum")
_FILLS = functions("masked_fill", "masked_fill_", "where")


@dataclass(slots=True, eq=False)
class SeenCall:
    """One call of attention: which one of those that a module made in its run, a sample of its tensors, and what the
    kernel or the softmax returned; `random_state`: of the CPU and, for a result there, of its device, afterwards."""

    module: str
    number: int
    sample: Sample | None
    result: Any = None
    random_state: tuple[Tensor, ...] = ()


@dataclass(slots=True, eq=False)
class Recording:
    """Hold what a run showed: its calls of attention, what caps of logits returned, the tensors that the modules around
    attention and then the model returned, which of these came first in their module, and the names of the modules that
    ran."""

    calls: list[SeenCall] = field(default_factory=list)
    caps: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    firsts: set[int] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)

    def add_returned(self, tensors: Iterable[Tensor]) -> None:
        """Add the tensors that one module has returned."""
        self.firsts.add(len(self.returned))
        self.returned += tensors


class AttentionRun(ScoreTracker):
    """Writes a run of a module into `recording`.

    `heads_of`: how many heads a call of a module has, and on which axis from the end, by its name and which one it is;
    None where nothing is asked.
    `around`: the names of modules whose outputs are recorded. `earlier`: a run whose results attentions and caps get.
    `keeps_results`: for later runs.
    """

    observes = True
    owner: object = None

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        heads_of: Callable[[str, int], tuple[int, int] | None],
        around: Collection[str] = (),
        earlier: Recording | None = None,
        *,
        keeps_results: bool = False,
    ) -> None:
        super().__init__(self._written_out)
        self._keeps_results = keeps_results
        self.graph_task = graph_task()
        self.recording = Recording()
        self._heads_of, self._around, self._earlier = heads_of, around, earlier or Recording()
        self._running: list[tuple[str, int]] = []
        self._runs = itertools.count()
        self._caps = 0
        self._numbers: dict[tuple[str, int], int] = {}
        self._entering: tuple[Tensor, Score] | None = None
        self._capped: dict[int, tuple[Tensor, tuple[Block, ...]]] = {}  # what a cap got, by the id of the pairs
        self._at_a_softmax: SeenCall | None = None
        self.is_in_kernel = False
        for name, each in module.named_modules():
            if isinstance(each, torch.jit.ScriptModule):  # which takes no hooks
                continue
            path = f"{prefix}{name}".removesuffix(".")
            each.register_forward_pre_hook(functools.partial(self._enter, path), prepend=True)
            each.register_forward_hook(self._leave)

    def end(self) -> Recording:
        """Forget all that is large, which would wait for the garbage collector: it knows itself by its own methods.
        Returns the recording."""
        recording, self.recording, self._earlier = self.recording, Recording(), Recording()
        self._heads_of, self._entering = no_heads, None
        self._capped.clear()
        return recording

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.recording.ran.add(name)
        self._running.append((name, next(self._runs)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name, _ = self._running.pop()
        if name in self._around:
            with torch._C.DisableTorchFunction():
                self.recording.add_returned(some(each.detach()) for each in tensors_in(output))

    def running_modules(self) -> object:
        return list(self._running)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        seen, self._at_a_softmax = self._at_a_softmax, None
        return result if seen is None else self._result_of(seen, lambda: result)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.autograd.grad:  # of what runs without a graph here; what it is does not matter
            return derivatives_in_place(args, kwargs)
        tracked = self._tracked(args, kwargs) if func in _CAPS or func in _FILLS else ()
        if not tracked or not (func in _CAPS or _fills_by_a_cap(func, args, kwargs)):
            return super().run(func, args, kwargs)
        for tensor, score in tracked:
            for block in score.blocks:
                self._capped.setdefault(id(block.pairs), (tensor.detach().clone(), score.blocks))
        result = super().run(func, args, kwargs)
        index = self._caps
        if index < len(self._earlier.caps):
            with torch.no_grad():
                result = result.detach().copy_(self._earlier.caps[index])  # in place where the cap is
        self._caps += 1
        if self._keeps_results:
            self.recording.caps.append(result.detach().clone())
        return result

    def attention(self, call: AttentionCall) -> Any:
        """Make a call of a kernel, or return what it returned earlier."""

        def run() -> Any:
            # Not every kernel has a backward on every device; and one may call another one.
            self.is_in_kernel = True
            try:
                with self.left(), torch.no_grad(), handling(None):
                    return tree_map(_numbers_for_zeros, (call.run_in_trace or call.run)())
            finally:
                self.is_in_kernel = False

        return self._result_of(self._see(call, self._running[-1]), run)

    def innermost(self) -> str:
        """Return the name of the innermost module that runs."""
        return self._running[-1][0] if self._running else ""

    def leave_out(self, reason: object) -> None:
        """Leave a call to the steps, of which it is told then that it was not observed."""

    def _attend(self, tensor: Tensor, score: Score, dimension: int | None, kernel: AttentionKernel = EAGER) -> None:
        self._entering = tensor, score
        super()._attend(tensor, score, dimension, kernel)

    def _written_out(self, call: AttentionCall) -> None:
        assert self._entering is not None
        # Product and softmax may be in modules of their own: what runs both is what is observed.
        made = cast("list[tuple[str, int]]", call.made_in)
        where = [one for one, other in zip(made, self._running, strict=False) if one == other][-1]
        self._at_a_softmax = self._see(call, where)

    def _see(self, call: AttentionCall, where: tuple[str, int]) -> SeenCall:
        number = self._numbers[where] = self._numbers.get(where, -1) + 1
        heads = self._heads_of(where[0], number)
        with torch._C.DisableTorchFunction():
            sample = None if heads is None else self._sample(call, *heads)
        self.recording.calls.append(SeenCall(where[0], number, sample))
        return self.recording.calls[-1]

    def _sample(self, call: AttentionCall, heads: int, axis: int) -> Sample:
        axis = axis if call.q.ndim > 4 else -3
        call = call.with_heads_from(axis)
        if not call.kernel.written_out:
            with torch._C._EnableTorchFunction(), self.left():  # a score_mod is read by a mode of its own
                return Sample.of_kernel(call, heads)
        assert self._entering is not None
        tensor, score = self._entering
        capped = self._capped.get(id(score.blocks[0].pairs))
        if capped is not None:
            capped = heads_from(axis, capped[0]), with_heads_from(axis, capped[1])
        return Sample.of_written_out(call, heads, heads_from(axis, tensor), with_heads_from(axis, score.blocks), capped)

    def _result_of(self, seen: SeenCall, run: Callable[[], Any]) -> Any:
        index = len(self.recording.calls) - 1
        if index < len(self._earlier.calls):
            earlier = self._earlier.calls[index]
            seen.result, seen.random_state = earlier.result, earlier.random_state
            _set_random_state(seen.result, seen.random_state)  # as after a dropout in it
        else:
            seen.result = tree_map(Thinned.of, run())
            seen.random_state = _random_state(seen.result)
        result = tree_map(whole, seen.result)  # a copy: the model may write into it
        if not self._keeps_results:
            seen.result = None
        return result


def no_heads(module: str, number: int) -> None:
    """Ask nothing of any call."""


def _random_state(result: Any) -> tuple[Tensor, ...]:
    device = _cuda_device(result)
    return (torch.get_rng_state(),) if device is None else (torch.get_rng_state(), torch.cuda.get_rng_state(device))


def _set_random_state(result: Any, state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    device = _cuda_device(result)
    if device is not None:
        torch.cuda.set_rng_state(state[1], device)


def _cuda_device(result: Any) -> torch.device | None:
    tensors = (each.rows if isinstance(each, Thinned) else each for each in tree_leaves(result))
    return next((each.device for each in tensors if isinstance(each, Tensor) and each.is_cuda), None)


def _numbers_for_zeros(value: Any) -> Any:
    """Replace the result of a kernel that does not run in a trace: behind zeros nothing would move."""
    is_zero = isinstance(value, Tensor) and value.is_floating_point() and not value.any()
    return torch.randn_like(value) if is_zero else value


def _fills_by_a_cap(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a number takes the place of logits without forbidding their pairs."""
    arguments = bind(func, args, kwargs)
    value = arguments.get("value", arguments.get("input"))
    value = value.detach() if isinstance(value, Tensor) else value
    single = not isinstance(value, Tensor) or value.numel() == 1
    return value is not None and single and not bool(replaces(value))
