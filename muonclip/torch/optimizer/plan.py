"""The plan of an optimizer: who updates each parameter, as which matrices, and why; and its attentions.

Who updates what is decided in `muonclip.core.parameter_roles`; here modules and attentions add how a parameter is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from muonclip.core import MatrixLayout, Recipe
from muonclip.core.declared_layouts import with_layouts
from muonclip.core.folded_rows import folded
from muonclip.core.head_parts import PerHead
from muonclip.core.parameter_plan import PlannedParameter, parameter_table
from muonclip.core.parameter_roles import (
    FUSED_QKV_NAMES,
    GATE_UP_NAMES,
    ONE_ROW,
    Kind,
    Role,
    Use,
    embedding_shapes,
    is_one_row,
    module_of,
    names_a_norm,
    role_of,
)
from muonclip.core.recipes import option_lines
from muonclip.core.tau_rules import is_by_name
from muonclip.core.text_table import table
from muonclip.core.updates import states_in_words
from muonclip.torch.clip import QKClip, clipping_in_words, frozen_weights
from muonclip.torch.heads import QKProjection, out_axis
from muonclip.torch.mesh import plain_name
from muonclip.torch.optimizer.layouts import default_layout, projection_layouts
from muonclip.torch.update import UpdatePlan

SPLIT_REASON = "attention projection, split by its heads' rows"
_FUSED_REASON = (
    "fused q, k, v taken as one matrix: tau=inf for qk_clip=None splits it; or declare the attention, or give layout="
)
_FUSED_FOR_NOW = "fused q, k, v: the first step shows its heads, read the plan again then"
_ATTENTION_HEADING = ("attention", "kind", "heads", "clip", "maximum from")


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of what the optimizer does with each parameter and each attention, and why; `print` it.

    Attributes:
        parameters: A line for each parameter.
        attentions: The attentions that are known, by the names of their modules.
        defaults: The options of the optimizer.
        qk_clip: The clip; None where it is off.
        update_plan: Which rank iterates which matrix, and what is sent; shown where there is more than one.
        state_bytes: The bytes of each state of the Muon half, by `update` and name; shown for variants, and where
            `momentum_dtype` says how the momentum is stored.
        memory: What has masters, and what is in host memory, in words; nothing where neither was asked for.
        recipe: The recipe that was asked for, and what was given next to it.
    """

    parameters: tuple[PlannedParameter, ...]
    attentions: Mapping[str, QKProjection]
    defaults: Mapping[str, object]
    qk_clip: QKClip | None = None
    state_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    update_plan: UpdatePlan | None = None
    recipe: Recipe | None = None
    memory: str = ""

    @property
    def weights_to_save(self) -> list[str]:
        """The names of the frozen weights that the clip scales, which have to be saved with what is trained.

        There are none without `QKClip(…, clip_frozen=True)`.
        """
        clip = self.qk_clip
        if clip is None or not clip.clip_frozen:
            return []
        weights = [weight for projection in clip.projections.values() for weight in frozen_weights(projection)]
        return clip.attentions.names_of(weights)

    def __str__(self) -> str:
        clip = self.qk_clip
        to_come = "" if clip is None else clip.attentions.to_come
        lines = [_as_of_now(line) for line in self.parameters] if to_come else self.parameters
        rest = getattr(self.defaults.get("rest"), "name", "rest")
        parameters = parameter_table(lines, lambda layout, shape: layout.describe(shape), rest)
        attentions = [
            (
                name or "(model)",
                projection.kind,
                str(projection.num_heads),
                "off" if clip is None else _clipping(clip, name, projection),
                "" if clip is None else clip.sources()[name],
            )
            for name, projection in self.attentions.items()
        ]
        found = table([_ATTENTION_HEADING, *folded(attentions)]) if attentions else ""
        if clip is None:
            found += "\n\nQK-Clip off" if found else "QK-Clip off"
        elif clip.attentions.has_nothing:
            found += "QK-Clip: nothing to clip (a search has seen no attention)"
        elif to_come:
            found += ("\n" if found else "") + f"attention to be found and checked: {to_come}"
            found += "\nread the plan again after the first step"
        elif clip.attentions.unchecked:
            found += f"\nnot checked in a forward of the training, which was not traced: {clip.attentions.unchecked}"
        if clip is not None:
            others = _others(clip)
            found += ("\n\n" if found and others else "") + others
        options = option_lines(self.defaults, self.recipe)
        over_ranks = ""
        if self.update_plan is not None and len(self.update_plan.ranks) > 1:
            over_ranks = str(self.update_plan)
        to_save = "\n  ".join(self.weights_to_save)
        if to_save:
            to_save = f"frozen weights that the clip scales; save them with what is trained:\n  {to_save}"
        states = states_in_words(self.state_bytes, self.defaults.get("momentum_dtype"))
        parts = [parameters, states, self.memory, over_ranks, found, to_save, options]
        return "\n\n".join(filter(None, parts))


