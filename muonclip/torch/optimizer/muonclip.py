"""The optimizers: `Muon`, a superset of `torch.optim.Muon`, and `MuonClip`, with AdamW for the rest and QK-Clip.

Their groups, state and step are those of `MatrixOptimizer`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Generic, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import TypeVar

from muonclip.core import MatrixLayout, Recipe
from muonclip.core.arguments import check_flag, check_kind, shown
from muonclip.core.coefficients import JORDAN, Coefficients
from muonclip.core.declared_layouts import DECLARED, check_layouts
from muonclip.core.head_parts import PerHead, heads_per_matrix
from muonclip.core.parameter_roles import Use
from muonclip.core.qk_clip import DEFAULT_TAU
from muonclip.core.recipes import RecipeName, saved_recipe, takes_recipe
from muonclip.core.tau_rules import Tau, check_tau_rules, tau_in_words, varies
from muonclip.core.update_rule import MuonRule
from muonclip.core.update_scale import AdjustLR
from muonclip.core.updates import Update
from muonclip.torch.clip import OPTIMIZER_STEPS, ClipAttentions, QKClip, is_idle, scaled_rows
from muonclip.torch.discover import guessed_uses
from muonclip.torch.heads import HeadRows, QKProjection, declared_qk_projections
from muonclip.torch.mesh import check_engine, unwrap
from muonclip.torch.optimizer.argument_hints import with_hints
from muonclip.torch.optimizer.filled_parameters import check_is_of_model, take_filled
from muonclip.torch.optimizer.groups import given_groups, groups_of, name_of
from muonclip.torch.optimizer.layouts import projection_layouts
from muonclip.torch.optimizer.master_weights import masters_in_words, offload_in_words
from muonclip.torch.optimizer.matrix_optimizer import MatrixOptimizer, check_workspace
from muonclip.torch.optimizer.matrix_state import rescale_matrix_states
from muonclip.torch.optimizer.options import (
    AdamWOptions,
    Group,
    MuonOptions,
    options_in_words,
    options_to_show,
)
from muonclip.torch.optimizer.plan import SPLIT_REASON, Plan, PlannedParameter, plan_module
from muonclip.torch.optimizer.rest import Rest, RestClass
from muonclip.torch.optimizer.shown_roles import FirstForward, warn_of_other_roles
from muonclip.torch.update import MasterWeightBits

Clip = TypeVar("Clip", bound=QKClip | None, default=QKClip)
"""The type of a `MuonClip`'s clip, for type checkers: `None` where that was given, else a `QKClip`."""


