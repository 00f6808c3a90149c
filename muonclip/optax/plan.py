"""The plan: who updates each parameter, as which matrices, and why, from names and shapes.

Muon is for the hidden matrices; AdamW takes embeddings, the output head, norms, biases and everything else that is not
a matrix (K. Jordan 2024; Moonlight, arXiv 2502.16982, §2.2). JAX's kernels do not say which of their axes are rows:
where names, the declared attentions and the shape leave that open, it has to be declared.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers

from muonclip.core import MatrixLayout, Recipe
from muonclip.core.arguments import check_array, check_choice
from muonclip.core.coefficients import Coefficients
from muonclip.core.cost_model import Form
from muonclip.core.declared_layouts import check_layouts, with_layouts
from muonclip.core.parameter_plan import PlannedParameter, parameter_table
from muonclip.core.parameter_roles import (
    ARRAY_NAMES,
    FUSED_QKV_NAMES,
    GATE_UP_NAMES,
    ONE_ROW,
    Role,
    embedding_shapes,
    is_one_row,
    module_of,
    role_of,
)
from muonclip.core.recipes import RecipeName, option_lines, takes_recipe
from muonclip.core.state_storage import stored_states
from muonclip.core.text_table import table
from muonclip.core.update_rule import MuonRule
from muonclip.core.updates import UPDATES, Update, states_in_words
from muonclip.optax.arguments import check_momentum_dtype, check_rest
from muonclip.optax.array_layout import ArrayLayout, WeightLayout
from muonclip.optax.head_rows import HeadRows, is_adapter
from muonclip.optax.known_attention import attentions_by_shape
from muonclip.optax.newton_schulz import NewtonSchulz
from muonclip.optax.paths import below, declared_for, map_named, named_arrays
from muonclip.optax.qk_projection import QKProjection, QKProjections, flatten_projections
from muonclip.optax.stored_states import dtype_of, storage_of
from muonclip.optax.types import PyTree, WeightLayouts

_QUERY_KEY_VALUE_NAMES = {"query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj"}
_OUTPUT_NAMES = {"out", "o", "o_proj", "out_proj", "output_proj"}

DECLARE = (
    "pass muon_weight_dimension_numbers=, a tree with a MuonDimensionNumbers or a MatrixLayout for each matrix and "
    "None for what AdamW updates (or a function of the parameters that makes it)"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of what `muonclip` does with each parameter, and why; `print` it.

    Attributes:
        parameters: A line for each array, in the order of the tree.
        products: The matrices of each shape, whichever way they lie, and the dtype and form of the products that
            iterate them.
        state_bytes: The bytes of each state of the Muon half, by `update` and name; shown for variants, and where
            `mu_dtype` says how the momentum is stored.
        recipe: The recipe that was asked for, and what was given next to it.
        options: What the recipe sets, and the options of the products; shown with a recipe.
        mu_dtype: How the momentum is stored; None: as the parameters are.
    """

    parameters: tuple[PlannedParameter, ...]
    products: tuple[tuple[str, str], ...] = ()
    state_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    recipe: Recipe | None = None
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    mu_dtype: object = None

    def __str__(self) -> str:
        parameters = parameter_table(
            self.parameters, lambda layout, shape: ArrayLayout.from_layout(layout, shape).describe(shape)
        )
        products = table([("matrices", "products"), *self.products]) if self.products else ""
        options = "" if self.recipe is None else option_lines(self.options, self.recipe)
        return "\n\n".join(
            filter(None, (parameters, states_in_words(self.state_bytes, self.mu_dtype), products, options))
        )

    def tree(self, params: Any, of: Callable[[PlannedParameter], Any]) -> Any:
        """Return `of(line)` of each line, as a tree with the structure of `params`.

        Args:
            params: The parameters.
            of: A function of a line of the plan.
        """
        lines = {line.name: line for line in self.parameters}
        return map_named(lambda name, _: of(lines[name]), params)


