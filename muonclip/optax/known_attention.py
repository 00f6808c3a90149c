"""Attentions of Flax and Equinox: which arrays make their queries and keys, known by type, or by names and shapes.

| type | modules | arrays |
|---|---|---|
| `MultiHeadAttention` of nnx, `MultiHeadDotProductAttention` of linen | `query`, `key` | kernel [in, heads, d] |
| `MultiheadAttention` of Equinox | `query_proj`, `key_proj` | weight [heads · d, in] |

Neither framework is imported here: who has such a model has imported it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax

from muonclip.core.arguments import check_kind, is_array, kind
from muonclip.core.parameter_roles import FUSED_QKV_NAMES
from muonclip.optax.head_rows import shapes_of
from muonclip.optax.paths import below, name_of, named_arrays
from muonclip.optax.qk_projection import QKProjection
from muonclip.optax.types import PyTree

if TYPE_CHECKING:
    import equinox
    from flax import linen, nnx

_PAIRS = (
    ("query", "key"), ("query_proj", "key_proj"), ("q_proj", "k_proj"), ("q", "k"), ("wq", "wk"), ("to_q", "to_k"),
)  # fmt: skip
_LATENT_NAMES = frozenset({"kv_up_proj", "kv_b_proj"})
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Hold what an attention of a known type says of itself."""

    query: str
    key: str
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    """Where heads are rows of a matrix, how many each has; None where they are an axis."""
    normalized: bool = False

    def holds(self, shape: tuple[int, ...], num_heads: int, *, bias: bool) -> bool:
        """Tell whether an array has the shape that this type gives it."""
        if self.head_dim is not None:
            return len(shape) == 2 - bias and shape[0] == num_heads * self.head_dim
        return len(shape) == 3 - bias and shape[1 - bias] == num_heads


@dataclass(frozen=True, slots=True)
class _Module:
    """Hold what is known of a module of a model."""

    kind: str
    """The name of its class."""
    attention: _Attention | None
    """None where the type is not known."""


def qk_projections_of(
    model: nnx.Module | linen.Module | equinox.Module,
    *inputs: PyTree,
    declare: Mapping[str, QKProjection | None] | None = None,
    **named_inputs: PyTree,
) -> dict[str, QKProjection]:
    """Declare the attentions of a Flax or Equinox model that have a known type, by the names of their modules.

    Known are nnx's `MultiHeadAttention`, linen's `MultiHeadDotProductAttention`, `MultiHeadAttention`, `SelfAttention`,
    and Equinox's `MultiheadAttention`; also scanned, with maxima [layers, heads], and with fewer heads for keys than
    for queries. Those that normalise queries and keys are only observed.

    `max_logits` may be the tree that the layers sow, of one array at or below the name of each attention: {"blocks":
    {0: {"attention": {"max_logits": …}}}} for "blocks/0/attention".

    Args:
        model: An `nnx.Module`, an Equinox module, or a linen module. Of a linen module the attentions appear when it is
            called, in shapes alone: nothing is computed.
        *inputs: For linen, what `model.init` takes after the key: arrays or their shapes.
        declare: For attentions of classes of your own, by the names of their modules, which rows make their queries and
            keys; None where a module is not an attention.
        **named_inputs: For linen, those by name.

    Raises:
        TypeError: For a model of another framework.
        ValueError: Where a module seems to be an attention and is of no known type; it lists them.
    """
    modules, arrays = _read(model, inputs, named_inputs)
    declared = {} if declare is None else declare
    check_kind("declare", declared, Mapping, "a dict of QKProjections by the names of modules")
    for name, projection in declared.items():
        if projection is not None:
            check_kind(f"declare[{name!r}]", projection, QKProjection, "a QKProjection, or None")
    shapes = shapes_of(named_arrays(arrays))
    found: dict[str, QKProjection] = {}
    for name, module in modules.items():
        if module.attention is not None and name not in declared:
            found[name] = _declared(name, module, shapes)
    unknown = _unknown(modules, shapes, [*found, *declared])
    if unknown:
        raise ValueError(
            "the rows of queries and keys are known of Flax's and Equinox's own attentions, and not of\n  "
            + "\n  ".join(f"{name!r} ({modules[name].kind})" if name in modules else repr(name) for name in unknown)
            + "\nDeclare them, and prove it by muonclip.optax.check: qk_projections_of(model, …, declare={\n  "
            + "\n  ".join(f"{name!r}: {how}," for name, how in unknown.items())
            + "\n}). None instead for a module that is not an attention."
        )
    found |= {name: projection for name, projection in declared.items() if projection is not None}
    if not found:
        raise ValueError(
            f"{kind(model)} has no attention of Flax's or Equinox's own. Declare those of your own classes, "
            "declare={name: QKProjection.mha(q=…, k=…, num_heads=…)}; Muon without a clip is qk_projections=None."
        )
    return found


