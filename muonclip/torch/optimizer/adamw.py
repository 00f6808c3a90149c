"""The AdamW half: the host's own, with the host's state names. It is elementwise, so each rank updates what it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_functional

from muonclip.torch.mesh import local_gradient, local_part
from muonclip.torch.optimizer.options import AdamWOptions, master_dtype
from muonclip.torch.update import errors_of, has_master, joined, missing_errors, split_into

ADAMW_STATES = ("step", "exp_avg", "exp_avg_sq")

_MASTERS_AT_ONCE = 2**24
"""How many masters are made at once, unless one parameter has more: 64 MiB, and as much for their gradients."""


class _Step(NamedTuple):
    """Hold what this rank has of a parameter and of its state."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


_MasterStep: TypeAlias = tuple[_Step, list[Tensor]]


def make_adamw_state(state: dict[str, Any], parameter: Tensor, options: AdamWOptions) -> None:
    """Fill the state of a parameter that has none, wholly or not at all; the errors of a master may come later."""
    bits = options.master_weight_bits
    errors = missing_errors(state, parameter, bits)
    if not state:
        device = parameter.device if options.capturable or options.fused else torch.device("cpu")
        step = torch.zeros((), dtype=torch.float32, device=device)
        first, second = (torch.zeros_like(parameter, dtype=master_dtype(parameter, bits)) for _ in range(2))
        state.update(step=step, exp_avg=first, exp_avg_sq=second, **errors)
    else:
        state.update(errors)


def restored_moments(
    saved: Mapping[str, Any], parameter: Tensor, options: AdamWOptions
) -> Iterator[tuple[str, Tensor]]:
    """Yield float32 copies of the saved moments of a parameter with a master, whose dtype torch would give them."""
    if has_master(parameter, options.master_weight_bits):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in saved:
                yield name, saved[name].detach().to(device=parameter.device, dtype=torch.float32, copy=True)


def adamw_step(
    parameters: Iterable[Tensor], options: AdamWOptions, state: Mapping[Tensor, dict[str, Any]]
) -> Callable[[], None]:
    """Return what updates those parameters of a group that have a gradient; nothing is changed before it is called."""
    steps: list[_Step] = []
    of_masters: list[_MasterStep] = []
    for parameter in parameters:
        gradient = local_gradient(parameter)
        if gradient is None:
            continue
        own = state[parameter]
        make_adamw_state(own, parameter, options)
        moments = local_part(own["exp_avg"]), local_part(own["exp_avg_sq"])
        each = _Step(local_part(parameter), gradient, *moments, own["step"])
        if has_master(parameter, options.master_weight_bits):
            of_masters.append((each, [local_part(error) for error in errors_of(own)]))
        else:
            steps.append(each)
    update = partial(
        adamw_functional,
        fused=options.fused,
        capturable=options.capturable,
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=options.lr,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=False,
    )

    def move() -> None:
        _update(update, steps)
        for some in _some_at_once(of_masters):
            masters = [joined(each.parameter.detach(), errors) for each, errors in some]
            pairs = zip(some, masters, strict=True)
            _update(update, [each._replace(parameter=m, gradient=each.gradient.float()) for (each, _), m in pairs])
            for (each, errors), master in zip(some, masters, strict=True):
                split_into(master, each.parameter, errors)

    return move


def _update(update: Callable[..., None], steps: Sequence[_Step]) -> None:
    lists: dict[str, list[Tensor]] = {name: [getattr(each, name) for each in steps] for name in _Step._fields}
    update(lists["parameter"], lists["gradient"], lists["exp_avg"], lists["exp_avg_sq"], [], lists["step"])


def _some_at_once(steps: Sequence[_MasterStep]) -> Iterator[list[_MasterStep]]:
    some: list[_MasterStep] = []
    for each in steps:
        if some and sum(step.parameter.numel() for step, _ in (*some, each)) > _MASTERS_AT_ONCE:
            yield some
            some = []
        some.append(each)
    if some:
        yield some