@takes_recipe
def plan(
    params: PyTree,
    weight_dimension_numbers: WeightLayouts = None,
    qk_projections: QKProjections | None = None,
    *,
    layouts: Mapping[str, int | MatrixLayout] | None = None,
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int | None = None,
    ns_dtype: DTypeLike | None = None,
    ns_form: Form | None = None,
    update: Update = "muon",
    mu_dtype: DTypeLike | str | None = None,
    recipe: RecipeName | Recipe | None = None,
    rest: optax.GradientTransformation | None = None,
) -> Plan:
    """Make the plan that `muonclip` follows with the same arguments.

    Args:
        params: The parameters: a tree of arrays or of `jax.ShapeDtypeStruct`s.
        weight_dimension_numbers: A tree like `params`, a prefix of one, or a function that makes it, with an
            `optax.contrib.MuonDimensionNumbers` or a `muonclip.core.MatrixLayout` for each matrix and None for what
            AdamW updates; None: names, shapes and declared attentions decide.
        qk_projections: The declared attentions, see `qk_clip`.
        layouts: For each pattern of parameters' names, a number of heads, each a matrix of its own, or a
            `muonclip.core.MatrixLayout`, `{"*/linear_attn/q_proj": 16}`; the first pattern that fits counts.
        ns_coefficients: The polynomials, see `muonclip.core.resolve_coefficients`.
        ns_steps: The number of steps, see `scale_by_muon`.
        ns_dtype: The dtype of the products, see `scale_by_muon`.
        ns_form: The form of the iteration, see `scale_by_muon`.
        update: The rule of the Muon half, see `muonclip`.
        mu_dtype: How the momentum is stored, see `scale_by_muon`.
        recipe: Show what this recipe sets where `muonclip` is given nothing else.
        rest: What takes the place of AdamW, see `muonclip`.

    Raises:
        ValueError: For arrays whose axes are not understood, in a list, for a form that may not run with these
            polynomials, and for `layouts` that do not fit.
    """
    newton_schulz = NewtonSchulz(ns_coefficients, ns_steps, dtype=ns_dtype, form=ns_form)
    newton_schulz.check()
    check_choice("update", update, *UPDATES)
    check_momentum_dtype(mu_dtype)
    check_rest(rest)
    check_layouts(layouts)
    own = _lines(params, weight_dimension_numbers, qk_projections)
    lines = tuple(with_layouts(own, layouts, readable=_readable, whole=not _is_masked(params)))
    if rest is not None:
        lines = tuple(replace(line, use="rest") if line.use == "adamw" else line for line in lines)
    sizes = _state_bytes(UPDATES[update], lines, named_arrays(params), mu_dtype)
    planned = Plan(lines, tuple(_products(lines, params, newton_schulz)), {update: sizes}, mu_dtype=mu_dtype)
    if not isinstance(recipe, Recipe):
        return planned
    options = {**recipe.arguments(recipe.given), "ns_coefficients": ns_coefficients, "ns_steps": ns_steps}
    options.pop("qk_clip", None)  # here it is qk_projections=None
    return replace(planned, recipe=recipe, options=options)


