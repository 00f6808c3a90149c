"""Groups, state and step of an optimizer for matrices, sharded or not.

The mathematics is in `muonclip.core`; how matrices get to it, in `update`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from muonclip.core import MatrixLayout
from muonclip.torch.mesh.dtensors import check_parameter, check_state, local_gradient, local_part
from muonclip.torch.mesh.topology import Topology
from muonclip.torch.optimizer.adamw import adamw_update, make_adamw_state
from muonclip.torch.optimizer.options import (
    Group,
    check_adamw_options,
    check_loadable,
    check_muon_options,
    iteration_of,
    layouts_of,
    momentum_dtype,
    name_of,
    plain_options,
)
from muonclip.torch.update.execute import ParameterStep, execute
from muonclip.torch.update.plan import PlacedParameter, UpdatePlan
from muonclip.torch.update.plan import plan as plan_matrices


class MatrixOptimizer(Optimizer):
    """Groups with `use` "muon" or "adamw", a layout for every Muon parameter, and their state.

    `_layouts[g][i]` belongs to `param_groups[g]["params"][i]`: by position, because engines replace parameters, and
    outside the groups, because those are saved.
    """

    def __init__(self, groups: Iterable[Group], options: Mapping[str, Group], workspace_bytes: int | None) -> None:
        if workspace_bytes is not None and not (isinstance(workspace_bytes, int) and workspace_bytes > 0):
            raise ValueError(f"workspace_bytes={workspace_bytes} must be a whole number of bytes, or None.")
        self._options = options
        self._workspace_bytes = workspace_bytes
        self._topology = Topology()
        self._distribution: UpdatePlan | None = None
        self._layouts: list[list[MatrixLayout | None]] = []
        common = ("lr", "weight_decay", "momentum") if "adamw" in options else options["muon"]
        super().__init__(groups, {name: options["muon"][name] for name in common})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group: `params`, and any option of its `use` ("muon", the default, or "adamw").

        A Muon group may carry `layout`, a `MatrixLayout` or one per parameter; by default the shape decides. Raises
        ValueError, and adds nothing, for parameters and options that do not fit.
        """
        group = dict(param_group)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        use = group.setdefault("use", "muon")
        if use not in self._options:
            raise ValueError(f"use={use!r} in a parameter group; it is one of {', '.join(map(repr, self._options))}.")
        layouts: list[MatrixLayout | None] = [None] * len(group["params"])
        if use == "muon":
            layouts = layouts_of(group, group.pop("layout", None))
        group = {**self._options[use], **group}
        if use == "muon":
            group = plain_options(group)
            check_muon_options(group)
        else:
            check_adamw_options(group)
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()  # a scheduler that scales each group in place must not do so thrice
        super().add_param_group(group)
        self._layouts.append(layouts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; `torch.optim.Muon`'s state is accepted. Momentum keeps its precision: torch would cast a
        float32 buffer to the dtype of a bf16 parameter."""
        for index, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
            check_loadable(saved, group, index)
            for position, (key, parameter) in enumerate(zip(saved["params"], group["params"], strict=False)):
                for part, value in state_dict["state"].get(key, {}).items():
                    check_state(name_of(group, index, position), part, value, parameter)
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            if group["use"] == "muon":
                for index, parameter in zip(saved["params"], group["params"], strict=True):
                    buffer = state_dict["state"].get(index, {}).get("momentum_buffer")
                    dtype = momentum_dtype(group, parameter)
                    if buffer is not None and dtype != parameter.dtype:
                        buffer = buffer.detach().to(device=parameter.device, dtype=dtype, copy=True)
                        self.state[parameter]["momentum_buffer"] = buffer

    def __getstate__(self) -> dict[str, Any]:
        own = ("_options", "_workspace_bytes", "_layouts")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_topology", Topology())
        self.__dict__.setdefault("_distribution", None)
        for group in self.param_groups:  # a checkpoint of torch.optim.Muon has fewer options
            options = self._options[group.setdefault("use", "muon")]
            for name, value in (plain_options(options) if group["use"] == "muon" else options).items():
                group.setdefault(name, value)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. `closure` re-evaluates the loss with gradients enabled and is returned from."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_parameters()
        self._update()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; every trainable parameter has its state, whether or not it has had a gradient here."""
        self._make_state()
        return super().state_dict()

    @torch.no_grad()
    def _make_state(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad or parameter.grad is not None:
                    if group["use"] == "adamw":
                        make_adamw_state(self.state[parameter], parameter, group)
                    elif "momentum_buffer" not in self.state[parameter]:
                        dtype = momentum_dtype(group, parameter)
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)

    def _update(self) -> None:
        self._make_state()
        self._settle()
        assert self._distribution is not None
        works = [
            ParameterStep(
                local_part(parameter),
                local_gradient(parameter),
                local_part(self.state[parameter]["momentum_buffer"]),
                layout,
                group,
            )
            for _, parameter, layout, group in self._matrices()
        ]
        for group in self.param_groups:
            if group["use"] == "adamw":
                adamw_update(group, self.state)
        execute(self._distribution, works, self._topology.by_mesh())

    def _settle(self) -> None:
        """Plan who iterates which matrix, unless the plan there is still holds."""
        placed = [
            PlacedParameter(
                name,
                tuple(parameter.shape),
                layout,
                iteration_of(group, parameter),
                self._topology.of(parameter).mesh,
                self._topology.placements(parameter),
            )
            for name, parameter, layout, group in self._matrices()
        ]
        if self._distribution is None or list(self._distribution.parameters) != placed:
            self._distribution = plan_matrices(placed, self._workspace_bytes)

    def _matrices(self) -> Iterator[tuple[str, Tensor, MatrixLayout, Group]]:
        """Muon's parameters that may move."""
        for index, (group, layouts) in enumerate(zip(self.param_groups, self._layouts, strict=True)):
            for position, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
                if layout is not None and parameter.numel() and (parameter.requires_grad or parameter.grad is not None):
                    yield name_of(group, index, position), parameter, layout, group

    def _check_parameters(self) -> None:
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                check_parameter(name_of(group, index, position), parameter)
                if group.get("capturable") and parameter.device.type == "cpu":
                    name = name_of(group, index, position)
                    raise ValueError(f"capturable=True is for CUDA graphs, but {name} is on the CPU. Leave it out.")
                if parameter.grad is not None and parameter.grad.is_sparse:
                    name = name_of(group, index, position)
                    raise ValueError(f"{name} has a sparse gradient, which neither Muon nor AdamW takes.")
