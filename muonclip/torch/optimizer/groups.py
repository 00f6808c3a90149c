"""Parameter groups made from what a user passes, and the check of their parameters and gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from muonclip.core import MatrixLayout
from muonclip.core.arguments import kind, shown
from muonclip.core.matrix_state import MatrixState
from muonclip.core.parameter_plan import OtherUse, Use
from muonclip.core.update_rule import MuonRule
from muonclip.torch.mesh import check_gradient, check_parameter, is_dtensor, refuse_megatron_shard
from muonclip.torch.optimizer.adamw import ADAMW_STATES
from muonclip.torch.optimizer.filled_parameters import ON_META
from muonclip.torch.optimizer.group_keys import options_of
from muonclip.torch.optimizer.matrix_state import held_states
from muonclip.torch.optimizer.options import Group, master_dtype
from muonclip.torch.optimizer.plan import PlannedParameter, plan_named
from muonclip.torch.update import WEIGHT_ERRORS, error_dtypes, has_master


def groups_of(
    planned: Sequence[PlannedParameter], named: Mapping[str, Tensor], other: OtherUse = "adamw"
) -> list[Group]:
    """Make at most three groups of planned parameters: Muon, the other half, the other half without decay."""
    groups: list[Group] = []
    planned = [replace(line, use=other) if line.use == "adamw" else line for line in planned]
    halves: list[tuple[Use, bool]] = [("muon", True), (other, True), (other, False)]
    for use, decays in halves:
        lines = [line for line in planned if line.use == use and line.decays == decays]
        if lines:
            group: Group = {"params": [(line.name, named[line.name]) for line in lines], "use": use, "planned": lines}
            if use == "muon":
                group["layout"] = [line.layout for line in lines]
            if not decays:
                group["weight_decay"] = 0.0
            groups.append(group)
    return groups


def given_groups(params: Iterable[Any], other: OtherUse = "adamw") -> list[Group]:
    """Make groups of what a user passed, groups or named parameters; what says no `use` is divided by names.

    `other`: whose the parameters are that are not Muon's.
    """
    groups: list[Group] = []
    check_iterable(params)
    given = list(params)
    given = [{"params": given}] if given and not isinstance(given[0], dict) else [*map(_with_names, given)]
    for group in given:
        group = {**group, "params": listed_params(group)}
        if "use" in group:
            groups.append(group)
            continue
        if "layout" in group:
            raise ValueError("layout in a parameter group that does not say use='muon': say it.")
        named = group["params"]
        if not all(isinstance(item, tuple) for item in named):
            raise ValueError(
                "MuonClip was given parameters without names, so an embedding looks like a hidden matrix. Pass the "
                f"model itself, model.named_parameters(), or groups that say use='muon' or use={other!r}."
            )
        twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
        if twice:
            raise ValueError(
                f"two parameters are named {twice[0]!r}; give each its own name, by a prefix for each module."
            )
        options = {name: value for name, value in group.items() if name != "params"}
        parts = groups_of(plan_named(named), dict(named), other)
        groups += [{**options_of(part["use"], options), **part} for part in parts]
    if groups and not all(isinstance(item, tuple) for group in groups for item in group["params"]):
        for group in groups:  # torch wants names for all or for none
            group["params"] = [item[1] if isinstance(item, tuple) else item for item in group["params"]]
    return groups


def _with_names(group: Group) -> Group:
    """Name the parameters of a group by its `param_names`, as torch's optimizers keep them."""
    names = group.get("param_names")
    if names is None:
        return group
    given = listed_params(group)
    if any(isinstance(item, tuple) for item in given):
        raise ValueError("a parameter group has names in params and in param_names. Leave one of them out.")
    if len(names) != len(given):
        raise ValueError(f"param_names lists {len(names)} names for the {len(given)} parameters of its group.")
    others = {key: value for key, value in group.items() if key != "param_names"}
    return {**others, "params": list(zip(names, given, strict=True))}


def check_iterable(params: Any) -> None:
    """Raise TypeError for what cannot hold parameters or groups."""
    if not isinstance(params, Iterable) or isinstance(params, str | nn.Module):
        raise TypeError(
            f"params={shown(params)} is a {kind(params)}; give parameters, (name, parameter) pairs or groups, which "
            "are dicts."
        )


def listed_params(group: Mapping[str, Any]) -> list[Any]:
    """Return the parameters of a group, of which a bare tensor is one, as a list.

    Raises TypeError where there are none.
    """
    params = group.get("params")
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, set | str | Mapping) or not isinstance(params, Iterable):
        raise TypeError(
            f"a parameter group has params={shown(params)}, a {kind(params)}; give a list of parameters, or of "
            "(name, parameter) pairs, whose order is that of the state."
        )
    return list(params)


def check_parameters(groups: Iterable[Group], *, offload: bool = False) -> None:
    """Raise ValueError, naming it, for a parameter that the optimizer cannot take; `offload`: with states in host
    memory."""
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            name = name_of(group, index, position)
            check_parameter(name, parameter)
            if group["use"] == "muon":
                refuse_megatron_shard(name, parameter)
            check_master_weights(name, parameter, group.get("master_weight_bits"))
            if offload and is_dtensor(parameter) and parameter.device.type != "cpu":
                raise ValueError(
                    f"offload=True, but {name} is a DTensor on {parameter.device}, whose states PyTorch keeps there, "
                    "too. Leave it out; FSDP2 keeps parameters and states in host memory by CPUOffloadPolicy."
                )
            if parameter.is_meta and parameter.requires_grad:
                raise ValueError(f"{name} is {ON_META}")
            if group.get("capturable") and parameter.device.type == "cpu":
                raise ValueError(f"capturable=True is for CUDA graphs, but {name} is on the CPU. Leave it out.")


