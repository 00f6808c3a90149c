"""Compares roles of parameters with what forwards show of them; without a clip, the first forward is traced for it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]; imports the compiler when called

from muonclip.core.parameter_plan import PlannedParameter
from muonclip.core.parameter_roles import Use, role_of
from muonclip.torch.discover import Inputs, has_a_foreign_forward, is_experiment, uses_in
from muonclip.torch.logits import outside_modes, unobservable
from muonclip.torch.mesh import plain_name


class FirstForward:
    """Traces the first forward with gradients of a model; then its hook is off the model, and `shown` is known."""

    def __init__(self, model: nn.Module) -> None:
        self.shown: Mapping[str, Use] | None = None
        hook = model.register_forward_pre_hook(_Hook(self), prepend=True, with_kwargs=True)
        self._end = weakref.finalize(self, hook.remove)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._end()

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Trace a forward that begins with these arguments."""
        self._end()
        with outside_modes():
            self.shown = uses_in(model, Inputs(args, kwargs).filled()) or {}


def warn_of_other_roles(planned: Iterable[PlannedParameter], shown: Mapping[str, Use], *, with_clip: bool) -> None:
    """Warn of parameters whose use, as forwards have shown it, is the other half's. None of them moves."""
    uses: dict[str, Use] = {plain_name(name): use for name, use in shown.items()}
    of_adamw: list[str] = []
    hidden: list[str] = []
    for line in planned:
        use = uses.get(plain_name(line.name))
        if use is None:
            continue
        role = role_of(line.name, line.shape, "linear", shown=use)
        if line.use == "muon" and use != "inner" and role.use == "adamw":
            of_adamw.append(f"{line.name} ({role.reason})")
        elif line.reason.startswith("output head") and use == "inner" and role.use == "muon":
            hidden.append(f"{line.name} (the model returns other products)")
    given = [
        f"{half} what a forward shows to be {role}: {', '.join(names)}"
        for half, role, names in (("Muon", "AdamW's", of_adamw), ("AdamW", "hidden", hidden))
        if names
    ]
    if given:
        warnings.warn(
            f"MuonClip gave {', and '.join(given)}. It stays where it is. {_BY_A_FORWARD if with_clip else _BY_NAME}",
            stacklevel=2,
        )


_BY_A_FORWARD = (
    "To decide it by a forward, write MuonClip(model, …, qk_clip=QKClip(model, example_inputs=batch)), where batch is "
    "what the model is called with."
)
_BY_NAME = (
    "To decide it yourself, write MuonClip([dict(params=[(name, parameter), …], use='adamw'), dict(params=…)], …, "
    "qk_clip=None), with those that are AdamW's in the first group; names divide the second."
)


class _Hook:
    """A hook that knows its owner weakly, and does nothing in a copy of the model."""

    def __init__(self, owner: FirstForward | None = None) -> None:
        self.owner = (lambda: None) if owner is None else weakref.ref(owner)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        owner = self.owner()
        if owner is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not (is_experiment() or has_a_foreign_forward(module) or unobservable() is not None):
            _begin(owner, module, args, kwargs)

    def __deepcopy__(self, memo: object) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hook, ())


_begin: Any = _disable_dynamo(FirstForward.begin)
