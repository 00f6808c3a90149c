"""Parameters are named as the model names them, those of traced copies too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from muonclip.torch.discover.attribution import feeds
from muonclip.torch.discover.head_colours import Rows


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Return all names of parameters, each with the first name of its parameter, which tied ones share."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


class ParameterPaths:
    """The module and attribute of each parameter of a copy.

    `modules`: of the model, by name. `by_copy`: id of a copied parameter → name of its module and attribute.
    """

    def __init__(self, modules: Mapping[str, nn.Module], by_copy: Mapping[int, tuple[str, str]]) -> None:
        self.modules, self.by_copy = modules, by_copy

    def has(self, rows: Rows) -> bool:
        """Tell whether the rows belong to a registered parameter of the model."""
        return id(rows.parameter) in self.by_copy

    def path(self, rows: Rows) -> tuple[str, str]:
        """Return the name of the module and of its attribute."""
        return self.by_copy[id(rows.parameter)]

    def parameter(self, rows: Rows) -> int:
        """Return the id of the parameter in the model."""
        name, attribute = self.path(rows)
        return id(getattr(self.modules[name], attribute))

    def identity(self, rows: Sequence[Rows], heads: int) -> object:
        """Return a key that is equal for the same rows of the same parameters, by query head, keys repeated or not."""
        return frozenset(
            (self.parameter(each), each.axes, tuple(feeds(each.masks, heads).flatten().nonzero().flatten().tolist()))
            for each in rows
        )
