"""Parameter groups made from what a user passes, their parameters checked, and compared with those of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from muonclip.torch.mesh import check_gradient, check_parameter, is_dtensor
from muonclip.torch.optimizer.filled_parameters import ON_META
from muonclip.torch.optimizer.options import Group
from muonclip.torch.optimizer.plan import PlannedParameter, plan_named


def groups_of(planned: Sequence[PlannedParameter], named: Mapping[str, Tensor]) -> list[Group]:
    """Make at most three groups of planned parameters: Muon, AdamW, AdamW without decay."""
    groups: list[Group] = []
    for use, decays in (("muon", True), ("adamw", True), ("adamw", False)):
        lines = [line for line in planned if line.use == use and line.decays == decays]
        if lines:
            group: Group = {"params": [(line.name, named[line.name]) for line in lines], "use": use, "planned": lines}
            if use == "muon":
                group["layout"] = [line.layout for line in lines]
            if not decays:
                group["weight_decay"] = 0.0
            groups.append(group)
    return groups


def given_groups(params: Iterable[Any]) -> list[Group]:
    """Make groups of what a user passed, groups or named parameters; what says no `use` is divided by names."""
    groups: list[Group] = []
    given = list(params)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    for group in given:
        if "use" in group:
            groups.append(dict(group))
            continue
        if "layout" in group:
            raise ValueError("layout in a parameter group that does not say use='muon': say it.")
        named = list(group["params"])
        if not all(isinstance(item, tuple) for item in named):
            raise ValueError(
                "MuonClip was given parameters without names, so an embedding looks like a hidden matrix. Pass the "
                "model itself, model.named_parameters(), or groups that say use='muon' or use='adamw'."
            )
        twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
        if twice:
            raise ValueError(
                f"two parameters are named {twice[0]!r}; give each its own name, by a prefix for each module."
            )
        options = {name: value for name, value in group.items() if name != "params"}
        groups += [{**options, **part} for part in groups_of(plan_named(named), dict(named))]
    if groups and not all(isinstance(item, tuple) for group in groups for item in group["params"]):
        for group in groups:  # torch wants names for all or for none
            group["params"] = [item[1] if isinstance(item, tuple) else item for item in group["params"]]
    return groups


def check_loadable(saved: Sequence[Group], own: Sequence[Group]) -> None:
    """Raise ValueError where groups of a checkpoint hold other parameters than the optimizer's, as far as they say."""
    for index, (theirs, ours) in enumerate(zip(saved, own, strict=False)):
        if _use_of(theirs) != ours["use"]:
            raise ValueError(
                f"group {index} of the checkpoint is for {_use_of(theirs)!r}, of the optimizer for {ours['use']!r}; "
                "build the optimizer with the groups it was saved with."
            )
    here = {name: index for index, group in enumerate(own) for name in group.get("param_names", ())}
    for index, group in enumerate(saved):
        if any(isinstance(key, str) for key in group["params"]):
            continue  # torch.distributed.checkpoint has already given each parameter what was saved under its name
        for name in group.get("param_names", ()):
            other = here.get(name, index)
            if other != index:
                raise ValueError(
                    f"{name!r} is in group {index} of the checkpoint, for {_use_of(group)!r}, and in group {other} of "
                    f"the optimizer, for {own[other]['use']!r}. {_OTHER_GROUPS}"
                )


def check_state_of(use: str, name: str, state: Mapping[str, Any]) -> None:
    """Raise ValueError where a parameter has a state in a checkpoint, but not that of the rule that updates it here."""
    needed = {"muon": "momentum_buffer", "adamw": "exp_avg"}[use]
    if state and not isinstance(state.get(needed), Tensor):
        raise ValueError(
            f"{name!r} has no {needed} in the checkpoint, which the optimizer needs to update it for {use!r}. "
            f"{_OTHER_GROUPS}"
        )


_OTHER_GROUPS = (
    "Nothing was loaded. Build the optimizer with the groups of the checkpoint, "
    "MuonClip([dict(params=[(name, parameter), …], use='muon'), dict(params=…, use='adamw'), …], …), to go on as "
    "before, or load the weights alone and start its state anew."
)


def _use_of(saved: Group) -> str:
    return saved.get("use", "adamw" if "betas" in saved else "muon")


def check_parameters(groups: Iterable[Group]) -> None:
    """Raise ValueError, naming it, for a parameter that the optimizer cannot take."""
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            name = name_of(group, index, position)
            check_parameter(name, parameter)
            if parameter.is_meta and parameter.requires_grad:
                raise ValueError(f"{name} is {ON_META}")
            if group.get("capturable") and parameter.device.type == "cpu":
                raise ValueError(f"capturable=True is for CUDA graphs, but {name} is on the CPU. Leave it out.")


def check_gradients(groups: Iterable[Group]) -> None:
    """Raise ValueError, naming the parameter, for a gradient that the optimizer cannot take."""
    for index, group in enumerate(groups):
        gradients = [parameter.grad for parameter in group["params"]]
        kinds = {*map(type, group["params"]), *map(type, gradients)}
        if kinds <= _PLAIN and not any(each.is_sparse for each in gradients if each is not None):
            continue  # as in most steps, which this must not slow down
        for position, (parameter, gradient) in enumerate(zip(group["params"], gradients, strict=True)):
            if gradient is None:
                continue
            if gradient.is_sparse:
                name = name_of(group, index, position)
                raise ValueError(f"{name} has a sparse gradient, which neither Muon nor AdamW takes.")
            if is_dtensor(gradient) or is_dtensor(parameter):
                check_gradient(name_of(group, index, position), parameter)


_PLAIN = {Tensor, nn.Parameter, type(None)}


def name_of(group: Group, index: int, position: int) -> str:
    """Name a parameter for errors and plans: as the user does, or by its position."""
    names = group.get("param_names")
    return names[position] if names else f"param_groups[{index}]['params'][{position}]"
