"""Functions in the place of the kernels' own, while somebody observes or traces a model.

They are put where models look: in torch's modules, in the files and classes of a model that imported a function by
name, in the attention interface of Hugging Face, in the autograd functions of kernels. Two others keep forwards from
being observed: a stage's first run in torch's pipelines, which is for the shapes alone, and a call of a model by
`functional_call` with other parameters than its own.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import stateless

from muonclip.torch.logits import (
    RING,
    Unobservable,
    host_sdpa,
    is_context_parallel,
    left_whole,
    on_own_sequences,
    seen_in_steps,
    unobserved,
)
from muonclip.torch.mesh import imported, plain_class
from muonclip.torch.observe.attention_call import AttentionKernel
from muonclip.torch.observe.handlers import of_thread
from muonclip.torch.observe.kernels import KERNELS
from muonclip.torch.observe.late_imports import LateImports
from muonclip.torch.observe.ulysses import ULYSSES, with_its_heads


class _Patch(NamedTuple):
    """A function, what takes its place, and how it is made of it."""

    function: Any
    patch: Any
    make: Callable[[Any], Any]


class Patches:
    """The functions in place of hosts' functions in this process, from the first user to the last, in all threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.users = 0
        self._placed: dict[tuple[int, str], tuple[Any, Any, Any]] = {}  # holder, patch, what was there; by holder, name
        self._patches: dict[int, _Patch] = {}  # by the function's id
        self._late = LateImports(self._patch_module)

    def add_user(self, model: nn.Module) -> None:
        """Put the patches where `model` will look. Raises ValueError within torch's `context_parallel`, which is around
        attention until it ends, unless they are there already."""
        with self._lock:
            if not self.users and is_context_parallel():
                raise ValueError(_TOO_LATE)
            self.users += 1
            self._late.wait_for({_PIPELINES, RING, ULYSSES, *(_module_of(kernel) for kernel in KERNELS)})
            self._patch_pipelines()
            self._patch_sequence_parallelism()
            self._patch_functional_calls()
            for kernel in KERNELS:
                self._patch_home(kernel)
            for holder in _code_of(model):
                self._patch_imports(holder)

    def remove_user(self) -> None:
        """Let a user go; after the last one, restore everything but what somebody else has put there meanwhile."""
        with self._lock:
            self.users -= 1
            if self.users:
                return
            self._late.wait_for(())
            for (_, name), (holder, patch, original) in reversed(self._placed.items()):
                if vars(holder).get(name) is not patch:
                    continue
                if original is _INHERITED:
                    delattr(holder, name)
                else:
                    setattr(holder, name, original)
            self._placed.clear()
            self._patches.clear()

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Have them in place meanwhile, around attention as a single process makes it."""
        self.add_user(model)
        try:
            with on_own_sequences():
                yield
        finally:
            self.remove_user()

    def _patch_module(self, name: str) -> None:
        """Patch a module that has been imported just now."""
        with self._lock:
            if not self.users:
                return
            if name == _PIPELINES:
                self._patch_pipelines()
            if name in (RING, ULYSSES):
                self._patch_sequence_parallelism()
            for kernel in KERNELS:
                if _module_of(kernel) == name:
                    self._patch_home(kernel)

    def _patch_home(self, kernel: AttentionKernel) -> None:
        *owners, name = kernel.home.partition(":")[2].split(".")
        holder: Any = sys.modules.get(_module_of(kernel))
        for owner in owners:
            holder = getattr(holder, owner, None)
            holder = holder if holder is None else vars(holder).get(_HOST, holder)  # not a patch that is in its place
        # Its package is not imported, or of a version without this function, so that nobody calls it.
        if holder is None or kernel.patch is None or not hasattr(holder, name) or (id(holder), name) in self._placed:
            return
        there = vars(holder).get(name, getattr(holder, name))
        host = getattr(there, _HOST, None)
        if host is None:
            self._put(holder, name, self._patch_of(there, kernel.patch))
        else:  # a patch that somebody has put back after all users were gone
            self._patches[id(host)] = _Patch(host, there, kernel.patch)
        if kernel.home == _SDPA:  # models may have imported it before somebody put another kernel in its place
            self._patch_of(host_sdpa, kernel.patch)

    def _patch_of(self, function: Any, make: Callable[[Any], Any]) -> Any:
        if id(function) not in self._patches:
            patch = make(function)
            setattr(patch, _HOST, function)
            self._patches[id(function)] = _Patch(function, patch, make)
        return self._patches[id(function)].patch

    def _patch_imports(self, holder: Any) -> None:
        for name, value in list(vars(holder).items()):
            function = value.__func__ if isinstance(value, staticmethod) else value
            original = getattr(function, "_torchdynamo_orig_callable", function)  # what is compiled under this name
            if id(original) in self._patches:
                patch = self._patch_of(function, self._patches[id(original)].make)
                self._put(holder, name, staticmethod(patch) if isinstance(holder, type) else patch)

    def _put(self, holder: Any, name: str, patch: Any) -> None:
        if (id(holder), name) not in self._placed:
            self._placed[id(holder), name] = holder, patch, vars(holder).get(name, _INHERITED)
            setattr(holder, name, patch)

    def _patch_pipelines(self) -> None:
        """Keep a stage's first run, with gradients, on memory that nobody has written to, from being observed."""
        stage = imported(_PIPELINES, "PipelineStage")
        compute = None if stage is None else vars(stage).get("_compute_outputs")
        if compute is not None and (id(stage), "_compute_outputs") not in self._placed:
            self._put(stage, "_compute_outputs", _unobserved(compute))

    def _patch_sequence_parallelism(self) -> None:
        """See the steps of attention whose keys pass in a ring, and whose heads are attended to after an all-to-all."""
        context, ulysses = imported(RING, "_ContextParallel"), imported(ULYSSES, "UlyssesSPAttentionHF")
        for holder, name, make in (
            (sys.modules.get(RING), "_templated_ring_attention", seen_in_steps),
            (context, "sdpa_input_fn", left_whole),
            (ulysses, "forward", with_its_heads),
        ):
            if hasattr(holder, name) and (id(holder), name) not in self._placed:
                self._put(holder, name, make(getattr(holder, name)))

    def _patch_functional_calls(self) -> None:
        """Keep a model that is called with other parameters than its own from being observed."""
        if (id(stateless), "_functional_call") not in self._placed:
            self._put(stateless, "_functional_call", _own_parameters_observed(stateless._functional_call))


