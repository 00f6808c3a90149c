"""Parameters that were replaced in the model after its optimizer was made; those on the meta device are followed.

`Module.to_empty` gives them numbers, and puts other parameters in their place unless they are DTensors. An optimizer
that keeps the first ones would train nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from muonclip.torch.mesh import check_engine, is_dtensor, is_fsdp_module
from muonclip.torch.optimizer.options import Group

ON_META = (
    "on the meta device and has no numbers. Fill the model first, by model.to_empty(device=…) and its initialisation; "
    "that replaces its parameters, so make the optimizer afterwards, or give it the model itself."
)
"""What is wrong with a parameter, in words that follow "is"."""


def take_filled(groups: Sequence[Group], model: nn.Module) -> list[Tensor]:
    """Replace parameters on the meta device by those that a model now has under their names, in place.

    Returns those that were replaced.
    """
    named = dict(model.named_parameters())
    replaced: list[Tensor] = []
    for group in groups:
        parameters = group["params"]
        for position, (name, parameter) in enumerate(zip(group.get("param_names", ()), parameters, strict=False)):
            filled = named.get(name)
            if parameter.is_meta and filled is not None and not filled.is_meta and filled.shape == parameter.shape:
                parameters[position] = filled
                replaced.append(parameter)
    return replaced


def check_is_of_model(groups: Sequence[Group], model: nn.Module, given: Collection[int]) -> None:
    """Raise RuntimeError where the model has others in the place of parameters that it gave to its optimizer, by id,
    as it has when it was sharded afterwards. Those that an engine has put into the groups instead are its own affair.
    Raises ValueError where an engine has flattened the model.
    """
    check_engine(model)
    named = dict(model.named_parameters())
    lost = _not_in(groups, named, given)
    if lost:  # FSDP2 may have left whole weights after a forward without a backward
        for module in model.modules():
            if is_fsdp_module(module):
                module.reshard()
        named = dict(model.named_parameters())
        lost = _not_in(groups, named, given)
    if lost:
        count = sum(len(group["params"]) for group in groups)
        how = "sharded" if is_dtensor(named[lost[0]]) else "changed"
        raise RuntimeError(
            f"{len(lost)} of the {count} parameters of this optimizer, {lost[0]!r} first, are not the model's any "
            f"more: it was {how} after the optimizer was made, and a step would train none of them. Write it in this "
            "order: fully_shard (or whatever else replaces parameters), then optimizer = MuonClip(model, …), then load "
            "a checkpoint."
        )


def _not_in(groups: Sequence[Group], named: Mapping[str, Tensor], given: Collection[int]) -> list[str]:
    """Return the names under which a model has others than the parameters it gave, and these nowhere."""
    own, given = set(map(id, named.values())), set(given)
    return [
        name
        for group in groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
        if id(parameter) not in own and id(parameter) in given and name in named
    ]
