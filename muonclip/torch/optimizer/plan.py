"""Names and shapes → who updates each parameter, as which matrices, and why.

Muon is for the hidden matrices; AdamW takes embeddings, the LM head, norms, biases and everything else that is not a
matrix (K. Jordan 2024; Moonlight, arXiv 2502.16982, §2.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from muonclip.core import MatrixLayout
from muonclip.core.text_table import table
from muonclip.torch.heads.qk_projection import QKProjection, out_axis
from muonclip.torch.optimizer.layouts import default_layout, projection_layouts
from muonclip.torch.update.plan import UpdatePlan

if TYPE_CHECKING:
    from muonclip.torch.clip.qk_clip import QKClip

_LM_HEAD_NAMES = {"lm_head", "embed_out", "unembed"}
_HEAD_NAMES = _LM_HEAD_NAMES | {"head", "output", "output_layer", "score", "classifier", "proj_out"}
_EMBEDDING_NAME = re.compile(r"embed|(^|_)emb(s|_|$)|^w[tp]e$", re.IGNORECASE)
_TABLE_NAME = re.compile(r"(^|_)(a_log|table|latents|tokens?)$|rel_pos|relative_.*bias", re.IGNORECASE)
_GATE_UP_NAMES = {"gate_up_proj", "gate_up", "w13"}
_FUSED_QKV_NAMES = {"qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "in_proj_weight"}
SPLIT_REASON = "attention projection, split by its heads' rows"
_NORM_NAME = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """One line of the plan. `layout` is None for AdamW; `decays`: whether weight decay applies."""

    name: str
    shape: tuple[int, ...]
    use: Literal["muon", "adamw"]
    reason: str
    layout: MatrixLayout | None = None
    decays: bool = True
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of what the optimizer does with each parameter and each attention, and why; `print` it."""

    parameters: tuple[PlannedParameter, ...]
    attentions: Mapping[str, QKProjection]
    defaults: Mapping[str, object]
    qk_clip: QKClip | None = None
    update_plan: UpdatePlan | None = None
    """Which rank iterates which matrix, and what is sent; shown where there is more than one."""

    def __str__(self) -> str:
        header = ("parameter", "shape", "update", "matrices", "reason")
        rows = [header] + [
            (
                row.name,
                "×".join(map(str, row.shape)) or "scalar",
                row.use,
                row.layout.describe(row.shape) if row.layout else "",
                row.reason + ("" if row.decays else ", no decay") + (", frozen" if row.frozen else ""),
            )
            for row in self.parameters
        ]
        parameters = table(rows)
        attentions = [("attention", "kind", "heads", "clip", "maximum from")] + [
            (
                name or "(model)",
                projection.kind,
                str(projection.num_heads),
                "off" if self.qk_clip is None else _clipping(projection),
                "" if self.qk_clip is None else self.qk_clip.sources()[name],
            )
            for name, projection in self.attentions.items()
        ]
        found = table(attentions) if self.attentions else ""
        if self.qk_clip is None:
            found += "\n\nQK-Clip off" if found else "QK-Clip off"
        elif self.qk_clip.attentions.to_come:
            found += ("\n" if found else "") + f"attention to be found and checked: {self.qk_clip.attentions.to_come}"
        options = "\n".join(f"{name} = {value}" for name, value in self.defaults.items())
        over_ranks = ""
        if self.update_plan is not None and len(self.update_plan.ranks) > 1:
            over_ranks = str(self.update_plan)
        parts = [parameters, over_ranks, found, options]
        return "\n\n".join(filter(None, parts))


