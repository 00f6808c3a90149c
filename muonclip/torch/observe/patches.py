"""Putting the doors of `calls.py` where models look, and taking them away.

They stand in torch's own modules, in the sources and classes of a model that imported a function by name, and in the
attention interface of Hugging Face, while somebody uses them. In torch's pipelines one keeps a stage's first run, which
is for the shapes alone, from being observed.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining.stage import PipelineStage
from torch.nn.attention import flex_attention as flex_module

from muonclip.torch.logits.host_sdpa import host_sdpa
from muonclip.torch.logits.max_logits import unobserved
from muonclip.torch.logits.sharded_attention import PARTS_OF_SEQUENCES
from muonclip.torch.mesh.wrappers import plain_class
from muonclip.torch.observe.calls import flex_door, host_flex, sdpa_door


def _sdpa_door_for(standing: Any) -> Any:
    """Return the replacement of what is there now: of PyTorch's attention, or of somebody's own kernel."""
    if standing is host_sdpa:
        return sdpa_door
    if sdpa_door in (standing, getattr(standing, "func", None)):  # which somebody put back after it was closed
        return standing
    door: Any = functools.partial(sdpa_door, call=standing)
    door.__name__ = sdpa_door.__name__
    return door


def _unobserved(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unobserved():
            return function(*args, **kwargs)

    return run


class Doors:
    """Open from the first user to the last, in all threads."""

    _lock = threading.RLock()
    _users = 0
    _standing: ClassVar[list[tuple[Any, str, Any, Any]]] = []  # holder, name, the door, what stood there

    @classmethod
    def open(cls, model: nn.Module) -> None:
        """Put the doors where `model` will look."""
        with cls._lock:
            cls._open(model)

    @classmethod
    def close(cls) -> None:
        """Count one user less; after the last, put the originals back. What somebody else has put there since stays."""
        with cls._lock:
            cls._users -= 1
            if cls._users:
                return
            for holder, name, door, original in reversed(cls._standing):
                if vars(holder).get(name) is door:
                    setattr(holder, name, original)
            cls._standing.clear()

    @classmethod
    def _open(cls, model: nn.Module) -> None:
        standing = F.scaled_dot_product_attention
        if (getattr(standing, "__module__", None) or "").startswith("torch.distributed"):
            raise ValueError(PARTS_OF_SEQUENCES)
        cls._users += 1
        cls._put(F, "scaled_dot_product_attention", _sdpa_door_for(standing))
        cls._put(flex_module, "flex_attention", flex_door)
        if hasattr(PipelineStage, "_compute_outputs"):  # with gradients, on memory that nobody has written to
            cls._put(PipelineStage, "_compute_outputs", _unobserved(vars(PipelineStage)["_compute_outputs"]))
        kinds = {plain_class(module) for module in model.modules()}
        for holder in (*(sys.modules.get(name) for name in {kind.__module__ for kind in kinds}), *kinds):
            if holder is not None:
                cls._put_in_place_of_imports(holder)
        if "transformers.modeling_utils" in sys.modules:
            from muonclip.torch.observe import huggingface as huggingface_attention

            cls._put(*huggingface_attention.interface_door())

    @classmethod
    def _put(cls, holder: Any, name: str, door: Any) -> None:
        if all(h is not holder or n != name for h, n, _, _ in cls._standing):
            cls._standing.append((holder, name, door, vars(holder)[name]))
            setattr(holder, name, door)

    @classmethod
    def _put_in_place_of_imports(cls, holder: Any) -> None:
        for name, value in list(vars(holder).items()):
            function = value.__func__ if isinstance(value, staticmethod) else value
            door: Any
            if function is host_sdpa:
                door = sdpa_door
            elif function is host_flex:
                door = flex_door
            elif getattr(function, "_torchdynamo_orig_callable", None) is host_flex:
                door = functools.partial(flex_door, call=function)
            else:
                continue
            cls._put(holder, name, staticmethod(door) if isinstance(holder, type) else door)
