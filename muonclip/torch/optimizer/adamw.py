"""The AdamW half: the host's own, with the host's state names. It is elementwise, so each rank updates what it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_functional

from muonclip.torch.mesh.dtensors import local_gradient, local_part


def make_adamw_state(state: dict[str, Any], parameter: Tensor, group: Mapping[str, Any]) -> None:
    if not state:
        device = parameter.device if group["capturable"] or group["fused"] else torch.device("cpu")
        state["step"] = torch.zeros((), device=device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)


def adamw_update(group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Those parameters of a group that have a gradient."""
    lists: dict[str, list[Tensor]] = {name: [] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")}
    for parameter in group["params"]:
        gradient = local_gradient(parameter)
        if gradient is None:
            continue
        own = state[parameter]
        lists["params"].append(local_part(parameter))
        lists["grads"].append(gradient)
        lists["exp_avgs"].append(local_part(own["exp_avg"]))
        lists["exp_avg_sqs"].append(local_part(own["exp_avg_sq"]))
        lists["steps"].append(own["step"])
    beta1, beta2 = group["betas"]
    adamw_functional(
        lists["params"],
        lists["grads"],
        lists["exp_avgs"],
        lists["exp_avg_sqs"],
        [],
        lists["steps"],
        fused=group["fused"],
        capturable=group["capturable"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
