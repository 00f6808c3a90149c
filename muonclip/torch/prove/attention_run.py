"""One run of a copy of a model, whose attentions are recorded or, by an earlier recording, get the same results again.

With the same results nothing behind an attention can tell that its weights were changed, unless these reach it by
another way.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from muonclip.core.attention_mask import replaces
from muonclip.torch.observe import (
    AttentionCall,
    Block,
    Score,
    ScoreTracker,
    bind,
    derivatives_in_place,
    functions,
    graph_task,
    handling,
)
from muonclip.torch.prove.sample import Sample

_CAPS = functions("tanh", "tanh_", "clamp", "clamp_", "clamp_max", "clamp_max_", "minimum")
_FILLS = functions("masked_fill", "masked_fill_", "where")


@dataclass(slots=True, eq=False)
class SeenCall:
    """One call of attention: which one of those that a module made in its run, a sample of its tensors, and what the
    kernel or the softmax returned; `random_state`: of the CPU, afterwards."""

    module: str
    number: int
    sample: Sample | None
    result: Any = None
    random_state: Tensor | None = None


class AttentionRun(ScoreTracker):
    """Sees the attentions of a run in `calls`, and in `ran` the names of the modules that run.

    `heads_of`: how many heads a call of a module has, by its name and which one it is; None where nothing is asked.
    `earlier`: the calls of a run whose results these get.
    """

    observes = True
    owner: object = None

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        heads_of: Callable[[str, int], int | None],
        earlier: Sequence[SeenCall] = (),
    ) -> None:
        super().__init__(self._written_out)
        self.graph_task = graph_task()
        self.calls: list[SeenCall] = []
        self.ran: set[str] = set()
        self._heads_of, self._earlier = heads_of, earlier
        self._running: list[tuple[str, int]] = []
        self._runs = itertools.count()
        self._numbers: dict[tuple[str, int], int] = {}
        self._entering: Score | None = None
        self._capped: dict[int, tuple[Tensor, tuple[Block, ...]]] = {}  # what a soft cap got, by the id of the pairs
        self._at_a_softmax: SeenCall | None = None
        for name, each in module.named_modules():
            if isinstance(each, torch.jit.ScriptModule):  # which takes no hooks
                continue
            path = f"{prefix}{name}".removesuffix(".")
            each.register_forward_pre_hook(functools.partial(self._enter, path), prepend=True)
            each.register_forward_hook(self._leave)

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.ran.add(name)
        self._running.append((name, next(self._runs)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

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
        if tracked and (func in _CAPS or _fills_by_a_cap(func, args, kwargs)):
            for tensor, score in tracked:
                for block in score.blocks:
                    self._capped.setdefault(id(block.pairs), (tensor.detach().clone(), score.blocks))
        return super().run(func, args, kwargs)

    def attention(self, call: AttentionCall) -> Any:
        """Make a call of a kernel, or return what it returned earlier."""

        def run() -> Any:
            # Not every kernel has a backward on every device; and one may call another one.
            with self.left(), torch.no_grad(), handling(None):
                return tree_map(_numbers_for_zeros, (call.run_in_trace or call.run)())

        return self._result_of(self._see(call, self._running[-1]), run)

    def leave_out(self, reason: object) -> None:
        """Leave a call to the steps, of which it is told then that it was not observed."""

    def _attend(self, tensor: Tensor, score: Score, dimension: int | None) -> None:
        self._entering = score
        super()._attend(tensor, score, dimension)

    def _written_out(self, call: AttentionCall) -> None:
        assert self._entering is not None
        # Product and softmax may be in modules of their own: what runs both is what is observed.
        made = cast("list[tuple[str, int]]", call.made_in)
        where = [one for one, other in zip(made, self._running, strict=False) if one == other][-1]
        self._at_a_softmax = self._see(call, where, self._capped.get(id(self._entering.blocks[0].pairs)))

    def _see(
        self,
        call: AttentionCall,
        where: tuple[str, int],
        capped: tuple[Tensor, Sequence[Block]] | None = None,
    ) -> SeenCall:
        number = self._numbers[where] = self._numbers.get(where, -1) + 1
        heads = self._heads_of(where[0], number)
        with torch._C.DisableTorchFunction():
            sample = None if heads is None else Sample.of(call, heads, capped)
        self.calls.append(SeenCall(where[0], number, sample))
        return self.calls[-1]

    def _result_of(self, seen: SeenCall, run: Callable[[], Any]) -> Any:
        index = len(self.calls) - 1
        if index < len(self._earlier):
            seen.result, state = self._earlier[index].result, self._earlier[index].random_state
            if state is not None:
                torch.set_rng_state(state)  # as after a dropout in it
        else:
            seen.result = tree_map(_detached, run())
            seen.random_state = torch.get_rng_state()
        return tree_map(_copied, seen.result)  # the model may write into it


def _numbers_for_zeros(value: Any) -> Any:
    """Replace the result of a kernel that does not run in a trace: behind zeros nothing would move."""
    is_zero = isinstance(value, Tensor) and value.is_floating_point() and not value.any()
    return torch.randn_like(value) if is_zero else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _fills_by_a_cap(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a number takes the place of logits without forbidding their pairs."""
    arguments = bind(func, args, kwargs)
    value = arguments.get("value", arguments.get("input"))
    value = value.detach() if isinstance(value, Tensor) else value
    single = not isinstance(value, Tensor) or value.numel() == 1
    return value is not None and single and not bool(replaces(value))
