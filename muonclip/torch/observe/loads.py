"""Loaded weights: what was observed with the weights before them says nothing of them, so statistics forget it.

Weights are loaded by `load_state_dict` of a module, or in place by torch.distributed.checkpoint into the tensors of a
state dict. Versions of tensors are not asked: an average swapped in for an evaluation and out again, or a perturbation
that is taken back, leaves the weights that were observed.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from muonclip.torch.logits import MaxLogits
from muonclip.torch.mesh import is_dtensor
from muonclip.torch.observe.late_imports import LateImports


class LoadHooks:
    """Hooks on the modules that hold weights of queries and keys: once those are loaded, their statistics are reset."""

    def __init__(self) -> None:
        self._resets: dict[nn.Module, _Reset] = {}
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _end, self._handles)

    def watch(self, statistics: Iterable[tuple[nn.Module, MaxLogits]]) -> None:
        """Reset each statistic when weights of its module are loaded, in place of those watched before."""
        self.take_off()
        for module, statistic in statistics:
            if module not in self._resets:
                self._resets[module] = _Reset()
                hooks = module._load_state_dict_post_hooks  # modules of TorchScript have no method to add one
                self._handles.append(RemovableHandle(hooks))
                hooks[self._handles[-1].id] = self._resets[module]
            self._resets[module].statistics.append(weakref.ref(statistic))
        _loads_in_place.add(self)

    def take_off(self) -> None:
        """Remove the hooks."""
        _loads_in_place.discard(self)
        _remove(self._handles)
        self._resets.clear()

    def loaded_in_place(self, storages: set[int]) -> None:
        """Reset the statistics of the modules that have a parameter in one of these storages."""
        for module, reset in self._resets.items():
            if storages & {_storage(each) for each in module.parameters(recurse=False)}:
                reset(module, None)


class _Reset:
    """Resets statistics; a copy, in a copy of the model, resets none."""

    def __init__(self) -> None:
        self.statistics: list[weakref.ref[MaxLogits]] = []

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        for statistic in (ref() for ref in self.statistics):
            if statistic is not None:
                statistic.reset()

    def __deepcopy__(self, memo: object) -> _Reset:
        return _Reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Reset, ())


class _LoadsInPlace:
    """Tells hooks of the tensors that torch.distributed.checkpoint has loaded, from the first hooks to the last."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._hooks: weakref.WeakSet[LoadHooks] = weakref.WeakSet()
        self._host: Callable[..., Any] | None = None
        self._patch: Callable[..., Any] | None = None
        self._late = LateImports(lambda _: self._put())

    def add(self, hooks: LoadHooks) -> None:
        with self._lock:
            self._hooks.add(hooks)
            self._late.wait_for((_LOADER,))
            self._put()

    def discard(self, hooks: LoadHooks) -> None:
        self._hooks.discard(hooks)
        self.restore_unused()

    def restore_unused(self) -> None:
        with self._lock:
            if self._hooks:
                return
            self._late.wait_for(())
            if self._host is not None:
                loader: Any = sys.modules[_LOADER]
                if loader._load_state_dict is self._patch:
                    loader._load_state_dict = self._host
                self._host = self._patch = None

    def _put(self) -> None:
        with self._lock:
            loader: Any = sys.modules.get(_LOADER)
            if self._hooks and self._host is None and hasattr(loader, "_load_state_dict"):
                host = self._host = loader._load_state_dict
                self._patch = loader._load_state_dict = self._telling(host)

    def _telling(self, host: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(host)
        def load(state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in tree_leaves(state_dict) if isinstance(each, Tensor)]
            try:
                return host(state_dict, *args, **kwargs)
            finally:  # where it failed some may be loaded
                storages = {_storage(each) for each in tensors} - {0}
                for hooks in list(self._hooks):
                    hooks.loaded_in_place(storages)

        return load


_LOADER = "torch.distributed.checkpoint.state_dict_loader"
_loads_in_place = _LoadsInPlace()


def _storage(tensor: Tensor) -> int:
    local = tensor._local_tensor if is_dtensor(tensor) else tensor
    return local.untyped_storage().data_ptr()


def _end(handles: list[RemovableHandle]) -> None:
    _remove(handles)
    _loads_in_place.restore_unused()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
