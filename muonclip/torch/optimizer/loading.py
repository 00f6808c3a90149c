"""The check of a checkpoint before anything of it is taken: parameters are found by name, options and states judged.

`param_groups[…]["format"]` is the version of what is saved. A release reads its own and all earlier ones; a later one
is refused. A group without it is of another optimizer, `torch.optim.Muon` for instance.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.core import MatrixLayout
from muonclip.core.arguments import BELOW_ONE, check_flag, check_number, check_whole, kind, shown
from muonclip.core.recipes import check_saved_recipe
from muonclip.core.state_storage import absmax_of
from muonclip.core.update_rule import MuonRule
from muonclip.torch.mesh import check_state, plain_name
from muonclip.torch.optimizer.adamw import ADAMW_STATES
from muonclip.torch.optimizer.filled_parameters import ON_META
from muonclip.torch.optimizer.group_keys import check_held_keys
from muonclip.torch.optimizer.groups import name_of
from muonclip.torch.optimizer.matrix_state import check_matrix_states, held_states
from muonclip.torch.optimizer.options import AdamWOptions, Group, Options
from muonclip.torch.update import WEIGHT_ERRORS, error_dtypes, has_master

FORMAT = 1
"""The version of what this release saves; it grows where an earlier release would read it wrongly."""


class SavedParameter(NamedTuple):
    """A parameter by its name, the use and the index of its group, and what a checkpoint holds for it."""

    name: str
    use: str
    group: int
    state: Any
    parameter: Tensor
    layout: MatrixLayout | None


def check_is_mapping(state_dict: Any) -> None:
    """Raise TypeError for what is not a dict, as a state is."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict={shown(state_dict)} is a {kind(state_dict)}; give what optimizer.state_dict() has returned. "
            "Nothing was loaded."
        )


def in_own_order(state_dict: Mapping[str, Any], own: Sequence[Group]) -> dict[str, Any]:
    """Return a saved state with groups and parameters in the order of an optimizer's, found by name.

    Without names on both sides, or where none is the same (a model that was renamed), the order is as saved. Raises
    ValueError for what is not the state of an optimizer, for a later format, and for parameters that the groups divide
    otherwise.
    """
    check_is_mapping(state_dict)  # as the hooks of others have left it
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list | tuple) or not isinstance(state_dict.get("state"), Mapping):
        raise ValueError(
            f"this is not the state of an optimizer: it holds {_listed(state_dict)}, and should hold 'state' and "
            "'param_groups', as optimizer.state_dict() does. Nothing was loaded."
        )
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f"group {index} of the checkpoint has no list of params. Nothing was loaded.")
        names = group.get("param_names", [""] * len(group["params"]))
        if not isinstance(names, list | tuple) or [*map(type, names)] != [str] * len(group["params"]):
            raise ValueError(
                f"group {index} of the checkpoint has param_names={shown(names)}, and should have one for each of its "
                f"{len(group['params'])} params. Nothing was loaded."
            )
    _check_keys_of(groups, state_dict["state"])
    ordered = _by_name(groups, own)
    for index, (theirs, ours) in enumerate(zip(ordered, own, strict=False)):
        use = use_of(theirs)
        if not (isinstance(use, str) and use == ours["use"]):
            raise ValueError(
                f"group {index} of the checkpoint is for {shown(use)}, of the optimizer for {ours['use']!r}; "
                "build the optimizer with the groups it was saved with. Of another optimizer's checkpoint, load "
                "the weights alone."
            )
        version = theirs.get("format", FORMAT)
        if type(version) is int and version < 1:
            raise ValueError(f"the checkpoint has format {version}; formats begin with 1. Nothing was loaded.")
        if type(version) is not int or version > FORMAT:
            raise ValueError(
                f"the checkpoint has format {version!r}, of a later release; this one reads formats up to {FORMAT}. "
                "Nothing was loaded. Install a release that is as new as the one that saved it."
            )
    return {**state_dict, "param_groups": ordered}


