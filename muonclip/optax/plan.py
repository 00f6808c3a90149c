"""Names and shapes → who updates each parameter, as which matrices, and why.

Muon is for the hidden matrices; AdamW takes embeddings, the output head, norms, biases and everything else that is not
a matrix (K. Jordan 2024; Moonlight, arXiv 2502.16982, §2.2). JAX's kernels do not say which of their axes are rows:
where names, the declared attentions and the shape leave that open, it has to be declared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from optax.contrib import MuonDimensionNumbers

from muonclip.core import MatrixLayout
from muonclip.optax.array_layout import ArrayLayout, WeightLayout
from muonclip.optax.head_rows import HeadRows
from muonclip.optax.paths import below, declared_for, map_named, named_arrays
from muonclip.optax.qk_clip import QKProjection, QKProjections

_LM_HEAD_NAMES = {"lm_head", "embed_out", "unembed", "logits_dense", "logits"}
_HEAD_NAMES = _LM_HEAD_NAMES | {"head", "output", "output_layer", "classifier"}
_EMBEDDING_NAME = re.compile(r"embed|(^|_)emb(s|_|$)|^w[tp]e$", re.IGNORECASE)
_NORM_NAME = re.compile(r"norm|(^|_)ln(_|\d|$)|^(scale|gamma|beta|gain)$", re.IGNORECASE)
_BIAS_NAME = re.compile(r"(^|_)bias$|^b$", re.IGNORECASE)
_GATE_UP_NAMES = {"gate_up_proj", "gate_up", "w13"}
_QUERY_KEY_VALUE_NAMES = {"query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj"}
_OUTPUT_NAMES = {"out", "o", "o_proj", "out_proj", "output_proj"}
_ARRAY_NAMES = {"kernel", "weight", "w", "embedding"}  # what a module calls its array

DECLARE = (
    "pass muon_weight_dimension_numbers=, a tree with a MuonDimensionNumbers or a MatrixLayout for each matrix and "
    "None for what AdamW updates (or a function of the parameters that makes it)"
)


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """One line of the plan. `layout` is None for AdamW; `decays`: whether weight decay applies."""

    name: str
    shape: tuple[int, ...]
    use: Literal["muon", "adamw"]
    reason: str
    layout: WeightLayout | None = None
    decays: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """What `muonclip` does with each parameter, and why; `print` it."""

    parameters: tuple[PlannedParameter, ...]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "update", "matrices", "reason")] + [
            (
                row.name,
                "×".join(map(str, row.shape)) or "scalar",
                row.use,
                ArrayLayout.of(row.layout, row.shape).describe(row.shape) if row.layout else "",
                row.reason + ("" if row.decays else ", no decay"),
            )
            for row in self.parameters
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def tree(self, params: Any, of: Callable[[PlannedParameter], Any]) -> Any:
        """`of` each line, as a tree with the structure of `params`."""
        lines = {line.name: line for line in self.parameters}
        return map_named(lambda name, _: of(lines[name]), params)


def plan(params: Any, weight_dimension_numbers: Any = None, qk_projections: QKProjections | None = None) -> Plan:
    """The plan that `muonclip` follows with the same arguments; `params` may be `jax.ShapeDtypeStruct`s.

    Raises ValueError, with a list, for arrays whose axes are not understood.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in named_arrays(params).items()}
    if weight_dimension_numbers is not None:
        given = weight_layouts(weight_dimension_numbers, params)
        return Plan(tuple(_as_declared(name, shape, given[name]) for name, shape in shapes.items()))
    stacks, attention = _declared_attention(qk_projections, shapes)
    embeddings = {shape: name for name, shape in shapes.items() if _is_embedding(name) and "pos" not in name}
    lines: list[PlannedParameter] = []
    unknown: list[str] = []
    for name, shape in shapes.items():
        line = _as_vector(name, shape) or _as_embedding_or_head(name, shape, embeddings)
        line = line or _as_matrices(name, shape, attention.get(name), _layer_axis(name, shape, stacks))
        if line is None:
            unknown.append(f"{name} {shape}")
        else:
            lines.append(line)
    if unknown:
        raise ValueError(
            "which axes of these arrays are rows and which are columns is not known:\n  "
            + "\n  ".join(unknown)
            + f"\nSay so: {DECLARE}."
        )
    return Plan(tuple(lines))


def weight_layouts(weight_dimension_numbers: Any, params: Any) -> dict[str, WeightLayout | None]:
    """Array name → what was declared for it: by a tree like `params`, a prefix of one, or a function that makes it."""
    return declared_for(
        params, weight_dimension_numbers, (MuonDimensionNumbers, MatrixLayout), "weight_dimension_numbers"
    )


def _as_declared(name: str, shape: tuple[int, ...], layout: WeightLayout | None) -> PlannedParameter:
    if layout is None:
        decays = _as_vector(name, shape) is None
        return PlannedParameter(name, shape, "adamw", "declared", decays=decays)
    try:
        ArrayLayout.of(layout, shape)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    return PlannedParameter(name, shape, "muon", "declared", layout)


def _as_vector(name: str, shape: tuple[int, ...]) -> PlannedParameter | None:
    path = _path(name)
    if len(shape) < 2:
        reason = "vector"
    elif 0 in shape:
        reason = "empty"
    elif _BIAS_NAME.search(path[-1]):
        reason = "biases"
    elif any(map(_NORM_NAME.search, path[-2:])):
        reason = "norm"
    else:
        return None
    return PlannedParameter(name, shape, "adamw", reason, decays=False)


