"""Published ways to train with Muon, by name: each a frozen value with its source.

`takes_recipe` lets a function take one as `recipe=`: its values stand in for the arguments that were not given by hand.
What a source does not publish is None here, and the default of the function holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, cast

from muonclip.core.arguments import shown
from muonclip.core.coefficients import Coefficients
from muonclip.core.update_scale import AdjustLR

P = ParamSpec("P")
R = TypeVar("R")

RecipeName: TypeAlias = Literal["moonlight", "k2", "kimi_k3", "glm5", "deepseek_v4", "nvidia"]
"""The names of `RECIPES`."""

_NOT_OF_THE_RECIPE = {"self", "model", "params", "recipe"}
_OF_THE_CLIP = {"tau", "qk_clip", "per_head"}  # which no checkpoint keeps
_VALUES = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn", "weight_decay", "per_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe: what its source publishes of it, None for what it does not.

    Args:
        name: The name, as `recipe` takes it.
        source: Paper or report.
        sentence: What is special about it.
        momentum: As `MuonClip` takes it.
        nesterov: As `MuonClip` takes it.
        ns_coefficients: As `MuonClip` takes them.
        ns_steps: As `MuonClip` takes it.
        adjust_lr_fn: As `MuonClip` takes it.
        weight_decay: As `MuonClip` takes it.
        per_head: As `MuonClip` takes it.
        heads: Which weights of attention are several matrices, in words.
        tau: Of the clip; None: without a clip.
        no_clip: Why there is none, in words.
        borrowed: Which of these the source takes from another recipe, or leaves to it.
        lender: That recipe.
        lr: The rate that was published, per step, or words. It is shown, and never set: a rate belongs to its model,
            its batch and its number of tokens.
        schedule: The schedule that was published, in words; shown, and never set.
        given: The arguments that were given by hand, which win; filled in where the recipe is taken.
    """

    name: str
    source: str
    sentence: str
    momentum: float | None = None
    nesterov: bool | None = None
    ns_coefficients: Coefficients | None = None
    ns_steps: int | None = None
    adjust_lr_fn: AdjustLR = None
    weight_decay: float | None = None
    per_head: bool = False
    heads: str = "whole"
    tau: float | None = None
    no_clip: str = ""
    borrowed: frozenset[str] = frozenset()
    lender: str = ""
    lr: float | str | None = None
    schedule: str | None = None
    given: frozenset[str] = frozenset()

    def arguments(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Return the arguments of `muonclip.torch.MuonClip` that this recipe sets next to those that were given.

        A polynomial that is given has its own number of steps; a τ that is given switches the clip on.

        Args:
            given: The names of the arguments that were given by hand.
        """
        values = {name: getattr(self, name) for name in _VALUES if getattr(self, name) is not None}
        if "ns_coefficients" in given:
            values.pop("ns_steps", None)
        if self.tau is not None:
            values["tau"] = self.tau
        elif "tau" not in given:
            values["qk_clip"] = None
        return {name: value for name, value in values.items() if name not in given}

    def origin(self, argument: str) -> str:
        """Say where the value of an argument comes from, in words.

        Args:
            argument: The name of the argument.
        """
        if argument in self.given:
            return "given"
        without_clip = argument == "tau" and "qk_clip" in self.arguments(self.given)
        if argument in self.arguments(self.given) or without_clip:
            return f"recipe {self.name}"
        if argument == "ns_steps" and "ns_coefficients" in self.arguments(self.given):
            return f"recipe {self.name}, the polynomial's own length"
        if argument == "lr":
            return f"default; {self.name} published {self.rate}, which a recipe does not set"
        return f"default; {self.name} does not publish it" if argument in _VALUES else "default"

    def as_saved(self) -> tuple[str, ...]:
        """Return what a checkpoint keeps: its name, then the arguments that were given."""
        return (self.name, *sorted(self.given - _OF_THE_CLIP))

    @property
    def rate(self) -> str:
        """The published rate and schedule, in words."""
        rate = "no rate" if self.lr is None else str(self.lr)
        return rate if self.schedule is None else f"{rate}, {self.schedule}"


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        each.name: each
        for each in (
            Recipe(
                name="moonlight",
                source="arXiv 2502.16982",
                sentence="Muon with AdamW's RMS and its weight decay; the router is Muon's, too.",
                momentum=0.95,
                nesterov=True,
                ns_coefficients="jordan",
                adjust_lr_fn="match_rms_adamw",
                weight_decay=0.1,
                no_clip="none",
                lr=4.2e-4,
                schedule="cosine",
            ),
            Recipe(
                name="k2",
                source="arXiv 2507.20534",
                sentence="Moonlight's Muon with QK-Clip: MuonClip.",
                momentum=0.95,
                nesterov=True,
                ns_coefficients="jordan",
                adjust_lr_fn="match_rms_adamw",
                weight_decay=0.1,
                tau=100.0,
                borrowed=frozenset({"momentum", "nesterov", "ns_coefficients"}),
                lender="moonlight",
                lr=2e-4,
                schedule="warm-up, constant, cosine",
            ),
            Recipe(
                name="kimi_k3",
                source="arXiv 2607.24653",
                sentence="Kimi K2's, with every head of queries, keys and values a matrix of its own.",
                momentum=0.95,
                nesterov=True,
                ns_coefficients="jordan",
                adjust_lr_fn="match_rms_adamw",
                weight_decay=0.1,
                per_head=True,
                heads="each head of q, k and v",
                tau=100.0,
                borrowed=frozenset({"momentum", "nesterov", "ns_coefficients", "tau"}),
                lender="k2",
                schedule="cosine after 1 % of warm-up",
            ),
            Recipe(
                name="glm5",
                source="arXiv 2602.15763, 2508.06471",
                sentence='"Muon Split": the up-projections of latent attention are divided by head.',
                momentum=0.95,
                ns_steps=5,
                adjust_lr_fn="match_rms_adamw",
                weight_decay=0.1,
                per_head=True,
                heads="W_uq, W_uk and W_uv by head",
                no_clip="none needed, they report",
                schedule="cosine",
            ),
            Recipe(
                name="deepseek_v4",
                source="arXiv 2606.19348",
                sentence="Eight steps of jordan and two that converge; V4.1 divides q and k by head.",
                momentum=0.95,
                nesterov=True,
                ns_coefficients="deepseek_v4",
                adjust_lr_fn=("match_rms_adamw", 0.18),
                weight_decay=0.1,
                no_clip="none: the model normalises q and kv",
                lr=2.6e-4,
            ),
            Recipe(
                name="nvidia",
                source="arXiv 2607.20548, Emerging-Optimizers 0.5.0",
                sentence="Sixteen steps of Polar Express, and the RMS of AdamW's updates in closed form.",
                momentum=0.9,
                ns_coefficients="polar_express",
                ns_steps=16,
                adjust_lr_fn="match_rms_adamw_closed_form",
                weight_decay=0.1,
                no_clip="none",
                lr="a rate per model",
                schedule="per model",
            ),
        )
    }
)
"""The recipes by name; one entry each."""


def find_recipe(recipe: object) -> Recipe | None:
    """Return a recipe by its name. Raises ValueError, with the names, for another one, TypeError for another kind."""
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe={shown(recipe)} is a {type(recipe).__name__}; give one of {', '.join(RECIPES)}.")
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is not known; known are {', '.join(RECIPES)}.")
    return RECIPES[recipe]


def saved_recipe(saved: Sequence[str], own: Recipe | None) -> Recipe | None:
    """Return the recipe that a checkpoint names (`Recipe.as_saved`; empty: none), for an optimizer made with `own`.

    What belongs to the clip is the optimizer's own still. None for a name that is not known here.
    """
    name, *given = saved or ("",)
    if own is not None and own.name == name:
        return replace(own, given=frozenset(given) | (own.given & _OF_THE_CLIP))
    return replace(RECIPES[name], given=frozenset(given) | _OF_THE_CLIP) if name in RECIPES else None


def check_saved_recipe(saved: object) -> None:
    """Raise ValueError for what no `Recipe.as_saved` is."""
    if not (isinstance(saved, tuple | list) and all(isinstance(each, str) for each in cast("Sequence[object]", saved))):
        raise ValueError(f"recipe={shown(saved)}; it is a name, then those of the arguments that were given.")


def takes_recipe(function: Callable[P, R]) -> Callable[P, R]:
    """Let the values of `recipe=` stand in for the arguments of a function that a call does not give.

    The function gets the `Recipe`, which knows what was given. `momentum` is its `beta` where it has that instead.
    Raises ValueError where a wrapper has filled in every argument: nothing tells then what was given.
    """
    signature = inspect.signature(function)
    names = {"momentum": "beta"} if "beta" in signature.parameters else {}

    @functools.wraps(function)
    def with_recipe(*args: P.args, **kwargs: P.kwargs) -> R:
        recipe = find_recipe(kwargs.get("recipe"))
        if recipe is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs).arguments
        given = set(bound) - _NOT_OF_THE_RECIPE
        if given == signature.parameters.keys() - _NOT_OF_THE_RECIPE:
            raise ValueError(
                f"recipe={recipe.name!r}, and every other argument was given too, as optax.inject_hyperparams does. "
                f"Give the values themselves: **muonclip.core.RECIPES[{recipe.name!r}].arguments()."
            )
        own = {argument: name for name, argument in names.items()}
        given = {own.get(name, name) for name in given}
        if not isinstance(bound.get("qk_clip", ""), str):  # None, or a clip that has its own τ
            given.add("tau")
        recipe = replace(recipe, given=frozenset(given))
        values = {names.get(name, name): value for name, value in recipe.arguments(recipe.given).items()}
        taken = {name: value for name, value in values.items() if name in signature.parameters}
        merged: Any = {**kwargs, **taken, "recipe": recipe}
        return cast("Callable[..., R]", function)(*args, **merged)

    return with_recipe


def option_lines(options: Mapping[str, object], recipe: Recipe | None) -> str:
    """Write options by name as lines for a plan; with a recipe, each with where it comes from."""
    if recipe is None:
        return "\n".join(f"{name} = {value}" for name, value in options.items())
    heading = f"recipe {recipe.name} ({recipe.source}): {recipe.sentence}"
    lines = [f"{name} = {value} ({recipe.origin(name)})" for name, value in options.items()]
    no_clip = [f"clip: {recipe.no_clip}"] if "qk_clip" in recipe.arguments(recipe.given) else []
    return "\n".join([heading, *no_clip, *lines])
