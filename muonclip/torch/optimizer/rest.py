"""The other half by choice: an optimizer class of the user's, on the parameters that Muon does not take.

Its instance shares the very groups and states of the optimizer that owns it. So schedulers, checkpoints and engines see
one optimizer, and the class reads what they set.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from muonclip.core.arguments import NOT_NEGATIVE, check_number, kind, plain_number, shown
from muonclip.torch.optimizer.group_keys import check_keys_of_class
from muonclip.torch.optimizer.groups import listed_params
from muonclip.torch.optimizer.options import Group

RestClass: TypeAlias = "type[Optimizer] | functools.partial[Optimizer]"
"""An optimizer class, or `functools.partial(Class, …)` with its options."""

_OURS = {"params", "param_names", "use", "layout", "planned", "format", "rest"}
_HOW = "Give a class of optimizers, rest=torch.optim.NAdam, or with options rest=functools.partial(Class, lr=…)."


@dataclass(frozen=True, slots=True, kw_only=True)
class RestOptions:
    """The options that are read of a group for such a class; the others are the class's own affair.

    `lr`: its rate. `betas`: of a class that has them, for schedulers that cycle β₁.
    """

    lr: Any = None
    betas: Any = None
    master_weight_bits: None = None  # a class that keeps wider weights does so itself

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the options among the values of a group by name."""
        return cls(lr=values.get("lr"), betas=values.get("betas"))

    def updated(self, group: Mapping[str, Any]) -> Self:
        """Return the options of a group. Raises ValueError for a rate that is none."""
        options = self.from_mapping(group)
        options.check()
        return options

    def as_group(self) -> Group:
        """Return what is added to a group: nothing."""
        return {}

    def check(self) -> None:
        """Raise ValueError for a rate that is a number, and less than zero or not finite."""
        if not isinstance(self.lr, str) and plain_number("lr", self.lr) is not None:
            check_number("lr", self.lr, NOT_NEGATIVE)


