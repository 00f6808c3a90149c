"""Experts that are divided over ranks by DTensors: in a copy of a model, all of them or this rank's own.

A module that runs all experts at once would not fit a part of them. One that has sent the tokens to the ranks of their
experts (TorchTitan's) computes with the local part, and all of them would not fit the tokens that came. Which it is, is
known when a copy with all of them does not run.
"""

from __future__ import annotations

import weakref

from torch import nn

from muonclip.torch.mesh import matrices_in_use

_with_own: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def own_shapes(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Return the shapes of experts, by the ids of parameters, of which copies have this rank's own alone."""
    if not _with_own:
        return {}
    counts = matrices_in_use(model)
    parameters = (
        each for module in model.modules() if module in _with_own for each in module.parameters(recurse=False)
    )
    return {id(each): (counts[id(each)], *each.shape[1:]) for each in parameters if id(each) in counts}


def take_own(model: nn.Module, *, own: bool) -> bool:
    """Let copies of a model have each rank's own experts, or all of them. Returns whether this makes a difference."""
    counts = matrices_in_use(model)
    holders = {
        module
        for module in (model.modules() if counts else ())
        if (module in _with_own) != own and any(id(each) in counts for each in module.parameters(recurse=False))
    }
    if own:
        _with_own.update(holders)
    else:
        _with_own.difference_update(holders)
    return bool(holders)
