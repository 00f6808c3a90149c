"""The AdamW half: the host's own, with the host's state names. It is elementwise, so each rank updates what it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_functional

from muonclip.torch.mesh import local_gradient, local_part
from muonclip.torch.optimizer.options import AdamWOptions

ADAMW_STATES = ("step", "exp_avg", "exp_avg_sq")


def make_adamw_state(state: dict[str, Any], parameter: Tensor, options: AdamWOptions) -> None:
    """Fill the state of a parameter that has none, wholly or not at all."""
    if not state:
        device = parameter.device if options.capturable or options.fused else torch.device("cpu")
        step = torch.zeros((), dtype=torch.float32, device=device)
        state.update(step=step, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))


def adamw_step(
    parameters: Iterable[Tensor], options: AdamWOptions, state: Mapping[Tensor, dict[str, Any]]
) -> Callable[[], None]:
    """Return what updates those parameters of a group that have a gradient; nothing is changed before it is called."""
    lists: dict[str, list[Tensor]] = {name: [] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")}
    for parameter in parameters:
        gradient = local_gradient(parameter)
        if gradient is None:
            continue
        own = state[parameter]
        make_adamw_state(own, parameter, options)
        lists["params"].append(local_part(parameter))
        lists["grads"].append(gradient)
        lists["exp_avgs"].append(local_part(own["exp_avg"]))
        lists["exp_avg_sqs"].append(local_part(own["exp_avg_sq"]))
        lists["steps"].append(own["step"])
    beta1, beta2 = options.betas
    return partial(
        adamw_functional,
        lists["params"],
        lists["grads"],
        lists["exp_avgs"],
        lists["exp_avg_sqs"],
        [],
        lists["steps"],
        fused=options.fused,
        capturable=options.capturable,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=options.lr,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=False,
    )
