"""The check that the weights behind queries and keys are still those that were found, by identity, at each step.

Parameters that were replaced under their name, as engines do when they shard a model, are taken as they are; weights
that are computed now are followed to what they are computed from. What cannot be followed is an error by name: a module
replaced by one with other parameters, weights that were tied or untied.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from muonclip.torch.heads import HeadRows, NotProportional, QKProjection, entry, followed, places, registered

_Home = tuple[nn.Module, str]
"""A module, and the name under which it has a parameter."""


class FoundWeights:
    """The weights of projections, their homes and the modules on the way to them, as they were last read.

    `model`: which holds them; without one, the modules of the projections are all that is known.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._found: dict[str, tuple[QKProjection, QKProjection]] = {}  # as found, and as it was followed
        self._version = -1
        self._projections: list[QKProjection] | None = None  # None: not read
        self._marks: list[tuple[Any, str, weakref.ref[Any] | None]] = []  # where to look, and what was there
        self._tied: dict[_Home, list[_Home]] = {}  # all homes of a parameter, by the one that is scaled
        self._ways: dict[str, list[_Step]] = {}  # by attention

    def are_as_read(self, projections: Mapping[str, QKProjection], version: int) -> bool:
        """Tell whether nothing was replaced since the last `read`; costs a look at each weight, and no search."""
        if self._projections is None or self._version != version or len(self._projections) != len(projections):
            return False
        if any(one is not other for one, other in zip(self._projections, projections.values(), strict=True)):
            return False
        for place, key, mark in self._marks:
            now = entry(place, key)
            if (now is not None) if mark is None else (now is None or mark() is not now):
                return False
        return True

    def read(self, projections: dict[str, QKProjection], version: int, sites: Mapping[str, Iterable[str]]) -> None:
        """Read all weights again and follow those that are computed now, in place of their projections.

        `sites`: the names of the modules that call each attention. Raises RuntimeError where something was changed
        since the last `read` that cannot be followed.
        """
        modules = self._modules(projections)
        self._follow(projections, modules)
        tied = self._homes(projections, modules)
        if self._projections is not None and self._version == version:
            self._check_ways(modules, sites)
            self._check_homes(tied, modules)
        _check_that_one_scales(projections, modules)
        self._version, self._tied = version, tied
        self._ways = self._find_ways(projections, modules, sites)
        self._projections = list(projections.values())
        self._marks = [
            (place, key, None if (there := entry(place, key)) is None else weakref.ref(there))
            for place, key in self._places(projections)
        ]

    def _places(self, projections: Mapping[str, QKProjection]) -> Iterator[tuple[Any, str]]:
        """Yield where to look at each step, and under which key."""
        for name in projections:
            for _, rows in self._found[name][0].parts():
                for attribute in filter(None, (rows.weight, rows.bias)):
                    yield from places(rows.module, attribute)
        for ways in self._ways.values():
            yield from ((parent._modules, step.key) for step in ways if (parent := step.parent()) is not None)
        for homes in self._tied.values():
            yield from ((module._parameters, attribute) for module, attribute in homes[1:])

    def _modules(self, projections: Mapping[str, QKProjection]) -> dict[nn.Module, str]:
        if self._model is not None:
            return {module: name for name, module in self._model.named_modules()}
        return {
            rows.module: f"{name}: {type(rows.module).__name__}"
            for name, projection in projections.items()
            for _, rows in projection.parts()
        }

    def _follow(self, projections: dict[str, QKProjection], modules: Mapping[nn.Module, str]) -> None:
        for name, current in projections.items():
            found, followed_to = self._found.get(name, (current, current))
            found = found if followed_to is current else current
            try:
                projections[name] = followed(found)
            except NotProportional as error:
                where = modules.get(error.module, type(error.module).__name__)
                raise RuntimeError(
                    f"QK-Clip: {error.attribute} of {where or 'the model'} {error} since {name or 'the attention'} was "
                    f"found: no parameter is left whose rows scale the heads. {_WHAT_TO_DO}"
                ) from None
            self._found[name] = found, projections[name]

    def _homes(
        self, projections: Mapping[str, QKProjection], modules: Mapping[nn.Module, str]
    ) -> dict[_Home, list[_Home]]:
        """Return all homes of each weight, by that of the rows, which is the first."""
        own = {
            id(parameter): (rows.module, rows.weight)
            for projection in projections.values()
            for _, rows in projection.parts()
            if (parameter := registered(rows.module, rows.weight)) is not None
        }
        homes = {key: [home] for key, home in own.items()}
        for module in modules:
            for attribute, parameter in module._parameters.items():
                if id(parameter) in own and own[id(parameter)] != (module, attribute):
                    homes[id(parameter)].append((module, attribute))
        return {each[0]: each for each in homes.values()}

    def _check_homes(self, tied: Mapping[_Home, list[_Home]], modules: Mapping[nn.Module, str]) -> None:
        """Raise RuntimeError where a weight has become that of another module, too, or is no longer."""
        for own, homes in tied.items():
            gained = [each for each in homes if each not in self._tied.get(own, homes)]  # a new one: it was followed
            if gained:
                raise RuntimeError(
                    f"QK-Clip: {_name(own, modules)} was tied to {_name(gained[0], modules)} since its attention was "
                    f"found: a factor for one would scale both. {_WHAT_TO_DO}"
                )
        for own, homes in self._tied.items():
            lost = [each for each in homes if each not in tied.get(own, ()) and each not in tied and each[0] in modules]
            if own[0] in modules and lost and lost != [own]:
                raise RuntimeError(
                    f"QK-Clip: {_name(lost[-1], modules)} was tied to {_name(own, modules)} when its attention was "
                    f"found, and is no longer: its heads would not be clipped. {_WHAT_TO_DO}"
                )

    def _find_ways(
        self,
        projections: Mapping[str, QKProjection],
        modules: Mapping[nn.Module, str],
        sites: Mapping[str, Iterable[str]],
    ) -> dict[str, list[_Step]]:
        """Return the modules between what calls an attention and what holds its weights, which may be replaced."""
        if self._model is None:
            return {}
        by_name = {name: module for module, name in modules.items()}
        ways: dict[str, dict[str, _Step]] = {}
        for name in projections:
            for _, rows in self._found[name][0].parts():
                path = modules[rows.module].split(".") if modules.get(rows.module) else []
                for site in sites.get(name, ()):
                    common = _length_of_common(path, site.split("."))
                    for depth in range(common, len(path)):
                        parent, child = (".".join(path[:end]) for end in (depth, depth + 1))
                        step = _Step(by_name[parent], path[depth], by_name[child], child)
                        ways.setdefault(name, {})[child] = step
        return {name: list(steps.values()) for name, steps in ways.items()}

    def _check_ways(self, modules: Mapping[nn.Module, str], sites: Mapping[str, Iterable[str]]) -> None:
        """Raise RuntimeError where a module was replaced by one with other parameters, in an attention that is still
        there."""
        names = set(modules.values())
        for attention, ways in self._ways.items():
            if not names & set(sites.get(attention, ())):
                continue
            for step in ways:
                parent = step.parent()
                if parent in modules and not step.leads_to_the_same_parameters():
                    raise RuntimeError(
                        f"QK-Clip: {step.name} was replaced since {attention or 'the attention'} was found: its heads "
                        f"are made of other weights now. {_WHAT_TO_DO}"
                    )