def _code_of(model: nn.Module) -> list[Any]:
    """Return what may have bound a kernel's function by name: the classes of a model with their bases, the files that
    they are in, and those of the functions that these import, however far. Libraries without models are left out."""
    kinds = {kind for module in model.modules() for kind in plain_class(module).__mro__ if not _is_library(kind)}
    files: dict[str, Any] = {}
    waiting = {kind.__module__ for kind in kinds}
    while waiting:
        name = waiting.pop()
        file = files[name] = sys.modules.get(name)
        functions = [each for each in vars(file).values() if isinstance(each, FunctionType)] if file else []
        waiting |= {each.__module__ for each in functions if not _is_library(each)} - files.keys()
    return [*kinds, *(file for file in files.values() if file is not None)]


def _module_of(kernel: AttentionKernel) -> str:
    return kernel.home.partition(":")[0]


def _is_library(code: Any) -> bool:
    name = code.__module__ or "builtins"
    package = name.partition(".")[0]
    return package in ("torch", "numpy") or package in sys.stdlib_module_names or name.startswith("muonclip.torch.")


_HOST = "_qk_host"  # the attribute of a patch that has the function in whose place it is
_INHERITED = object()  # in the place of what a class does not have itself
_PIPELINES = "torch.distributed.pipelining.stage"
_TOO_LATE = (
    "QK-Clip: torch's context_parallel is in the place of scaled_dot_product_attention, and cannot be seen from the "
    "parts of sequences within it. Build the optimizer, or the QKClip, before you enter context_parallel."
)
_SDPA = "torch.nn.functional:scaled_dot_product_attention"
PATCHES = Patches()
"""Those of this process."""


def _unobserved(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unobserved():
            return function(*args, **kwargs)

    return run


def _own_parameters_observed(functional_call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(functional_call)
    def run(module: nn.Module, parameters_and_buffers: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        # Amid a forward it is a part of it, as the search has seen.
        is_outermost = not torch.compiler.is_compiling() and not of_thread.handlers
        reason = _other_parameters(module, parameters_and_buffers) if is_outermost else None
        with nullcontext() if reason is None else unobserved(reason):
            return functional_call(module, parameters_and_buffers, *args, **kwargs)

    return run


def _other_parameters(module: nn.Module, given: Mapping[str, Tensor]) -> Unobservable | None:
    """Return why a call of a module with these parameters is not observed; None where they are its own."""
    own = dict(module.named_parameters(remove_duplicate=False))
    others = [name for name in given if name in own and given[name] is not own[name]]
    if not others:
        return None
    trains = any(given[name].grad_fn is not None for name in others) or not own.keys() <= given.keys()
    return Unobservable("with other parameters than the model's own, by functional_call", trains)
