"""What a parameter group may say: its options checked, its layouts, and the groups made from what a user passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from muonclip.core import MatrixLayout, resolve_coefficients, update_scale
from muonclip.core.coefficients import gram_restarts
from muonclip.torch.optimizer.plan import PlannedParameter, default_layout, plan_named
from muonclip.torch.update.plan import NewtonSchulzConfig
from muonclip.torch.update.products import choose_products, iteration_dtype

Group: TypeAlias = dict[str, Any]


class TorchEps(float):
    """`torch.optim.Muon`'s default of `eps`, told apart from the same number given on purpose: see `Muon`."""


class TorchSteps(int):
    """`torch.optim.Muon`'s default of `ns_steps`; a named set or a list of triples then has its own length."""


DEFAULT_EPS, DEFAULT_STEPS = TorchEps(1e-7), TorchSteps(5)


def plain_options(group: Group) -> Group:
    """A Muon group with those defaults as plain numbers, which a checkpoint can hold.

    `eps_given`: whether `eps` is a floor of the norm, or only there for `torch.optim.Muon` to find.
    """
    eps, steps, coefficients = group["eps"], group["ns_steps"], group["ns_coefficients"]
    if isinstance(steps, TorchSteps):
        is_triple = not isinstance(coefficients, str) and not any(isinstance(item, Sequence) for item in coefficients)
        steps = int(steps) if is_triple else None
    dtypes = {name: dtype_name(group[name]) for name in ("ns_dtype", "momentum_dtype")}
    return {**group, **dtypes, "eps": float(eps), "eps_given": not isinstance(eps, TorchEps), "ns_steps": steps}


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """`torch.float32` → "float32": what every checkpoint format can hold."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def dtype_named(name: torch.dtype | str | None) -> torch.dtype | None:
    return getattr(torch, name) if isinstance(name, str) else name


def momentum_dtype(group: Group, parameter: Tensor) -> torch.dtype:
    return dtype_named(group["momentum_dtype"]) or parameter.dtype


def check_loadable(saved: Group, own: Group, index: int) -> None:
    """Raises ValueError where a group of a checkpoint is for the other half of the optimizer."""
    saved_use = saved.get("use", "adamw" if "betas" in saved else "muon")
    if saved_use != own["use"]:
        raise ValueError(
            f"group {index} of the checkpoint is for {saved_use!r}, of the optimizer for {own['use']!r}; build the "
            "optimizer with the groups it was saved with."
        )


def groups_of(planned: Sequence[PlannedParameter], named: Mapping[str, Tensor]) -> list[Group]:
    """At most three groups: Muon, AdamW, AdamW without decay."""
    groups: list[Group] = []
    for use, decays in (("muon", True), ("adamw", True), ("adamw", False)):
        lines = [line for line in planned if line.use == use and line.decays == decays]
        if lines:
            group: Group = {"params": [(line.name, named[line.name]) for line in lines], "use": use, "planned": lines}
            if use == "muon":
                group["layout"] = [line.layout for line in lines]
            if not decays:
                group["weight_decay"] = 0.0
            groups.append(group)
    return groups


def given_groups(params: Iterable[Any]) -> list[Group]:
    """Groups as MuonClip takes them, from groups and named parameters; what says no `use` is divided by names."""
    groups: list[Group] = []
    given = list(params)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    for group in given:
        if "use" in group:
            groups.append(dict(group))
            continue
        if "layout" in group:
            raise ValueError("layout in a parameter group that does not say use='muon': say it.")
        named = list(group["params"])
        if not all(isinstance(item, tuple) for item in named):
            raise ValueError(
                "MuonClip was given parameters without names, so an embedding looks like a hidden matrix. Pass the "
                "model itself, model.named_parameters(), or groups that say use='muon' or use='adamw'."
            )
        if len(dict(named)) < len(named):
            raise ValueError("two parameters have the same name; name them apart, by a prefix for each module.")
        options = {name: value for name, value in group.items() if name != "params"}
        groups += [{**options, **part} for part in groups_of(plan_named(named), dict(named))]
    if groups and not all(isinstance(item, tuple) for group in groups for item in group["params"]):
        for group in groups:  # torch wants names for all or for none
            group["params"] = [item[1] if isinstance(item, tuple) else item for item in group["params"]]
    return groups


def iteration_of(group: Group, parameter: Tensor) -> NewtonSchulzConfig:
    """How the matrices of a parameter of this group are iterated."""
    return NewtonSchulzConfig(
        iteration_dtype(parameter.device.type, momentum_dtype(group, parameter), dtype_named(group["ns_dtype"])),
        _hashable(group["ns_coefficients"]),
        group["ns_steps"],
        group["ns_form"] or "standard",
        group["eps"] if group["eps_given"] else 0.0,
        group["products"],
        str(parameter.device),
    )


def _hashable(coefficients: Any) -> Any:
    return (
        tuple(map(_hashable, coefficients))
        if isinstance(coefficients, Sequence) and not isinstance(coefficients, str)
        else coefficients
    )


def adamw_options(given: Mapping[str, Any], *, lr: float, weight_decay: float, capturable: bool) -> Group:
    known: Group = dict(lr=None, betas=(0.9, 0.95), eps=1e-8, weight_decay=None, fused=None)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"adamw={{{', '.join(unknown)}: …}} is not an option of the AdamW half; known: {', '.join(known)}."
        )
    options = {**known, **given, "capturable": capturable}
    options["lr"] = lr if options["lr"] is None else options["lr"]
    options["weight_decay"] = weight_decay if options["weight_decay"] is None else options["weight_decay"]
    check_adamw_options(options)
    return options


def layouts_of(group: Group, layout: MatrixLayout | Sequence[MatrixLayout] | None) -> list[MatrixLayout | None]:
    given = [layout] * len(group["params"]) if layout is None or isinstance(layout, MatrixLayout) else list(layout)
    if len(given) != len(group["params"]):
        raise ValueError(f"layout lists {len(given)} layouts for the {len(group['params'])} parameters of its group.")
    layouts: list[MatrixLayout | None] = []
    for position, (item, own) in enumerate(zip(group["params"], given, strict=True)):
        name, parameter = item if isinstance(item, tuple) else (f"parameter {position} of the group", item)
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name!r} is a {type(parameter).__name__}; the optimizer takes tensors.")
        try:
            chosen = own or default_layout(parameter.shape)
            if parameter.numel():
                chosen.matrix_shapes(parameter.shape)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}" if own else f"{name!r} {error}") from None
        layouts.append(chosen)
        if parameter.is_complex():
            raise ValueError(f"{name!r} is complex; Muon's polynomials are real. Leave it to AdamW.")
    return layouts


def check_muon_options(options: Group) -> None:
    _check_rate(options)
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"momentum={options['momentum']} must lie in [0, 1).")
    if not options["eps"] >= 0:
        raise ValueError(f"eps={options['eps']} must be zero or more.")
    resolve_coefficients(options["ns_coefficients"], options["ns_steps"])
    update_scale(1, 1, options["adjust_lr_fn"])
    choose_products(options["products"])
    if options["ns_form"] not in (None, "standard", "gram"):
        raise ValueError(f"ns_form={options['ns_form']!r}; use 'standard', 'gram', or None for the standard one.")
    if options["ns_form"] == "gram":
        gram_restarts(options["ns_coefficients"])


def check_adamw_options(options: Group) -> None:
    _check_rate(options)
    for name in ("amsgrad", "maximize", "differentiable"):
        if options.get(name):
            raise ValueError(f"{name}={options[name]} is not an option of the AdamW half.")
    if not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"betas={options['betas']} must lie in [0, 1).")
    if not options["eps"] >= 0:
        raise ValueError(f"eps={options['eps']} must be zero or more.")


def _check_rate(options: Group) -> None:
    for name in ("lr", "weight_decay"):
        if not (options[name] >= 0 and math.isfinite(options[name])):
            raise ValueError(f"{name}={options[name]} must be a finite number, zero or more.")


def name_of(group: Group, index: int, position: int) -> str:
    names = group.get("param_names")
    return names[position] if names else f"param_groups[{index}]['params'][{position}]"