def _as_embedding_or_head(
    name: str, shape: tuple[int, ...], embeddings: Mapping[tuple[int, ...], str]
) -> PlannedParameter | None:
    path = _path(name)
    in_a_layer = any(re.search(r"(^|_)\d+$|layers|blocks", part) for part in path[:-2])
    if _is_embedding(name):
        return PlannedParameter(name, shape, "adamw", "embedding")
    if _module(path) in _LM_HEAD_NAMES or (_module(path) in _HEAD_NAMES and len(path) <= 3 and not in_a_layer):
        return PlannedParameter(name, shape, "adamw", "output head, by its name")
    like = embeddings.get(shape) or embeddings.get(shape[::-1])
    if not in_a_layer and like and len(set(shape)) > 1:
        return PlannedParameter(name, shape, "adamw", f"output head: the shape of {like}")
    return None


def _as_matrices(
    name: str, shape: tuple[int, ...], layout: WeightLayout | None, layer_axis: int | None
) -> PlannedParameter | None:
    """A line for what can be read as matrices; `layout`: as the declared attention says; None where nothing says."""
    if layout is not None:
        return PlannedParameter(name, shape, "muon", "attention projection", layout)
    path = _path(name)
    stored_out_first = path[-1] == "weight"  # PyTorch's and Equinox's name goes with their order
    if layer_axis is None and len(shape) == 2:
        fused = _module(path) in _GATE_UP_NAMES
        rows = shape[0] if stored_out_first else shape[1]
        blocks = (rows // 2, rows // 2) if fused else ()
        reason = "fused gate|up" if fused else "hidden matrix"
        return PlannedParameter(name, shape, "muon", reason, MatrixLayout(0, not stored_out_first, blocks))
    axes = [axis for axis in range(len(shape)) if axis != layer_axis]
    reason = "hidden matrix" if layer_axis is None else f"hidden matrix, stacked over {shape[layer_axis]} layers"
    if any("expert" in part for part in path) and len(axes) >= 3:
        axes, reason = axes[1:], reason.replace("hidden matrix", "experts")
    if len(axes) == 2:
        return PlannedParameter(name, shape, "muon", reason, MuonDimensionNumbers(axes[0], axes[1]))
    if any("conv" in part.lower() for part in path) and layer_axis is None:
        layout = MatrixLayout() if stored_out_first else MuonDimensionNumbers(tuple(axes[:-1]), axes[-1])
        return PlannedParameter(name, shape, "muon", "convolution, window flattened", layout)
    return None


def _declared_attention(
    qk_projections: QKProjections | None, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[tuple[str, int]], dict[str, WeightLayout]]:
    """What the declared attentions tell: (path, layer axis) of stacks, and the layouts of their projections.

    The value and output projections beside a declared query are read as it is: [in, heads, d] and [heads, d, out].
    """
    stacks: list[tuple[str, int]] = []
    layouts: dict[str, WeightLayout] = {}
    for projection in jax.tree.leaves(qk_projections, is_leaf=lambda leaf: isinstance(leaf, QKProjection)):
        for rows in projection.parts():
            if rows.layer_axis is not None:
                stacks.append((rows.path, rows.layer_axis))
            beside = [name for name in shapes if not below(rows.path, name) and below(_parent(rows.path), name)]
            for name in (name for name in shapes if below(rows.path, name)):
                layouts[name] = _projection_layout(rows, shapes[name], reverse=False)
            for name in beside:
                known = _module(_path(name)) in _QUERY_KEY_VALUE_NAMES, _module(_path(name)) in _OUTPUT_NAMES
                if any(known) and len(shapes[name]) - (rows.layer_axis is not None) >= 3:
                    layouts.setdefault(name, _projection_layout(rows, shapes[name], reverse=known[1]))
    return stacks, layouts


def _projection_layout(rows: HeadRows, shape: Sequence[int], *, reverse: bool) -> WeightLayout:
    """Of a projection to the heads, or (`reverse`) from them: then the output is the single axis."""
    axes = list(range(len(shape)))
    if rows.layer_axis is not None:
        del axes[rows.layer_axis % len(shape)]
    first = (rows.in_axis == 0) != reverse
    single, several = (axes[0], tuple(axes[1:])) if first else (axes[-1], tuple(axes[:-1]))
    return MuonDimensionNumbers(several, single) if reverse else MuonDimensionNumbers(single, several)


def _layer_axis(name: str, shape: tuple[int, ...], stacks: Sequence[tuple[str, int]]) -> int | None:
    """The layer axis of the stack that the array stands in: the one whose path it shares more of than the root."""
    for path, axis in stacks:
        shared = 0
        for one, other in zip(path.split("/"), name.split("/"), strict=False):
            if one != other:
                break
            shared += 1
        if shared and len(shape) > 2 and axis < len(shape):
            return axis % len(shape)
    return None


def _is_embedding(name: str) -> bool:
    return any(map(_EMBEDDING_NAME.search, _path(name)[-2:]))


def _path(name: str) -> list[str]:
    """Of modules and array: dots separate too, as PyTorch's names have them."""
    return re.split(r"[/.]", name)


def _module(path: Sequence[str]) -> str:
    """The name of the module that an array belongs to."""
    return path[-2] if path[-1] in _ARRAY_NAMES and len(path) > 1 else path[-1]


def _parent(path: str) -> str:
    """Where the siblings of a projection stand; the path may name its array."""
    parts = path.split("/")
    return "/".join(parts[: -2 if parts[-1] in _ARRAY_NAMES else -1])