def check_master_weights(name: str, parameter: Tensor, bits: int | None) -> None:
    """Raise ValueError, naming it, for a parameter whose masters would need more bits than these."""
    if bits is not None and parameter.dtype == torch.float16:
        raise ValueError(
            f"master_weight_bits={bits}, but {name} is torch.float16, whose numbers are no upper half of float32 ones. "
            "Cast the model, model.to(torch.bfloat16); or keep it in float32 and compute in float16 by torch.autocast."
        )


def check_gradients(groups: Iterable[Group]) -> None:
    """Raise ValueError, naming the parameter, for a gradient that the optimizer cannot take."""
    for index, group in enumerate(groups):
        gradients = [parameter.grad for parameter in group["params"]]
        takes_sparse = group["use"] == "rest"  # or says itself that it does not
        kinds = {*map(type, group["params"]), *map(type, gradients)}
        if kinds <= _PLAIN and not any(each.is_sparse for each in gradients if each is not None):
            continue  # as in most steps, which this must not slow down
        for position, (parameter, gradient) in enumerate(zip(group["params"], gradients, strict=True)):
            if gradient is None:
                continue
            if gradient.is_sparse:
                if takes_sparse:
                    continue
                name = name_of(group, index, position)
                raise ValueError(f"{name} has a sparse gradient, which neither Muon nor AdamW takes.")
            if is_dtensor(gradient) or is_dtensor(parameter):
                check_gradient(name_of(group, index, position), parameter)


def check_states(
    groups: Sequence[Group],
    layouts: Sequence[Sequence[MatrixLayout | None]],
    state: Mapping[Tensor, Mapping[str, Any]],
    rules: Sequence[MuonRule],
    offload: bool = False,
) -> None:
    """Raise ValueError, naming the parameter, for a gradient or a state that does not fit its parameter any more.

    So it is where a model was cast, moved or resized after its states were made. `rules`: one for each group.
    `offload`: whether Muon's states are in host memory.
    """
    for index, group in enumerate(groups):
        is_muon, rule = group["use"] == "muon", rules[index]
        for position, parameter in enumerate(group["params"]):
            layout, own = layouts[index][position], state.get(parameter, {})
            if not isinstance(own, dict) and group["use"] != "rest":
                name = name_of(group, index, position)
                raise ValueError(f"{name} has a {kind(own)} for its state; {_BEGIN_ANEW}")
            held: dict[str, Any] = {}
            stored: dict[str, MatrixState] = {}
            if parameter.grad is not None and not parameter.grad.is_sparse:  # which is said elsewhere
                held["grad"] = parameter.grad
            if is_muon and layout is not None:
                stored = {
                    each.name: each for each in held_states(rule, own) if each.name in own or each.dtype == "float32"
                }
                held |= {part: own.get(part) for part in stored}
            elif own and group["use"] == "adamw":
                held |= {name: own.get(name) for name in ADAMW_STATES}
            bits = group.get("master_weight_bits")
            if has_master(parameter, bits):
                held |= {name: own[name] for name in WEIGHT_ERRORS if name in own}
            for part, value in held.items():
                if part == "step" and not is_muon:
                    if not _is_count(value):
                        name = name_of(group, index, position)
                        raise ValueError(f"the step of {name} is {shown(value)}, no count; {_BEGIN_ANEW}")
                    continue
                declared = stored.get(part)
                expected = _expected(declared, parameter, layout)
                dtype = None if is_muon else parameter.dtype if part == "grad" else master_dtype(parameter, bits)
                if bits is not None and part in WEIGHT_ERRORS:
                    dtype = error_dtypes(bits).get(part)
                elif declared is not None and declared.dtype == "int8":
                    dtype = torch.int8
                on_host = offload and is_muon and part != "grad"
                device = torch.device("cpu") if on_host else parameter.device
                if _fits(value, device, expected, dtype):
                    continue
                name = name_of(group, index, position)
                found = (value.dtype, tuple(value.shape), value.device) if isinstance(value, Tensor) else ()
                seen = "{} {} on {}".format(*found) if found else f"a {kind(value)}"
                seen += "" if not found or value.layout is torch.strided else f", {value.layout}"
                raise ValueError(
                    f"{name} is {parameter.dtype} {tuple(parameter.shape)} on {parameter.device}, but its {part} is "
                    f"{seen}. If the model was cast or moved, optimizer.load_state_dict(optimizer.state_dict()) makes "
                    f"the state follow; else {_BEGIN_ANEW}"
                )


_BEGIN_ANEW = "optimizer.state.pop(parameter) begins it anew. Nothing was changed."


def _fits(value: Any, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype | None) -> bool:
    """Tell whether a state or gradient can be used with its parameter; `dtype` None: whatever its floating dtype."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.device != device:
        return False
    is_floating = value.dtype.is_floating_point and value.dtype.itemsize > 1
    return value.layout is torch.strided and (is_floating if dtype is None else value.dtype == dtype)


def _is_count(value: Any) -> bool:
    """Tell whether a value can count the steps of AdamW; one on an accelerator is not waited for."""
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dtype.is_complex or value.dtype.itemsize < 4:
        return False
    return value.device.type != "cpu" or 0 <= float(value) < math.inf


def _expected(declared: MatrixState | None, parameter: Tensor, layout: MatrixLayout | None) -> tuple[int, ...]:
    if declared is None or layout is None:
        return tuple(parameter.shape)
    return declared.stored_shape(parameter.shape, layout.axes(parameter.ndim).fan_in)


_PLAIN = {Tensor, nn.Parameter, type(None)}


def name_of(group: Group, index: int, position: int) -> str:
    """Name a parameter for errors and plans: as the user does, or by its position."""
    names = group.get("param_names")
    return names[position] if names else f"param_groups[{index}]['params'][{position}]"
