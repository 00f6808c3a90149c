"""A small reference model in PyTorch, every number of it random, and tokens for it."""

import math

import torch

from muonclip.models import MoEConfig
from muonclip.models.torch import MixtureOfExperts, MoE

SMALL = {
    "vocab_size": 32,
    "hidden_size": 40,
    "num_layers": 2,
    "max_seq_len": 16,
    "q_lora_rank": 12,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
    "head_dim": 8,
    "intermediate_size": 56,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 2.5,
}


def small_model(seed=0, dtype=torch.float64, **overrides):
    """Every parameter random, gains and the correction bias included, and large enough to matter."""
    torch.manual_seed(seed)
    model = MoE(MoEConfig.cpu(**(SMALL | overrides))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.5 / math.sqrt(parameter.shape[-1]))
        for router in routers(model):
            router.correction_bias.uniform_(-0.2, 0.2)
    return model


def routers(model):
    return [layer.mlp.router for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]


def random_tokens(config, batch=2, length=11, seed=0):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
