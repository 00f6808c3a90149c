"""The models whose steps `clip_cost` measures: one declares its attention, in the other it is found.

Heads of 64 wide, all projections of common proportions. The vocabulary is small: a large one would hide the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.experiment.errors import UsageError
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE

MODELS = {"moe": "reference MoE, MLA", "llama": "Hugging Face Llama, GQA"}
DTYPES = {
    "moe": {"float32": "fp32", "bfloat16": "bf16 autocast"},
    "llama": {"float32": "fp32", "bfloat16": "bf16 weights"},
}
VOCABULARY = 1024
_HEAD_WIDTH, _ROTARY_WIDTH = 64, 16


def build(name: str, *, width: int, layers: int, length: int) -> nn.Module:
    """Build the model in float32, on the CPU. Raises UsageError where transformers is missing."""
    heads = width // _HEAD_WIDTH
    if name == "moe":
        sizes = {"hidden_size": width, "num_layers": layers, "max_seq_len": length, "num_heads": heads}
        ranks = {"q_lora_rank": width // 2, "kv_lora_rank": width // 4}
        own = _HEAD_WIDTH - _ROTARY_WIDTH
        widths = {"qk_nope_head_dim": own, "qk_rope_head_dim": _ROTARY_WIDTH, "v_head_dim": own}
        experts = {"intermediate_size": 2 * width, "moe_intermediate_size": width // 2}
        return MoE(MoEConfig.cpu(vocab_size=VOCABULARY, **sizes, **ranks, **widths, **experts))
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UsageError(
            "--models", "llama comes from transformers, which is not installed. pip install 'muonclip[dev]' brings it."
        ) from error
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "attn_implementation": "sdpa"}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=length, **sizes, **attention))


def loss(model: nn.Module, tokens: Tensor, dtype: str) -> Tensor:
    """Return the loss of next tokens, int64 [B, T + 1].

    In bfloat16 the MoE runs under autocast; a Llama is cast by its owner.
    """
    if isinstance(model, MoE):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return model.loss(tokens[:, :-1], tokens[:, 1:])
    return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