class Muon(MatrixOptimizer):
    """Muon for matrices: the arguments and the state of `torch.optim.Muon`, and more.

    Three things differ from torch. Gradients are normalised in float32 before the cast to bf16, torch casts first:
    updates agree within 3 % (Frobenius; matrices of fewer than 32 rows differ more). Without `eps` the norm has no
    floor, so that gradients below torch's default of 1e-7 get their full-size update; an `eps` that you give, 1e-7 too,
    is the floor, as in torch. A named set and a list of triples have their own length without `ns_steps`.

    Args:
        params: Matrices, named or not, or groups. A parameter of three axes is a stack of matrices, one of four and
            more a convolution, unless its group says `layout=MatrixLayout(…)`.
        lr: The rate, per step.
        weight_decay: Decoupled, times the rate.
        momentum: The share of the old momentum, as in torch; in [0, 1).
        nesterov: Look ahead by one step of the momentum, as in torch.
        ns_coefficients: A triple, a list of triples, or a name of `muonclip.core.COEFFICIENT_SETS`.
        eps: Floor of the Frobenius norm; None: no floor.
        ns_steps: Number of steps; None: five of one triple, as in torch, and the own length of a named set or a list.
        adjust_lr_fn: The scale of an update, see `muonclip.core.update_scale`; a number too.
        ns_dtype: The dtype of the matrix products; None: bf16 on CUDA and on processors with bf16 products, float32
            elsewhere, float64 for float64.
        ns_form: "gram" iterates on small square products, faster the less square a matrix is, and a little less
            accurate; None: on processors the one that multiplies less for a shape, else "standard".
        products: "plain", "baddbmm", or "halves", which makes half of each symmetric product; "quack" for the kernels
            of quack-kernels on NVIDIA GPUs, with `ns_form="gram"` its Gram iteration; None: the fastest that was
            measured.
        momentum_dtype: The dtype of the momentum; None: the parameter's, or float32 where it has a master. "int8" are
            codes, with a float32 size for each 2048 entries of a row of a matrix (arXiv 2509.23106). "int8_stochastic"
            and "bfloat16_stochastic" round without a bias, by a noise that is a function of the parameter's name, the
            step and the entry.
        master_weight_bits: Update float32 masters of bf16 parameters, which are their roundings: 32 keeps all bits of a
            master, in two more bytes for each parameter, 24 rounds it to 24, in one more. Other parameters are updated
            as they are.
        freeze_unused: Leave matrices whose gradient is zero, and their momentum, unchanged for that step. By default
            such a matrix, for instance an expert that got no token, still moves by a full-size update along its
            decaying momentum, as in torch.
        update: "normuon" (arXiv 2510.05491), Muon with rows of one size over time; "hyperball" (arXiv 2606.16899),
            which holds the Frobenius norm of each matrix, takes `lr` relative to it, and has neither decay nor a scale:
            give `weight_decay=0`; or "muown" (arXiv 2605.10797), Muon on the directions of rows, Adam and the decay on
            their magnitudes. A group may have its own.
        cautious_decay: Decay only the entries that the update takes towards zero (arXiv 2510.12402).
        offload: Keep the states of matrices, and the errors of their masters, in host memory; a step fetches them a
            batch ahead, and returns them. Nothing else changes. For parameters on one accelerator.
        workspace_bytes: Largest batch of equal shapes iterated at once, in bytes, counted in float32; None: 256 MiB. A
            processor takes 2 MiB at once of what it holds whole.

    Raises:
        ValueError: For vectors, and for options that do not fit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = JORDAN,
        eps: float | None = None,
        ns_steps: int | None = None,
        adjust_lr_fn: AdjustLR = None,
        *,
        ns_dtype: torch.dtype | None = None,
        ns_form: Literal["standard", "gram"] | None = None,
        products: str | None = None,
        momentum_dtype: torch.dtype | str | None = None,
        master_weight_bits: MasterWeightBits | None = None,
        freeze_unused: bool = False,
        update: Update = "muon",
        cautious_decay: bool = False,
        offload: bool = False,
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__(params, MuonOptions.from_mapping(locals()), None, workspace_bytes, offload=offload)


class MuonClip(MatrixOptimizer, Generic[Clip]):
    """Kimi K2's optimizer (arXiv 2507.20534, Algorithm 1), a replacement for `AdamW(model.parameters(), …)`:

        optimizer = MuonClip(model, lr=5e-3, weight_decay=0.1)
        print(optimizer.plan)
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    Args:
        model: A module; or named parameters, or groups `dict(params=…, use="muon" | "adamw", …)`, with `qk_clip` given
            or None. Matrices are Muon's, embeddings, head, norms, biases and the rest AdamW's, or those of `rest`, in
            groups `use="rest"`; `plan` says which and why.
        lr: The rate of both halves, per step. With the default `adjust_lr_fn` updates have the RMS of AdamW's
            (Moonlight, arXiv 2502.16982): its decay carries over, and rates from its own, in large runs, to five times
            that in small ones.
        weight_decay: Decoupled, times the rate.
        momentum: The share of the old momentum, of the Muon half; in [0, 1).
        nesterov: Look ahead by one step of the momentum.
        ns_coefficients: The polynomials, see `Muon`.
        ns_steps: Number of steps of the iteration, see `Muon`.
        eps: Floor of the Frobenius norm, see `Muon`.
        adjust_lr_fn: The scale of Muon's updates, see `muonclip.core.update_scale`.
        per_head: Every head of q, k and v is a matrix of its own, or every so many: "pairs", or their number.
        layouts: The heads of projections that no softmax attention has, as those of linear attention or an indexer: a
            number of heads, or a layout, for each pattern of parameters' names, `{"*.linear_attn.q_proj": 16}`. Each is
            a matrix of its own. The first pattern that fits counts.
        tau: Heads whose largest attention logit, after the softmax scale, exceeds it are clipped after each step. A
            number, a function of the step, or either for each attention, as `QKClip` has it; a checkpoint keeps the
            step.
        qk_clip: "auto" finds the attentions of the module; where a search sees none, and nothing that mixes activations
            by products, the model trains with one warning, and "required" makes that an error. A `QKClip` is used as it
            is (its own tau); None switches the clip off.
        recipe: The values of a published recipe, by its name, for the arguments that are not given here: see
            `muonclip.core.RECIPES`. `plan` says what came from where. A recipe never sets `lr`.
        adamw: Options of the AdamW half: `lr` (None: `lr`), `betas`, `eps`, `weight_decay` (None: `weight_decay`; none
            on norms and biases), `fused`.
        rest: Another optimizer in the place of AdamW: a class such as `torch.optim.NAdam` or one of a library, or
            `functools.partial(Class, …)` with its options. It has the rate `lr` unless the partial gives another, and
            its own decay (none on norms and biases). `step`, `state_dict` and `param_groups` are one optimizer's.
        ns_dtype: The dtype of the matrix products, see `Muon`.
        ns_form: The form of the iteration, see `Muon`.
        products: How products are multiplied, see `Muon`.
        momentum_dtype: The dtype of Muon's momentum, or "int8", "int8_stochastic", "bfloat16_stochastic", see `Muon`.
        master_weight_bits: Update float32 masters of bf16 parameters, see `Muon`; of both halves, and AdamW's moments
            are float32 then.
        freeze_unused: Leave matrices whose gradient is zero unchanged for that step, see `Muon`.
        capturable: For CUDA graphs, as in torch.
        update: The rule of the Muon half: "muon", "normuon", "hyperball" or "muown", see `Muon`.
        cautious_decay: Decay only the entries that Muon's update takes towards zero, see `Muon`.
        offload: Keep the states of the Muon half in host memory, see `Muon`; not with `capturable`.
        workspace_bytes: Largest batch of matrices iterated at once, in bytes, see `Muon`.

    Raises:
        ValueError: For arguments that do not fit and for attention that is not understood.
        RuntimeError: From `step`, before anything is changed, where the clip lacks its observation (see `QKClip.step`).
    """

    plan: Plan
    """The plan: who updates each parameter, as which matrices, and why; `print` it."""
    qk_clip: Clip
    """The clip; None where it is switched off, which type checkers know."""
    _unfilled: weakref.ref[nn.Module] | None = None  # the model, while parameters of it are on the meta device
    _given: tuple[weakref.ref[nn.Module], list[int]] | None = None  # the model, and its parameters by id, until a step
    _first_forward: FirstForward | None = None  # as long as no forward has shown the uses of parameters

    @with_hints
    @takes_recipe
    def __init__(
        self,
        model: nn.Module | ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        recipe: RecipeName | Recipe | None = None,
        ns_coefficients: Coefficients = "jordan",
        ns_steps: int | None = None,
        eps: float | None = None,
        adjust_lr_fn: AdjustLR = "match_rms_adamw",
        per_head: PerHead = False,
        layouts: Mapping[str, int | MatrixLayout] | None = None,
        tau: Tau = DEFAULT_TAU,
        qk_clip: Clip | Literal["auto", "required"] = "auto",
        adamw: Mapping[str, Any] | None = None,
        rest: RestClass | None = None,
        ns_dtype: torch.dtype | None = None,
        ns_form: Literal["standard", "gram"] | None = None,
        products: str | None = None,
        momentum_dtype: torch.dtype | str | None = None,
        master_weight_bits: MasterWeightBits | None = None,
        freeze_unused: bool = False,
        update: Update = "muon",
        cautious_decay: bool = False,
        capturable: bool = False,
        offload: bool = False,
        workspace_bytes: int | None = None,
    ) -> None:
        muon = MuonOptions.from_mapping(locals())
        muon.check()
        check_workspace(workspace_bytes)
        heads_per_matrix(per_head)
        check_layouts(layouts)
        check_tau_rules(tau)
        check_flag("capturable", capturable)
        check_flag("offload", offload)
        if capturable and offload:
            raise ValueError(
                "capturable=True with offload=True: the host waits for copies in each step. Leave one of them out."
            )
        if capturable and varies(tau):
            raise ValueError(
                "capturable=True with a tau that is a function: a graph that is replayed does not call it."
            )
        other = _other_half(adamw, rest, muon, capturable=capturable)
        check_engine(model)
        if layouts is not None and not isinstance(model, nn.Module):
            raise ValueError("layouts= goes by the names of a model: pass the model, or give each group its layout=.")
        self._declared_layouts = layouts
        self.qk_clip = cast("Clip", _find_clip(model, qk_clip, tau))
        try:
            recipe = recipe if isinstance(recipe, Recipe) else None
            self._make(model, muon, other, workspace_bytes, per_head=per_head, recipe=recipe, offload=offload)
        except BaseException:  # which keeps this object as long as it lasts, and so its hooks
            if self.qk_clip is not None and self.qk_clip is not qk_clip:
                self.qk_clip.attentions.withdraw()
            if self._first_forward is not None:
                self._first_forward.remove()
            raise

    def _make(
        self,
        model: nn.Module | Iterable[Any],
        muon: MuonOptions,
        other: AdamWOptions | Rest,
        workspace_bytes: int | None,
        *,
        per_head: PerHead,
        recipe: Recipe | None,
        offload: bool,
    ) -> None:
        """Divide the parameters, and add their groups."""
        projections: dict[str, QKProjection] = {}  # layouts come from them with the clip off, too
        if self.qk_clip is not None:
            projections = self.qk_clip.projections
        elif isinstance(model, nn.Module):
            projections = declared_qk_projections(model)
        defaults = {
            **options_to_show(muon),
            **({"rest": other} if isinstance(other, Rest) else {"adamw": options_to_show(other)}),
            "tau": self.qk_clip and tau_in_words(self.qk_clip.tau),
        }
        if recipe is not None:
            defaults["per_head"] = per_head
        self.plan = Plan((), projections, defaults, self.qk_clip, recipe=recipe)
        self._per_head: PerHead = per_head
        self._finds_layouts = isinstance(model, nn.Module)
        self._clip_version = 0 if self.qk_clip is None else self.qk_clip.attentions.version
        self._shown: Mapping[str, Use] = {} if self.qk_clip is None else self.qk_clip.attentions.shown
        to_come = self.qk_clip is not None and self.qk_clip.attentions.to_come
        if per_head and not ((projections or to_come or self._declared_layouts) and isinstance(model, nn.Module)):
            raise ValueError(
                "per_head=True needs to know the heads: pass the model itself, its attentions declared, or let the "
                "clip find them: tau=math.inf finds and never clips."
            )
        if isinstance(model, nn.Module):
            named = dict(model.named_parameters())
            planned = plan_module(
                model, projections, per_head=per_head, layouts=self._declared_layouts, shown=self._shown_by(model)
            )
            groups = groups_of(planned, named, other.use)
        else:
            groups = given_groups(model, other.use)
        super().__init__(groups, muon, other, workspace_bytes, offload=offload)
        if isinstance(model, nn.Module):
            self._topology.find_replicas_of(model)
        of_clip = None if self.qk_clip is None else self.qk_clip.attentions.model
        owner = model if isinstance(model, nn.Module) else of_clip
        if owner is not None:
            self._given = weakref.ref(owner), [*map(id, owner.parameters())]
        if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
            self._unfilled = weakref.ref(model)
        self._plan_update()
        self._matrices.clear()  # until the first step an engine may replace the parameters: hold none

    @property
    def rest(self) -> Optimizer | None:
        """The optimizer of the other half that was made of `rest=`; None where that is AdamW.

        It has the groups and states of this one. What it does besides its step is called on it.
        """
        return None if self._rest is None else self._rest.optimizer

    def __getattr__(self, name: str) -> Any:
        """Return `train` and `eval` of a rest that has them, as schedule-free optimizers do; trainers call them.

        Args:
            name: The name of the attribute.
        """
        rest = self.__dict__.get("_rest")
        if name in ("train", "eval") and rest is not None and hasattr(rest.optimizer, name):
            return getattr(rest.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group for Muon or AdamW, as its `use` says; without it, the plan's rules divide named parameters.

        Args:
            param_group: `params`, and any option of its `use`.
        """
        check_kind("param_group", param_group, dict, "a dict with `params` and options")
        param_group = dict(param_group)
        planned: list[PlannedParameter] | None = param_group.pop("planned", None)
        if planned is None and "use" not in param_group:
            before = len(self.param_groups), self.plan
            try:
                for group in given_groups([param_group], "adamw" if self._rest is None else self._rest.use):
                    self.add_param_group(group)
            except BaseException:
                del self.param_groups[before[0] :], self._layouts[before[0] :]
                if self._rest is not None:
                    self._rest.share(self.param_groups, self.state)
                self.plan = before[1]
                raise
            return
        super().add_param_group(param_group)
        group, layouts = self.param_groups[-1], self._layouts[-1]
        if self.qk_clip is not None:
            OPTIMIZER_STEPS.add(self)
        if self.plan.recipe is not None:
            group["recipe"] = self.plan.recipe.as_saved()
        self._note_step([group])
        if planned is None:
            index = len(self.param_groups) - 1
            planned = [
                PlannedParameter(
                    name_of(group, index, position), tuple(parameter.shape), group["use"], "as its group says", layout,
                    group["weight_decay"] > 0, not parameter.requires_grad,
                )
                for position, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True))
            ]  # fmt: skip
        self.plan = replace(self.plan, parameters=(*self.plan.parameters, *planned))

    def _plan_update(self) -> None:
        super()._plan_update()
        states, memory = self._state_bytes(), masters_in_words(self.param_groups)
        if self._offload:
            memory += ("\n" if memory else "") + offload_in_words(states)
        self.plan = replace(self.plan, update_plan=self._update_plan, state_bytes=states, memory=memory)

    def _refresh_plan(self) -> None:
        self._take_filled()
        if self._given is not None:
            model = self._given[0]()
            if model is not None:
                check_is_of_model(self.param_groups, model, self._given[1])
            self._given = None
        super()._refresh_plan()

    def _take_filled(self) -> None:
        """Take the parameters that to_empty has put in the place of those on the meta device."""
        model = None if self._unfilled is None else self._unfilled()
        if model is not None:
            for each in take_filled(self.param_groups, model):
                self.state.pop(each, None)
            if not any(parameter.is_meta for parameter in model.parameters()):
                self._unfilled = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as any optimizer does; the clip has none, but raises here the errors that it deferred."""
        self._take_filled()
        if self.qk_clip is not None:
            self.qk_clip.raise_deferred()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as any optimizer does; what the clip observed before belongs to another run and is forgotten.

        Args:
            state_dict: What `state_dict` returned, here or in another process.
        """
        self._take_filled()
        super().load_state_dict(state_dict)
        if self.qk_clip is not None:
            self.qk_clip.reset()
            self._take_step(self.qk_clip)
        self._take_recipe()

    def __getstate__(self) -> dict[str, Any]:
        own = ("qk_clip", "plan", "_per_head", "_declared_layouts", "_finds_layouts", "_clip_version", "_shown")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def _note_step(self, groups: Iterable[Group]) -> None:
        """Leave the number of the clip's next step in groups, which are saved, where τ depends on it."""
        if self.qk_clip is not None and varies(self.qk_clip.tau):
            for group in groups:
                group["clip_step"] = self.qk_clip.state_dict()["step"]

    def _take_step(self, clip: QKClip) -> None:
        """Let the clip go on at the step that a checkpoint tells."""
        saved = next((group["clip_step"] for group in self.param_groups if "clip_step" in group), None)
        if saved is not None:
            clip.load_state_dict({"step": saved})
        elif varies(clip.tau) and self.state:
            warnings.warn(
                "tau is a function of the step, and the checkpoint does not say at which the clip was: it goes on at "
                f"{clip.state_dict()['step']}. qk_clip.load_state_dict({{'step': n}}) sets another.",
                stacklevel=3,
            )

    def _take_recipe(self) -> None:
        """Let the plan say what a checkpoint that was loaded says of its recipe, and show its options."""
        saved = next((group["recipe"] for group in self.param_groups if "recipe" in group), ())
        if self.plan.recipe is not None or saved:
            muon = next(
                (MuonOptions.from_mapping(group) for group in self.param_groups if group["use"] == "muon"), None
            )
            defaults = {**self.plan.defaults, **({} if muon is None else options_to_show(muon))}
            self.plan = replace(self.plan, recipe=saved_recipe(saved, self.plan.recipe), defaults=defaults)

    def _update(self) -> None:
        if self.qk_clip is None:
            if self._first_forward is not None and self._first_forward.shown is not None:
                self._compare_roles(self._first_forward.shown)
                self._first_forward = None
            super()._update()
            return
        factors = self.qk_clip.before_update(idle=is_idle(self), options=lambda: options_in_words(self.param_groups))
        self._take_findings(self.qk_clip.attentions)
        super()._update()
        self.qk_clip.after_update(factors)
        self._note_step(self.param_groups)
        if any(type(self._rule(each)).rescale is not MuonRule.rescale for each in self._options):
            clip_frozen = self.qk_clip.clip_frozen
            self._rescale_states(scaled_rows(self.qk_clip.projections, factors, clip_frozen=clip_frozen))

    def _rescale_states(self, scaled: Iterable[tuple[HeadRows, Tensor]]) -> None:
        """Tell the states of each weight which of its rows the clip has scaled."""
        by_weight: dict[int, list[tuple[HeadRows, Tensor]]] = {}
        for rows, factors in scaled:
            weight = getattr(rows.module, rows.weight)
            for each in (weight, *OPTIMIZER_STEPS.in_place_of(weight)):
                by_weight.setdefault(id(each), []).append((rows, factors))
        assert self._update_plan is not None
        for matrix, placed in zip(self._matrices, self._update_plan.parameters, strict=True):
            rule = self._rule(self._options[matrix.group])
            if id(matrix.parameter) in by_weight and type(rule).rescale is not MuonRule.rescale:
                parts, here = by_weight[id(matrix.parameter)], self._topology.position(matrix.parameter)
                rescale_matrix_states(self.state[matrix.parameter], rule, parts, matrix.parameter, placed, here)

    def _shown_by(self, model: nn.Module) -> Mapping[str, Use]:
        """Return what forwards have shown of parameters; where the clip ran none, one on guessed inputs is traced."""
        clip, inner = self.qk_clip, unwrap(model)[0]
        if clip is not None and (self._shown or not clip.projections):
            return self._shown
        shown = guessed_uses(inner)
        if clip is None and not shown:
            self._first_forward = FirstForward(inner)
        return shown

    def _compare_roles(self, shown: Mapping[str, Use]) -> None:
        """Warn where forwards show another role of a parameter than that by which it was given to one half."""
        if shown is self._shown or not self._finds_layouts:
            return
        self._shown = shown
        warn_of_other_roles(self.plan.parameters, shown, with_clip=self.qk_clip is not None)

    def _take_findings(self, attentions: ClipAttentions) -> None:
        """Read weights as the matrices that attentions found since the construction show them to be."""
        self._compare_roles(attentions.shown)
        if self._clip_version == attentions.version or not self._finds_layouts:
            return
        self._clip_version = attentions.version
        known = projection_layouts(attentions.projections, self._per_head)
        for weight in attentions.parameters():
            for each in OPTIMIZER_STEPS.in_place_of(weight) if id(weight) in known else ():
                known[id(each)] = known[id(weight)]
        lines = iter(self.plan.parameters)
        planned: list[PlannedParameter] = []
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            for position, parameter in enumerate(group["params"]):
                line = next(lines)
                if group["use"] == "muon" and id(parameter) in known and line.reason != DECLARED:
                    layouts[position] = known[id(parameter)]
                    line = replace(line, layout=known[id(parameter)], reason=SPLIT_REASON)
                planned.append(line)
        self.plan = replace(self.plan, parameters=tuple(planned))
        self._forget_plan()
        self._refresh_plan()


