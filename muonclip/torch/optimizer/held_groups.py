"""The check of groups at each step: they are in a user's hands, and hosts change them between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor

from muonclip.core import MatrixLayout
from muonclip.core.arguments import check_flag, kind, shown
from muonclip.torch.mesh import check_groups_not_flattened
from muonclip.torch.optimizer.group_keys import check_held_keys
from muonclip.torch.optimizer.options import AdamWOptions, MuonOptions, check_off

_NEEDED = {
    use: frozenset(each.name for each in fields(options) if each.default is MISSING)
    for use, options in (("muon", MuonOptions), ("adamw", AdamWOptions))
}
_ANEW = "Groups are added by add_param_group; for any other change make the optimizer anew, and load its state by name."


def check_held_groups(groups: Sequence[Any], layouts: Sequence[Sequence[MatrixLayout | None]]) -> None:
    """Raise TypeError or ValueError, naming the group, where one is not as `add_param_group` has left it.

    Options may have other values, and hosts may have added keys. `layouts`: those of the groups that were added.
    """
    check_groups_not_flattened(groups, [len(own) for own in layouts])
    if len(groups) != len(layouts):
        raise ValueError(f"param_groups holds {len(groups)} groups, and {len(layouts)} were added. {_ANEW}")
    for index, (group, own) in enumerate(zip(groups, layouts, strict=True)):
        if not isinstance(group, dict):
            raise TypeError(f"param_groups[{index}]={shown(group)} is a {kind(group)}, no dict. {_ANEW}")
        parameters, use = group.get("params"), group.get("use")
        if not isinstance(parameters, list) or len(parameters) != len(own):
            count = f"{len(parameters)} parameters" if isinstance(parameters, list) else f"a {kind(parameters)}"
            raise ValueError(f"param_groups[{index}]['params'] holds {count}, and {len(own)} were added. {_ANEW}")
        names = group.get("param_names", parameters)
        if not isinstance(names, list | tuple) or len(names) != len(own):
            raise ValueError(f"param_groups[{index}]['param_names']={shown(names)} is not a name for each. {_ANEW}")
        if own and not (isinstance(use, str) and use in (("adamw", "rest") if own[0] is None else ("muon",))):
            raise ValueError(f"param_groups[{index}]['use']={shown(use)} is not what it was added for. {_ANEW}")
        missing = sorted(_NEEDED.get(str(use), frozenset()) - group.keys())
        if missing:
            raise ValueError(f"param_groups[{index}] has no {missing[0]!r} any more. {_ANEW}")
        try:
            if "eps_given" in group:
                check_flag("eps_given", group["eps_given"])
            if use != "rest":
                check_off(group)
            check_held_keys(group, str(use))
        except (TypeError, ValueError) as error:
            raise type(error)(f"param_groups[{index}]: {error}") from None


def check_tensors(groups: Sequence[dict[str, Any]]) -> None:
    """Raise TypeError, naming its place, for a parameter that is not a tensor."""
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            if not isinstance(parameter, Tensor):
                raise TypeError(
                    f"param_groups[{index}]['params'][{position}]={shown(parameter)} is a {kind(parameter)}. {_ANEW}"
                )