class Rest:
    """An optimizer of a class that was given, made on the groups with `use="rest"` of another, its owner.

    Args:
        given: The class, or a `functools.partial` of it.
        lr: The rate where the partial gives none.

    Raises:
        TypeError: For what is not a class of optimizers, and for one whose step needs a closure.
    """

    use: ClassVar[Literal["rest"]] = "rest"

    def __init__(self, given: RestClass, lr: float | Tensor) -> None:
        self._class, self._options = _class_and_options(given)
        parameters = inspect.signature(self._class).parameters.values()
        if any(each.name == "lr" or each.kind is each.VAR_KEYWORD for each in parameters):
            self._options = {"lr": lr, **self._options}
        self.optimizer: Optimizer | None = None

    @property
    def name(self) -> str:
        """The name of the class."""
        return self._class.__name__

    def __str__(self) -> str:
        defaults = self._options if self.optimizer is None else {**self.optimizer.defaults, **self._options}
        words = ", ".join(f"{name}={value}" for name, value in defaults.items())
        return f"{self._class.__module__.partition('.')[0]} {self.name}({words})"

    def made_on(self, groups: Iterable[Group]) -> list[Group]:
        """Make the optimizer on those of the groups that are for it; return all, these with their options.

        All at once, because some classes make their states when they are made. Raises TypeError or ValueError, saying
        whose it is, where the class does.
        """
        given = list(groups)
        own = [group for group in given if group.get("use") == "rest"]
        if own:
            self.optimizer = self._made(own)
        made = iter(() if self.optimizer is None else self.optimizer.param_groups)
        return [self._completed(group, next(made)) if group.get("use") == "rest" else group for group in given]

    def added(self, group: Group) -> Group:
        """Add a group later; return it with its options. `share` takes it back, where the owner does not have it."""
        if self.optimizer is None:
            return self.made_on([group])[0]
        names = [item[0] for item in listed_params(group) if isinstance(item, tuple)]
        self.optimizer.add_param_group({**_of_class(group), **({"param_names": names} if names else {})})
        return self._completed(group, self.optimizer.param_groups[-1])

    def share(self, groups: Sequence[Group], state: MutableMapping[Any, Any]) -> None:
        """Let the optimizer have the owner's own groups and states, which engines may have replaced."""
        if self.optimizer is not None:
            self.optimizer.param_groups = [group for group in groups if group["use"] == "rest"]
            self.optimizer.state = state  # pyright: ignore[reportAttributeAccessIssue]

    def owns(self) -> set[int]:
        """Return the ids of its parameters."""
        groups = () if self.optimizer is None else self.optimizer.param_groups
        return {id(parameter) for group in groups for parameter in group["params"]}

    def step(self) -> None:
        """Update its parameters. What it raises tells what was and what was not done in this step.

        Hooks of steps, torch's global ones too, are the owner's and not run twice.
        """
        if self.optimizer is None:
            return
        step: Callable[..., Any] = type(self.optimizer).step
        if getattr(step, "hooked", False):
            step = getattr(step, "__wrapped__", step)
        try:
            step(self.optimizer)
        except BaseException as error:
            error.add_note(
                f"In the step of rest={self.name}, which comes first: no matrix of Muon's has moved and nothing was "
                f"clipped. What {self.name} itself had updated before it raised stays updated."
            )
            raise

    def loaded(self, state_dict: Mapping[str, Any]) -> Optimizer | None:
        """Return a copy of the optimizer that has loaded its part of the owner's state, as its class does it.

        States of one number, such as counts, keep their dtype: torch would cast them to a parameter's. Raises
        ValueError for a state of another class.
        """
        groups = [group for group in state_dict["param_groups"] if group.get("use") == "rest"]
        for group in groups:
            saved = group.get("rest", self.name)
            if saved != self.name:
                raise ValueError(
                    f"the checkpoint was saved with rest={shown(saved)}, and this optimizer has rest={self.name}, "
                    "whose states are others. Nothing was loaded. Make it with the class of the checkpoint, or load "
                    "the weights alone."
                )
        if self.optimizer is None:
            return None
        twin: Optimizer = object.__new__(self._class)
        vars(twin).update(vars(self.optimizer))
        twin.param_groups = [dict(group) for group in self.optimizer.param_groups]
        keys = [key for group in groups for key in group["params"]]
        states = {key: state_dict["state"][key] for key in keys if key in state_dict["state"]}
        twin.load_state_dict({"state": states, "param_groups": groups})
        parameters = [parameter for group in twin.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in states.get(key, {}).items():
                held = twin.state[parameter].get(name)
                if isinstance(value, Tensor) and isinstance(held, Tensor) and value.numel() == held.numel() == 1:
                    twin.state[parameter][name] = value.detach().to(device=held.device, copy=True)
        return twin

    def take(self, twin: Optimizer | None, groups: Sequence[Group], state: MutableMapping[Any, Any]) -> None:
        """Take what a copy has loaded into the groups and states of the owner, which has loaded all the others."""
        if self.optimizer is None or twin is None:
            return
        loaded = iter(twin.param_groups)
        for group in groups:
            if group["use"] == "rest":
                group.update(next(loaded))
        state.update(twin.state)
        vars(self.optimizer).update(vars(twin))
        self.share(groups, state)

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes of the optimizer, of which torch's own pickles drop those of a subclass."""
        held = None if self.optimizer is None else dict(vars(self.optimizer))
        return {"class": self._class, "options": self._options, "optimizer": held}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._class, self._options, self.optimizer = state["class"], state["options"], None
        if state["optimizer"] is not None:
            made: Optimizer = object.__new__(self._class)
            vars(made).update(state["optimizer"])
            Optimizer.__setstate__(made, {})  # which wraps the step, in a new process
            self.optimizer = made

    def _made(self, groups: Sequence[Group]) -> Optimizer:
        given = [_of_class(group) for group in groups]
        parameters = [[id(parameter) for parameter in group["params"]] for group in given]
        try:
            made = self._class(given, **self._options)  # pyright: ignore[reportCallIssue, reportArgumentType]
        except Exception as error:
            words = ", ".join(f"{name}={shown(value)}" for name, value in self._options.items())
            again = TypeError if isinstance(error, TypeError) else ValueError
            raise again(
                f"rest={self.name} could not be made on the parameters that Muon does not take, as {self.name}(…"
                f"{words and ', ' + words}): {error} Its options are given by functools.partial({self.name}, …)."
            ) from error
        if [[id(parameter) for parameter in group["params"]] for group in made.param_groups] != parameters:
            raise ValueError(f"rest={self.name} divides its parameter groups otherwise than they are given to it.")
        return made

    def _completed(self, group: Group, made: Group) -> Group:
        """Add the options of the class to a group; `momentum` is β₁ where it has none, for schedulers that cycle it."""
        if "lr" not in made:
            raise ValueError(f"rest={self.name} has no lr in its parameter groups, which schedulers set. {_HOW}")
        known = made if self.optimizer is None else self.optimizer.defaults
        check_keys_of_class(group, known, self.name)
        betas = made.get("betas")
        beta1 = betas[0] if isinstance(betas, Sequence) and betas else 0.0
        options = {name: value for name, value in made.items() if name not in _OURS}
        return {"momentum": beta1, "weight_decay": 0.0, **options, **group, "rest": self.name}


def _of_class(group: Group) -> Group:
    """Return a group as the class gets it: tensors without names, and the options that were given."""
    options = {name: value for name, value in group.items() if name not in _OURS}
    return {**options, "params": [item[1] if isinstance(item, tuple) else item for item in listed_params(group)]}


def _class_and_options(given: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return class and options. Raises TypeError for what is not a class whose step can be called alone."""
    if isinstance(given, Optimizer):
        raise TypeError(
            f"rest={kind(given)}(…) is an optimizer that was made already; give its class, rest={kind(given)}, or with "
            f"options rest=functools.partial({kind(given)}, lr=…). It is made on the parameters that are not Muon's."
        )
    partial = isinstance(given, functools.partial)
    made: Any = given.func if partial else given
    if not (isinstance(made, type) and issubclass(made, Optimizer)):
        raise TypeError(f"rest={shown(given)} is a {kind(made)}. {_HOW}")
    if partial and given.args:
        raise TypeError(f"rest={shown(given)} gives parameters or options by position; give options by name. {_HOW}")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"rest={made.__name__} needs a closure in each step, which it calls several times; with Muon the loss is "
            "evaluated once. Give a class whose step() can be called alone."
        )
    return made, dict(given.keywords) if partial else {}
