"""Names and shapes → who updates each parameter, as which matrices, and why.

Muon is for the hidden matrices; AdamW takes embeddings, the LM head, norms, biases and everything else that is not a
matrix (K. Jordan 2024; Moonlight, arXiv 2502.16982, §2.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from muonclip.core import MatrixLayout
from muonclip.torch.attention import HeadRows, QKProjection

_HEAD_NAMES = {"lm_head", "head", "output", "output_layer", "unembed", "score", "classifier", "proj_out"}
_GATE_UP_NAMES = {"gate_up_proj", "gate_up", "w13"}
_FUSED_QKV_NAMES = {"qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "in_proj_weight", "in_proj"}
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
    """What the optimizer does with each parameter and each attention, and why; `print` it."""

    parameters: tuple[PlannedParameter, ...]
    attentions: Mapping[str, QKProjection]
    defaults: Mapping[str, object]

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
        table = _table(rows)
        attentions = [("attention", "kind", "heads", "clip")] + [
            (name or "(model)", projection.kind, str(projection.num_heads), projection.reason or "above tau")
            for name, projection in self.attentions.items()
        ]
        options = "\n".join(f"{name} = {value}" for name, value in self.defaults.items())
        return "\n\n".join([table, _table(attentions) if len(attentions) > 1 else "QK-Clip off", options])


def plan_module(model: nn.Module, projections: Mapping[str, QKProjection], *, per_head: bool) -> list[PlannedParameter]:
    """A line for each parameter of the model, tied ones once."""
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    layouts = _projection_layouts(projections, per_head)
    return plan_named(model.named_parameters(), owners=owners, layouts=layouts)


def plan_named(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    owners: Mapping[int, nn.Module] | None = None,
    layouts: Mapping[int, MatrixLayout] | None = None,
) -> list[PlannedParameter]:
    """A line for each named parameter. `owners`: the module each is an attribute of, `layouts`: known ones; by id."""
    owners, layouts = owners or {}, layouts or {}
    named = list(named_parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in named}
    embeddings = {shapes[name]: name for name, parameter in named if _is_embedding(name, owners.get(id(parameter)))}
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


def default_layout(shape: Sequence[int]) -> MatrixLayout:
    """How Muon reads a parameter of which only the shape is known: [out, in] a matrix, [E, out, in] a stack of them,
    four axes and more a convolution [out, in, *window]. Raises ValueError for vectors."""
    if len(shape) < 2:
        raise ValueError(f"has shape {tuple(shape)}; Muon needs a matrix. Leave it to AdamW.")
    return MatrixLayout(batch_ndim=1) if len(shape) == 3 else MatrixLayout()


def _as_vector(name: str, parameter: Tensor, owner: nn.Module | None) -> PlannedParameter | None:
    path = name.split(".")
    if parameter.ndim < 2:
        reason = "vector"
    elif path[-1].endswith("bias"):
        reason = "stacked biases"
    elif _NORM_NAME.search(type(owner).__name__ if owner else "") or any(map(_NORM_NAME.search, path[-2:])):
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
    in_a_layer = any(part.isdigit() for part in path)
    if not in_a_layer and any(part in _HEAD_NAMES for part in path):
        return _adamw(name, parameter, "output head, by its name")
    if not in_a_layer and tuple(parameter.shape) in embeddings:
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
    if layout is not None:
        reason = "attention projection, split by its declaration"
    elif isinstance(owner, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
        if owner.groups > 1 and owner.groups == owner.in_channels:
            return _adamw(name, parameter, "depthwise convolution")
        layout = MatrixLayout(transposed=owner.transposed, heads=(owner.groups,) if not owner.transposed else ())
        reason = "convolution, window flattened"
    elif isinstance(owner, nn.MultiheadAttention) and leaf == "in_proj_weight":
        layout, reason = MatrixLayout(blocks=(owner.embed_dim,) * 3), "fused q|k|v"
    elif leaf in _GATE_UP_NAMES and parameter.ndim <= 3:
        layout, reason = _gate_up_layout(name, shape, shapes), "fused gate|up"
    else:
        layout = default_layout(shape)
        if type(owner).__name__ == "Conv1D" and parameter.ndim == 2:
            layout = MatrixLayout(transposed=True)
        if leaf in _FUSED_QKV_NAMES:
            reason = "fused q, k, v taken as one matrix: declare the attention, or give layout="
        elif parameter.ndim > 2:
            reason = "stack of matrices" if parameter.ndim == 3 else "convolution, window flattened"
    if min(min(fan_out, fan_in) for _, fan_out, fan_in in layout.matrix_shapes(shape)) == 1:
        return _adamw(name, parameter, "one row or column")
    return PlannedParameter(name, shape, "muon", reason, layout, frozen=not parameter.requires_grad)


def _gate_up_layout(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> MatrixLayout:
    """[*E, 2f, d], or [*E, d, 2f] where the `down_proj` beside it, [*E, f, d] then, says so."""
    head, _, _ = name.removesuffix(".weight").rpartition(".")
    siblings = (f"{head}.down_proj".lstrip("."), f"{head}.down_proj.weight".lstrip("."))
    down = next((shapes[sibling] for sibling in siblings if sibling in shapes), None)
    transposed = down is not None and shape[-2:] != (2 * down[-1], down[-2]) and shape[-2:] == (down[-1], 2 * down[-2])
    rows = shape[-1] if transposed else shape[-2]
    if rows % 2:
        return default_layout(shape)
    return MatrixLayout(batch_ndim=len(shape) - 2, transposed=transposed, blocks=(rows // 2, rows // 2))


def _projection_layouts(projections: Mapping[str, QKProjection], per_head: bool) -> dict[int, MatrixLayout]:
    """Layouts of the weights that attentions declare, by id: fused q|k|v split, and with `per_head` each head."""
    parts: dict[int, list[tuple[str, HeadRows]]] = {}
    for projection in projections.values():
        for side, rows in projection.parts():
            parts.setdefault(id(getattr(rows.module, rows.weight)), []).append((side, rows))
    layouts = {key: _split_by_heads(sides, per_head=per_head) for key, sides in parts.items()}
    return {key: layout for key, layout in layouts.items() if layout is not None}


def _split_by_heads(parts: list[tuple[str, HeadRows]], *, per_head: bool) -> MatrixLayout | None:
    """The blocks that the declared rows cut a weight into; None where it is one matrix.

    Rows with a stride interleave heads: the same sequence of blocks repeats for every head. K2's W_ukv ([k_nope | v]
    per head) is such a weight; without `per_head` it stays the one matrix it is in K2.
    """
    parts = sorted(parts, key=lambda part: part[1].start)
    first = parts[0][1]
    weight: Tensor = getattr(first.module, first.weight)
    interleaved = any(rows.step != rows.size for _, rows in parts)
    repeats = first.num_heads if interleaved else 1
    total = weight.shape[first.axis] // repeats
    blocks: list[tuple[str, int, int]] = []
    position = 0
    for side, rows in parts:
        size = rows.size if interleaved else rows.size * rows.num_heads
        if rows.start > position:
            blocks.append(("other", rows.start - position, repeats))
        if blocks and blocks[-1][0] == side and interleaved:
            blocks[-1] = (side, blocks[-1][1] + size, repeats)
        else:
            blocks.append((side, size, rows.num_heads))
        position = rows.start + size
    if position < total:
        blocks.append(("other", total - position, repeats))
    sides = {side for side, _, _ in blocks}
    fused = len(sides) > 1 and (not interleaved or {"query", "key"} <= sides)
    if not fused and not per_head:
        return None
    return MatrixLayout(
        transposed=first.axis == 1,
        blocks=tuple(size for _, size, _ in blocks),
        heads=tuple(heads for _, _, heads in blocks) if per_head else (),
        repeats=repeats,
    )


def _adamw(name: str, parameter: Tensor, reason: str, *, decays: bool = True) -> PlannedParameter:
    frozen = not parameter.requires_grad
    return PlannedParameter(name, tuple(parameter.shape), "adamw", reason, decays=decays, frozen=frozen)


def _is_embedding(name: str, owner: nn.Module | None) -> bool:
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return True
    return any("embed" in part.lower() or part in ("wte", "wpe") for part in name.split("."))


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
