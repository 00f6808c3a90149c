"""One forward of a copy of the model, in which every attention is seen, and its queries and keys traced to their rows.

In evaluation mode no layer is dropped. What is seen in the forward, `tracer.py` says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from muonclip.core.parameter_roles import Use
from muonclip.torch.discover.applied_functions import Seen, run_inside, seen_autograd_functions
from muonclip.torch.discover.opaque_calls import OpaqueCalls
from muonclip.torch.discover.own_experts import take_own
from muonclip.torch.discover.parameter_uses import returned_parameters
from muonclip.torch.discover.replica import Replica, replica_of
from muonclip.torch.discover.tracer import AttentionTracer, TracedCall
from muonclip.torch.discover.weighed_sums import Sighting
from muonclip.torch.logits import MaxLogits
from muonclip.torch.observe import handling


@dataclass(slots=True, eq=False)
class Trace:
    """The calls of a traced forward, in their order.

    `paths`: the names of module and attribute in the model of each parameter among their rows, by its id.
    `statistics`: the copies of the model's, by the ids of the originals. `unclaimed`: attention in none of the calls.
    `without_logits`: what mixes activations by products without a softmax. `reached`: the names of modules that ran.
    `idle`: of those which hold a matrix that no function was called with, whether they ran or not.
    `shown`: of parameters, by their names in the model, whose rows are looked up and whose product is returned.
    `operators_of_weights`: that may make weights of scores, with the names of the modules they run in.
    """

    calls: list[TracedCall]
    paths: dict[int, tuple[str, str]]
    statistics: dict[int, MaxLogits]
    unclaimed: list[Sighting] = field(default_factory=list)
    without_logits: list[Sighting] = field(default_factory=list)
    reached: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    operators_of_weights: frozenset[tuple[str, str]] = frozenset()
    shown: Mapping[str, Use] = field(default_factory=dict[str, Use])


def trace(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, prefix: str = "", training: bool = False
) -> Trace:
    """Run `model(*args, **kwargs)` on a copy. Raises whatever the model raises; model and arguments are as before.
    `prefix`: of the names. `training`: the mode of the copy."""
    try:
        return _trace(model, args, kwargs, prefix, training=training)
    except Exception:  # whatever the model raises
        if not take_own(model, own=True):
            raise
        try:
            return _trace(model, args, kwargs, prefix, training=training)
        except Exception:
            take_own(model, own=False)
        raise


def _trace(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], prefix: str, *, training: bool) -> Trace:
    with replica_of(model, args, kwargs, _moved, prefix=prefix, training=training) as replica:
        tracer = AttentionTracer(replica.module, prefix, tree_leaves((replica.args, dict(replica.kwargs))))
        sums = tracer.sums
        opaque = OpaqueCalls(sums, lambda: len(tracer.calls))
        sums.operators = opaque.operator
        seen = seen_autograd_functions(_applied_by(tracer, opaque))
        with torch.enable_grad(), _hooks_are_ours(), handling(tracer), seen, tracer, sums:
            outputs = replica.run()
        shown = _shown(replica, tracer, outputs, whole=not prefix)
    sources = [source for call in tracer.calls for source in call.sources()]
    kept = {id(rows.parameter) for source in sources for each in (*source.candidates, source.gains) for rows in each}
    paths = {key: path for key, path in replica.paths.items() if key in kept}
    reached = frozenset(tracer.reached)
    operators = frozenset(sums.operators_of_weights)
    idle = frozenset(_idle(replica.module, prefix, tracer.used))
    return Trace(
        tracer.calls, paths, replica.statistics, sums.unclaimed(), sums.linear(), reached, idle, operators, shown
    )


def _applied_by(tracer: AttentionTracer, opaque: OpaqueCalls) -> Seen:
    """Return how autograd functions are called: one that takes a weight may be a projection, as Megatron's linears are,
    and the product inside of it is looked at."""

    def applied(function: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        if tracer.takes_matrix(function, args):
            run = partial(run_inside, function, args, kwargs, run)
        return opaque.applied(function, args, kwargs, run)

    return applied


@contextmanager
def _hooks_are_ours() -> Iterator[None]:
    """Silence torch (2.14 on) where it warns of hooks on saved tensors around selective checkpoints: they are of the
    trace."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        yield


def _shown(replica: Replica, tracer: AttentionTracer, outputs: Any, *, whole: bool) -> dict[str, Use]:
    """Name the parameters whose rows are looked up and, in a forward of the whole model, whose product is returned, or
    is not."""
    returned = returned_parameters(outputs, tracer.matrices) if whole else set[int]()
    shown: dict[str, Use] = {}
    for parameter in replica.module.parameters():
        path = replica.paths.get(id(parameter))
        if path is None or parameter.ndim < 2:
            continue
        name = ".".join(filter(None, path))
        if tracer.sums.is_looked_up(parameter):
            shown[name] = "looked up"
        elif id(parameter) in returned:
            shown[name] = "returned"
        elif returned and id(parameter) in tracer.matrices:
            shown[name] = "inner"
    return shown


def _idle(model: nn.Module, prefix: str, used: set[int]) -> Iterator[str]:
    """Yield the names of modules that hold a matrix which was not used, in a list of parameters perhaps."""
    lists = nn.ParameterList, nn.ParameterDict
    modules = dict(model.named_modules(prefix=prefix.removesuffix(".")))
    for name, module in modules.items():
        holder = name
        while isinstance(modules.get(holder), lists):
            holder = holder.rpartition(".")[0]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in used and sum(size > 1 for size in parameter.shape) > 1:
                yield holder


def _moved(values: Tensor) -> Tensor:
    """Move vectors a little, and what is zero: a bias that is could not be distinguished from a gain, and nothing is
    seen through a gate that is."""
    if values.ndim <= 1:
        return values + 0.05 * torch.rand_like(values) + 0.02
    return values if values.any() else 0.02 * torch.randn_like(values)