def _lines(
    params: Any, weight_dimension_numbers: Any, qk_projections: QKProjections | None
) -> tuple[PlannedParameter, ...]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, leaf in named_arrays(params).items():
        check_array(f"params: {name!r}", leaf)
        shapes[name] = tuple(leaf.shape)
    if weight_dimension_numbers is not None:
        given = weight_layouts(weight_dimension_numbers, params)
        return tuple(_as_declared(name, shape, given[name]) for name, shape in shapes.items())
    declared = [] if qk_projections is None else flatten_projections(qk_projections)[0]
    projections = [projection for _, projection in declared]
    parts = [rows for projection in projections for rows in projection.parts()]
    projections += [
        each
        for each in attentions_by_shape(shapes)
        if not any(below(own.path, rows.path) or below(rows.path, own.path) for rows in each.parts() for own in parts)
    ]
    layer_axes = _layer_axes(projections, shapes)
    embeddings = embedding_shapes((name, shape, None) for name, shape in shapes.items())
    roles = {name: role_of(name, shape, None, embeddings) for name, shape in shapes.items()}
    attention = _attention_layouts(projections, {n: shape for n, shape in shapes.items() if roles[n].use == "muon"})
    lines: list[PlannedParameter] = []
    unknown: list[str] = []
    for name, shape in shapes.items():
        if roles[name].use == "adamw":
            line = _adamw(name, shape, roles[name])
        elif name in attention:
            layout = attention[name]
            line = layout and _muon(name, shape, "attention projection", layout)
        else:
            line = _as_matrices(name, shape, layer_axes.get(name))
        if line is None:
            part = ": only a part of its rows is declared. Declare its keys too, by shared_key= or QKProjection.fused"
            unknown.append(f"{name} {shape}" + (part if name in attention else ""))
        else:
            lines.append(line)
    if unknown:
        raise ValueError(
            "which axes of these arrays are rows and which are columns is not known:\n  "
            + "\n  ".join(unknown)
            + f"\nSay so: {DECLARE}."
        )
    return tuple(lines)


def weight_layouts(weight_dimension_numbers: Any, params: Any) -> dict[str, WeightLayout | None]:
    """Return what was declared for each array, by name.

    `weight_dimension_numbers`: a tree like `params`, a prefix of one, or a function that makes it.
    """
    return declared_for(
        params, weight_dimension_numbers, (MuonDimensionNumbers, MatrixLayout), "weight_dimension_numbers"
    )


def _products(lines: Iterable[PlannedParameter], params: Any, newton_schulz: NewtonSchulz) -> Iterable[tuple[str, str]]:
    """Count the matrices of each shape, and say how they are multiplied."""
    arrays, counts = named_arrays(params), Counter[tuple[int, int, Any]]()
    for line in lines:
        if line.use == "muon":
            layout = ArrayLayout.from_layout(line.layout, line.shape)
            for count, fan_out, fan_in in layout.fused.matrix_shapes(layout.unit_shape(line.shape)):
                counts[min(fan_out, fan_in), max(fan_out, fan_in), arrays[line.name].dtype] += count
    for (m, n, dtype), count in counts.items():
        form = "Gram" if newton_schulz.form_of(m, n, dtype) == "gram" else "standard"
        yield f"{count} × ({m}×{n})", f"{newton_schulz.products_dtype(dtype).name}, {form} form"


def _state_bytes(
    rule: MuonRule, lines: Iterable[PlannedParameter], arrays: Mapping[str, Any], mu_dtype: Any
) -> dict[str, int]:
    """Count the bytes of each state that a rule keeps of all matrices."""
    storage = storage_of(mu_dtype)
    parts = stored_states(rule.states, storage)
    sizes = {part.name: 0 for part in parts}
    for line in lines:
        if line.use == "muon":
            own, dtype = ArrayLayout.from_layout(line.layout, line.shape), arrays[line.name].dtype
            for part in parts:
                kept = np.dtype(dtype_of(part, dtype, storage))
                sizes[part.name] += math.prod(part.stored_shape(line.shape, own.fan_in)) * kept.itemsize
    return sizes