def checked_options(saved: Sequence[Group], defaults: Callable[[str], Options]) -> list[Options]:
    """Return the options of a checkpoint's groups, `defaults` of their use where a group says nothing.

    Raises ValueError for what it would not be made with.
    """
    options: list[Options] = []
    for index, theirs in enumerate(saved):
        use = use_of(theirs)
        missing = [name for name in _NEEDED[use] if name not in theirs]
        if missing:
            raise ValueError(f"group {index} of the checkpoint has no {missing[0]!r}. Nothing was loaded.")
        try:
            check_held_keys(dict(theirs), use)
            check_flag("eps_given", theirs.get("eps_given", True))
            check_whole("clip_step", theirs.get("clip_step", 0), 0)
            check_whole("rounding_step", theirs.get("rounding_step", 0), 0)
            check_saved_recipe(theirs.get("recipe", ()))
            if "momentum" in theirs and use != "rest":  # of an AdamW group, too: schedulers cycle β₁ by it
                check_number("momentum", theirs["momentum"], BELOW_ONE)
            options.append(defaults(use).updated(theirs))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"group {index} of the checkpoint: {error} Nothing was loaded.") from None
    return options


def check_capturable(saved: Iterable[SavedParameter], options: Sequence[Options]) -> None:
    """Raise ValueError, naming the parameter, for a group that was saved for CUDA graphs and has one on the CPU."""
    for each in saved:
        own = options[each.group]
        if isinstance(own, AdamWOptions) and own.capturable and each.parameter.device.type == "cpu":
            raise ValueError(
                f"group {each.group} of the checkpoint has capturable=True, which is for CUDA graphs, but {each.name} "
                "is on the CPU. Nothing was loaded. Set it to False in the param_groups of the checkpoint, or move the "
                "model to its device first."
            )


def saved_parameters(
    state_dict: Mapping[str, Any], own: Sequence[Group], layouts: Sequence[Sequence[MatrixLayout | None]]
) -> Iterator[SavedParameter]:
    """Yield an optimizer's parameters, each with what was saved for it."""
    for index, (saved, group) in enumerate(zip(state_dict["param_groups"], own, strict=False)):
        for position, (key, parameter) in enumerate(zip(saved["params"], group["params"], strict=False)):
            state, name = state_dict["state"].get(key, {}), name_of(group, index, position)
            yield SavedParameter(name, group["use"], index, state, parameter, layouts[index][position])


def warn_of_missing(saved: Sequence[SavedParameter]) -> None:
    """Warn of parameters without a state in a checkpoint that has others: they begin anew."""
    halves = {each.use for each in saved if each.state}
    wanted = [each for each in saved if each.use in halves or each.use != "rest"]  # some classes keep no states
    names = [each.name for each in wanted if not each.state and each.parameter.requires_grad and each.parameter.numel()]
    if names and any(each.state for each in saved):
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"the checkpoint holds no state for {listed}: frozen when it was saved, or lost. They begin anew, the "
            "others go on.",
            stacklevel=2,
        )


def check_saved_state(each: SavedParameter, rule: MuonRule) -> None:
    """Raise ValueError for a state that is not as the optimizer would have made it."""
    name, use, saved, parameter = each.name, each.use, each.state, each.parameter
    if not isinstance(saved, Mapping):
        raise ValueError(f"{name!r} has a {type(saved).__name__} for its state in the checkpoint. Nothing was loaded.")
    if not saved:
        return
    if parameter.is_meta:
        raise ValueError(f"{name} is {ON_META}")
    if use == "rest":  # its class knows
        return
    for part in (_MOMENTUM,) if use == "muon" else ADAMW_STATES:
        if not isinstance(saved.get(part), Tensor | (int | float if part == "step" else Tensor)):
            raise ValueError(
                f"{name!r} has no {part} in the checkpoint, which the optimizer needs to update it for {use!r}. "
                f"{_OTHER_GROUPS}"
            )
    stored = held_states(rule, saved) if use == "muon" else ()
    known = [state.name for state in stored] if use == "muon" else ADAMW_STATES
    codes = [state.name for state in stored if state.dtype == "int8"]
    for part in codes:
        if absmax_of(part) not in saved:
            raise ValueError(
                f"{part} of {name!r} in the checkpoint is torch.int8, and {absmax_of(part)}, the sizes of its blocks, "
                "is not there. Nothing was loaded."
            )
    _check_errors(name, saved, parameter)
    for part, value in saved.items():
        if part in WEIGHT_ERRORS:
            continue
        if part == "step" and use == "adamw":
            _check_count(name, value)
        elif part not in known and use == "adamw":  # a variant of Muon may keep more
            raise ValueError(
                f"{name!r} has {part!r} in the checkpoint, and AdamW keeps only {', '.join(known)}. {_OTHER_GROUPS}"
            )
        elif part in known and part not in codes and not (isinstance(value, Tensor) and value.is_floating_point()):
            found = value.dtype if isinstance(value, Tensor) else f"a {kind(value)}"
            raise ValueError(f"{part} of {name!r} in the checkpoint is {found}. Nothing was loaded.")
        elif part in known and (value.is_meta or value.layout is not torch.strided):
            found = "on the meta device" if value.is_meta else value.layout
            raise ValueError(f"{part} of {name!r} in the checkpoint is {found}. Nothing was loaded.")
    if use == "muon":
        if each.layout is not None:
            check_matrix_states(name, saved, rule, parameter, each.layout)
    else:
        for part in ADAMW_STATES:
            if part != "step":
                check_state(name, part, saved[part], parameter)