def attentions_by_shape(shapes: Mapping[str, tuple[int, ...]]) -> list[QKProjection]:
    """Return the attentions whose arrays have the names and shapes that Flax's own modules give them.

        query, key, value: [in, heads, d]    out: [heads, d, out]    (with one more axis where layers are scanned)

    That is enough to tell rows from columns, and not to clip: an attention of one's own may normalise its queries.
    """
    found: list[QKProjection] = []
    for name in shapes:
        parent, _, behind = name.rpartition("query/kernel")
        if behind or (parent and not parent.endswith("/")):
            continue
        own = [shapes.get(f"{parent}{part}/kernel") for part in ("query", "key", "value", "out")]
        for axis in (None, 0, 1, 2, 3):
            heads = _flax_heads([_without(shape, axis) for shape in own])
            if heads:
                found.append(
                    QKProjection.gqa(
                        q=f"{parent}query",
                        k=f"{parent}key",
                        num_heads=heads[0],
                        num_kv_heads=heads[1],
                        layer_axis=axis,
                    )
                )
                break
    return found


def _flax_heads(kernels: list[tuple[int, ...] | None]) -> tuple[int, int] | None:
    """Return the numbers of heads of queries and keys, if these are the kernels of query, key, value and out."""
    found = [shape for shape in kernels if shape is not None and len(shape) == 3]
    if len(found) < 4:
        return None
    query, key, value, out = found
    fits = query[2] == key[2] and key[1] == value[1] and out[:2] == (query[1], value[2]) and query[1] % key[1] == 0
    return (query[1], key[1]) if fits else None


def _without(shape: tuple[int, ...] | None, axis: int | None) -> tuple[int, ...] | None:
    """Return a shape without its axis of layers; None where it has no such axis."""
    if shape is None or axis is None:
        return shape
    return shape[:axis] + shape[axis + 1 :] if axis < len(shape) else None


def _declared(name: str, module: _Module, shapes: Mapping[str, tuple[int, ...]]) -> QKProjection:
    """Declare an attention of a known type."""
    attention = module.attention
    assert attention is not None
    query, key = _join(name, attention.query), _join(name, attention.key)
    sides = ((query, attention.num_heads), (key, attention.num_kv_heads))
    own = [
        (shape, heads, array.endswith("/bias"))
        for path, heads in sides
        for array, shape in shapes.items()
        if below(path, array)
    ]
    for axis in (None, 0, 1, 2, 3) if own else ():
        each = ((_without(shape, axis), heads, bias) for shape, heads, bias in own)
        if all(shape is not None and attention.holds(shape, heads, bias=bias) for shape, heads, bias in each):
            projection = QKProjection.gqa(
                q=query, k=key, num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads, layer_axis=axis
            )
            return replace(projection, reason="QK-norm") if attention.normalized else projection
    raise ValueError(
        f"{name or 'the model'!r} ({module.kind}) has arrays of other shapes than its type makes, or none that is "
        f"trained: {[shape for shape, _, _ in own]}. Declare it: declare={{{name!r}: QKProjection.mha(…)}}."
    )


def _unknown(modules: Mapping[str, _Module], shapes: Mapping[str, tuple[int, ...]], known: list[str]) -> dict[str, str]:
    """Return what seems to be an attention, by its class or the names of its arrays, and how to declare it."""
    children: dict[str, set[str]] = {}
    for array in shapes:
        parts = array.split("/")
        for depth in range(len(parts)):
            children.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    seeming: dict[str, str] = {}
    for name, own in children.items():
        fused, latent = sorted(own & FUSED_QKV_NAMES), sorted(own & _LATENT_NAMES)
        pair = next((pair for pair in _PAIRS if own.issuperset(pair)), None)
        if pair:
            seeming[name] = _pair_to_declare(_join(name, pair[0]), _join(name, pair[1]), shapes)
        elif fused:
            heads = "num_heads=…, num_kv_heads=…, head_dim=…"
            seeming[name] = f"QKProjection.fused({_join(name, fused[0])!r}, {heads})"
        elif latent:
            widths = "qk_nope_head_dim=…, qk_rope_head_dim=…, v_head_dim=…"
            seeming[name] = f"QKProjection.mla(q='…', kv={_join(name, latent[0])!r}, num_heads=…, {widths})"
    for name in sorted(modules, key=len, reverse=True):
        around = any(below(name, other) for other in (*known, *seeming))
        if _ATTENTION.search(modules[name].kind) and name in children and not around:
            seeming[name] = "QKProjection.gqa(q='…', k='…', num_heads=…, num_kv_heads=…)"
    return {name: how for name, how in seeming.items() if not any(below(other, name) for other in known)}


