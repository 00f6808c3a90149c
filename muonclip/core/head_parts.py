"""The parts of an attention's heads, and which of QK-Clip's factors each part takes.

    logit of head h = scale · Σ over terms of (query part · key part)        every term must shrink by γ_h

A term whose two parts are private to the head shares γ between them: γ^α and γ^(1−α). In a term whose key serves
several heads the query takes all of γ, so that no other head's logits move. A shared key and the values are not scaled
(Kimi K2, arXiv 2507.20534, §2.1). MHA has one private term, GQA and MQA one shared; MLA has one of each, the latter
rotary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from muonclip.core.arguments import check_choice, check_whole

PerHead: TypeAlias = bool | int | Literal["pairs"]
"""How many heads of q, k and v make one matrix: all of them (False), one (True), two ("pairs"), or this many."""

Part: TypeAlias = Literal["query", "key", "query_facing_shared", "shared_key", "value"]

Factor: TypeAlias = Literal["query", "key", "gamma"]
"""A field of `ClipFactors`."""

FACTOR_OF: dict[Part, Factor] = {
    "query": "query",
    "key": "key",
    "query_facing_shared": "gamma",
}
"""The field of `ClipFactors` that a part is scaled by; other parts are not scaled."""

SIDE_OF: dict[Part, Literal["query", "key", "value"]] = {
    "query": "query",
    "query_facing_shared": "query",
    "key": "key",
    "shared_key": "key",
    "value": "value",
}
"""The side of the attention that a part is on."""


@dataclass(frozen=True, slots=True)
class HeadPart:
    """The rows of one projection that play a part: of every head's `stride` rows those from `start` on, `size` of them;
    size and stride None: all rows, divided by `num_heads`."""

    part: Part
    projection: Literal["q", "k", "v", "kv"]
    num_heads: int
    size: int | None = None
    start: int = 0
    stride: int | None = None


def grouped_parts(num_heads: int, num_kv_heads: int) -> tuple[str, tuple[HeadPart, ...]]:
    """Return the kind and the parts of attention with projections q, k and v: "mha", "gqa" or "mqa" by the number of
    key heads. Raises ValueError where these do not divide the query heads."""
    check_whole("num_heads", num_heads)
    check_whole("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}.")
    value = HeadPart("value", "v", num_kv_heads)
    if num_kv_heads == num_heads:
        return "mha", (HeadPart("query", "q", num_heads), HeadPart("key", "k", num_heads), value)
    query, key = HeadPart("query_facing_shared", "q", num_heads), HeadPart("shared_key", "k", num_kv_heads)
    return "mqa" if num_kv_heads == 1 else "gqa", (query, key, value)


def latent_parts(
    num_heads: int, qk_nope_head_dim: int, qk_rope_head_dim: int, v_head_dim: int
) -> tuple[str, tuple[HeadPart, ...]]:
    """Return the kind and the parts of multi-head latent attention (DeepSeek-V2, V3; K2): `q` holds [nope | rope] rows
    of each head, `kv` holds [k_nope | v]. The rotary key is shared by the heads."""
    check_whole("num_heads", num_heads)
    sizes = {"qk_nope_head_dim": qk_nope_head_dim, "qk_rope_head_dim": qk_rope_head_dim, "v_head_dim": v_head_dim}
    for name, size in sizes.items():
        check_whole(name, size)
    q, kv = qk_nope_head_dim + qk_rope_head_dim, qk_nope_head_dim + v_head_dim
    return "mla", (
        HeadPart("query", "q", num_heads, qk_nope_head_dim, 0, q),
        HeadPart("key", "kv", num_heads, qk_nope_head_dim, 0, kv),
        HeadPart("query_facing_shared", "q", num_heads, qk_rope_head_dim, qk_nope_head_dim, q),
        HeadPart("value", "kv", num_heads, v_head_dim, qk_nope_head_dim, kv),
    )


def factors_of(parts: Collection[Part], fixed: Collection[Part] = ()) -> dict[Part, Factor]:
    """Return the factor of each part that is scaled, where the weights of the parts `fixed` must not change.

    A logit is linear in either side of a term, so the other side takes all of γ then. Empty where no side of a term can
    be scaled: what is left would not shrink the logit by γ.
    """
    factors: dict[Part, Factor] = {
        part: factor for part, factor in FACTOR_OF.items() if part in parts and part not in fixed
    }
    if "query_facing_shared" in fixed or {"query", "key"} <= {*fixed}:
        return {}
    for part, other in (("query", "key"), ("key", "query")):
        if part in fixed and other in factors:
            factors[other] = "gamma"
    return factors


def check_parts(parts: Collection[Part], reason: str) -> None:
    """Raises ValueError unless the parts that are there reach every logit, or a `reason` says why nothing is scaled."""
    if not reason and "query_facing_shared" not in parts and not {"query", "key"} <= {*parts}:
        raise ValueError("a QKProjection needs `query` and `key`, or `query_facing_shared`, or a `reason` for neither.")


def heads_per_matrix(per_head: Any) -> int:
    """Return how many heads make one matrix, 0 for all of a projection. Raises TypeError and ValueError for no number.

    `per_head`: see `PerHead`.
    """
    if isinstance(per_head, str):
        check_choice("per_head", per_head, False, True, "pairs", hint="or a number of heads for each matrix.")
        return 2
    is_flag = type(per_head).__name__ in ("bool", "bool_")  # NumPy's, too
    return check_whole("per_head", int(per_head) if is_flag else per_head, 0, hint="True, False, or 'pairs'.")