def plan_module(model: nn.Module, projections: Mapping[str, QKProjection], *, per_head: bool) -> list[PlannedParameter]:
    """Plan each parameter of the model, tied ones once."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(owners.get(id(parameter)), nn.Embedding):  # a tied head is an embedding
                owners[id(parameter)] = module
    layouts = projection_layouts(projections, per_head)
    return plan_named(model.named_parameters(), owners=owners, layouts=layouts)


def plan_named(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    owners: Mapping[int, nn.Module] | None = None,
    layouts: Mapping[int, MatrixLayout] | None = None,
) -> list[PlannedParameter]:
    """Plan each named parameter. `owners`: the module each is an attribute of, `layouts`: known ones; by id."""
    owners, layouts = owners or {}, layouts or {}
    named = list(named_parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in named}
    embeddings = {
        shapes[name]: name
        for name, parameter in named
        if _is_embedding(name, owners.get(id(parameter))) and not re.search(r"pos|wpe", name)
    }
    planned: list[PlannedParameter] = []
    for name, parameter in named:
        owner, layout = owners.get(id(parameter)), layouts.get(id(parameter))
        line = (
            _as_vector(name, parameter, owner)
            or _as_embedding_or_head(name, parameter, owner, embeddings)
            or _as_matrices(name, parameter, owner, layout, shapes)
        )
        planned.append(line)
    return planned


def _as_vector(name: str, parameter: Tensor, owner: nn.Module | None) -> PlannedParameter | None:
    path = name.split(".")
    if parameter.ndim < 2:
        reason = "vector"
    elif path[-1].endswith("bias"):
        reason = "biases"
    elif not isinstance(owner, nn.Linear | _ConvNd) and (
        _NORM_NAME.search(type(owner).__name__ if owner else "") or any(map(_NORM_NAME.search, path[-2:]))
    ):
        reason = "norm"
    else:
        return None
    return _adamw(name, parameter, reason, decays=False)


def _as_embedding_or_head(
    name: str, parameter: Tensor, owner: nn.Module | None, embeddings: Mapping[tuple[int, ...], str]
) -> PlannedParameter | None:
    path = name.split(".")
    if _is_embedding(name, owner):
        return _adamw(name, parameter, "embedding")
    if _TABLE_NAME.search(path[-1]):
        return _adamw(name, parameter, "no linear map, by its name")
    in_a_layer = any(part.isdigit() for part in path[:-2])
    if _leaf(name) in _LM_HEAD_NAMES or (_leaf(name) in _HEAD_NAMES and len(path) <= 3 and not in_a_layer):
        return _adamw(name, parameter, "output head, by its name")
    if not in_a_layer and tuple(parameter.shape) in embeddings and len(set(parameter.shape)) > 1:
        return _adamw(name, parameter, f"output head: the shape of {embeddings[tuple(parameter.shape)]}")
    return None


def _as_matrices(
    name: str,
    parameter: Tensor,
    owner: nn.Module | None,
    layout: MatrixLayout | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> PlannedParameter:
    shape, leaf = tuple(parameter.shape), _leaf(name)
    reason = "hidden matrix"
    if not parameter.numel():
        return _adamw(name, parameter, "empty")
    if layout is not None:
        reason = SPLIT_REASON
    elif isinstance(owner, _ConvNd):
        if owner.groups > 1 and owner.groups == owner.in_channels:
            return _adamw(name, parameter, "depthwise convolution")
        layout = MatrixLayout(transposed=owner.transposed and owner.groups == 1, heads=(owner.groups,))
        reason = "convolution, window flattened"
    elif isinstance(owner, nn.LSTM | nn.GRU):
        gates = 4 if isinstance(owner, nn.LSTM) else 3
        layout = MatrixLayout(blocks=(shape[0] // gates,) * gates) if "_hr_" not in leaf else MatrixLayout()
        reason = "fused gates"
    elif isinstance(owner, nn.MultiheadAttention) and leaf == "in_proj_weight":
        layout, reason = MatrixLayout(blocks=(owner.embed_dim,) * 3), "fused q|k|v"
    elif leaf in _GATE_UP_NAMES and parameter.ndim <= 3:
        layout, reason = _gate_up_layout(name, shape, shapes), "fused gate|up"
    else:
        layout = default_layout(shape) if owner is None else MatrixLayout(batch_ndim=parameter.ndim - 2)
        if out_axis(owner) and parameter.ndim == 2:
            layout = MatrixLayout(transposed=True)
        if leaf in _FUSED_QKV_NAMES:
            reason = "fused q, k, v taken as one matrix: declare the attention, or give layout="
        elif parameter.ndim > 2:
            reason = "stack of matrices" if layout.batch_ndim else "convolution, window flattened"
    if min(min(fan_out, fan_in) for _, fan_out, fan_in in layout.matrix_shapes(shape)) == 1:
        return _adamw(name, parameter, "one row or column")
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


def _clipping(projection: QKProjection) -> str:
    return projection.reason or ("above tau" if projection.trains() else "frozen: observed only")


def _adamw(name: str, parameter: Tensor, reason: str, *, decays: bool = True) -> PlannedParameter:
    frozen = not parameter.requires_grad
    return PlannedParameter(name, tuple(parameter.shape), "adamw", reason, decays=decays, frozen=frozen)


def _is_embedding(name: str, owner: nn.Module | None) -> bool:
    """Tell by the module, or by a name near the leaf: a model called `embedder` is not all embedding."""
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return True
    path = name.split(".")[-3:]
    numbered = max((i for i, part in enumerate(path) if part.isdigit()), default=-1)
    return any(map(_EMBEDDING_NAME.search, path[numbered + 1 :]))


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
