"""Forwards of copies of one model on the same inputs, some of whose weights are scaled by powers of two.

These commute with rounding, so that results are compared to the bit, in the precision that the model runs in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from muonclip.torch.discover import Inputs, Replica, replica_of
from muonclip.torch.heads import HeadRows, scale_heads
from muonclip.torch.observe import handling
from muonclip.torch.prove.attention_run import AttentionRun, Recording
from muonclip.torch.prove.sample import tensors_in

Scaling = Sequence[tuple[HeadRows, Tensor]]
"""Rows of the model, each with a factor for every head."""

_NOISE = 2**-6  # of the largest, where a kernel is not deterministic
_HALF = 2**-5  # of the largest, where small numbers are not normal ones


def run_copy(
    model: nn.Module,
    inputs: Inputs,
    heads_of: Callable[[str, int], tuple[int, int] | None],
    around: Collection[str] = (),
    earlier: Recording | None = None,
    values: Callable[[Tensor], Tensor] = lambda values: values,
    prepare: Callable[[Replica], None] = lambda copy: None,
    *,
    training: bool,
    keeps_graph: bool = False,
    keeps_results: bool = False,
    widens: bool = False,
    watch: Callable[[AttentionRun], AbstractContextManager[object]] = nullcontext,
) -> Recording:
    """Run a copy of a model, or of the part of it that the inputs are for. Raises whatever the model raises.

    `heads_of`, `around`, `earlier`: as of `AttentionRun`. `values`: those of its parameters, by the model's. `prepare`
    changes the copy. `keeps_graph`: for a model that takes derivatives itself. `keeps_results`: as of `AttentionRun`.
    `widens`: float16 becomes bfloat16, which has room for powers of two. `watch`: what is entered with the run.
    """
    module, prefix = model.get_submodule(inputs.module), prefix_of(inputs)
    with (
        replica_of(module, inputs.args, inputs.kwargs, values, prefix=prefix, training=training) as copy,
        torch.enable_grad(),  # without, some models call other kernels
        nullcontext() if keeps_graph else saved_tensors_hooks(_nothing, _not_asked_for),
        warnings.catch_warnings(action="ignore"),  # of checkpointing, for inputs that need no gradient
        _widened(copy) if widens else nullcontext(),
    ):
        prepare(copy)
        run = AttentionRun(copy.module, prefix, heads_of, around, earlier, keeps_results=keeps_results)
        with handling(run), run, watch(run):
            returned = copy.run()
        recording = run.end()
    recording.add_returned(each.detach().clone() for each in tensors_in(returned))
    return recording


def prefix_of(inputs: Inputs) -> str:
    """Return the beginning of the names of modules in the part of a model that inputs are for."""
    return f"{inputs.module}." if inputs.module else ""


class Experiments:
    """Runs a model, or the part of it that `inputs` are for, with some rows scaled.

    `heads_of`, `around`: as of `AttentionRun`. `base`: the run in which nothing is scaled. Raises whatever the model
    raises.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        heads_of: Callable[[str, int], tuple[int, int] | None],
        around: Collection[str],
        *,
        training: bool,
    ) -> None:
        self._model, self._inputs, self._training = model, inputs, training
        self._heads_of, self._around = heads_of, around
        self._names = {module: name for name, module in model.named_modules()}
        self._prefix = prefix_of(inputs)
        self._is_noisy: bool | None = None
        self._keeps_graph, self._widens = False, _is_half(model)
        try:
            self.base = self.run((), is_base=True)
        except Exception:  # whatever the model raises; perhaps it takes derivatives itself, or insists on float16
            self._keeps_graph, self._widens = True, False
            self.base = self.run((), is_base=True)

    def end(self) -> None:
        """Forget the results of attention, which would wait for the garbage collector with whoever asks."""
        self.base = Recording()

    def run(self, scaling: Scaling, *, replayed: bool = False, is_base: bool = False) -> Recording:
        """Run the model with these rows scaled. `replayed`: every attention returns what it did in `base`."""
        return run_copy(
            self._model,
            self._inputs,
            self._heads_of,
            self._around,
            self.base if replayed else None,
            _NumbersForZeros(),
            lambda copy: self._scale(copy, scaling),
            training=self._training,
            keeps_graph=self._keeps_graph,
            keeps_results=is_base,
            widens=self._widens,
        )

    def reaches(self, rows: HeadRows) -> bool:
        """Tell whether a weight is in what is run."""
        name = self._names.get(rows.module)
        return name is not None and f"{name}.".startswith(self._prefix)

    def differ(self, one: Tensor | None, other: Tensor | None, *, by_powers_of_two: bool = False) -> bool:
        """Tell whether a tensor of one run is another one in the other run.

        `by_powers_of_two`: each element times such a number is the same.
        """
        if one is None or other is None or one.shape != other.shape:
            return one is not other
        if torch.equal(one, other) or not one.numel():
            return False
        if not one.is_floating_point():
            return True
        a, b = (each.double() for each in (one, other))
        equal = (a == b) | (a.isnan() & b.isnan())
        if by_powers_of_two:
            equal = equal | (torch.frexp(a).mantissa == torch.frexp(b).mantissa)
            equal = equal | (b.abs() < torch.finfo(other.dtype).tiny)  # which is not exact
        if bool(equal.all()):
            return False
        away = (a - b).masked_fill(equal, 0).abs().max()
        is_small = bool(away <= _NOISE * a.masked_fill(~a.isfinite(), 0).abs().max())
        return not is_small or not self._noisy()

    def scores_differ(self, expected: Tensor, scores: Tensor, dtype: torch.dtype) -> bool:
        """Tell whether the logits [B, heads, T, Tk] of queries of a dtype are other ones. In half precision a factor
        may leave numbers too small to be exact."""
        if dtype != torch.float16:
            return self.differ(expected, scores)
        away, largest = ((each.abs().amax((0, 2, 3))) for each in (expected - scores, expected))
        return not bool((away <= _HALF * largest).all())

    def is_rounding(self, away: Tensor, largest: Tensor, dtype: torch.dtype) -> bool:
        """Tell whether differences of at most `away` [heads] between numbers that were computed of tensors of a dtype
        are not more than rounding of each head's largest explains."""
        rounding = max(8 * torch.finfo(dtype).eps, 2**-14)
        return bool((away <= rounding * largest).all()) or (bool((away <= _NOISE * largest).all()) and self._noisy())

    def _noisy(self) -> bool:
        """Tell whether the model returns other bits when it runs again."""
        if self._is_noisy is None:
            self._is_noisy = False
            again = self.run(())
            pairs = zip(self.base.returned, again.returned, strict=True)
            self._is_noisy = any(self.differ(one, other) for one, other in pairs)
        return self._is_noisy

    def _scale(self, copy: Replica, scaling: Scaling) -> None:
        for rows, factors in scaling:
            name = f"{self._names[rows.module]}.".removeprefix(self._prefix).removesuffix(".")
            module = copy.module.get_submodule(name)
            in_copy = dataclasses.replace(rows, module=module)
            for parameter, axis in in_copy.parameters():
                on_device = factors.to(parameter.device)
                copy.change(parameter, functools.partial(scale_heads, in_copy, parameter, axis, on_device))


