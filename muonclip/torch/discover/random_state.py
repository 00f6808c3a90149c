"""Random numbers, which experiments take as the model would, and put back: the global ones and those of generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.logits import InnermostMode


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random numbers of Python, NumPy and torch back at the end."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class GeneratorsKept(InnermostMode):
    """Puts generators back at the end that functions were given meanwhile: a copy of a model has copies of those that
    it holds, but not of those that its code refers to."""

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[int, tuple[torch.Generator, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and id(generator) not in self._states:
            self._states[id(generator)] = generator, generator.get_state()
        return func(*args, **kwargs)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for generator, state in self._states.values():
            generator.set_state(state)
        self._states.clear()
