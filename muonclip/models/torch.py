"""The reference model in PyTorch: DeepSeek-V3's architecture as Kimi K2 uses it; `config.py` holds the sizes.

Shapes: B sequences, T positions, N = B·T tokens, D hidden width, V vocabulary, H heads, G key heads, E experts,
K experts per token, F width of an expert; d width of a head's query and key (MLA: nope + rope), R of its rotated part,
v of its value.

Names are for both frameworks: embed_tokens, layers.{i}.{attn_norm, attn, mlp_norm, mlp}, norm, lm_head. A matrix is
stored [out, in]; a stack of experts [E, out, in]; gate_up_proj has the gate's rows first, then up's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from muonclip.core.arguments import check_kind
from muonclip.models.config import MoEConfig
from muonclip.models.int4 import round_to_int4
from muonclip.models.shards import fill_normal, local, local_gate_up
from muonclip.torch import MaxLogits, QKProjection, attention

__all__ = ["MoE"]

Keep = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def keep_all(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to x; autograd keeps what it needs."""
    return function(x)


class MoE(nn.Module):
    """A decoder-only mixture-of-experts language model.

    `optimizer.register_step_post_hook(model.step_hook)` balances the load of the experts. Built on the meta device, it
    is filled by `to_empty(device=…)` and `reset_parameters()`. `muonclip.models.parallel` spreads it over ranks.

    Args:
        config: Its sizes.
    """

    def __init__(self, config: MoEConfig) -> None:
        check_kind("config", config, MoEConfig, "a MoEConfig, as MoEConfig.cpu()")
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dense=i < config.num_dense_layers) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Compute the logits [B, T, V] of the tokens.

        Args:
            tokens: int64 [B, T].
            document_ids: int [B, T]: a token attends only to its own document.

        Raises:
            ValueError: For more than max_seq_len positions.
        """
        check_kind("tokens", tokens, Tensor, "an int64 tensor [B, T]")
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens is {tokens.dtype} {tuple(tokens.shape)}; it must be int64 [B, T].")
        length, limit = tokens.shape[-1], self.config.max_seq_len
        if length > limit:
            raise ValueError(f"tokens has {length} positions; max_seq_len={limit}. Cut them, or build with more.")
        x = self.embed_tokens(tokens)
        rotary = self._rotary_table(x)
        for layer in self.layers:
            x = layer(x, rotary, document_ids)
        return self.lm_head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy in nats per token.

        Args:
            tokens: int64 [B, T].
            targets: int64 [B, T], already shifted; those of −100 are ignored.
            document_ids: int [B, T]: a token attends only to its own document.

        Raises:
            ValueError: For more than max_seq_len positions.
        """
        check_kind("targets", targets, Tensor, "an int64 tensor [B, T]")
        logits = at_least_float32(self(tokens, document_ids))
        if targets.dtype != torch.int64 or targets.shape != tokens.shape:
            raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)}; int64 {tuple(tokens.shape)} is due.")
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the first parameters: gains 1; matrices normal(0, init_std).

        Matrices that write to the residual stream have a standard deviation smaller by √(2·num_layers) (GPT-2).
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            writes_residual = "o_proj" in name or "down_proj" in name
            fill_normal(
                parameter, self.config.init_std / math.sqrt(2 * self.config.num_layers if writes_residual else 1)
            )
        for router in self._routers():
            router.correction_bias.zero_()

    @torch.no_grad()
    def step_hook(self, optimizer: Any = None, args: Any = None, kwargs: Any = None) -> None:
        """Balance the experts' load without an auxiliary loss (arXiv 2408.15664); then forget the load.

            correction_bias += router_bias_update_rate · sign(mean load − load)

        The load is counted in forwards with gradients enabled, over micro-batches, and summed over all ranks, which
        must all call this. Where a layer is recomputed its tokens count twice, all of them: the sign is the same.

        Args:
            optimizer: Not read: what torch gives to a hook of a step, as the other two.
            args: Not read.
            kwargs: Not read.
        """
        routers = self._routers()
        if not routers:
            return
        loads = torch.stack([router.load.to(router.correction_bias.device) for router in routers])  # [layers, E]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        corrections = self.config.router_bias_update_rate * (loads.mean(1, keepdim=True) - loads).sign()
        for router, correction in zip(routers, corrections, strict=True):
            router.correction_bias += correction
            router.load.zero_()

    def _routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def _rotary_table(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines [T, R] for `rotate`.

        They are made when first used, so that no cast of the model and no `to_empty` spoils them.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self._rotary is None or (self._rotary[0].device, self._rotary[0].dtype) != (x.device, dtype):
            with torch.inference_mode(False):  # a table first made in evaluation serves training too
                cos, sin = rotary_table(self.config)
                self._rotary = cos.to(x.device, dtype), sin.to(x.device, dtype)
        cos, sin = self._rotary
        return cos[: x.shape[1]], sin[: x.shape[1]]


class Layer(nn.Module):
    """A decoder layer: `x + attn(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: MoEConfig, *, dense: bool) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = LatentAttention(config) if config.attention == "mla" else GroupedQueryAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], document_ids: Tensor | None = None) -> Tensor:
        x = x + self.attend(x, rotary, document_ids)
        return x + self.transform(x)

    def attend(self, x: Tensor, rotary: tuple[Tensor, Tensor], document_ids: Tensor | None) -> Tensor:
        return self.attn(self.attn_norm(x), rotary, document_ids)

    def transform(self, x: Tensor) -> Tensor:
        return self.mlp(self.mlp_norm(x))


class Attention(nn.Module, ABC):
    """The part of an attention that all variants share: normalise, rotate, attend, observe.

    A variant makes q, k and v (`project`), and declares from which weights (`declare`).
    """

    def __init__(self, config: MoEConfig, *, value_width: int) -> None:
        super().__init__()
        self.config = config
        self.max_logits = MaxLogits(config.num_heads)
        self.o_proj = linear(value_width, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.qk_head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.qk_head_dim, config.norm_eps)

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, T, D] to q [B, T, H, d], k [B, T, G, d], v [B, T, G, v], before normalisation and rotation."""

    @abstractmethod
    def declare(self) -> QKProjection:
        """Return which rows of which weights feed which head of what `project` makes."""

    def qk_projection(self) -> QKProjection:
        """Return what QK-Clip may scale."""
        if not self.config.qk_norm:
            return self.declare()
        return replace(self.declare(), reason="QK-norm: scaling the projection would change nothing")

    def queries_keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the q, k and v of the softmax, [B, H or G, T, width] each: normalised and rotated, not yet scaled."""
        q, k, v = self.project(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotary).transpose(1, 2), rotate(k, rotary).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], document_ids: Tensor | None = None) -> Tensor:
        q, k, v = self.queries_keys_values(x, rotary)
        output = attention(
            q,
            k,
            v,
            scale=self.config.softmax_scale,
            is_causal=True,
            document_ids=document_ids,
            softcap=self.config.softcap,
            max_logits=self.max_logits,
        )
        return self.o_proj(output.transpose(1, 2).flatten(2))


class LatentAttention(Attention):
    """Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434).

    q, k, v come from RMS-normed latents; the heads share the rotary key. Rows per head: q_b_proj (or q_proj)
    [nope | rope], kv_b_proj [k_nope | v].
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, value_width=config.num_heads * config.v_head_dim)
        query_width = config.num_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = linear(config.hidden_size, query_width)
        else:
            self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
            self.q_a_norm = RMSNorm(config.q_lora_rank, config.norm_eps)
            self.q_b_proj = linear(config.q_lora_rank, query_width)
        self.kv_a_proj = linear(config.hidden_size, config.kv_lora_rank)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, config.norm_eps)
        self.kv_b_proj = linear(config.kv_lora_rank, config.num_heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.k_rope_proj = linear(config.hidden_size, config.qk_rope_head_dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q = self.project_queries(x)  # first: the order in which the gradients of x are added decides their last bits
        kv = self.kv_b_proj(self.kv_a_norm(self.kv_a_proj(x)))
        kv = kv.unflatten(-1, (-1, c.qk_nope_head_dim + c.v_head_dim))  # by width: a rank may have some of the heads
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        k_rope = self.k_rope_proj(x)[:, :, None].expand(-1, -1, kv.shape[2], -1)
        return q, torch.cat((k_nope, k_rope), -1), v

    def project_queries(self, x: Tensor) -> Tensor:
        """Project x [B, T, D] to q [B, T, H, d], before normalisation and rotation."""
        q = self.q_proj(x) if self.config.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        return q.unflatten(-1, (-1, self.config.qk_head_dim))

    def declare(self) -> QKProjection:
        return QKProjection.mla(
            q=self.q_proj if self.config.q_lora_rank is None else self.q_b_proj,
            kv=self.kv_b_proj,
            num_heads=self.config.num_heads,
            qk_nope_head_dim=self.config.qk_nope_head_dim,
            qk_rope_head_dim=self.config.qk_rope_head_dim,
            v_head_dim=self.config.v_head_dim,
            max_logits=self.max_logits,
        )


class GroupedQueryAttention(Attention):
    """Grouped-query attention, GQA (arXiv 2305.13245): G key heads, each for H / G query heads; MHA is G = H.

    The whole head is rotated.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, value_width=config.num_heads * config.head_dim)
        self.num_kv_heads = config.num_heads if config.attention == "mha" else config.num_kv_heads
        self.q_proj = linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = linear(config.hidden_size, self.num_kv_heads * config.head_dim)
        self.v_proj = linear(config.hidden_size, self.num_kv_heads * config.head_dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.config.head_dim
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q.unflatten(-1, (-1, width)), k.unflatten(-1, (-1, width)), v.unflatten(-1, (-1, width))

    def declare(self) -> QKProjection:
        return QKProjection.gqa(
            q=self.q_proj,
            k=self.k_proj,
            v=self.v_proj,
            num_heads=self.config.num_heads,
            num_kv_heads=self.num_kv_heads,
            max_logits=self.max_logits,
        )


class MixtureOfExperts(nn.Module):
    """A layer's experts: every token goes to its K experts, weighted, and to the shared experts."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared_width) if shared_width else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # [N, D]
        chosen, weights = self.router(tokens)
        y = self.experts(tokens, chosen, weights).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Router(nn.Module):
    """Chooses the K experts of best `score + correction_bias`; weighs them by score (arXiv 2412.19437, eq. 12–16).

        score = sigmoid(x · weightᵀ),   weights_k = routed_scaling_factor · score_k / Σ score over the chosen

    `load` counts the tokens of each expert since the last `MoE.step_hook`. It is not a buffer: DistributedDataParallel
    overwrites buffers with rank 0's at every forward. It follows the device of the tokens.
    """

    correction_bias: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.load = torch.zeros(config.num_experts, dtype=torch.float32, device="cpu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of x [N, D], int64 [N, K], and their weights [N, K] in fp32 (float64 for float64)."""
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(at_least_float32(x), at_least_float32(self.weight)))  # [N, E]
        chosen = torch.topk(
            scores.detach() + self.correction_bias, self.config.num_experts_per_tok, sorted=False
        ).indices
        weights = scores.gather(1, chosen)
        weights = self.config.routed_scaling_factor * weights / (weights.sum(1, keepdim=True) + 1e-20)
        if torch.is_grad_enabled():
            self._count(chosen)
        return chosen, weights

    @torch.no_grad()
    def _count(self, chosen: Tensor) -> None:
        if self.load.device != chosen.device:
            self.load = self.load.to(chosen.device)
        self.load.scatter_add_(0, chosen.flatten(), self.load.new_ones(()).expand(chosen.numel()))

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Keep the bias in fp32 when the model is cast: in bf16 a step of 1e-3 is lost from 0.5 on."""
        bias = self.correction_bias
        super()._apply(fn, recurse)
        if self.correction_bias.dtype != torch.float32:
            self.correction_bias = bias.to(self.correction_bias.device)
        return self


class Experts(nn.Module):
    """E SwiGLUs in two stacked weights; tokens are sorted by expert and multiplied group by group.

    With `expert_weight_bits` they compute with rounded weights, made anew in each forward and not kept for the backward
    pass where `keep` keeps the input alone.

    `exchange`, where experts are on several ranks: takes rows sorted by expert and the experts' ends; returns the rows
    for this rank's experts, their ends, and the function that sends results back. `keep`: applies a function to its
    input, and decides what is kept of it for the backward pass.
    """

    exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] | None = None
    keep: Keep = staticmethod(keep_all)

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.weight_bits = config.expert_weight_bits
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        for name, size in (("hidden_size", hidden), ("moe_intermediate_size", width)):
            if size % 8:
                raise ValueError(
                    f"{name}={size} must be a multiple of 8: the grouped product reads rows of whole 16 bytes."
                )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute `Σ_k weights_k · expert_k(x)` [N, D] of x [N, D], chosen and weights [N, K]."""
        n, k, dtype = *chosen.shape, x.dtype
        by_expert, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(
            by_expert, experts, right=True, out_int32=True
        )  # [E]: where the rows of each expert end
        # A permutation there and one back: its gradient is a permutation too, so sums have one order on every device.
        rows = x[:, None].expand(n, k, -1).reshape(n * k, -1).index_select(0, order)
        back = None
        if self.exchange is not None:
            rows, ends, back = self.exchange(rows, ends)
        gate_up_proj = local_gate_up(self.gate_up_proj)
        gate_up = self.keep(lambda rows: grouped_linear(rows, self.rounded(gate_up_proj), ends), rows)

        def finish(gate_up: Tensor) -> Tensor:
            rows = grouped_linear(swiglu(gate_up), self.rounded(local(self.down_proj)), ends)
            if back is not None:
                rows = back(rows)
            y = rows.index_select(0, order.argsort()).view(n, k, -1)
            return (y * weights[..., None]).sum(1).to(dtype)  # of x its dtype alone: `finish` may be kept for long

        return self.keep(finish, gate_up)

    def rounded(self, weight: Tensor) -> Tensor:
        return weight if self.weight_bits is None else _RoundToInt4.apply(weight)  # pyright: ignore[reportReturnType]


class _RoundToInt4(torch.autograd.Function):
    """Rounds weights to INT4; the gradient passes straight through (arXiv 1308.3432).

    `w + (rounded − w).detach()` would not be the rounded weights to the bit.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return round_to_int4(at_least_float32(weight), torch).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class SwiGLU(nn.Module):
    """The MLP `down(silu(gate(x)) · up(x))` (arXiv 2002.05202); `keep` as in `Experts`."""

    keep: Keep = staticmethod(keep_all)

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = GateUp(hidden, 2 * width, bias=False)
        self.down_proj = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.keep(self.gate_up_proj, x)
        return self.keep(lambda gate_up: self.down_proj(swiglu(gate_up)), gate_up)


class RMSNorm(nn.RMSNorm):
    """RMS norm in the dtype of the gain or wider, whatever autocast made of the input.

    The output has the input's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        gain = local(self.weight)
        return F.rms_norm(x.to(gain.dtype), self.normalized_shape, gain, self.eps).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer that computes with the rows or columns of the weight that this rank has."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, local(self.weight))


class GateUp(nn.Linear):
    """A linear layer of gate and up that computes the rows of gate, then of up, that this rank has."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, local_gate_up(self.weight))


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    return Linear(fan_in, fan_out, bias=False)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) · up of x [..., 2F] (gate, then up) → [..., F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotary_table(config: MoEConfig, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and (−sin | sin) of `position · frequency`, times YaRN's factor; float64 [stop − start, R] both.

    Without `stop` up to max_seq_len.
    """
    frequencies = torch.tensor(config.rotary_frequencies(), dtype=torch.float64)
    positions = torch.arange(start, config.max_seq_len if stop is None else stop, dtype=torch.float64)
    angles = positions[:, None] * frequencies
    cos, sin = config.rotary_scale * angles.cos(), config.rotary_scale * angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the last R entries of each head of x [B, T, heads, d], pairing i with i + R/2; those before them stay."""
    cos, sin = rotary
    width = cos.shape[-1]
    still, turned = x.split((x.shape[-1] - width, width), -1)
    turned = turned * cos[:, None] + turned.roll(width // 2, -1) * sin[:, None]
    return torch.cat((still, turned.to(x.dtype)), -1)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply x [rows, in] → [rows, out]: rows `ends[e − 1]` to `ends[e]` (int32 [E]) by weight[e] [out, in]."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != torch.float64 and x.device.type != "meta" and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weight.mT, offs=ends)
    # No float64 kernel exists, and none at all before torch 2.10: every expert meets every row, which keeps its own.
    row = torch.arange(len(x), device=x.device)
    expert = torch.searchsorted(ends, row, right=True)
    return torch.bmm(x.expand(len(weight), -1, -1), weight.mT)[expert, row]


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
