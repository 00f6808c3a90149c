"""The options of a parameter group as values: checked in one place, None where nothing was given.

A group of `torch.optim` is a dict, and so is what a checkpoint holds: `as_group` and `from_mapping` are that edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from muonclip.core import resolve_coefficients, update_scale
from muonclip.core.adam_defaults import ADAM_BETAS, ADAM_EPS
from muonclip.core.arguments import (
    BELOW_ONE,
    NOT_NEGATIVE,
    check_choice,
    check_flag,
    check_kind,
    check_number,
    plain_number,
    shown,
)
from muonclip.core.coefficients import DEFAULT_NS_STEPS, Coefficients, checked_gram_restarts
from muonclip.core.state_storage import Storage
from muonclip.core.updates import check_update
from muonclip.torch.update import (
    MasterWeightBits,
    NewtonSchulzConfig,
    StepOptions,
    check_products,
    check_products_on,
    has_master,
    iteration_dtype,
)

Group: TypeAlias = dict[str, Any]

TORCH_EPS = 1e-7
"""`torch.optim.Muon`'s default of `eps`, which it has to find in a checkpoint."""


class Options(Protocol):
    """The options of a group, whoever's it is."""

    @property
    def lr(self) -> Any: ...

    @property
    def master_weight_bits(self) -> Any: ...

    def from_mapping(self, values: Mapping[str, Any], /) -> Options: ...

    def updated(self, group: Mapping[str, Any], /) -> Options: ...

    def as_group(self) -> Group: ...

    def check(self) -> None: ...


_LATER = {"update": "muon", "cautious_decay": False, "master_weight_bits": None}
"""Options that a group has only where they are not these."""

