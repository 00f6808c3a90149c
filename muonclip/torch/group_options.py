"""What a parameter group may say: its options checked, its layouts, and the groups made from what a user passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from muonclip.core import MatrixLayout, resolve_coefficients, update_scale
from muonclip.torch.param_groups import PlannedParameter, default_layout, plan_named
from muonclip.torch.products import choose_products

Group: TypeAlias = dict[str, Any]


class TorchEps(float):
    """`torch.optim.Muon`'s default 1e-7, told apart from the same number given on purpose: see `Muon`."""


DEFAULT_EPS = TorchEps(1e-7)


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
        named = list(group["params"])
        if not all(isinstance(item, tuple) for item in named):
            raise ValueError(
                "MuonClip was given parameters without names, so an embedding looks like a hidden matrix. Pass the "
                "model itself, model.named_parameters(), or groups that say use='muon' or use='adamw'."
            )
        options = {name: value for name, value in group.items() if name != "params"}
        groups += [{**options, **part} for part in groups_of(plan_named(named), dict(named))]
    if groups and not all(isinstance(item, tuple) for group in groups for item in group["params"]):
        for group in groups:  # torch wants names for all or for none
            group["params"] = [item[1] if isinstance(item, tuple) else item for item in group["params"]]
    return groups


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
        try:
            layouts.append(own or default_layout(parameter.shape))
            (own or default_layout(parameter.shape)).matrix_shapes(parameter.shape)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}" if own else f"{name!r} {error}") from None
        if parameter.is_complex():
            raise ValueError(f"{name!r} is complex; Muon's polynomials are real. Leave it to AdamW.")
    return layouts


def check_muon_options(options: Group) -> None:
    _check_rate(options)
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"momentum={options['momentum']} must lie in [0, 1).")
    if options["eps"] is not None and not options["eps"] >= 0:
        raise ValueError(f"eps={options['eps']} must be zero or more.")
    resolve_coefficients(options["ns_coefficients"], options["ns_steps"])
    update_scale(1, 1, options["adjust_lr_fn"])
    choose_products(options["products"])


def check_adamw_options(options: Group) -> None:
    _check_rate(options)
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
