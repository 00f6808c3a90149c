"""The architectures of the sweep: tiny models of public libraries from configurations, with inputs; nothing is downloaded.

Sizes that many configurations name are set wherever they are named; an architecture lists the others. Two sequences,
four heads, seven tokens: no two of these are the same number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, VOCABULARY, IMAGE = 2, 7, 60, 24
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64,
    "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "ffn_dim": 48, "embedding_size": 16,
    "image_size": IMAGE, "patch_size": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, 
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "sliding_window": 4, "rotary_dim": 4,
    "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10,
    "attention_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model by the name of its class in a library: `options` of its configuration, and what it is called with.

    `inputs`: names of arguments and how each is made, or one of the kinds in `_KINDS`.
    """

    name: str
    library: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str | dict[str, Callable[[], Any]] = ""
    note: str = ""

    @property
    def importable(self) -> bool:
        """True where the library is installed."""
        return importlib.util.find_spec(self.library) is not None

    def build(self) -> nn.Module:
        """Make the model, in evaluation mode, its weights large enough for logits of a few units."""
        torch.manual_seed(0)
        model = _BUILDERS[self.library](self).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    fan_in = parameter[0].numel() if parameter.ndim == 4 else min(parameter.shape[-2:])
                    parameter.normal_(0, 1.3 * max(fan_in, 8) ** -0.5)
                elif not parameter.any():
                    parameter.normal_(0, 0.2)  # zero-initialised biases, gates and scales
        return model

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """Make what the model is called with, the same each time."""
        torch.manual_seed(1)
        kind: Any = self.inputs or ("pixel_values" if "pixel" in getattr(model, "main_input_name", "") else "tokens")
        made = {name: make() for name, make in (_KINDS[kind] if isinstance(kind, str) else kind).items()}
        if kind == "tokens" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            made["decoder_input_ids"] = tokens()[:, :-2]
        return made


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *shape)


_KINDS: dict[str, dict[str, Callable[[], Any]]] = {
    "tokens": {"input_ids": tokens},
    "pixel_values": {"pixel_values": numbers(3, IMAGE, IMAGE)},
    "wave": {"input_values": numbers(600)},
}


def tiny_config(kind: Any, options: dict[str, Any]) -> Any:
    """Make a configuration of transformers with every size it knows made small."""
    default = kind()
    known = {name: value for name, value in _SIZES.items() if isinstance(getattr(default, name, None), int | float)}
    for name in list(known):
        if kind.attribute_map.get(name, name) != name:
            del known[name]  # an alias
    refused = [name for name in known if isinstance(getattr(kind, name, None), property)]
    config = kind(**{name: value for name, value in (known | options).items() if name not in refused})
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def _transformers(architecture: Architecture) -> nn.Module:
    import transformers

    kind = getattr(transformers, architecture.name)
    options = dict(architecture.options)
    implementation = options.pop("attn_implementation", None)
    for name, part in getattr(kind.config_class, "sub_configs", {}).items():
        if isinstance(options.get(name), dict) or (name in options and options[name] is None):
            options[name] = tiny_config(part, options[name] or {}).to_dict()
    config = tiny_config(kind.config_class, options)
    if implementation is not None:
        config._attn_implementation = implementation
    return kind(config)


_BUILDERS: dict[str, Callable[[Architecture], nn.Module]] = {"transformers": _transformers}

def of_transformers(names: str) -> tuple[Architecture, ...]:
    return tuple(Architecture(name, "transformers") for name in names.split())


_DECODERS = """
LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM
MixtralForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM VaultGemmaForCausalLM PhiForCausalLM
Phi3ForCausalLM PhimoeForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM GPTJForCausalLM GPTBigCodeForCausalLM
OpenAIGPTModel BloomForCausalLM OPTForCausalLM StableLmForCausalLM Starcoder2ForCausalLM CohereForCausalLM
Cohere2ForCausalLM OlmoForCausalLM Olmo2ForCausalLM OlmoeForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
GptOssForCausalLM GlmForCausalLM Glm4ForCausalLM HeliumForCausalLM PersimmonForCausalLM CodeGenForCausalLM
XGLMForCausalLM BioGptForCausalLM SmolLM3ForCausalLM Exaone4ForCausalLM ArceeForCausalLM SeedOssForCausalLM
DiffLlamaForCausalLM DogeForCausalLM JetMoeForCausalLM CTRLModel Llama4ForCausalLM ApertusForCausalLM BitNetForCausalLM
Ernie4_5ForCausalLM
"""
_HYBRIDS = "MiniMaxForCausalLM Lfm2ForCausalLM MambaForCausalLM RwkvForCausalLM"
_ENCODERS = """
BertForMaskedLM RobertaModel AlbertModel ElectraModel DebertaModel DebertaV2Model MPNetModel NystromformerModel FNetModel
ConvBertModel ModernBertModel RoFormerModel LongformerModel BigBirdModel CanineModel YosoModel IBertModel SplinterModel
MegatronBertModel RemBertModel NomicBertModel EuroBertModel
"""
_SEQUENCE_TO_SEQUENCE = """
T5ForConditionalGeneration UMT5Model LongT5Model BartModel MBartModel PegasusXModel MarianModel M2M100Model LEDModel
BigBirdPegasusModel NllbMoeModel
"""
_VISION = """
ViTModel DeiTModel BeitModel Data2VecVisionModel Dinov2Model Dinov2WithRegistersModel DINOv3ViTModel VitDetModel
YolosModel SiglipVisionModel CLIPVisionModel IJepaModel ViTMAEModel ViTMSNModel DPTModel Aimv2VisionModel
PixtralVisionModel
"""
ARCHITECTURES: tuple[Architecture, ...] = (
    *of_transformers(_DECODERS),
    *of_transformers(_HYBRIDS),
    *of_transformers(_ENCODERS),
    *of_transformers(_SEQUENCE_TO_SEQUENCE),
    *of_transformers(_VISION),
)