OFF = ("amsgrad", "maximize", "differentiable", "dampening")
"""Options of torch's optimizers that are switched off in their groups, and cannot be switched on here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MuonOptions(StepOptions):
    """The options of a Muon group; see `Muon` for what they mean."""

    ns_coefficients: Coefficients
    eps: float | None = None
    ns_steps: int | None = None
    ns_dtype: torch.dtype | str | None = None
    ns_form: Literal["standard", "gram"] | None = None
    products: str | None = None
    momentum_dtype: torch.dtype | str | None = None
    update: str = "muon"
    master_weight_bits: MasterWeightBits | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the options among the values by name: of a group that `as_group` has made, or of a call's arguments."""
        return cls(**_given(cls, values))

    def updated(self, group: Mapping[str, Any]) -> Self:
        """Return these options where a group says nothing else. Raises ValueError for what does not fit."""
        check_off(group)
        options = replace(self, **_given(type(self), group))
        options.check()
        return options

    def as_group(self) -> Group:
        """Return what a group holds: every checkpoint format can save it, and `torch.optim.Muon` can read it.

        `eps_given` tells whether `eps` is a floor of the norm, or only there for torch to find.
        """
        group: Group = {each.name: getattr(self, each.name) for each in fields(self)}
        group["eps"] = TORCH_EPS if self.eps is None else self.eps
        group["eps_given"] = self.eps is not None
        group = _without_later(group)
        if self.ns_steps is None and _is_triple(self.ns_coefficients):
            group["ns_steps"] = DEFAULT_NS_STEPS
        for name in ("ns_dtype", "momentum_dtype"):
            group[name] = None if group[name] is None else str(group[name]).removeprefix("torch.")
        return group

    def check(self) -> None:
        """Raise ValueError, naming the option, for a value that does not fit."""
        _check_rates(self.lr, self.weight_decay)
        check_number("momentum", self.momentum, BELOW_ONE)
        check_flag("nesterov", self.nesterov)
        check_flag("freeze_unused", self.freeze_unused)
        check_flag("cautious_decay", self.cautious_decay)
        check_update(self.update, self.weight_decay, cautious_decay=self.cautious_decay)
        if self.eps is not None:
            check_number("eps", self.eps, NOT_NEGATIVE)
        resolve_coefficients(self.ns_coefficients, self.ns_steps)
        update_scale(1, 1, self.adjust_lr_fn)
        check_products(self.products)
        check_choice("ns_form", self.ns_form, "standard", "gram", None, hint="None takes the cheaper one.")
        _check_dtype("ns_dtype", self.ns_dtype)
        if Storage.named("momentum_dtype", self._momentum_dtype) is None:
            _check_dtype("momentum_dtype", self.momentum_dtype, "'int8', ")
        _check_master_weight_bits(self.master_weight_bits)
        if self.ns_form == "gram":
            checked_gram_restarts(self.ns_coefficients, self.ns_steps)

    @property
    def storage(self) -> Storage:
        """The way in which the momentum is stored."""
        name = self._momentum_dtype
        return Storage.named("momentum_dtype", name) or Storage(name)

    def momentum_dtype_of(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which a parameter's momentum moves: that in which it is stored, or a wider one."""
        storage = self.storage
        if storage.has_codes or storage.is_stochastic:
            return torch.promote_types(parameter.dtype, torch.float32)
        return _dtype(storage.dtype) or master_dtype(parameter, self.master_weight_bits)

    @property
    def _momentum_dtype(self) -> str | None:
        return None if self.momentum_dtype is None else str(self.momentum_dtype).removeprefix("torch.")

    def newton_schulz(self, parameter: Tensor) -> NewtonSchulzConfig:
        """Return how the matrices of a parameter are iterated. Raises ValueError for what its device cannot do."""
        momentum = self.momentum_dtype_of(parameter)
        dtype = iteration_dtype(parameter.device.type, momentum, _dtype(self.ns_dtype))
        check_products_on(parameter.device, self.products, dtype)
        return NewtonSchulzConfig(
            dtype,
            _hashable(self.ns_coefficients),
            self.ns_steps,
            self.ns_form,
            self.eps or 0.0,
            self.products,
            str(parameter.device),
            is_asked=self.ns_dtype is not None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWOptions:
    """The options of an AdamW group, as `torch.optim.AdamW` has them."""

    use: ClassVar[Literal["adamw"]] = "adamw"
    lr: float | Tensor
    betas: tuple[float, float] = ADAM_BETAS
    eps: float = ADAM_EPS
    weight_decay: float
    fused: bool | None = None
    capturable: bool = False
    master_weight_bits: MasterWeightBits | None = None

    @classmethod
    def given(cls, options: Mapping[str, Any], muon: MuonOptions, *, capturable: bool) -> Self:
        """Read `MuonClip`'s `adamw`; `lr` and `weight_decay` are Muon's where they are not given, or None."""
        check_kind("adamw", options, Mapping, "a dict of options of the AdamW half, adamw=dict(betas=(0.9, 0.95))")
        known = [each.name for each in fields(cls) if each.name not in ("capturable", "master_weight_bits")]
        unknown = sorted(map(str, set(options) - set(known)))
        if unknown:
            raise ValueError(
                f"adamw={{{', '.join(unknown)}: …}} is not an option of the AdamW half; known: {', '.join(known)}."
            )
        shared = {"lr": muon.lr, "weight_decay": muon.weight_decay}
        said = {name: value for name, value in options.items() if name not in shared or value is not None}
        result = cls(**{**shared, **said}, capturable=capturable, master_weight_bits=muon.master_weight_bits)
        result.check()
        return result

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the options among the values by name, of a group that `as_group` has made."""
        return cls(**_given(cls, values))

    def updated(self, group: Mapping[str, Any]) -> Self:
        """Return these options where a group says nothing else. Raises ValueError for what does not fit."""
        check_off(group)
        options = replace(self, **_given(type(self), group))
        options.check()
        return options

    def as_group(self) -> Group:
        """Return what a group holds; `momentum` is β₁, for schedulers that cycle it, see `follow_cycle`."""
        group = {each.name: getattr(self, each.name) for each in fields(self)}
        return _without_later(group) | {"momentum": self.betas[0]}

    def check(self) -> None:
        """Raise ValueError, naming the option, for a value that does not fit."""
        _check_rates(self.lr, self.weight_decay)
        check_kind("betas", self.betas, Sequence, "two numbers, (β₁, β₂)")
        numbers = [plain_number("betas", beta) for beta in self.betas]
        if len(numbers) != 2 or not all(beta is not None and 0 <= beta < 1 for beta in numbers):
            raise ValueError(f"betas={shown(self.betas)} must be two numbers, (β₁, β₂), each in [0, 1).")
        if isinstance(self.betas[0], Tensor) != isinstance(self.betas[1], Tensor):
            raise ValueError(f"betas={shown(self.betas)} must be both numbers or both tensors, as torch has it.")
        check_number("eps", self.eps, NOT_NEGATIVE)
        if self.fused is not None:
            check_flag("fused", self.fused)
        check_flag("capturable", self.capturable)
        _check_master_weight_bits(self.master_weight_bits)


def follow_cycle(group: Group, known: object) -> None:
    """Let β₁ of a group that is not Muon's be the momentum that OneCycleLR or CyclicLR has set.

    So it is since its options were `known`.

    These schedulers cycle `momentum` in all groups of an optimizer that has it among its defaults, and leave
    `max_momentum` in each.
    """
    if group["use"] == "muon" or "max_momentum" not in group or not isinstance(group.get("betas"), Sequence):
        return
    betas = getattr(known, "betas", None)
    if betas is None or group["momentum"] != betas[0]:
        check_number("momentum", group["momentum"], BELOW_ONE)
        group["betas"] = (group["momentum"], *group["betas"][1:])


def master_dtype(parameter: Tensor, bits: int | None) -> torch.dtype:
    """Return the dtype in which a parameter is updated: float32 for one with a master, else its own."""
    return torch.float32 if has_master(parameter, bits) else parameter.dtype


def options_to_show(options: MuonOptions | AdamWOptions) -> Group:
    """Return the options that a plan shows: masters where there are some, once."""
    is_muon = isinstance(options, MuonOptions)
    kept = {"master_weight_bits"} if is_muon and options.master_weight_bits is not None else set[str]()
    return {name: value for name, value in asdict(options).items() if name != "master_weight_bits" or name in kept}


def options_in_words(groups: Sequence[Group]) -> dict[str, str]:
    """Return the options of groups on which the ranks of a model must agree, by name. Reads tensors."""
    names = "lr", "weight_decay", "momentum"
    return {
        f"{name} of param_groups[{index}]": str(plain_number(name, group[name]))
        for index, group in enumerate(groups)
        for name in names
    }


def check_off(group: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of torch's that a group switches on, and nothing here would do."""
    for name in OFF:
        if group.get(name):
            instead = "It descends: negate the loss." if name == "maximize" else "Leave it out."
            raise ValueError(f"{name}={shown(group[name])} is not an option of this optimizer. {instead}")


def _given(options: type[MuonOptions | AdamWOptions], group: Mapping[str, Any]) -> Group:
    """Take from a group what these options know."""
    given = {each.name: group[each.name] for each in fields(options) if each.name in group}
    if not group.get("eps_given", True):
        given["eps"] = None
    return given


def _without_later(group: Group) -> Group:
    """Leave out what earlier releases do not have, where it is off: DCP wants the keys that it finds in a group."""
    return {name: value for name, value in group.items() if name not in _LATER or value != _LATER[name]}


def _check_master_weight_bits(bits: Any) -> None:
    if bits is not None and not (type(bits) is int and bits in (24, 32)):
        raise ValueError(
            f"master_weight_bits={shown(bits)}; use 32 for float32 masters of bf16 parameters, 24 for masters that are "
            "rounded to 24 bits, or None."
        )


def _check_rates(lr: float | Tensor, weight_decay: float) -> None:
    check_number("lr", lr, NOT_NEGATIVE)
    check_number("weight_decay", weight_decay, NOT_NEGATIVE)


def _is_triple(coefficients: Coefficients) -> bool:
    return not isinstance(coefficients, str) and not any(isinstance(item, Sequence) for item in coefficients)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _check_dtype(name: str, dtype: object, others: str = "") -> None:
    """Raise ValueError unless it is a real floating dtype, its name, or None."""
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if known is not None and isinstance(known, torch.dtype) and known.is_floating_point and known.itemsize > 1:
        return
    if dtype is not None:
        raise ValueError(
            f"{name}={dtype!r} is not a floating dtype; give torch.float32, torch.bfloat16, … {others}or None."
        )


def _hashable(coefficients: Any) -> Any:
    return (
        tuple(map(_hashable, coefficients))
        if isinstance(coefficients, Sequence) and not isinstance(coefficients, str)
        else coefficients
    )