def _pair_to_declare(query: str, key: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Write the declaration of two projections: of as many heads each, where their arrays are of one shape."""
    one, other = (sorted(shape for name, shape in shapes.items() if below(path, name)) for path in (query, key))
    if one == other:
        return f"QKProjection.mha(q={query!r}, k={key!r}, num_heads=…)"
    return f"QKProjection.gqa(q={query!r}, k={key!r}, num_heads=…, num_kv_heads=…)"


def _read(model: Any, inputs: tuple[Any, ...], named_inputs: Mapping[str, Any]) -> tuple[dict[str, _Module], Any]:
    """Return the modules of a model by name, and its arrays as they are trained."""
    nnx, linen, equinox = (sys.modules.get(name) for name in ("flax.nnx", "flax.linen", "equinox"))
    if linen is not None and isinstance(model, linen.Module):
        return _read_linen(linen, model, inputs, named_inputs)
    if inputs or named_inputs:
        raise TypeError(f"inputs are for Flax linen; of {kind(model)} the attentions are seen without.")
    if nnx is not None and isinstance(model, nnx.Module):
        named = (("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model))
        return {name: _of_nnx(nnx, module) for name, module in named}, nnx.state(model, nnx.Param)
    if equinox is not None and isinstance(model, equinox.Module):
        modules = {name: _of_equinox(equinox, module) for name, module in _equinox_modules(equinox, model, "")}
        return modules, model
    raise TypeError(
        f"model is a {kind(model)}; give a module of Flax (nnx or linen) or Equinox. For trees of arrays declare the "
        "attentions: {name: QKProjection.mha(q=…, k=…, num_heads=…)}."
    )


def _read_linen(
    linen: Any, model: Any, inputs: tuple[Any, ...], named_inputs: Mapping[str, Any]
) -> tuple[dict[str, _Module], Any]:
    modules: dict[str, _Module] = {}

    def see(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        modules.setdefault("/".join(context.module.path), _of_linen(linen, context.module))
        return method(*args, **kwargs)

    if model.scope is not None:
        model, _ = model.unbind()
    leaves, treedef = jax.tree.flatten((inputs, named_inputs))
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]

    def init(arrays: Any) -> Any:
        given = [leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)]
        inputs, named_inputs = treedef.unflatten(given)
        return model.init(jax.random.key(0), *inputs, **named_inputs)

    try:
        with linen.intercept_methods(see):
            variables = jax.eval_shape(init, arrays)
    except Exception as error:
        raise ValueError(
            f"{kind(model)} could not be called: {kind(error)}: {error}\nThe attentions of a linen module appear when "
            "it is called. Give what model.init takes after the key: qk_projections_of(model, x)."
        ) from error
    return modules, variables.get("params", {})


def _of_nnx(nnx: Any, module: Any) -> _Module:
    attention = None
    if _is_plain(module, nnx.MultiHeadAttention):
        normalized = module.query_ln is not None
        attention = _Attention("query", "key", module.num_heads, module.num_kv_heads, normalized=normalized)
    return _Module(kind(module), attention)


def _of_linen(linen: Any, module: Any) -> _Module:
    attention = None
    if _is_plain(module, linen.MultiHeadDotProductAttention):
        heads = module.num_heads
        attention = _Attention("query", "key", heads, heads, normalized=module.normalize_qk)
    return _Module(kind(module), attention)


def _of_equinox(equinox: Any, module: Any) -> _Module:
    attention = None
    if _is_plain(module, equinox.nn.MultiheadAttention):
        heads = module.num_heads
        attention = _Attention("query_proj", "key_proj", heads, heads, module.qk_size)
    return _Module(kind(module), attention)


def _equinox_modules(equinox: Any, module: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Walk the modules in a tree; of one that is there twice each place has arrays of its own."""
    yield name, module

    def is_module(node: Any) -> bool:
        return node is not module and isinstance(node, equinox.Module)

    for path, child in jax.tree_util.tree_flatten_with_path(module, is_leaf=is_module)[0]:
        if is_module(child):
            yield from _equinox_modules(equinox, child, _join(name, name_of(path)))


def _is_plain(module: Any, known: type) -> bool:
    """Tell whether a module is of a known type, and its computation that of the framework and not of a user."""
    if not isinstance(module, known):
        return False
    calls = next(cls for cls in type(module).__mro__ if "__call__" in vars(cls))
    return calls.__module__.partition(".")[0] == known.__module__.partition(".")[0]


def _join(name: str, child: str) -> str:
    return f"{name}/{child}" if name else child
