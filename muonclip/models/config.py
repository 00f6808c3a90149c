"""The sizes of the reference model and the arithmetic on them; no framework is imported.

The architecture is DeepSeek-V3's (arXiv 2412.19437), as Kimi K2 uses it (arXiv 2507.20534): multi-head latent
attention, first layers dense, then SwiGLU experts chosen by a sigmoid router whose load a bias balances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from muonclip.models.int4 import GROUP
from muonclip.models.rotary import rotary_frequencies, yarn_mscale

Attention = Literal["mla", "gqa", "mha"]

_LEAST = {"num_shared_experts": 0, "num_dense_layers": 0, "num_experts_per_tok": 2}  # one normalised weight is constant
_MAY_BE_ZERO = {"router_bias_update_rate", "yarn_mscale", "yarn_mscale_all_dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Sizes and constants of one model. Widths are in elements, lengths in tokens; `None` means absent.

    `attention="mla"` reads the two ranks and `qk_nope_head_dim`, `qk_rope_head_dim`, `v_head_dim`; "mha" reads
    `head_dim`; "gqa" reads `head_dim` and `num_kv_heads`. The presets fill all of them, so that
    `MoEConfig.cpu(attention="gqa")` is complete.

    Args:
        vocab_size: Number of tokens there are.
        hidden_size: Width of the residual stream.
        num_layers: Number of layers.
        max_seq_len: Longest sequence.
        attention: "mla" (multi-head latent), "gqa" (grouped-query) or "mha" (multi-head).
        num_heads: Number of query heads.
        q_lora_rank: Width of the queries' latent; None: queries are projected directly.
        kv_lora_rank: Width of the latent of keys and values.
        qk_nope_head_dim: Width of a head's query and key without position.
        qk_rope_head_dim: Width of a head's rotated query and of the rotated key that heads share.
        v_head_dim: Width of a head's value.
        num_kv_heads: Number of key heads.
        head_dim: Width of a head's query, key and value.
        qk_norm: RMSNorm of every head's q and k, before the rotation; in MLA over both parts of a head (QK-Normed MLA,
            arXiv 2606.16310). The clip then only observes.
        softcap: c, for logits c · tanh(logits / c).
        num_dense_layers: How many of the first layers have one dense SwiGLU instead of experts.
        intermediate_size: Width of that SwiGLU.
        moe_intermediate_size: Width of an expert.
        num_experts: Number of experts of a layer.
        num_experts_per_tok: How many of them a token uses.
        num_shared_experts: Experts that every token uses, fused to one SwiGLU of this many times
            `moe_intermediate_size`; 0: none.
        routed_scaling_factor: Factor of the weights of a token's experts.
        router_bias_update_rate: How far the correction bias of a router moves, per step.
        expert_weight_bits: 4: experts compute with weights rounded to INT4 in groups of 32 along the input axis, as
            Kimi K2 Thinking's do; the parameters, their gradients and updates are those of the weights before. Neither
            shared experts nor anything else is rounded. None: no rounding.
        rope_theta: Base of the rotation's frequencies.
        yarn_factor: Context extension s; 1: plain RoPE, and no other yarn field is read.
        yarn_original_seq_len: Longest sequence before the extension.
        yarn_beta_fast: Pairs that turn more often within the original length keep their frequency.
        yarn_beta_slow: Pairs that turn less often have it divided by s.
        yarn_mscale: YaRN's temperature of the rotation.
        yarn_mscale_all_dim: YaRN's temperature of the logits.
        norm_eps: Added to the mean square in the norms.
        init_std: Standard deviation of the first weights.

    Raises:
        ValueError: For sizes that do not fit together; it names the field.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_seq_len: int

    attention: Attention = "mla"
    num_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    num_kv_heads: int = 8
    head_dim: int = 128
    qk_norm: bool = False
    softcap: float | None = None

    num_dense_layers: int = 1
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 1
    routed_scaling_factor: float = 1.0
    router_bias_update_rate: float = 1e-3
    expert_weight_bits: Literal[4] | None = None

    rope_theta: float = 10_000.0
    yarn_factor: float = 1.0
    yarn_original_seq_len: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 1.0

    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.attention not in get_args(Attention):
            raise ValueError(
                f"attention={self.attention!r} is unknown; choose one of {', '.join(get_args(Attention))}."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("q_lora_rank", "softcap"):
                continue
            if "int" in str(field.type):
                least = _LEAST.get(field.name, 1)
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise ValueError(f"{field.name}={value!r} must be an integer of at least {least}.")
            elif "bool" in str(field.type):
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name}={value!r} must be True or False.")
            elif "float" in str(field.type):
                if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                    raise ValueError(f"{field.name}={value!r} must be a finite number.")
                if value < 0 or (value == 0 and field.name not in _MAY_BE_ZERO):
                    raise ValueError(f"{field.name}={value!r} must be positive.")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta={self.rope_theta} must exceed 1: later pairs turn slower.")
        if self.yarn_factor < 1:
            raise ValueError(f"yarn_factor={self.yarn_factor} must be at least 1, which leaves the context as it is.")
        if self.yarn_beta_fast < self.yarn_beta_slow:
            raise ValueError(
                f"yarn_beta_fast={self.yarn_beta_fast} is below yarn_beta_slow={self.yarn_beta_slow}; "
                "the fast dimensions turn more often than the slow ones. Swap them."
            )
        if self.rotary_dim % 2:
            name = "qk_rope_head_dim" if self.attention == "mla" else "head_dim"
            raise ValueError(f"{name}={self.rotary_dim} is odd; the rotation turns pairs. Make it even.")
        if self.attention == "gqa" and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key head serves equally many query heads."
            )
        if self.expert_weight_bits not in (None, 4):
            raise ValueError(f"expert_weight_bits={self.expert_weight_bits!r} is unknown; give 4, or None for none.")
        for name in ("hidden_size", "moe_intermediate_size") if self.expert_weight_bits else ():
            if (size := getattr(self, name)) % GROUP:
                raise ValueError(f"{name}={size} must be a multiple of {GROUP}: so many INT4 weights share a scale.")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}; lower it."
            )
        if self.num_dense_layers > self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} exceeds num_layers={self.num_layers}; lower it."
            )

    # Presets

    @classmethod
    def cpu(cls, **overrides: Any) -> Self:
        """Make a model of 0.8M parameters over bytes, which trains in minutes on one core.

        Args:
            **overrides: Fields to set otherwise.
        """
        sizes: dict[str, Any] = {
            "vocab_size": 256,
            "hidden_size": 128,
            "num_layers": 3,
            "max_seq_len": 64,
            "num_heads": 4,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "num_kv_heads": 2,
            "head_dim": 48,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def gpu(cls, **overrides: Any) -> Self:
        """Make a model of 0.3B parameters, 0.06B active, over bytes, for one GPU.

        Args:
            **overrides: Fields to set otherwise; `vocab_size` gives another vocabulary.
        """
        sizes: dict[str, Any] = {
            "vocab_size": 256,
            "hidden_size": 768,
            "num_layers": 12,
            "max_seq_len": 1024,
            "num_heads": 12,
            "q_lora_rank": 384,
            "kv_lora_rank": 192,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "num_kv_heads": 4,
            "head_dim": 96,
            "intermediate_size": 2048,
            "moe_intermediate_size": 320,
            "num_experts": 32,
            "num_experts_per_tok": 4,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def node(cls, **overrides: Any) -> Self:
        """Make a model of 3B parameters, 0.5B active, over bytes, for 8 GPUs.

        K2's report ablates the clip at about this size.

        Args:
            **overrides: Fields to set otherwise.
        """
        sizes: dict[str, Any] = {
            "vocab_size": 256,
            "hidden_size": 1536,
            "num_layers": 20,
            "max_seq_len": 4096,
            "num_heads": 16,
            "q_lora_rank": 768,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 96,
            "qk_rope_head_dim": 32,
            "v_head_dim": 96,
            "num_kv_heads": 4,
            "head_dim": 128,
            "intermediate_size": 4096,
            "moe_intermediate_size": 512,
            "num_experts": 64,
            "num_experts_per_tok": 6,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def moonlight(cls, **overrides: Any) -> Self:
        """Make Moonlight 16B-A3B (arXiv 2502.16982).

        Args:
            **overrides: Fields to set otherwise.
        """
        sizes: dict[str, Any] = {
            "vocab_size": 163_840,
            "hidden_size": 2048,
            "num_layers": 27,
            "max_seq_len": 8192,
            "num_heads": 16,
            "q_lora_rank": None,
            "num_kv_heads": 4,
            "head_dim": 192,
            "intermediate_size": 11_264,
            "moe_intermediate_size": 1408,
            "num_experts": 64,
            "num_experts_per_tok": 6,
            "num_shared_experts": 2,
            "routed_scaling_factor": 2.446,
            "rope_theta": 50_000.0,
            "norm_eps": 1e-5,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def k2(cls, **overrides: Any) -> Self:
        """Make Kimi K2 as pre-trained, 4k context; `max_seq_len=131_072, yarn_factor=32` is its long context.

        Args:
            **overrides: Fields to set otherwise.
        """
        sizes: dict[str, Any] = {
            "vocab_size": 163_840,
            "hidden_size": 7168,
            "num_layers": 61,
            "max_seq_len": 4096,
            "num_heads": 64,
            "q_lora_rank": 1536,
            "intermediate_size": 18_432,
            "moe_intermediate_size": 2048,
            "num_experts": 384,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.827,
            "rope_theta": 50_000.0,
            "yarn_beta_fast": 1.0,
        }
        return cls(**(sizes | overrides))

    # Derived sizes

    @property
    def rotary_dim(self) -> int:
        """Width of the rotated part of a head."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key; MLA: `[nope | rope]`."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor from `q · k` to a logit: `mscale² / √qk_head_dim`, as DeepSeek-V3 scales under YaRN."""
        return yarn_mscale(self.yarn_factor, self.yarn_mscale_all_dim) ** 2 / math.sqrt(self.qk_head_dim)

    def rotary_frequencies(self) -> list[float]:
        """Return the radians per position of each of the rotary_dim / 2 pairs."""
        return rotary_frequencies(
            self.rotary_dim,
            theta=self.rope_theta,
            factor=self.yarn_factor,
            original_seq_len=self.yarn_original_seq_len,
            beta_fast=self.yarn_beta_fast,
            beta_slow=self.yarn_beta_slow,
        )

    @property
    def rotary_scale(self) -> float:
        """Factor on cosines and sines: the part of YaRN's temperature that `softmax_scale` does not carry."""
        factor = self.yarn_factor
        return yarn_mscale(factor, self.yarn_mscale) / yarn_mscale(factor, self.yarn_mscale_all_dim)

    # Counting

    def num_parameters(self) -> int:
        """Number of all parameters, embeddings and head included."""
        return self._count(experts=self.num_experts)

    def num_active_parameters(self) -> int:
        """Number of parameters that one token uses, embeddings and head included."""
        return self._count(experts=self.num_experts_per_tok)

    def _count(self, *, experts: int) -> int:
        d, expert = self.hidden_size, 3 * self.hidden_size * self.moe_intermediate_size
        dense = 3 * d * self.intermediate_size
        mixture = self.num_experts * d + (experts + self.num_shared_experts) * expert
        layers = self.num_layers * (self._count_attention() + 2 * d)
        layers += self.num_dense_layers * dense + (self.num_layers - self.num_dense_layers) * mixture
        return 2 * self.vocab_size * d + layers + d

    def _count_attention(self) -> int:
        d, heads = self.hidden_size, self.num_heads
        norms = 2 * self.qk_head_dim if self.qk_norm else 0
        if self.attention != "mla":
            kv_heads = heads if self.attention == "mha" else self.num_kv_heads
            return d * self.head_dim * (2 * heads + 2 * kv_heads) + norms
        rank, q_rows = self.kv_lora_rank, heads * self.qk_head_dim
        q = q_rows * d if self.q_lora_rank is None else self.q_lora_rank * (d + 1 + q_rows)
        kv = rank * (d + 1 + heads * (self.qk_nope_head_dim + self.v_head_dim)) + self.qk_rope_head_dim * d
        return q + kv + heads * self.v_head_dim * d + norms
