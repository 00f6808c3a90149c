"""Tell which attentions a forward reaches, without a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from muonclip.torch.discover import Inputs, Site, may_make_weights
from muonclip.torch.prove.attention_run import AttentionRun, no_heads
from muonclip.torch.prove.experiments import run_copy


class Reach(NamedTuple):
    """Hold what a forward reaches: the names of modules, and the operators in them that may make weights of scores."""

    modules: set[str]
    operators_of_weights: set[tuple[str, str]]


class _Operators(TorchDispatchMode):
    """Notes which operators run outside of kernels that may make weights of scores, and in which modules."""

    supports_higher_order_operators = True

    def __init__(self, run: AttentionRun, seen: set[tuple[str, str]]) -> None:
        super().__init__()
        self._run, self._seen = run, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if may_make_weights(func) and not self._run.is_in_kernel:
            self._seen.add((self._run.innermost(), str(func)))
        return func(*args, **(kwargs or {}))


def reached_beside_known(
    model: nn.Module, inputs: Inputs, sites: Mapping[str, Site], *, training: bool
) -> Reach | None:
    """Return what a forward of a copy reaches, where all calls of attention in it are made by known sites, and no more
    than they make; else None.

    Costs one forward. Raises whatever the model raises.
    """
    operators: set[tuple[str, str]] = set()
    outcome = run_copy(model, inputs, no_heads, training=training, watch=lambda run: _Operators(run, operators))
    for call in outcome.calls:
        site = sites.get(call.module)
        if site is None or (call.number >= len(site.projections) > 1):
            return None
    return Reach(outcome.ran, operators)