def _is_masked(params: Any) -> bool:
    """Tell whether Optax has left out some of the parameters, as `optax.partition` does for each of its parts."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    return any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)


def _readable(line: PlannedParameter) -> MatrixLayout | None:
    """Return the layout of a line as a MatrixLayout; None where no such layout has its axes."""
    if isinstance(line.layout, MatrixLayout):
        return line.layout
    batch, fan_out, fan_in = (own := ArrayLayout.from_layout(line.layout, line.shape)).batch, own.fan_out, own.fan_in
    axes = list(range(len(line.shape)))
    if [*batch, *fan_out, *fan_in] == axes:
        return MatrixLayout(len(batch), out_ndim=len(fan_out))
    transposed = [*batch, *fan_in, *fan_out] == axes and len(fan_in) == 1
    return MatrixLayout(len(batch), transposed=True) if transposed else None


def _as_declared(name: str, shape: tuple[int, ...], layout: WeightLayout | None) -> PlannedParameter:
    if layout is None:
        return PlannedParameter(name, shape, "adamw", "declared", decays=role_of(name, shape).decays)
    try:
        ArrayLayout.from_layout(layout, shape)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    return PlannedParameter(name, shape, "muon", "declared", layout)


def _adamw(name: str, shape: tuple[int, ...], role: Role) -> PlannedParameter:
    return PlannedParameter(name, shape, "adamw", role.reason, decays=role.decays)


def _muon(name: str, shape: tuple[int, ...], reason: str, layout: WeightLayout) -> PlannedParameter:
    array = ArrayLayout.from_layout(layout, shape)
    if is_one_row(array.fused.matrix_shapes(array.unit_shape(shape))):
        return _adamw(name, shape, ONE_ROW)
    return PlannedParameter(name, shape, "muon", reason, layout)


def _as_matrices(name: str, shape: tuple[int, ...], layer_axis: int | None) -> PlannedParameter | None:
    """Make a line from what name and shape tell; None where they do not tell enough."""
    path = re.split(r"[./]", name)
    out_first = path[-1] == "weight"  # PyTorch's and Equinox's name goes with their order
    batch = [] if layer_axis is None else [layer_axis]
    axes = [axis for axis in range(len(shape)) if axis != layer_axis]
    if len(axes) < 2:
        return _adamw(name, shape, Role("adamw", "vectors, stacked over layers", decays=False))
    what, stacked = "hidden matrix", "" if layer_axis is None else f", stacked over {shape[layer_axis]} layers"
    if any("expert" in part for part in path) and len(axes) >= 3:
        batch, axes, what = [*batch, axes[0]], axes[1:], "experts"
    if len(axes) == 2:
        out, into = axes if out_first else axes[::-1]
        if module_of(name) in FUSED_QKV_NAMES:
            what = "fused q, k, v taken as one matrix: declare the attention, which splits it"
        if module_of(name) not in GATE_UP_NAMES or shape[out] % 2:
            layout = MuonDimensionNumbers(into, out) if batch else MatrixLayout(transposed=not out_first)
        elif batch == list(range(len(batch))):
            layout, what = MatrixLayout(len(batch), not out_first, (shape[out] // 2,) * 2), "fused gate|up"
        else:
            return None  # no layout has its batch behind the rows
        return _muon(name, shape, what + stacked, layout)
    if any("conv" in part.lower() for part in path) and not batch:
        layout = MatrixLayout() if out_first else MuonDimensionNumbers(tuple(axes[:-1]), axes[-1])
        return _muon(name, shape, "convolution, window flattened", layout)
    return None


def _attention_layouts(
    projections: Sequence[QKProjection], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, WeightLayout | None]:
    """Return the layouts that declared attentions imply; None for an array of which they tell only a part.

    The value and output projections of the same attention are read as its query is: [in, heads, d] and [heads, d, out].
    """
    layouts: dict[str, WeightLayout | None] = {}
    for projection in projections:
        queries = (*projection.query, *projection.query_facing_shared)
        keys = (*projection.key, *projection.shared_key)
        for name, shape in shapes.items():
            query, key = ([rows for rows in side if below(rows.path, name)] for side in (queries, keys))
            if (query or key) and not is_adapter(name):
                layouts[name] = _fused_layout(name, query, key, shape)
        for rows in projection.parts():
            stacked = rows.layer_axis is not None
            for name, shape in shapes.items():
                leaf = module_of(name)
                known = leaf in _QUERY_KEY_VALUE_NAMES or leaf in _OUTPUT_NAMES
                if known and below(_parent(rows.path), name) and len(shape) - stacked >= 3:
                    layouts.setdefault(name, _sibling_layout(rows, shape, reverse=leaf in _OUTPUT_NAMES))
    return layouts


def _fused_layout(
    name: str, query: Sequence[HeadRows], key: Sequence[HeadRows], shape: tuple[int, ...]
) -> WeightLayout | None:
    """Return the layout of an array with these parts; None where the parts do not tell.

    An array of queries, or of keys (and the values of MLA), is one matrix; queries and keys in one array are matrices
    of their own, and so is what follows them.
    """
    first = (*query, *key)[0]
    into = first.in_axis_of(name, shape)
    plain = _projection_layout(first, shape, into, reverse=False)
    axes = plain.output_axis if isinstance(plain.output_axis, tuple) else (plain.output_axis,)
    rows = math.prod(shape[axis] for axis in axes)  # pyright: ignore[reportCallIssue, reportArgumentType]
    indices = [part.index(rows) for part in (*query, *key)]
    covered = len(np.unique(np.concatenate([index.ravel() for index in indices]))) == rows
    if not query or (covered and not key):
        return plain
    readable = first.layer_axis in (None, 0) and (into == 0 or len(axes) == 1)
    if not key or not readable:
        return None
    heads = first.num_heads
    one_after_another = all(index.ravel().tolist() == list(range(index[0, 0], index[-1, -1] + 1)) for index in indices)
    by_head = all(
        len(index) == heads and rows % heads == 0 and (np.diff(index[:, 0]) == rows // heads).all() for index in indices
    )
    if not one_after_another and not by_head:
        return None
    repeats = 1 if one_after_another else heads
    last = -1 if one_after_another else 0
    edges = sorted(
        {0, rows // repeats, *(int(edge) for index in indices for edge in (index[0, 0], index[last, -1] + 1))}
    )
    blocks = tuple(end - start for start, end in itertools.pairwise(edges))
    return MatrixLayout(int(first.layer_axis is not None), into == 0, blocks, (), repeats)


def _layer_axes(projections: Sequence[QKProjection], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the layer axis of each array in the largest module, around a declared stack, that has it throughout."""
    found: dict[str, int] = {}
    for rows in (rows for projection in projections for rows in projection.parts()):
        axis, layers, parts = rows.layer_axis, rows.num_layers(shapes), rows.path.split("/")
        if axis is None or layers is None:
            continue
        for depth in range(len(parts) + 1):
            inside = {n: shape for n, shape in shapes.items() if below("/".join(parts[:depth]), n)}
            if all(-len(shape) <= axis < len(shape) and shape[axis] == layers for shape in inside.values()):
                found |= {name: axis % len(shape) for name, shape in inside.items()}
                break
    return found


def _sibling_layout(rows: HeadRows, shape: Sequence[int], *, reverse: bool) -> WeightLayout:
    """Return the layout of a value or an output next to a query that is declared by these rows."""
    return _projection_layout(rows, shape, rows.in_axis or 0, reverse=reverse)


def _projection_layout(rows: HeadRows, shape: Sequence[int], in_axis: int, *, reverse: bool) -> MuonDimensionNumbers:
    """Return the layout of a projection to the heads, or (`reverse`) from them: then the output is the single axis."""
    axes = list(range(len(shape)))
    if rows.layer_axis is not None:
        del axes[rows.layer_axis % len(shape)]
    if reverse:
        first = in_axis in (-1, len(axes) - 1)
        single = axes[0] if first else axes[-1]
        return MuonDimensionNumbers(tuple(axis for axis in axes if axis != single), single)
    single = axes[in_axis]
    return MuonDimensionNumbers(single, tuple(axis for axis in axes if axis != single))


def _parent(path: str) -> str:
    """Return the module that holds a projection and its siblings; the path may name its array."""
    parts = path.split("/")
    return "/".join(parts[: -2 if parts[-1] in ARRAY_NAMES else -1])