def restored_errors(each: SavedParameter, bits: int | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the saved errors of a parameter's master, as copies; torch would cast them to the parameter's dtype.

    Those of 24 bits are exact with 32. Raises ValueError for those of more bits than these. Without any, the master
    begins at the parameter.
    """
    held = [name for name in WEIGHT_ERRORS if name in each.state]
    if not held or bits is None or not has_master(each.parameter, bits):
        return
    if len(held) > len(error_dtypes(bits)):
        raise ValueError(
            f"{held[-1]} of {each.name!r} in the checkpoint is of masters of 32 bits, and master_weight_bits={bits} "
            "has no place for it. Nothing was loaded. Take it out of the checkpoint, and masters are cut to 24 bits."
        )
    for name, dtype in error_dtypes(bits).items():
        error = each.state[name] if name in held else torch.zeros_like(each.state[held[0]], dtype=dtype)
        yield name, error.detach().to(device=each.parameter.device, copy=True)


def _check_errors(name: str, saved: Mapping[str, Any], parameter: Tensor) -> None:
    """Raise ValueError for errors of a master that are not as the optimizer would have made them."""
    for part, dtype in WEIGHT_ERRORS.items():
        if part not in saved:
            continue
        error = saved[part]
        if not isinstance(error, Tensor) or error.is_meta or error.dtype != dtype:
            found = error.dtype if isinstance(error, Tensor) else f"a {kind(error)}"
            raise ValueError(f"{part} of {name!r} in the checkpoint is {found}, not {dtype}. Nothing was loaded.")
        check_state(name, part, error, parameter)
        first = next(iter(WEIGHT_ERRORS))
        if first not in saved:
            raise ValueError(
                f"{name!r} has {part} in the checkpoint, and no {first}, whose last bits it is. Nothing was loaded."
            )


def warn_of_left_errors(saved: Sequence[SavedParameter], options: Sequence[Options]) -> None:
    """Warn of errors of masters in a checkpoint whose parameters have none here: they are left out."""
    left = [
        each
        for each in saved
        if WEIGHT_ERRORS.keys() & each.state.keys()
        and not has_master(each.parameter, options[each.group].master_weight_bits)
    ]
    if left:
        first = left[0]
        warnings.warn(
            f"the checkpoint holds the errors of masters of bf16 weights, and {first.name} is {first.parameter.dtype} "
            f"here, as {len(left)} in all: they are left out. The float32 weights of such a run are what "
            "optimizer.fp32_state_dict(model) returns there.",
            stacklevel=2,
        )


def without_states(state_dict: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a saved state without what has these names, which torch is not to cast or move."""
    state = {
        key: {name: value for name, value in saved.items() if name not in names}
        if isinstance(saved, Mapping)
        else saved
        for key, saved in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def with_tensor_counts(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state whose counts of AdamW's steps are float32 tensors of its own.

    Old ones are numbers; in bfloat16 a count would stop at 256.
    """
    of_rest = {key for group in state_dict["param_groups"] if use_of(group) == "rest" for key in group["params"]}
    state = {
        key: {**saved, "step": torch.as_tensor(saved["step"]).detach().to(torch.float32, copy=True).reshape(())}
        if isinstance(saved, Mapping) and "step" in saved and key not in of_rest
        else saved
        for key, saved in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def use_of(saved: Group) -> str:
    """Tell for which half a group was saved; torch's own optimizers do not say it."""
    return saved.get("use", "adamw" if "betas" in saved else "muon")


_MOMENTUM = "momentum_buffer"

_NEEDED = {
    "muon": ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"),
    "adamw": ("lr", "weight_decay", "betas", "eps"),
    "rest": ("lr",),
}
"""The options that torch's own optimizers save, too; others have their default where they are not saved."""

_OTHER_GROUPS = (
    "Nothing was loaded. Build the optimizer with the groups of the checkpoint, "
    "MuonClip([dict(params=[(name, parameter), …], use='muon'), dict(params=…, use='adamw'), …], …), to go on as "
    "before, or load the weights alone and start its state anew."
)


def _by_name(saved: Sequence[Group], own: Sequence[Group]) -> list[Group]:
    theirs, ours = _names(saved), _names(own)
    if theirs is None and ours is not None and all("param_names" in group for group in saved):
        counts = Counter(plain_name(name) for group in saved for name in group["param_names"])
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"two parameters of the checkpoint are named {twice!r}. Nothing was loaded.")
    if theirs is None or ours is None:
        return list(saved)
    if not theirs.keys() & ours.keys():  # a model that was renamed
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
            return list(saved)  # which torch refuses
        pairs = zip(saved, own, strict=True)
        return [{**group, "param_names": list(now.get("param_names", ()))} for group, now in pairs]
    if any(isinstance(key, str) for group in saved for key in group["params"]):
        return list(saved)  # torch.distributed.checkpoint has given each parameter what was saved under its name
    for name in (*ours, *theirs):
        if name not in theirs or name not in ours:
            raise ValueError(
                f"{name!r} is in the {'optimizer' if name in ours else 'checkpoint'}, and not in the "
                f"{'checkpoint' if name in ours else 'optimizer'}. Nothing was loaded. To go on with layers that were "
                "added or removed, take the state by name: see 'Stages of a run' in the documentation."
            )
    places: dict[int, int] = {}  # which group of the checkpoint holds most of each of the optimizer's
    for index, group in enumerate(own):
        held = Counter(theirs[plain_name(name)][0] for name in group.get("param_names", ()))
        if held:
            left = [other for other in held if other not in places.values()]
            places[index] = max(left, key=lambda other: (held[other], other == index), default=-1)
    for name, (other, _) in theirs.items():
        index = ours[name][0]
        if places[index] != other:
            raise ValueError(
                f"{name!r} is in group {other} of the checkpoint, for {use_of(saved[other])!r}, and in group {index} "
                f"of the optimizer, for {own[index]['use']!r}. {_OTHER_GROUPS}"
            )
    empty = iter([group for group in saved if not group["params"]])
    ordered: list[Group] = []
    for index, group in enumerate(own):
        if index not in places:
            ordered += [each for each in [next(empty, None)] if each is not None]
            continue
        keys = [saved[places[index]]["params"][theirs[plain_name(name)][1]] for name in group["param_names"]]
        ordered.append({**saved[places[index]], "params": keys, "param_names": list(group["param_names"])})
    return ordered


def _names(groups: Sequence[Group]) -> dict[str, tuple[int, int]] | None:
    """Return group and position by name; None where not every parameter has a name of its own."""
    places: dict[str, tuple[int, int]] = {}
    for index, group in enumerate(groups):
        names = group.get("param_names", ())
        if len(names) != len(group["params"]):
            return None
        places |= {plain_name(name): (index, position) for position, name in enumerate(names)}
    return places if len(places) == sum(len(group["params"]) for group in groups) else None


def _check_keys_of(groups: Sequence[Group], states: Mapping[Any, Any]) -> None:
    """Raise ValueError for keys by which parameters could not have been saved, and for states of none of them."""
    keys = [key for group in groups for key in group["params"]]
    wrong = [key for key in keys if isinstance(key, bool) or not isinstance(key, int | str)]
    if wrong or len(set(keys)) < len(keys):
        what = f"params hold {shown(wrong[0])}" if wrong else "params name one parameter twice"
        raise ValueError(f"the checkpoint's {what}; each is a number or a name of its own. Nothing was loaded.")
    others = states.keys() - set(keys)
    left = [key for key in others if isinstance(key, int) or not isinstance(states[key], Mapping)]
    if left:
        raise ValueError(
            f"the checkpoint holds {len(left)} states of parameters that its groups do not list, {left[0]!r} first. "
            "Nothing was loaded."
        )


def _check_count(name: str, value: float | Tensor) -> None:
    dtype = value.dtype if isinstance(value, Tensor) else torch.bool if isinstance(value, bool) else torch.float32
    if dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"step of {name!r} in the checkpoint is {dtype}. Nothing was loaded.")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"step of {name!r} in the checkpoint has shape {tuple(value.shape)}. Nothing was loaded.")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"step of {name!r} in the checkpoint is {float(value)}. Nothing was loaded.")


def _listed(state_dict: Mapping[str, Any]) -> str:
    keys = [repr(key) for key in state_dict]
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "") if keys else "nothing"