class _NumbersForZeros:
    """Random numbers in place of parameters that are zero, as adapters and gates are in the beginning; the same ones in
    every run, and on every rank."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, values: Tensor) -> Tensor:
        if not values.numel() or bool(values.any()):
            return values
        if values.device not in self._generators:
            self._generators[values.device] = torch.Generator(values.device).manual_seed(0)
        numbers = torch.randn(values.shape, generator=self._generators[values.device], device=values.device)
        return (numbers / math.sqrt(max(1, math.prod(values.shape[1:])))).to(values.dtype)


def _is_half(model: nn.Module) -> bool:
    """Tell whether a model computes in float16."""
    return any(each.dtype == torch.float16 for each in model.parameters()) or bool(_half_autocasts(model))


def _half_autocasts(model: nn.Module) -> list[str]:
    """Return the types of a model's devices on which autocast is to float16 now."""
    types = {each.device.type for each in model.parameters() if torch.amp.is_autocast_available(each.device.type)}
    return [
        each for each in types if torch.is_autocast_enabled(each) and torch.get_autocast_dtype(each) == torch.float16
    ]


@contextmanager
def _widened(copy: Replica) -> Iterator[None]:
    """Let a copy compute in bfloat16 where it would in float16."""

    def widened(value: Any) -> Any:
        return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype == torch.float16 else value

    for tensor in (*copy.module.parameters(), *copy.module.buffers()):
        if tensor.dtype == torch.float16 and id(tensor) not in copy.stand_ins:
            tensor.data = tensor.detach().to(torch.bfloat16)
            copy.own.add(id(tensor))
    copy.args, copy.kwargs = tree_map(widened, (copy.args, copy.kwargs))
    with ExitStack() as stack:
        for each in _half_autocasts(copy.module):
            stack.enter_context(torch.autocast(each, torch.bfloat16))
        yield


def _nothing(saved: object) -> None:
    """Keep nothing for a backward, which nobody asks for."""


def _not_asked_for(nothing: object) -> Tensor:
    raise AssertionError("an experiment has no backward")
