"""The rows of weights behind the queries and keys of one attention, and how modules declare them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from muonclip.core.arguments import check_choice, check_flag, check_kind, check_whole
from muonclip.core.head_parts import FACTOR_OF, SIDE_OF, HeadPart, Part, check_parts, grouped_parts, latent_parts
from muonclip.torch.heads.head_rows import HeadRows
from muonclip.torch.heads.query_heads import QueryHeads
from muonclip.torch.logits import MaxLogits


@dataclass(frozen=True, slots=True, eq=False)
class QKProjection:
    """One attention: the rows behind its heads by the part they play, and the statistic that its forward fills.

    Only three parts are ever scaled (Kimi K2, arXiv 2507.20534, §2.1): `query`, `key` and `query_facing_shared`. `mha`,
    `gqa` and `mla` build the usual ones from modules with a `weight` and perhaps a `bias`.

    Args:
        kind: A word for the plan.
        num_heads: Number of query heads.
        max_logits: The statistic that the forward fills.
        query: Rows private to their heads, whose keys are, too.
        key: Rows private to their heads.
        query_facing_shared: Rows whose key serves several heads; they take all of γ.
        shared_key: The keys that serve several heads; declared so that a fused weight can be split into its matrices,
            never scaled.
        value: The rows of the values; declared for the same reason, never scaled.
        reason: Why no part is scaled, for the plan: the attention is observed and reported only (QK-norm: scaling W
            changes nothing).
        fixed: Parts that are not scaled either, because they feed something else, too: the other side takes all of γ.
        counts_added: S includes what is added to the products, because it is linear in the queries, as relative
            positions are.

    Raises:
        ValueError: For rows that the weights do not have, and for parts that do not fit together.
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
    fixed: tuple[Part, ...] = field(default=(), kw_only=True)
    counts_added: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_whole("num_heads", self.num_heads)
        check_kind("max_logits", self.max_logits, MaxLogits, "a MaxLogits")
        check_kind("kind", self.kind, str, "a word for the plan")
        check_kind("reason", self.reason, str, 'why nothing is scaled, in words, or ""')
        check_flag("counts_added", self.counts_added)
        check_kind("fixed", self.fixed, (tuple, list), f"a tuple of parts: {', '.join(SIDE_OF)}")
        for part in self.fixed:
            check_choice("fixed", part, *SIDE_OF)
        if self.max_logits.num_heads != self.num_heads:
            raise ValueError(f"max_logits counts {self.max_logits.num_heads} heads, the projection {self.num_heads}.")
        for part in SIDE_OF:
            given = getattr(self, part)
            check_kind(part, given, (tuple, list), "a tuple of HeadRows")
            object.__setattr__(self, part, tuple(given))
            for rows in given:
                check_kind(part, rows, HeadRows, "HeadRows in its tuple")
                rows.check(part)
                if part in FACTOR_OF and rows.num_heads != self.num_heads:
                    raise ValueError(
                        f"{part} has rows for {rows.num_heads} heads, the attention has {self.num_heads}: a part is "
                        f"either each head's own or, for a key that heads share, `shared_key`."
                    )
        check_parts([part for part in SIDE_OF if getattr(self, part)], self.reason)
        self._tell_the_statistic()

    def _tell_the_statistic(self) -> None:
        """Give the statistic the rows of the queries: under tensor parallelism a forward has some of the heads only."""
        for rows in (*self.query, *self.query_facing_shared):
            self.max_logits.query_heads = QueryHeads.from_rows(rows)
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
        """Declare multi-head attention: every head has its own query and key.

        Args:
            q: The module of the queries, with a `weight`.
            k: That of the keys.
            num_heads: Number of heads.
            max_logits: The statistic that the forward fills.
            v: That of the values, where its heads are to be matrices of their own.
        """
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
        same key keep their weights.

        Args:
            q: The module of the queries, with a `weight`.
            k: That of the keys.
            num_heads: Number of query heads.
            num_kv_heads: Number of key heads, a divisor of `num_heads`.
            max_logits: The statistic that the forward fills.
            v: That of the values, where its heads are to be matrices of their own.

        Raises:
            ValueError: For numbers of heads that do not divide.
        """
        kind, parts = grouped_parts(num_heads, num_kv_heads)
        return cls._from_parts(kind, num_heads, max_logits, parts, q=q, k=k, v=v)

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
        """Declare multi-head latent attention (DeepSeek-V2, V3; K2). The rotary key is shared and never scaled.

        Args:
            q: The module with [nope | rope] rows per head (the up-projection, or the only one).
            kv: That with [k_nope | v] rows per head.
            num_heads: Number of heads.
            qk_nope_head_dim: Rows of a head's query and key without position.
            qk_rope_head_dim: Rows of a head's rotated query.
            v_head_dim: Rows of a head's value.
            max_logits: The statistic that the forward fills.

        Raises:
            ValueError: For weights of another number of rows.
        """
        kind, parts = latent_parts(num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        q_stride, kv_stride = qk_nope_head_dim + qk_rope_head_dim, qk_nope_head_dim + v_head_dim
        for name, module, stride in (("q", q, q_stride), ("kv", kv, kv_stride)):
            rows, wanted = _rows(name, module), num_heads * stride
            if rows != wanted:
                raise ValueError(f"{name} has {rows} rows; {num_heads} heads of {stride} would have {wanted}.")
        return cls._from_parts(kind, num_heads, max_logits, parts, q=q, kv=kv)

    @classmethod
    def _from_parts(
        cls,
        kind: str,
        num_heads: int,
        max_logits: MaxLogits,
        parts: Iterable[HeadPart],
        **projections: nn.Module | None,
    ) -> QKProjection:
        rows: dict[str, Any] = {}
        for part in parts:
            module = projections[part.projection]
            if module is not None or part.projection != "v":  # which alone may be left out
                rows[part.part] = (*rows.get(part.part, ()), _rows_of(part, module))
        return cls(kind, num_heads, max_logits, **rows)

    def parts(self) -> Iterator[tuple[str, HeadRows]]:
        """Yield every declared part with the side it is on: "query", "key" or "value"."""
        for part, side in SIDE_OF.items():
            for rows in getattr(self, part):
                yield side, rows

    def scaled_parts(self) -> tuple[HeadRows, ...]:
        """Return the parts that the clip may scale."""
        if self.reason:
            return ()
        return tuple(rows for part in FACTOR_OF if part not in self.fixed for rows in getattr(self, part))

    def qk_parameters(self) -> list[Tensor]:
        """Return the weights and biases behind queries and keys."""
        return [p for side, rows in self.parts() if side != "value" for p, _ in rows.parameters()]

    def qk_modules(self) -> list[nn.Module]:
        """Return the modules that hold the weights behind queries and keys."""
        return list({rows.module: None for side, rows in self.parts() if side != "value"})

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
        elif _declared_rows(found[first]) != _declared_rows(projection):
            called = first or "the model"
            raise ValueError(f"{called} and {name} share one MaxLogits; give each attention its own.")
    return found


def _declared_rows(projection: QKProjection) -> list[tuple[int, str, int]]:
    return [(id(rows.module), rows.weight, rows.start) for _, rows in projection.parts()]


def out_axis(module: nn.Module | None) -> int:
    """Return the axis of the rows: 1 for GPT-2's `Conv1D`, whose weight is [in, out]; else 0."""
    return int(type(module).__name__ == "Conv1D")


def _rows(name: str, module: nn.Module | None) -> int:
    check_kind(name, module, nn.Module, "a module with a `weight`")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"{name}={type(module).__name__} has no matrix `weight`; give the module of the projection.")
    return weight.shape[out_axis(module)]


def _rows_of(part: HeadPart, module: nn.Module | None) -> HeadRows:
    rows, axis = _rows(part.projection, module), out_axis(module)
    assert module is not None
    if part.size is not None:
        return HeadRows(module, part.num_heads, part.size, part.start, part.stride, axis=axis)
    if rows % part.num_heads:
        raise ValueError(f"{part.projection}: {part.num_heads} heads do not divide the {rows} rows of its weight.")
    return HeadRows(module, part.num_heads, rows // part.num_heads, axis=axis)
