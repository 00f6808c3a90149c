"""The rule of who updates a parameter, Muon or AdamW: by its name, its shape and the kind of module that owns it.

Muon is for hidden matrices; AdamW takes embeddings, the output head, norms, biases and what is not a linear map (K.
Jordan 2024; Moonlight, arXiv 2502.16982, §2.2). Both adapters ask here. PyTorch knows modules; JAX's trees and named
parameters alone know names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["embedding", "norm", "linear", "convolution"]
"""What is known of the module that owns a parameter; of "linear" the weight is [out, in]."""

Use: TypeAlias = Literal["looked up", "returned", "inner"]
"""What a forward has shown of a parameter: its rows are looked up, or its product is what the model returns, or is not,
while that of another parameter is."""

GATE_UP_NAMES = frozenset({"gate_up_proj", "gate_up", "w13"})
"""Modules whose weight holds two matrices, gate and up, one after the other."""

FUSED_QKV_NAMES = frozenset({
    "qkv", "qkv_proj", "to_qkv", "query_key_value", "c_attn", "Wqkv", "in_proj_weight",
})  # fmt: skip
"""Modules whose weight holds the queries, keys and values of an attention."""

ARRAY_NAMES = frozenset({"kernel", "weight", "w"})
"""What modules call their matrix: such a last part of a name belongs to the array, not to the module."""

_HEADS_ANYWHERE = {"lm_head", "embed_out", "unembed", "logits", "logits_dense"}
_HEADS_OUTSIDE_OF_LAYERS = {"head", "output", "output_layer", "score", "classifier", "proj_out"} | {
    "text_projection",
    "visual_projection",
}
_PROJECTIONS = {"proj", "projection", "linear", "dense", "mlp", "fc"}
_EMBEDDING = re.compile(r"\w*embed\w*|embs?|w[tp]e")
_TOKENS = re.compile(r"(tok|token|word)s?_emb\w*|wte")
_INPUT_PROJECTION = re.compile(r"(x|context|t|time|timestep|guidance|text|caption|cap)_embedder")
_NORM = re.compile(r"\w*norm(s|alization|\dd)?|ln")
_SCALE = re.compile(r"(scale|gamma|beta|gain)s?")
_BIAS = re.compile(r"(\w*)bias|b")
_TABLE = re.compile(
    r"(\w+_)?(a_log|table|latents|tokens?|pos(ition|itional)?_enc\w*)|\w*rel_pos\w*|\w*relative_\w*bias\w*"
)
_NUMBERED = re.compile(r"(^|_)\d+$")
_LAYERS = re.compile(r"(^|_)\d+$|layers|blocks")
_POSITIONS = re.compile(r"pos|wpe")


@dataclass(frozen=True, slots=True)
class Role:
    """The optimizer that updates a parameter, why, and whether weight decay applies."""

    use: Literal["muon", "adamw"]
    reason: str
    decays: bool = True


def role_of(
    name: str,
    shape: Sequence[int],
    kind: Kind | None = None,
    embeddings: Mapping[tuple[int, ...], str] | None = None,
    shown: Use | None = None,
) -> Role:
    """Decide who updates a parameter.

    `name`: a path with dots or slashes; a number in it, or `layers` or `blocks`, says that what follows is in a layer,
    where `score`, `output` or `proj_out` is a hidden matrix; outside it is the head that gives the model's answer.
    `kind`: of the module that owns the parameter, None where only names are known; a linear module is an embedding if
    its name says that it takes tokens. `shown`: what a forward has shown, None where none has. `embeddings`: the
    model's tables by shape, see `embedding_shapes`; a matrix of such a shape outside of the layers maps to the same
    vocabulary. A matrix of Muon's may still turn out to be one row, once its layout is known: see `is_one_row`.
    """
    parts = _parts(name)
    modules = parts[:-1] if parts[-1] in ARRAY_NAMES and len(parts) > 1 else parts
    nearest = _behind_the_last_number(modules)[-2:]
    if len(shape) < 2:
        return Role("adamw", "vector", decays=False)
    if kind == "embedding":
        return Role("adamw", "embedding")
    if _BIAS.fullmatch(parts[-1]):
        return Role("adamw", "biases", decays=False)
    if kind == "norm" or (kind is None and _is_norm(parts)):
        return Role("adamw", "norm", decays=False)
    if _is_head(modules, is_inner=shown == "inner"):
        return Role("adamw", "output head, by its name")
    if shown == "returned" and (_is_of_a_head(modules) or not _in_a_layer(modules)):
        return Role("adamw", "output head: the model returns its product")
    if shown == "looked up" and len(shape) == 2:
        return Role("adamw", "embedding: its rows are looked up")
    if _TOKENS.fullmatch(modules[-1]) if kind == "linear" else any(map(_is_embedding, nearest)):
        return Role("adamw", "embedding")
    if _is_table((parts if kind in ("linear", "convolution") else modules)[-1]):
        return Role("adamw", "not a linear map, by its name")
    like = _same_vocabulary(tuple(shape), kind, embeddings or {})
    if like and shown != "inner" and not _in_a_layer(modules):
        return Role("adamw", f"output head: the shape of {like}")
    if 0 in shape:
        return Role("adamw", "empty")
    if len(shape) == 2 and 1 in shape:
        return ONE_ROW
    return Role("muon", "hidden matrix")


ONE_ROW = Role("adamw", "one row or column")


def is_one_row(matrices: Iterable[tuple[int, int, int]]) -> bool:
    """Tell whether a matrix of (count, fan_out, fan_in) is a single row or column, whose orthogonalised update is only
    its direction."""
    return any(min(fan_out, fan_in) == 1 for _, fan_out, fan_in in matrices)


def embedding_shapes(
    parameters: Iterable[tuple[str, Sequence[int], Kind | None]],
) -> dict[tuple[int, ...], str]:
    """Map the shapes of a model's embeddings to their names; tables of positions are left out, for they say nothing of
    the vocabulary."""
    return {
        tuple(shape): name
        for name, shape, kind in parameters
        if not _POSITIONS.search(name) and role_of(name, shape, kind).reason == "embedding"
    }


def module_of(name: str) -> str:
    """Return the last part of a name that is not the array's own: `layers.0.q_proj.weight` → `q_proj`."""
    parts = _parts(name)
    return parts[-2] if parts[-1] in ARRAY_NAMES and len(parts) > 1 else parts[-1]


