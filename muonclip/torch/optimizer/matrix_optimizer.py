"""Groups, state and step of an optimizer for matrices, sharded or not.

The mathematics is in `muonclip.core`; how matrices get to it, in `update`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from muonclip.core import MatrixLayout
from muonclip.core.update_rule import MuonRule
from muonclip.torch.mesh import Topology, check_state, local_gradient, local_part
from muonclip.torch.optimizer.adamw import adamw_update, make_adamw_state, widen_step_count
from muonclip.torch.optimizer.filled_parameters import ON_META
from muonclip.torch.optimizer.groups import check_gradients, check_loadable, check_parameters, check_state_of, name_of
from muonclip.torch.optimizer.layouts import layouts_of
from muonclip.torch.optimizer.matrix_state import check_matrix_states, make_matrix_states, restored_states
from muonclip.torch.optimizer.options import AdamWOptions, Group, MuonOptions
from muonclip.torch.optimizer.plan_inputs import plan_inputs
from muonclip.torch.update import MUON, ParameterStep, PlacedParameter, UpdatePlan, execute
from muonclip.torch.update import plan as plan_update


class Matrix(NamedTuple):
    """A parameter that Muon updates: its group and its position there, and how it is read as matrices."""

    parameter: Tensor
    layout: MatrixLayout
    group: int
    position: int


class MatrixOptimizer(Optimizer):
    """Groups with `use` "muon" or "adamw", a layout for every Muon parameter, and their state.

    `_layouts[g][i]` belongs to `param_groups[g]["params"][i]`: by position, because engines replace parameters, and
    outside the groups, because those are saved. `rule` is what its matrices are updated by.
    """

    rule: ClassVar[MuonRule] = MUON

    def __init__(
        self, groups: Iterable[Group], muon: MuonOptions, adamw: AdamWOptions | None, workspace_bytes: int | None
    ) -> None:
        if workspace_bytes is not None and not (isinstance(workspace_bytes, int) and workspace_bytes > 0):
            raise ValueError(f"workspace_bytes={workspace_bytes} must be a whole number of bytes, or None.")
        self._muon, self._adamw = muon, adamw
        self._workspace_bytes = workspace_bytes
        self._topology = Topology()
        self._layouts: list[list[MatrixLayout | None]] = []
        self._forget_plan()
        defaults = muon.as_group()
        common = defaults if adamw is None else ("lr", "weight_decay", "momentum")
        super().__init__(groups, {name: defaults[name] for name in common})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group: `params`, and any option of its `use` ("muon", the default, or "adamw").

        A Muon group may carry `layout`, a `MatrixLayout` or one per parameter; by default the shape decides. Raises
        ValueError, and adds nothing, for parameters and options that do not fit.
        """
        group = dict(param_group)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        use = group.setdefault("use", "muon")
        layouts: list[MatrixLayout | None] = [None] * len(group["params"])
        if use == "muon":
            layouts = layouts_of(group, group.pop("layout", None))
        group |= self._defaults(use).updated(group).as_group()
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()  # a scheduler that scales each group in place must not do so thrice
        super().add_param_group(group)
        self._layouts.append(layouts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as any optimizer does; `torch.optim.Muon`'s is accepted, and keeps torch's floor.

        States keep their precision: torch would cast a float32 buffer to the dtype of a bf16 parameter.
        """
        check_loadable(state_dict["param_groups"], self.param_groups)
        for index, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
            for position, (key, parameter) in enumerate(zip(saved["params"], group["params"], strict=False)):
                name, state = name_of(group, index, position), state_dict["state"].get(key, {})
                layout = self._layouts[index][position]
                check_state_of(group["use"], name, state)
                if parameter.is_meta and state:
                    raise ValueError(f"{name} is {ON_META}")
                if layout is None:
                    for part, value in state.items():
                        check_state(name, part, value, parameter)
                else:
                    check_matrix_states(name, state, self.rule, parameter, layout)
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            if group["use"] == "muon":
                options = MuonOptions.from_mapping(group)
                for key, parameter in zip(saved["params"], group["params"], strict=True):
                    self.state[parameter].update(
                        restored_states(state_dict["state"].get(key, {}), self.rule, parameter, options)
                    )
            else:
                for parameter in group["params"]:
                    widen_step_count(self.state.get(parameter, {}))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_muon", "_adamw", "_workspace_bytes", "_layouts")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_topology", Topology())
        self._forget_plan()
        for group in self.param_groups:  # a checkpoint of torch.optim.Muon has fewer options, and means its own eps
            use = group.setdefault("use", "muon")
            if use == "muon" and "eps" in group:
                group.setdefault("eps_given", True)
            for name, value in self._defaults(use).as_group().items():
                group.setdefault(name, value)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter once. `closure` re-evaluates the loss with gradients enabled and is returned from."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refresh_plan()
        check_gradients(self.param_groups)
        self._update()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state as any optimizer does; every trainable parameter has one, with or without a gradient."""
        self._make_state()
        return super().state_dict()

    def _defaults(self, use: str) -> MuonOptions | AdamWOptions:
        if use == "muon":
            return self._muon
        if use == "adamw" and self._adamw is not None:
            return self._adamw
        known = "'muon'" if self._adamw is None else "'muon', 'adamw'"
        raise ValueError(f"use={use!r} in a parameter group; it is one of {known}.")

    def _update(self) -> None:
        assert self._update_plan is not None
        if not self._has_state:
            self._make_state()
            self._has_state = True
        muon = {
            index: MuonOptions.from_mapping(group)
            for index, group in enumerate(self.param_groups)
            if group["use"] == "muon"
        }
        steps: list[ParameterStep] = []
        for parameter, layout, index, _ in self._matrices:
            state, options = self.state[parameter], muon[index]
            make_matrix_states(state, self.rule, parameter, layout, options)
            held = {each.name: local_part(state[each.name]) for each in self.rule.states}
            gradient = local_gradient(parameter)
            steps.append(ParameterStep(local_part(parameter), gradient, held, layout, options, self.rule))
        for group in self.param_groups:
            if group["use"] == "adamw":
                adamw_update(group["params"], AdamWOptions.from_mapping(group), self.state)
        execute(self._update_plan, steps, self._topology.positions())

    @torch.no_grad()
    def _make_state(self) -> None:
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            options = self._defaults(group["use"]).from_mapping(group)
            for parameter, layout in zip(group["params"], layouts, strict=True):
                if not _moves(parameter):
                    continue
                if isinstance(options, AdamWOptions):
                    make_adamw_state(self.state[parameter], parameter, options)
                elif layout is not None:
                    make_matrix_states(self.state[parameter], self.rule, parameter, layout, options)

    def _refresh_plan(self) -> None:
        """Check the parameters and plan their update anew, if what these depend on has changed."""
        inputs = plan_inputs(self.param_groups, self._topology.version)
        if inputs != self._inputs:
            check_parameters(self.param_groups)
            self._plan_update()
            self._inputs, self._has_state = inputs, False

    def _plan_update(self) -> None:
        """Decide who iterates which matrix."""
        self._matrices = list(self._find_matrices())
        options = [MuonOptions.from_mapping(group) if group["use"] == "muon" else None for group in self.param_groups]
        placed: list[PlacedParameter] = []
        for parameter, layout, index, position in self._matrices:
            muon = options[index]
            assert muon is not None
            placed.append(
                PlacedParameter(
                    name_of(self.param_groups[index], index, position),
                    tuple(parameter.shape),
                    layout,
                    muon.newton_schulz(parameter),
                    self._topology.position(parameter).mesh,
                    self._topology.placements(parameter),
                )
            )
        self._update_plan = plan_update(placed, self._workspace_bytes)

    def _forget_plan(self) -> None:
        self._update_plan: UpdatePlan | None = None
        self._matrices: list[Matrix] = []
        self._inputs: list[object] | None = None
        self._has_state = False  # as far as the plan knows

    def _find_matrices(self) -> Iterator[Matrix]:
        """Yield Muon's parameters that may move."""
        for index, (group, layouts) in enumerate(zip(self.param_groups, self._layouts, strict=True)):
            for position, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
                if layout is not None and parameter.numel() and _moves(parameter):
                    yield Matrix(parameter, layout, index, position)


def _moves(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None
