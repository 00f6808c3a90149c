"""Groups, state and step of an optimizer for matrices, sharded or not.

The mathematics is in `muonclip.core`; how matrices get to it, in `update`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple, cast, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]; imports the compiler when called
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from muonclip.core import MatrixLayout
from muonclip.core.arguments import check_flag, check_kind, check_whole, kind, shown
from muonclip.core.state_storage import stream_of
from muonclip.core.update_rule import MuonRule
from muonclip.core.updates import UPDATES
from muonclip.torch.mesh import Topology, local_gradient, local_part, plain_name
from muonclip.torch.optimizer.adamw import adamw_step, make_adamw_state, restored_moments
from muonclip.torch.optimizer.group_keys import check_keys
from muonclip.torch.optimizer.groups import (
    check_gradients,
    check_iterable,
    check_master_weights,
    check_parameters,
    check_states,
    listed_params,
    name_of,
)
from muonclip.torch.optimizer.held_groups import check_held_groups, check_tensors
from muonclip.torch.optimizer.layouts import layouts_of
from muonclip.torch.optimizer.loading import (
    FORMAT,
    check_capturable,
    check_is_mapping,
    check_saved_state,
    checked_options,
    in_own_order,
    restored_errors,
    saved_parameters,
    warn_of_left_errors,
    warn_of_missing,
    with_tensor_counts,
    without_states,
)
from muonclip.torch.optimizer.master_weights import fp32_state_dict, load_fp32_state_dict
from muonclip.torch.optimizer.matrix_state import (
    held_states,
    local_states,
    make_matrix_states,
    offloaded,
    restored_states,
    state_bytes,
)
from muonclip.torch.optimizer.options import AdamWOptions, Group, MuonOptions, Options, follow_cycle
from muonclip.torch.optimizer.plan_inputs import plan_inputs
from muonclip.torch.optimizer.rest import Rest, RestOptions
from muonclip.torch.optimizer.saved_values import check_saved_values
from muonclip.torch.update import (
    MUON,
    WEIGHT_ERRORS,
    ParameterStep,
    PlacedParameter,
    Rounding,
    UpdatePlan,
    errors_of,
    execute,
    has_master,
)
from muonclip.torch.update import plan as plan_update

ROUNDING_STEP = "rounding_step"
"""The key of a group whose momentum is rounded stochastically: the steps that it has taken."""


class Matrix(NamedTuple):
    """A parameter that Muon updates: its group and its position there, and how it is read as matrices."""

    parameter: Tensor
    layout: MatrixLayout
    group: int
    position: int


class MatrixOptimizer(Optimizer):
    """Groups with `use` "muon" and "adamw" or "rest", a layout for every Muon parameter, and their state.

    `_layouts[g][i]` belongs to `param_groups[g]["params"][i]`: by position, because engines replace parameters, and
    outside the groups, because those are saved. `rule` is what matrices are updated by in groups with the `update`
    "muon".
    """

    rule: ClassVar[MuonRule] = MUON

    def __init__(
        self,
        groups: ParamsT,
        muon: MuonOptions,
        other: AdamWOptions | Rest | None,
        workspace_bytes: int | None,
        *,
        offload: bool = False,
    ) -> None:
        check_workspace(workspace_bytes)
        check_flag("offload", offload)
        muon.check()
        check_iterable(groups)
        self._muon = muon
        self._adamw = other if isinstance(other, AdamWOptions) else None
        self._rest = other if isinstance(other, Rest) else None
        self._has_rest = False  # made, while groups are added for the first time
        self._workspace_bytes = workspace_bytes
        self._offload = offload
        self._topology = Topology()
        self._layouts: list[list[MatrixLayout | None]] = []
        self._forget_plan()
        defaults = muon.as_group()
        common = defaults if other is None else ("lr", "weight_decay", "momentum")
        if self._rest is not None:
            groups = self._rest.made_on(cast("Iterable[Group]", groups))
        super().__init__(groups, {name: defaults[name] for name in common})
        if self._rest is not None:
            if self._rest.optimizer is not None:
                self.state.update(self._rest.optimizer.state)  # of classes that make states when they are made
            self._rest.share(self.param_groups, self.state)
            self._has_rest = True

    def add_param_group(self, param_group: Group) -> None:
        """Add a group.

        Args:
            param_group: `params`, and any option of its `use` ("muon", the default, or the other half's). A Muon
                group may carry `layout`, a `MatrixLayout` or one per parameter; by default the shape decides.

        Raises:
            ValueError: For parameters and options that do not fit; nothing is added then.
        """
        check_kind("param_group", param_group, dict, "a dict with `params` and options")
        group = dict(param_group)
        group["params"] = listed_params(group)
        use = group.setdefault("use", "muon")
        defaults = self._defaults(use)
        layouts: list[MatrixLayout | None] = [None] * len(group["params"])
        if use == "muon":
            layouts = layouts_of(group, group.pop("layout", None))
        added_later = self._rest if use == "rest" and self._has_rest else None
        check_keys(group, use)
        try:
            if added_later is not None:
                group = added_later.added(group)
            options = defaults.updated(group)
            self._check_rounding(options)
            group |= options.as_group() | {"format": FORMAT}
            if isinstance(options, MuonOptions) and options.storage.is_stochastic:
                group.setdefault(ROUNDING_STEP, 0)
            for position, item in enumerate(group["params"]):
                index = len(self.param_groups)
                name, parameter = item if isinstance(item, tuple) else (name_of({}, index, position), item)
                if isinstance(parameter, Tensor):  # torch says what is wrong with others
                    check_master_weights(name, parameter, group.get("master_weight_bits"))
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].clone()  # a scheduler that scales each group in place must not do so thrice
            super().add_param_group(group)
            self._layouts.append(layouts)
        finally:
            if added_later is not None:
                added_later.share(self.param_groups, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as any optimizer does; `torch.optim.Muon`'s is accepted, and keeps torch's floor.

        Parameters are found by name where both sides have names, whatever their order. States keep their precision:
        torch would cast a float32 buffer to the dtype of a bf16 parameter.

        Args:
            state_dict: What `state_dict` returned, here or in another process.

        Raises:
            ValueError: For groups, options and states that this optimizer would not have; nothing is loaded then.
        """
        restored: list[tuple[Tensor, dict[str, Tensor | None]]] = []
        rest: list[Optimizer | None] = []
        check_is_mapping(state_dict)

        def prepare(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            ready = in_own_order(given, self.param_groups)
            saved = list(saved_parameters(ready, self.param_groups, self._layouts))
            for each in saved:
                name = ready["param_groups"][each.group].get("update", self._muon.update)
                check_saved_state(each, self._rule_named(name))
            options = checked_options(ready["param_groups"], self._defaults)
            check_capturable(saved, options)
            check_saved_values(saved, self.rule)
            warn_of_missing(saved)
            warn_of_left_errors(saved, options)
            names = {*WEIGHT_ERRORS}  # what torch is not to cast, or to put on the device
            for each in saved:
                own = options[each.group]
                if isinstance(own, MuonOptions):
                    self._check_rounding(own)
                    rule, held = self._rule(own), (each.name, each.state)
                    states = dict(restored_states(*held, rule, each.parameter, each.layout, own, offload=self._offload))
                elif isinstance(own, AdamWOptions):
                    states = dict(restored_moments(each.state, each.parameter, own))
                else:
                    continue
                errors = dict(restored_errors(each, own.master_weight_bits))
                if self._offload and each.use == "muon":
                    errors = {name: offloaded(value) for name, value in errors.items()}
                    names |= {state.name for state in held_states(self._rule(own), each.state)}
                restored.append((each.parameter, {**states, **errors}))
            if self._rest is not None:
                rest.append(self._rest.loaded(ready))
            return with_tensor_counts(without_states(ready, names))

        hook = self.register_load_state_dict_pre_hook(prepare)  # the last: those of others may bring a state into shape
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for parameter, states in restored:
            own = self.state[parameter]
            own.update(states)
            for name in [name for name, value in states.items() if value is None]:
                del own[name]
        if self._rest is not None:
            self._rest.take(rest[0], self.param_groups, self.state)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_muon", "_adamw", "_rest", "_has_rest", "_workspace_bytes", "_offload", "_layouts")
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
            group["format"] = FORMAT
        if self._rest is not None:
            self._rest.share(self.param_groups, self.state)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter once. Under `torch.compile` it runs uncompiled, between two graphs.

        Args:
            closure: Re-evaluates the loss; it is called with gradients enabled, and what it returns is returned.
        """
        loss = None
        if closure is not None and not callable(closure):
            raise TypeError(f"closure={shown(closure)} is a {kind(closure)}; give a function of no argument, or None.")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_uncompiled()
        return loss

    @_disable_dynamo
    def _step_uncompiled(self) -> None:
        self._refresh_plan()
        check_gradients(self.param_groups)
        self._update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as any optimizer does; every trainable parameter has one, with or without a gradient.

        With a `rest`, whose class makes its states in its first step, there is none before.
        """
        if self._rest is None or self.state:
            self._make_state()
        return super().state_dict()

    @torch.no_grad()
    def fp32_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return `model.state_dict()` with the float32 master of each parameter that has one, for saving.

        Args:
            model: The model that is trained. Parameters that are sharded have sharded masters. What has no master is as
                it is in the model.
        """
        self._make_state()
        return fp32_state_dict(model, self._errors())

    @torch.no_grad()
    def load_fp32_state_dict(self, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Load float32 weights into a model and its masters: `model.load_state_dict` alone would round them to bf16.

        Args:
            model: The model that is trained.
            state_dict: What `fp32_state_dict` returned, or the state dict of a float32 model with the same names.
        """
        self._make_state()
        load_fp32_state_dict(model, state_dict, self._errors())

    def _errors(self) -> dict[int, tuple[Tensor, ...]]:
        """Return the errors of masters by the `id`s of their parameters."""
        return {
            id(parameter): errors
            for group in self.param_groups
            for parameter in group["params"]
            if has_master(parameter, group.get("master_weight_bits")) and (errors := errors_of(self.state[parameter]))
        }

    def _defaults(self, use: str) -> Options:
        if isinstance(use, str) and use == "muon":
            return self._muon
        if isinstance(use, str) and use == "adamw" and self._adamw is not None:
            return self._adamw
        if isinstance(use, str) and use == "rest" and self._rest is not None:
            return RestOptions()
        other = ", 'adamw'" if self._adamw is not None else ", 'rest'" if self._rest is not None else ""
        raise ValueError(f"use={use!r} in a parameter group; it is one of 'muon'{other}.")

    def _rule(self, options: Options) -> MuonRule:
        """Return what the matrices of a group with these options are updated by."""
        return self._rule_named(options.update if isinstance(options, MuonOptions) else "muon")

    def _rule_named(self, update: Any) -> MuonRule:
        known = isinstance(update, str) and update in UPDATES and update != "muon"  # other names are refused elsewhere
        return UPDATES[update] if known else self.rule

    def _update(self) -> None:
        """Update all parameters. What can be wrong raises before the first of them changes."""
        assert self._update_plan is not None
        if not self._has_state:
            self._make_state()
            self._has_state = True
        steps: list[ParameterStep] = []
        for matrix in self._matrices:
            parameter, layout, index, _ = matrix
            state, options = self.state[parameter], self._options[index]
            assert isinstance(options, MuonOptions)
            rule = self._rule(options)
            make_matrix_states(state, rule, parameter, layout, options, offload=self._offload)
            held, gradient = local_states(rule, state), local_gradient(parameter)
            masters = errors_of(state) if has_master(parameter, options.master_weight_bits) else ()
            errors = tuple(map(local_part, masters))
            rounding = self._rounding(matrix) if options.storage.is_stochastic else None
            own = local_part(parameter), gradient, held, layout, options, rule, errors, rounding
            steps.append(ParameterStep(*own, offloaded=self._offload))
        adamw = [
            adamw_step(group["params"], options, self.state)
            for group, options in zip(self.param_groups, self._options, strict=True)
            if isinstance(options, AdamWOptions)
        ]
        for move in adamw:
            move()
        if self._rest is not None:
            self._rest.share(self.param_groups, self.state)
            self._rest.step()
        execute(self._update_plan, steps, self._topology.positions())
        for group, options in zip(self.param_groups, self._options, strict=True):
            if isinstance(options, MuonOptions) and options.storage.is_stochastic:
                group[ROUNDING_STEP] = group.get(ROUNDING_STEP, 0) + 1

    def _rounding(self, matrix: Matrix) -> Rounding:
        """Return by what the momentum of a parameter is rounded in this step."""
        group = self.param_groups[matrix.group]
        name = plain_name(name_of(group, matrix.group, matrix.position))
        return Rounding(stream_of(name), group.get(ROUNDING_STEP, 0) + 1)

    def _check_rounding(self, options: Options) -> None:
        """Raise ValueError for stochastic rounding in a CUDA graph, of which each replay would be the same step."""
        if not isinstance(options, MuonOptions) or not options.storage.is_stochastic:
            return
        if self._adamw is not None and self._adamw.capturable:
            raise ValueError(
                f"capturable=True with momentum_dtype={options.momentum_dtype!r}: the noise of a graph that is "
                "replayed does not change. Leave one of them out."
            )

    @torch.no_grad()
    def _make_state(self) -> None:
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            options = self._defaults(group["use"]).from_mapping(group)
            for parameter, layout in zip(group["params"], layouts, strict=True):
                if not _moves(parameter):
                    continue
                if isinstance(options, AdamWOptions):
                    make_adamw_state(self.state[parameter], parameter, options)
                elif layout is not None and isinstance(options, MuonOptions):
                    rule, own = self._rule(options), self.state[parameter]
                    make_matrix_states(own, rule, parameter, layout, options, offload=self._offload)

    def _refresh_plan(self) -> None:
        """Check options and parameters, and plan the update anew, if what these depend on has changed."""
        self._check_options()
        try:
            inputs = plan_inputs(self.param_groups, self._topology.version)
        except AttributeError:
            check_tensors(self.param_groups)
            raise
        if not isinstance(self.state, defaultdict):
            check_kind("optimizer.state", self.state, dict, "a dict of the states by parameter")
            self.state = defaultdict(dict, self.state)
        others = set[int]() if self._rest is None else self._rest.owns()  # whose class may replace its states
        held = [own for parameter, own in self.state.items() if id(parameter) not in others]
        states = [id(value) for own in held if isinstance(own, dict) for value in own.values()]
        changed = inputs != self._inputs
        if changed:
            check_parameters(self.param_groups, offload=self._offload)
        if changed or states != self._states:
            check_states(self.param_groups, self._layouts, self.state, [*map(self._rule, self._options)], self._offload)
            self._states = states
        if changed:
            self._plan_update()
            self._inputs, self._has_state = inputs, False

    def _check_options(self) -> None:
        """Read the options of the groups, which schedulers and users set; raise for those that do not fit."""
        check_held_groups(self.param_groups, self._layouts)
        options: list[Options] = []
        for index, (group, known) in enumerate(zip_longest(self.param_groups, self._options)):
            try:
                follow_cycle(group, known)
                new = self._defaults(group["use"]).from_mapping(group)
                if new != known:
                    waits = isinstance(new.lr, Tensor) and new.lr.device.type != "cpu"  # to read it: drains the queue
                    (replace(cast("Any", new), lr=0.0) if waits else new).check()
                    self._check_rounding(new)
            except (TypeError, ValueError) as error:
                raise type(error)(f"param_groups[{index}]: {error}") from None
            options.append(new)
        self._options = options

    def _plan_update(self) -> None:
        """Decide who iterates which matrix."""
        self._matrices = list(self._find_matrices())
        options = [MuonOptions.from_mapping(group) if group["use"] == "muon" else None for group in self.param_groups]
        placed: list[PlacedParameter] = []
        for parameter, layout, index, position in self._matrices:
            muon = options[index]
            assert muon is not None
            name = name_of(self.param_groups[index], index, position)
            try:
                iteration = muon.newton_schulz(parameter)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            placed.append(
                PlacedParameter(
                    name,
                    tuple(parameter.shape),
                    layout,
                    iteration,
                    self._topology.position(parameter).mesh,
                    self._topology.placements(parameter),
                )
            )
        self._update_plan = plan_update(placed, self._workspace_bytes)

    def _state_bytes(self) -> dict[str, dict[str, int]]:
        """Count the bytes of the states of all matrices, over all ranks, by `update` and state."""
        sizes: dict[str, dict[str, int]] = {}
        for parameter, layout, index, _ in self._matrices:
            options = MuonOptions.from_mapping(self.param_groups[index])
            own = sizes.setdefault(options.update, {})
            for name, size in state_bytes(self._rule(options), parameter, layout, options):
                own[name] = own.get(name, 0) + size
        return sizes

    def _forget_plan(self) -> None:
        self._update_plan: UpdatePlan | None = None
        self._matrices: list[Matrix] = []
        self._inputs: list[object] | None = None
        self._states: list[int] = []  # the tensors that were checked, by id
        self._has_state = False  # as far as the plan knows
        self._options: list[Options] = []  # of the groups, as they were checked

    def _find_matrices(self) -> Iterator[Matrix]:
        """Yield Muon's parameters that may move."""
        for index, (group, layouts) in enumerate(zip(self.param_groups, self._layouts, strict=True)):
            for position, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
                if layout is not None and parameter.numel() and _moves(parameter):
                    yield Matrix(parameter, layout, index, position)


def check_workspace(workspace_bytes: Any) -> None:
    """Raise TypeError or ValueError unless it is a number of bytes, or None."""
    if workspace_bytes is not None:
        check_whole("workspace_bytes", workspace_bytes, hint="a number of bytes, or None.")


def _moves(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None
