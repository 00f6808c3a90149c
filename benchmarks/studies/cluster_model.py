"""The weights, operations and activations of each unit of a model, from its configuration.

A unit is what a pipeline stage holds whole: the embedding, a layer, the head with the norm before it. Names and shapes
of weights are the reference model's own, made on the meta device; who updates them, and as which matrices, is what
`MuonClip` decides. The arithmetic on them is `MoEConfig`'s sizes alone.

    operations of a token    2 for each weight that it meets, and 2 · T · heads · (query + value width) / 2 for causal
                             attention over T positions; the backward pass twice that
    experts                  a token meets `num_experts_per_tok` of them, and all tokens are spread evenly over them
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from muonclip.core import MatrixLayout
from muonclip.core.cost_model import Form, flops
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

UnitKind = Literal["embedding", "dense", "mixture", "head"]
Stored = Literal[
    "residual",
    "norm",
    "up-projection",
    "attention",
    "expert input",
    "SwiGLU input",
    "SwiGLU output",
    "down-projection",
    "logits",
]
SELECTIVE = frozenset[Stored](("norm", "up-projection", "SwiGLU output", "down-projection"))
"""What Kimi K2 computes again: norms, SwiGLU, MLA's up-projections, the experts' down-projections (section 2.4.3)."""
IN_FP8 = frozenset[Stored](("expert input", "SwiGLU input"))
"""What Kimi K2 stores in FP8-E4M3: inputs of the experts' up-projections and of SwiGLU."""
FP8_BYTES = 1 + 4 / 128
"""Bytes of an element in tiles of 1 × 128 with a scale in fp32."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of a unit; `layout` is None where AdamW updates it."""

    name: str
    shape: tuple[int, ...]
    layout: MatrixLayout | None
    is_expert: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def matrices(self) -> list[tuple[int, int, int]]:
        """List (count, m, n) of the matrices that Muon iterates, m ≤ n."""
        shapes = () if self.layout is None else self.layout.matrix_shapes(self.shape)
        return [(count, min(rows, columns), max(rows, columns)) for count, rows, columns in shapes]


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a model, in the order of the forward pass."""

    kind: UnitKind
    weights: tuple[Weight, ...]

    def numel(self, *, experts: bool) -> int:
        """Count the parameters of its routed experts, or all others."""
        return sum(each.numel for each in self.weights if each.is_expert is experts)


@cache
def units(config: MoEConfig) -> tuple[Unit, ...]:
    """Return the units of a model, from its embedding to its head."""
    with torch.device("meta"):
        model = MoE(config)
    optimizer = MuonClip(model, qk_clip=None)
    assert optimizer.plan.update_plan is not None
    layouts = {each.name: each.layout for each in optimizer.plan.update_plan.parameters}
    found: dict[str, list[Weight]] = {}
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        unit = f"layers.{rest[0]}" if first == "layers" else "embedding" if first == "embed_tokens" else "head"
        weight = Weight(name, tuple(parameter.shape), layouts.get(name), ".experts." in name)
        found.setdefault(unit, []).append(weight)
    layers = [Unit(_kind(config, at), tuple(found[f"layers.{at}"])) for at in range(config.num_layers)]
    return Unit("embedding", tuple(found["embedding"])), *layers, Unit("head", tuple(found["head"]))


def _kind(config: MoEConfig, layer: int) -> UnitKind:
    return "dense" if layer < config.num_dense_layers else "mixture"


def forward_flops(config: MoEConfig, unit: Unit, length: int | None = None) -> float:
    """Count the operations of one token's forward pass in a unit; `length`: of the sequence, by default the longest."""
    if unit.kind == "embedding":
        return 0.0
    active = config.num_experts_per_tok / config.num_experts
    products = sum(2 * w.numel * (active if w.is_expert else 1) for w in unit.weights if len(w.shape) > 1)
    if unit.kind == "head":
        return products
    value = config.v_head_dim if config.attention == "mla" else config.head_dim
    return products + (length or config.max_seq_len) * config.num_heads * (config.qk_head_dim + value)


def recomputed_flops(config: MoEConfig, unit: Unit, recompute: Collection[Stored]) -> float:
    """Count the operations of one token's products that are computed again in the backward pass."""
    if unit.kind not in ("dense", "mixture"):
        return 0.0
    again = 0.0
    for weight in unit.weights:
        if "up-projection" in recompute and config.attention == "mla" and weight.name.split(".")[-2] in _UP_PROJECTIONS:
            again += 2 * weight.numel
        if "down-projection" in recompute and weight.name.endswith("experts.down_proj"):
            again += 2 * weight.numel * config.num_experts_per_tok / config.num_experts
    return again


_UP_PROJECTIONS = ("q_b_proj", "kv_b_proj")


def activations(config: MoEConfig, unit: Unit) -> list[tuple[Stored, float]]:
    """List the elements that the backward pass needs of one token, by what they are."""
    c, d = config, config.hidden_size
    kept: list[tuple[Stored, float]] = []
    if unit.kind == "embedding":
        return kept
    if unit.kind == "head":
        return [("residual", d), ("norm", d), ("logits", c.vocab_size)]
    heads, width = c.num_heads, c.qk_head_dim
    kept.extend([("residual", d), ("norm", d)])  # into the norm, and out of it
    if c.attention == "mla":
        latents = c.kv_lora_rank + (c.q_lora_rank or 0)
        kept.extend([("residual", latents), ("norm", latents), ("up-projection", heads * (2 * width + c.v_head_dim))])
        kept.extend([("attention", heads * c.v_head_dim)])
    else:
        groups = heads if c.attention == "mha" else c.num_kv_heads
        kept.extend([("attention", c.head_dim * (2 * heads + 2 * groups))])
    kept.extend([("residual", d), ("norm", d)])
    if unit.kind == "dense":
        kept.extend([("SwiGLU input", 2 * c.intermediate_size), ("SwiGLU output", c.intermediate_size)])
        return kept
    chosen, inner = c.num_experts_per_tok, c.moe_intermediate_size
    widths = (chosen + c.num_shared_experts) * inner
    kept.extend([("expert input", chosen * d), ("SwiGLU input", 2 * widths), ("SwiGLU output", widths)])
    kept.extend([("down-projection", chosen * d)])
    return kept


def activation_bytes(
    config: MoEConfig,
    unit: Unit,
    *,
    width: int = 2,
    recompute: Collection[Stored] = (),
    fp8: Collection[Stored] = (),
) -> float:
    """Count the bytes of one token that wait in a unit for the backward pass, at `width` bytes for an element.

    Logits are in fp32.
    """
    of = dict[Stored, float].fromkeys(fp8, FP8_BYTES) | {"logits": 4.0}
    return sum(size * of.get(kind, width) for kind, size in activations(config, unit) if kind not in recompute)


def iteration_flops(weights: Collection[Weight], form: Form | Literal["symmetric"]) -> int:
    """Count the operations of five steps of Newton–Schulz on all matrices of these weights.

    "symmetric": the standard form whose products XXᵀ and AAᵀ are computed in one half, and mirrored.
    """
    total = 0
    for count, m, n in (matrix for weight in weights for matrix in weight.matrices()):
        if form == "symmetric":
            total += count * 5 * (3 * m * m * n + m**3)
        else:
            total += count * flops(m, n, form, "jordan", None, wide=False)
    return total