def names_a_norm(name: str) -> bool:
    """Tell whether a module's or class's name says that it normalises: `RMSNorm`, `ln_1`, `attn_gated_norm`."""
    return _has_word(name, _NORM)


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


def _words(part: str) -> list[str]:
    """Split `tok_emb`, `LayerNorm_0` into words, without numbers."""
    words = re.split(r"_|(?<=[a-z])(?=[A-Z])", part)
    return [word for word in (each.lower().rstrip("0123456789") for each in words) if word]


def _has_word(part: str, pattern: re.Pattern[str]) -> bool:
    """Tell whether one of the words fits and the last does not say that it is a projection, as in `time_emb_proj`."""
    words = _words(part)
    return bool(words) and words[-1] not in _PROJECTIONS and any(map(pattern.fullmatch, words))


def _is_embedding(part: str) -> bool:
    return _has_word(part, _EMBEDDING) and not _INPUT_PROJECTION.fullmatch(part)


def _is_table(part: str) -> bool:
    return bool(_TABLE.fullmatch(part.lower())) and _words(part)[-1] not in _PROJECTIONS


def _is_norm(parts: Sequence[str]) -> bool:
    return any(map(names_a_norm, parts[-2:])) or bool(_SCALE.fullmatch(parts[-1]))


def _is_head(modules: Sequence[str], *, is_inner: bool) -> bool:
    """Tell whether names say that it is the output head. `is_inner`: a forward has shown another one."""
    if modules[-1] in _HEADS_ANYWHERE or is_inner:
        return not is_inner or modules[-1] in _HEADS_ANYWHERE
    if modules[-1] == "fc":  # of a ResNet, a ConvNeXt
        return len(modules) == 1 or modules[-2] == "head"
    return modules[-1] in _HEADS_OUTSIDE_OF_LAYERS and len(modules) <= 2 and not _in_a_layer(modules)


def _is_of_a_head(modules: Sequence[str]) -> bool:
    """Tell whether what a module is in, outside of the layers, is called a head: `head.layers.2`."""
    outside = itertools.takewhile(lambda part: not _LAYERS.search(part), modules[:-1])
    return any(part in _HEADS_ANYWHERE or part in _HEADS_OUTSIDE_OF_LAYERS for part in outside)


def _in_a_layer(modules: Sequence[str]) -> bool:
    return any(map(_LAYERS.search, modules[:-1]))


def _behind_the_last_number(modules: Sequence[str]) -> Sequence[str]:
    """Return the last numbered part and what follows: a model called `embedder` is not all embedding."""
    numbered = max((index for index, part in enumerate(modules) if _NUMBERED.search(part)), default=0)
    return modules[numbered:]


def _same_vocabulary(
    shape: tuple[int, ...], kind: Kind | None, embeddings: Mapping[tuple[int, ...], str]
) -> str | None:
    """Find the embedding [vocabulary, width] of this shape, in either order of axes where that is not known."""
    if len(set(shape)) < 2:
        return None
    return embeddings.get(shape) or (embeddings.get(shape[::-1]) if kind is None else None)
