"""Parameters on the meta device, which have no numbers yet.

`Module.to_empty` gives them numbers, and puts other parameters in their place unless they are DTensors. An optimizer
that keeps the first ones would train nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

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
