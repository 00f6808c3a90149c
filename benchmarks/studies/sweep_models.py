"""Tiny models of public libraries, from configurations, with inputs; nothing is downloaded.

Sizes that many configurations name are set wherever they are named; an architecture lists the others. Two sequences,
four heads, seven tokens: no two of these are the same number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
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

    `name`: the class, and perhaps a space and which variant it is. `inputs`: names of arguments and how each is made,
    "*" those without a name; none of them: tokens, or an image.
    """

    name: str
    library: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    @property
    def kind(self) -> Any:
        """The class, or what makes the model. Raises ImportError where the library is not installed."""
        module = "torch_geometric.nn" if self.library == "torch_geometric" else self.library
        return getattr(importlib.import_module(module), self.name.partition(" ")[0])

    def build(self) -> nn.Module:
        """Make the model, in evaluation mode, its weights large enough for logits of a few units."""
        torch.manual_seed(0)
        model = _BUILDERS.get(self.library, _plain)(self).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    fan_in = parameter[0].numel() if parameter.ndim == 4 else min(parameter.shape[-2:])
                    parameter.normal_(0, 1.3 * max(fan_in, 8) ** -0.5)
                elif not parameter.any():
                    parameter.normal_(0, 0.2)  # zero-initialised biases, gates and scales
        return model

    def arguments(self, model: Any) -> dict[str, Any]:
        """Make what the model is called with, the same each time."""
        torch.manual_seed(1)
        if self.inputs:
            return {name: make() for name, make in self.inputs.items()}
        if model.main_input_name == "pixel_values":
            return {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE)}
        given = {"input_ids": tokens()}
        return given | {"decoder_input_ids": tokens()[:, :-2]} if model.config.is_encoder_decoder else given


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *shape)


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
    kind, options = architecture.kind, dict(architecture.options)
    implementation = options.pop("attn_implementation", None)
    for name, part in kind.config_class.sub_configs.items():
        if isinstance(options.get(name), dict):
            options[name] = tiny_config(part, options[name]).to_dict()
    config = tiny_config(kind.config_class, options)
    if implementation is not None:
        config._attn_implementation = implementation
    return kind(config)


def _plain(architecture: Architecture) -> nn.Module:
    return architecture.kind(**architecture.options)


def _timm(architecture: Architecture) -> nn.Module:
    return importlib.import_module("timm").create_model(architecture.name, num_classes=5, **architecture.options)


def _x_transformers(architecture: Architecture) -> nn.Module:
    layers: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
    wrapper = importlib.import_module(architecture.library).TransformerWrapper
    return wrapper(
        num_tokens=VOCABULARY, max_seq_len=16, attn_layers=architecture.kind(**layers | architecture.options)
    )


_BUILDERS: dict[str, Callable[[Architecture], nn.Module]] = {
    "transformers": _transformers,
    "timm": _timm,
    "x_transformers": _x_transformers,
}