def _check_that_one_scales(projections: Mapping[str, QKProjection], modules: Mapping[nn.Module, str]) -> None:
    """Raise RuntimeError where two attentions would scale the same rows of a trained weight, each by its own factor."""
    uses: dict[int, dict[str, list[HeadRows]]] = {}
    for name, projection in projections.items():
        for rows in projection.scaled_parts():
            weight = registered(rows.module, rows.weight)
            if weight is not None and weight.requires_grad:
                uses.setdefault(id(weight), {}).setdefault(name, []).append(rows)
    for by_attention in uses.values():
        owners: dict[int, str] = {}
        for name, parts in by_attention.items() if len(by_attention) > 1 else ():
            for rows in parts:
                for row in rows.rows("cpu").flatten().tolist():
                    if owners.setdefault(row, name) != name:
                        weight = _name((rows.module, rows.weight), modules)
                        raise RuntimeError(
                            f"QK-Clip: {weight} is scaled for {owners[row]} and for {name}, and would get the factors "
                            "of both. Untie it, or declare the two as one attention, a QKProjection whose MaxLogits "
                            "both fill."
                        )


class _Step:
    """A step from a module to one inside it."""

    def __init__(self, parent: nn.Module, key: str, child: nn.Module, name: str) -> None:
        self.parent, self.key, self.child, self.name = weakref.ref(parent), key, weakref.ref(child), name

    def leads_to_the_same_parameters(self) -> bool:
        """Tell whether what is there now is the module that was found, or a wrapper without parameters of its own."""
        parent, found = self.parent(), self.child()
        now = None if parent is None else entry(parent._modules, self.key)
        if now is None or found is None:
            return False
        return now is found or set(map(id, now.parameters())) == set(map(id, found.parameters()))


_WHAT_TO_DO = (
    "Undo that, or make the optimizer and its clip anew after such a change: they find the attention as it is then "
    "and say what can be scaled."
)


def _length_of_common(path: list[str], other: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), min(len(path), len(other)))


def _name(home: _Home, modules: Mapping[nn.Module, str]) -> str:
    module, attribute = home
    return f"{modules.get(module, type(module).__name__)}.{attribute}".lstrip(".")
