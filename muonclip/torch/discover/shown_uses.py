"""Reads what forwards show of a model's parameters, for who updates them; traces one where no clip has done so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from muonclip.core.parameter_roles import Use
from muonclip.torch.discover.dense_copy import is_whole
from muonclip.torch.discover.discovery import Inputs
from muonclip.torch.discover.example_inputs import guess_inputs
from muonclip.torch.discover.trace import trace

_LEAST: tuple[Use, ...] = ("inner", "looked up", "returned")


def joint_uses(shown: Iterable[Mapping[str, Use]]) -> dict[str, Use]:
    """Return what several forwards show of parameters, by name: what one has seen, another need not reach."""
    joint: dict[str, Use] = {}
    for each in shown:
        for name, use in each.items():
            known = joint.get(name)
            if known is None or _LEAST.index(use) > _LEAST.index(known):
                joint[name] = use
    return joint


def guessed_uses(model: nn.Module) -> Mapping[str, Use]:
    """Return what a forward on guessed inputs shows of parameters, by name; nothing where none runs."""
    for inputs in guess_inputs(model):
        shown = uses_in(model, inputs)
        if shown is not None:
            return shown
    return {}


def uses_in(model: nn.Module, inputs: Inputs) -> Mapping[str, Use] | None:
    """Return what a forward on these inputs shows of parameters, by name.

    None where a copy of the model does not run, and where it would not be cheap: of sharded weights, or without any.
    """
    if not all(is_whole(each) and not each.is_meta for each in model.parameters()):
        return None
    try:
        return trace(model, inputs.args, inputs.kwargs).shown
    except Exception:  # whatever the model raises: types and names decide then
        return None
