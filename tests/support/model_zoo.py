"""Tiny models of many architectures, from configurations: two layers, a few heads, nothing downloaded.

Widths are chosen so that model width, heads · head width and the number of heads never coincide.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

SIZES = dict(vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56)
GQA = dict(SIZES, num_key_value_heads=2, head_dim=10, pad_token_id=0)
SHORT = dict(max_position_embeddings=64)
GPT2 = dict(vocab_size=50, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
MLA = dict(
    SIZES,
    num_key_value_heads=4,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=14,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
)
BART = dict(
    vocab_size=50,
    d_model=48,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=56,
    decoder_ffn_dim=56,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=2,
    max_position_embeddings=64,
)
HYBRID = dict(GQA, max_position_embeddings=64, tie_word_embeddings=False)
MAMBA2 = dict(mamba_n_heads=6, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4)
DELTA_NET = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)


@dataclass(frozen=True)
class Architecture:
    """`kind`: what every attention of it is. `attentions`: how many there are. `options`: of the configuration."""

    model: str
    kind: str
    options: dict[str, Any]
    attentions: int = 2
    implementation: str | None = None

    def build(self) -> nn.Module:
        kind = getattr(transformers, self.model)
        config = kind.config_class(**self.options)
        config.use_cache = False  # an attention is replayed on its inputs, which must not have grown
        if self.implementation is not None:
            config._attn_implementation = self.implementation
        return kind(config)

    def inputs(self, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))
        if self.model.endswith("ConditionalGeneration"):
            return {"input_ids": tokens, "decoder_input_ids": tokens[:, :-2]}
        return {"input_ids": tokens}


def _architecture(
    model: str, kind: str, options: dict[str, Any], name: str = "", **others: Any
) -> tuple[str, Architecture]:
    return name or model, Architecture(model, kind, options, **others)


ZOO = dict(
    [
        _architecture("LlamaForCausalLM", "gqa", GQA),
        _architecture("Qwen2ForCausalLM", "gqa", dict(SIZES, num_key_value_heads=2, pad_token_id=0)),  # biases
        _architecture("Phi3ForCausalLM", "gqa", dict(SIZES, num_key_value_heads=2, pad_token_id=0)),  # one fused weight
        _architecture("GPT2LMHeadModel", "mha", GPT2),  # transposed, fused
        _architecture("GPTNeoXForCausalLM", "mha", dict(SIZES, rotary_pct=0.5)),  # fused, interleaved per head
        _architecture("DeepseekV3ForCausalLM", "mla", MLA),
        _architecture("MixtralForCausalLM", "gqa", dict(GQA, num_local_experts=4, num_experts_per_tok=2)),
        _architecture("Gemma2ForCausalLM", "gqa", dict(GQA, query_pre_attn_scalar=7, attn_logit_softcapping=3.0)),
        _architecture("GraniteForCausalLM", "gqa", dict(SIZES, num_key_value_heads=2, attention_multiplier=0.3)),
        _architecture("GptOssForCausalLM", "gqa", dict(GQA, **MOE, sliding_window=4)),  # sinks
        _architecture("MistralForCausalLM", "gqa", dict(GQA, sliding_window=4)),
        _architecture("FalconForCausalLM", "gqa", dict(  # fused, interleaved per key group
            vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
            new_decoder_architecture=True, alibi=False)),
        _architecture("GPTBigCodeForCausalLM", "mqa", GPT2),
        _architecture("BloomForCausalLM", "mha", dict(  # written out, ALiBi
            vocab_size=50, hidden_size=48, n_layer=2, n_head=4)),
        _architecture("MptForCausalLM", "mha", dict(vocab_size=50, d_model=48, n_layers=2, n_heads=4)),
        _architecture("GPTJForCausalLM", "mha", dict(GPT2, rotary_dim=4)),
        _architecture("OPTForCausalLM", "mha", dict(
            vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=56,
            word_embed_proj_dim=48, **SHORT)),
        _architecture("CohereForCausalLM", "gqa", dict(SIZES, num_key_value_heads=2, pad_token_id=0)),  # rotates pairs
        _architecture("BertForMaskedLM", "mha", dict(SIZES, **SHORT)),
        _architecture("AlbertForMaskedLM", "mha", dict(  # two layers, one module
            SIZES, embedding_size=24, **SHORT), attentions=1),
        _architecture("T5ForConditionalGeneration", "mha", dict(
            vocab_size=50, d_model=48, d_kv=10, d_ff=56, num_layers=1, num_heads=4, decoder_start_token_id=0),
            attentions=3),
        _architecture("BartForConditionalGeneration", "mha", BART, attentions=3),
        _architecture("Qwen3ForCausalLM", "qk-norm", GQA),
        _architecture("Gemma3ForCausalLM", "qk-norm", GQA),
        _architecture("Olmo2ForCausalLM", "qk-norm", dict(SIZES, num_key_value_heads=2)),
        _architecture("CohereForCausalLM", "qk-norm", dict(
            SIZES, num_key_value_heads=2, use_qk_norm=True, pad_token_id=0), name="Cohere with QK-norm"),
        # State spaces, delta nets, linear attention, convolutions; and attention between them
        _architecture("BambaForCausalLM", "gqa", dict(
            HYBRID, attn_layer_indices=[1], **MAMBA2), attentions=1),
        _architecture("Zamba2ForCausalLM", "mha", dict(  # one attention for two layers
            SIZES, num_hidden_layers=3, num_key_value_heads=4, attention_head_dim=24, adapter_rank=8, chunk_size=4,
            layers_block_type=["hybrid", "mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=6, mamba_headdim=16,
            num_mem_blocks=1), attentions=1),
        _architecture("NemotronHForCausalLM", "gqa", dict(
            HYBRID, layers_block_type=["mamba", "attention"], mamba_num_heads=6, mamba_head_dim=16, ssm_state_size=8,
            n_groups=2, chunk_size=4, use_mamba_kernels=False), attentions=1),
        _architecture("FalconH1ForCausalLM", "gqa", dict(HYBRID, mamba_d_ssm=96, **MAMBA2)),
        _architecture("GraniteMoeHybridForCausalLM", "gqa", dict(
            HYBRID, layer_types=["mamba", "attention"], shared_intermediate_size=16, **MOE, **MAMBA2), attentions=1),
        _architecture("JambaForCausalLM", "gqa", dict(
            HYBRID, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=4,
            use_mamba_kernels=False), attentions=1),
        _architecture("RecurrentGemmaForCausalLM", "gqa", dict(
            HYBRID, lru_width=48, attention_window_size=5, block_types=["recurrent", "attention"]), attentions=1),
        _architecture("MiniMaxForCausalLM", "gqa", dict(
            HYBRID, layer_types=["linear_attention", "full_attention"], block_size=4, **MOE), attentions=1),
        _architecture("KimiLinearForCausalLM", "mla", dict(
            MLA, q_lora_rank=None, linear_head_dim=8, linear_num_heads=4, num_local_experts=4, pad_token_id=0,
            layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"]), attentions=1),
        _architecture("Qwen3NextForCausalLM", "qk-norm", dict(
            HYBRID, **DELTA_NET, **MOE, shared_expert_intermediate_size=16), attentions=1),
        _architecture("OlmoHybridForCausalLM", "qk-norm", dict(HYBRID, **DELTA_NET), attentions=1),
        _architecture("Lfm2ForCausalLM", "qk-norm", dict(HYBRID, layer_types=["conv", "full_attention"]), attentions=1),
    ]
)  # fmt: skip