def plan_module(
    model: nn.Module,
    projections: Mapping[str, QKProjection],
    *,
    per_head: PerHead,
    layouts: Mapping[str, int | MatrixLayout] | None = None,
    shown: Mapping[str, Use] | None = None,
) -> list[PlannedParameter]:
    """Plan each parameter of the model, tied ones once. `layouts`: declared by patterns; `shown`: what forwards have
    shown of parameters, by name."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(owners.get(id(parameter)), nn.Embedding):  # a tied head is an embedding
                owners[id(parameter)] = module
    known = projection_layouts(projections, per_head)
    planned = plan_named(model.named_parameters(), owners=owners, layouts=known, shown=shown)
    return with_layouts(planned, layouts, plain_name=plain_name)


def plan_named(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    owners: Mapping[int, nn.Module] | None = None,
    layouts: Mapping[int, MatrixLayout] | None = None,
    shown: Mapping[str, Use] | None = None,
) -> list[PlannedParameter]:
    """Plan each named parameter. `owners`: the module each is an attribute of, `layouts`: known ones; by id."""
    owners, layouts = owners or {}, layouts or {}
    shown = {plain_name(name): use for name, use in (shown or {}).items()}
    named = list(named_parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in named}
    kinds: dict[str, Kind | None] = {name: kind_of(owners.get(id(parameter))) for name, parameter in named}
    embeddings = embedding_shapes((name, shapes[name], kinds[name]) for name, _ in named)
    planned: list[PlannedParameter] = []
    for name, parameter in named:
        role = role_of(name, shapes[name], kinds[name], embeddings, shown.get(plain_name(name)))
        if role.use == "muon":
            owner, layout = owners.get(id(parameter)), layouts.get(id(parameter))
            planned.append(_as_matrices(name, parameter, owner, layout, shapes))
        else:
            planned.append(_adamw(name, parameter, role))
    return planned


def kind_of(owner: nn.Module | None) -> Kind | None:
    """Say what is known of the module that owns a parameter."""
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(owner, nn.Linear):
        return "linear"
    if isinstance(owner, _ConvNd):
        return "convolution"
    return "norm" if owner is not None and names_a_norm(type(owner).__name__) else None


def _as_matrices(
    name: str,
    parameter: Tensor,
    owner: nn.Module | None,
    layout: MatrixLayout | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> PlannedParameter:
    shape, leaf = tuple(parameter.shape), module_of(name)
    reason = "hidden matrix"
    if layout is not None:
        reason = SPLIT_REASON
    elif isinstance(owner, _ConvNd):
        if owner.groups > 1 and owner.groups == owner.in_channels:
            return _adamw(name, parameter, Role("adamw", "depthwise convolution"))
        layout = MatrixLayout(transposed=owner.transposed and owner.groups == 1, heads=(owner.groups,))
        reason = "convolution, window flattened"
    elif isinstance(owner, nn.LSTM | nn.GRU):
        gates = 4 if isinstance(owner, nn.LSTM) else 3
        layout = MatrixLayout(blocks=(shape[0] // gates,) * gates) if "_hr_" not in leaf else MatrixLayout()
        reason = "fused gates"
    elif isinstance(owner, nn.MultiheadAttention) and leaf == "in_proj_weight":
        layout, reason = MatrixLayout(blocks=(owner.embed_dim,) * 3), "fused q|k|v"
    elif leaf in GATE_UP_NAMES and parameter.ndim <= 3:
        layout, reason = _gate_up_layout(name, shape, shapes), "fused gate|up"
    else:
        layout = default_layout(shape) if owner is None else MatrixLayout(batch_ndim=parameter.ndim - 2)
        if out_axis(owner) and parameter.ndim == 2:
            layout = MatrixLayout(transposed=True)
        if leaf in FUSED_QKV_NAMES:
            reason = _FUSED_REASON
        elif parameter.ndim > 2:
            reason = "stack of matrices" if layout.batch_ndim else "convolution, window flattened"
    if is_one_row(layout.matrix_shapes(shape)):
        return _adamw(name, parameter, ONE_ROW)
    return PlannedParameter(name, shape, "muon", reason, layout, frozen=not parameter.requires_grad)


def _gate_up_layout(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> MatrixLayout:
    """Read [*E, 2f, d], or [*E, d, 2f] where the `down_proj` next to it, [*E, f, d] then, says so."""
    head, _, _ = name.removesuffix(".weight").rpartition(".")
    siblings = (f"{head}.down_proj".lstrip("."), f"{head}.down_proj.weight".lstrip("."))
    down = next((shapes[sibling] for sibling in siblings if sibling in shapes), None)
    transposed = down is not None and shape[-2:] != (2 * down[-1], down[-2]) and shape[-2:] == (down[-1], 2 * down[-2])
    rows = shape[-1] if transposed else shape[-2]
    if rows % 2:
        return default_layout(shape)
    return MatrixLayout(batch_ndim=len(shape) - 2, transposed=transposed, blocks=(rows // 2, rows // 2))


def _as_of_now(line: PlannedParameter) -> PlannedParameter:
    """Say of a fused weight that its heads are not known yet, while the search is not over."""
    return replace(line, reason=_FUSED_FOR_NOW) if line.reason == _FUSED_REASON else line


def _clipping(clip: QKClip, name: str, projection: QKProjection) -> str:
    """Say which heads are clipped, with their own τ where attentions have one."""
    words = clipping_in_words(projection, clip_frozen=clip.clip_frozen)
    own = f"above tau = {clip.tau_of(name):g}" if is_by_name(clip.tau) else "above tau"
    return words.replace("above tau", own)


def _others(clip: QKClip) -> str:
    """Write a line for each module that has no logits, or is ignored."""
    without = clip.attentions.without_logits.items()
    lines = [f"{name or '(model)'}: {what}" for name, what in without]
    return "\n".join(lines + [f"{name or '(model)'}: ignored" for name in clip.attentions.ignored])


def _adamw(name: str, parameter: Tensor, role: Role) -> PlannedParameter:
    frozen = not parameter.requires_grad
    return PlannedParameter(name, tuple(parameter.shape), "adamw", role.reason, decays=role.decays, frozen=frozen)