def _other_half(
    adamw: Mapping[str, Any] | None, rest: RestClass | None, muon: MuonOptions, *, capturable: bool
) -> AdamWOptions | Rest:
    if rest is None:
        return AdamWOptions.given({} if adamw is None else adamw, muon, capturable=capturable)
    if adamw is not None:
        raise ValueError(
            f"adamw={shown(dict(adamw) if isinstance(adamw, Mapping) else adamw)} and rest={shown(rest)} are two "
            "optimizers for one half. Leave one of them out; options of a class go into its functools.partial."
        )
    if capturable:
        raise ValueError(
            "capturable=True with rest=: give it to the class, rest=functools.partial(…, capturable=True)."
        )
    return Rest(rest, muon.lr)


def _find_clip(model: nn.Module | Iterable[Any], qk_clip: QKClip | str | None, tau: Tau) -> QKClip | None:
    if qk_clip is None or isinstance(qk_clip, QKClip):
        if qk_clip is None and tau != DEFAULT_TAU:
            raise ValueError(f"tau={shown(tau)} has nothing to clip where qk_clip=None. Leave one of them out.")
        if qk_clip is not None and tau not in (DEFAULT_TAU, qk_clip.tau):
            raise ValueError(
                f"tau={shown(tau)} was given with a QKClip whose own tau is {tau_in_words(qk_clip.tau)}. Say "
                f"it once: qk_clip=QKClip(model, tau={shown(tau)})."
            )
        return qk_clip
    if not (isinstance(qk_clip, str) and qk_clip in ("auto", "required")):
        raise ValueError(f"qk_clip={shown(qk_clip)}; use 'auto', 'required', a QKClip, or None.")
    if not isinstance(model, nn.Module):
        raise ValueError(
            "MuonClip was given parameters, from which the attention cannot be found. Pass the model itself, "
            "MuonClip(model, …), or give qk_clip=QKClip(model), or switch the clip off with qk_clip=None."
        )
    return QKClip(model, tau, required=qk_clip == "required")
