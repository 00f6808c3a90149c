"""The rows of weights behind the queries and keys of one attention, and how modules declare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from muonclip.torch.heads.head_rows import HeadRows
from muonclip.torch.heads.query_heads import QueryHeads
from muonclip.torch.logits.max_logits import MaxLogits


@dataclass(frozen=True, slots=True, eq=False)
class QKProjection:
    """One attention: the rows behind its heads by the part they play, and the statistic that its forward fills.

    Only three parts are ever scaled (Kimi K2, arXiv 2507.20534, §2.1): `query` and `key`, private to a head on both
    sides, and `query_facing_shared`, whose key serves several heads. `shared_key` and `value` are declared so that a
    fused weight can be split into its matrices; they are never scaled. With a `reason` none is scaled, and the plan
    gives the reason: the attention is observed and reported only (QK-norm: scaling W changes nothing). `kind` is a word
    for the plan.

    `mha`, `gqa` and `mla` build the usual ones from modules with a `weight` and perhaps a `bias`. Raises ValueError for
    rows that the weights do not have, and for parts that do not fit together.
    """

    kind: str
    num_heads: int
    max_logits: MaxLogits
    query: tuple[HeadRows, ...] = ()
    key: tuple[HeadRows, ...] = ()
    query_facing_shared: tuple[HeadRows, ...] = ()
    shared_key: tuple[HeadRows, ...] = ()
    value: tuple[HeadRows, ...] = ()
    reason: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if self.max_logits.num_heads != self.num_heads:
            raise ValueError(f"max_logits counts {self.max_logits.num_heads} heads, the projection {self.num_heads}.")
        for part in ("query", "key", "query_facing_shared", "shared_key", "value"):
            for rows in getattr(self, part):
                rows.check(part)
                if part in ("query", "key", "query_facing_shared") and rows.num_heads != self.num_heads:
                    raise ValueError(
                        f"{part} has rows for {rows.num_heads} heads, the attention has {self.num_heads}: a part is "
                        f"either each head's own or, for a key that heads share, `shared_key`."
                    )
        if not self.reason and not self.query_facing_shared and not (self.query and self.key):
            raise ValueError(
                "a QKProjection needs `query` and `key`, or `query_facing_shared`, or a `reason` for none."
            )
        self._tell_the_statistic()

    def _tell_the_statistic(self) -> None:
        """Give the statistic the rows of the queries: under tensor parallelism a forward has some of the heads only."""
        for rows in (*self.query, *self.query_facing_shared):
            self.max_logits.query_heads = QueryHeads.of(rows)
            return

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self._tell_the_statistic()

    @classmethod
    def mha(
        cls, *, q: nn.Module, k: nn.Module, num_heads: int, max_logits: MaxLogits, v: nn.Module | None = None
    ) -> QKProjection:
        """Declare multi-head attention: every head has its own query and key."""
        return cls.gqa(q=q, k=k, num_heads=num_heads, num_kv_heads=num_heads, max_logits=max_logits, v=v)

    @classmethod
    def gqa(
        cls,
        *,
        q: nn.Module,
        k: nn.Module,
        num_heads: int,
        num_kv_heads: int,
        max_logits: MaxLogits,
        v: nn.Module | None = None,
    ) -> QKProjection:
        """Declare grouped-query attention (one key head: multi-query).

        Where each key serves several queries, the query of a head above τ takes all of γ, so that the heads with the
        same key keep their weights. Raises ValueError for numbers of heads that do not divide.
        """
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}.")
        query = (_whole("q", q, num_heads),)
        key = (_whole("k", k, num_kv_heads),)
        value = () if v is None else (_whole("v", v, num_kv_heads),)
        if num_kv_heads == num_heads:
            return cls("mha", num_heads, max_logits, query=query, key=key, value=value)
        kind = "mqa" if num_kv_heads == 1 else "gqa"
        return cls(kind, num_heads, max_logits, query_facing_shared=query, shared_key=key, value=value)

    @classmethod
    def mla(
        cls,
        *,
        q: nn.Module,
        kv: nn.Module,
        num_heads: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        max_logits: MaxLogits,
    ) -> QKProjection:
        """Declare multi-head latent attention (DeepSeek-V2, V3; K2).

        `q` holds [nope | rope] rows per head (the up-projection, or the only one), `kv` holds [k_nope | v] rows per
        head. The rotary key is shared and never scaled. Raises ValueError for weights of another number of rows.
        """
        q_stride, kv_stride = qk_nope_head_dim + qk_rope_head_dim, qk_nope_head_dim + v_head_dim
        for name, module, stride in (("q", q, q_stride), ("kv", kv, kv_stride)):
            if _rows(module) != num_heads * stride:
                raise ValueError(
                    f"{name} has {_rows(module)} rows; {num_heads} heads of {stride} would have {num_heads * stride}."
                )
        return cls(
            "mla",
            num_heads,
            max_logits,
            query=(HeadRows(q, num_heads, qk_nope_head_dim, 0, q_stride, axis=out_axis(q)),),
            key=(HeadRows(kv, num_heads, qk_nope_head_dim, 0, kv_stride, axis=out_axis(kv)),),
            query_facing_shared=(
                HeadRows(q, num_heads, qk_rope_head_dim, qk_nope_head_dim, q_stride, axis=out_axis(q)),
            ),
            value=(HeadRows(kv, num_heads, v_head_dim, qk_nope_head_dim, kv_stride, axis=out_axis(kv)),),
        )

    def parts(self) -> Iterator[tuple[str, HeadRows]]:
        """Yield every declared part with the side it is on: "query", "key" or "value"."""
        for rows in (*self.query, *self.query_facing_shared):
            yield "query", rows
        for rows in (*self.key, *self.shared_key):
            yield "key", rows
        for rows in self.value:
            yield "value", rows

    def scaled_parts(self) -> tuple[HeadRows, ...]:
        """Return the parts that the clip may scale."""
        return () if self.reason else self.query + self.key + self.query_facing_shared

    def qk_parameters(self) -> list[Tensor]:
        """Return the weights and biases behind queries and keys."""
        return [p for side, rows in self.parts() if side != "value" for p, _ in rows.parameters()]

    def trains(self) -> bool:
        """Tell whether queries or keys are trained; a frozen attention is neither scaled nor has to be observed."""
        return any(parameter.requires_grad for parameter in self.qk_parameters())


def declared_qk_projections(model: nn.Module) -> dict[str, QKProjection]:
    """Return the declarations found in a model, by module name, each once.

    A wrapper that forwards its module's attributes declares it again. Raises ValueError where two attentions share one
    statistic.
    """
    found: dict[str, QKProjection] = {}
    by_statistic: dict[int, str] = {}
    for name, module in model.named_modules():
        declare = getattr(module, "qk_projection", None)
        if not callable(declare):
            continue
        projection = declare()
        if not isinstance(projection, QKProjection):
            raise ValueError(f"{name or 'the model'}.qk_projection() returned {projection!r}, not a QKProjection.")
        first = by_statistic.setdefault(id(projection.max_logits), name)
        if first == name:
            found[name] = projection
        elif _places(found[first]) != _places(projection):
            raise ValueError(f"{first} and {name} share one MaxLogits; give each attention its own.")
    return found


def _places(projection: QKProjection) -> list[tuple[int, str, int]]:
    return [(id(rows.module), rows.weight, rows.start) for _, rows in projection.parts()]


def out_axis(module: nn.Module | None) -> int:
    """Return the axis of the rows: 1 for GPT-2's `Conv1D`, whose weight is [in, out]; else 0."""
    return int(type(module).__name__ == "Conv1D")


def _rows(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[out_axis(module)]


def _whole(name: str, module: nn.Module, num_heads: int) -> HeadRows:
    if num_heads < 1 or _rows(module) % num_heads:
        raise ValueError(f"{name}: {num_heads} heads do not divide the {_rows(module)} rows of its weight.")
    return HeadRows(module, num_heads, _rows(module) // num_heads, axis=out_axis(module))
