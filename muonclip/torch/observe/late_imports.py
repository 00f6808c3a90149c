"""Modules that are imported while somebody observes: what is to be patched in them is patched before anybody uses it.

Importing them on the chance that a model may use them would take longer than importing torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class LateImports(MetaPathFinder):
    """Calls `then(name)` whenever one of the modules it waits for has been run, before the import returns it."""

    def __init__(self, then: Callable[[str], None]) -> None:
        self._then = then
        self._names: frozenset[str] = frozenset()

    def wait_for(self, names: Iterable[str]) -> None:
        """Wait for these modules, and for no others any more; those that are imported now have been run."""
        self._names = frozenset(names) - sys.modules.keys()
        if self._names and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif not self._names and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module as the finders behind this one do."""
        if name not in self._names:
            return None
        others = list(sys.meta_path)
        for finder in others[others.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if isinstance(spec.loader, Loader) and hasattr(spec.loader, "exec_module"):
                    # Set on this loader alone, which stays the module's: `inspect` and pickles of specs ask it.
                    vars(spec.loader)["exec_module"] = functools.partial(self._run, spec.loader.exec_module)
                return spec
        return None

    def _run(self, run: Callable[[ModuleType], Any], module: ModuleType) -> None:
        vars(module.__loader__).pop("exec_module", None)
        run(module)
        self._then(module.__name__)
