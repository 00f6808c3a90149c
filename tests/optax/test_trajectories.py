"""Twenty steps of MuonClip on the reference model, the clip firing: PyTorch, JAX and NumPy end at the same weights."""

import jax
import numpy as np
import optax
import pytest
import torch
from numpy_moe import loss_and_gradients
from svd_oracle import muon_step

from muonclip.core import resolve_coefficients, update_scale
from muonclip.models import MoEConfig
from muonclip.models import jax as moe
from muonclip.models.torch import MoE
from muonclip.optax import muonclip
from muonclip.torch import MuonClip, QKClip

STEPS, RATE, DECAY, TAU = 20, 0.02, 0.1, 1.0
CONFIGS = {
    name: MoEConfig.cpu(
        vocab_size=23, hidden_size=24, num_layers=2, max_seq_len=12, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=5, head_dim=8, intermediate_size=32, moe_intermediate_size=16, num_experts=4,
        init_std=0.3, **options,
    )
    for name, options in {"mla": {}, "gqa": {"attention": "gqa"}, "mha": {"attention": "mha"}}.items()
}  # fmt: skip


def batches():
    """tokens, targets [2, 11] of each step."""
    draws = np.random.default_rng(0).integers(0, 23, (STEPS, 2, 12))
    return [(draw[:, :-1], draw[:, 1:]) for draw in draws]


def in_torch(config, weights):
    model = MoE(config).double()
    model.load_state_dict(weights)
    clip = QKClip(model, tau=TAU, observe="always")
    optimizer = MuonClip(model, lr=RATE, weight_decay=DECAY, qk_clip=clip)
    optimizer.register_step_post_hook(model.step_hook)
    clipped = 0
    for tokens, targets in batches():
        optimizer.zero_grad()
        model.loss(torch.from_numpy(tokens), torch.from_numpy(targets)).backward()
        optimizer.step()
        clipped += clip.report().clipped_heads
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}, clipped


def in_jax(config, weights):
    params, buffers = moe.from_torch(weights)
    tx = muonclip(
        RATE,
        DECAY,
        tau=TAU,
        qk_projections=moe.qk_projections(config),
        muon_weight_dimension_numbers=moe.matrix_layouts(config),
    )

    @jax.jit
    def step(params, buffers, state, tokens, targets):
        (_, aux), gradients = jax.value_and_grad(moe.loss, has_aux=True)(params, buffers, tokens, targets, config)
        updates, state = tx.update(gradients, state, params, max_logits=aux.max_logits)
        return optax.apply_updates(params, updates), moe.balance(buffers, aux.loads, config), state

    state, clipped = tx.init(params), 0
    for tokens, targets in batches():
        params, buffers, state = step(params, buffers, state, tokens, targets)
        clipped += sum(int((gamma < 1).sum()) for gamma in optax.tree.get(state, "gamma").values())
    assert step._cache_size() == 1
    return params, clipped


def in_numpy(config, weights):
    """The update and the clip written out, head by head."""
    params = {name: value.numpy().copy() for name, value in weights.items() if "correction_bias" not in name}
    buffers = {name: value.numpy().copy() for name, value in weights.items() if "correction_bias" in name}
    momenta = {name: np.zeros_like(value) for name, value in params.items()}
    squares, clipped = {name: np.zeros_like(value) for name, value in params.items()}, 0
    for step, (tokens, targets) in enumerate(batches(), 1):
        _, gradients, maxima, loads = loss_and_gradients(params, buffers, tokens, targets, config)
        for name, gradient in gradients.items():
            weight = params[name]
            if weight.ndim == 1 or name in ("embed_tokens.weight", "lm_head.weight"):
                momenta[name] = 0.9 * momenta[name] + 0.1 * gradient
                squares[name] = 0.95 * squares[name] + 0.05 * gradient**2
                direction = momenta[name] / (1 - 0.9**step) / (np.sqrt(squares[name] / (1 - 0.95**step)) + 1e-8)
                params[name] = weight * (1 - RATE * DECAY * (weight.ndim > 1)) - RATE * direction
                continue
            halves = 2 if "gate_up" in name else 1
            pieces = [np.split(x, halves, axis=-2) for x in (weight, momenta[name], gradient)]
            stepped = [
                muon_step(
                    *piece, lr=RATE, weight_decay=DECAY, mu=0.95, nesterov=True,
                    coefficients=resolve_coefficients("jordan"),
                    scale=update_scale(*piece[0].shape[-2:], "match_rms_adamw"),
                )
                for piece in zip(*pieces, strict=True)
            ]  # fmt: skip
            params[name], momenta[name] = (np.concatenate(parts, axis=-2) for parts in zip(*stepped, strict=True))
        for attention, heads in maxima.items():
            for head, maximum in enumerate(heads):
                if maximum > TAU:
                    clipped += 1
                    scale_head(params, attention, head, TAU / maximum, config)
        for router, load in loads.items():
            buffers[f"{router}.correction_bias"] += np.float32(1e-3) * np.sign(load.mean() - load).astype(np.float32)
    return params, clipped


def scale_head(params, attention, head, gamma, config):
    if config.attention == "mla":
        q, kv = params[f"{attention}.q_b_proj.weight"], params[f"{attention}.kv_b_proj.weight"]
        nope, width = config.qk_nope_head_dim, config.qk_head_dim
        q[head * width : head * width + nope] *= gamma**0.5
        q[head * width + nope : (head + 1) * width] *= gamma
        start = head * (nope + config.v_head_dim)
        kv[start : start + nope] *= gamma**0.5
        return
    rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
    params[f"{attention}.q_proj.weight"][rows] *= gamma if config.attention == "gqa" else gamma**0.5
    if config.attention == "mha":
        params[f"{attention}.k_proj.weight"][rows] *= gamma**0.5


@pytest.mark.parametrize("attention", CONFIGS)
def test_three_frameworks_end_at_the_same_weights(attention):
    config = CONFIGS[attention]
    torch.manual_seed(0)
    weights = {name: value.clone() for name, value in MoE(config).double().state_dict().items()}
    oracle, clipped = in_numpy(config, weights)
    assert clipped > STEPS
    for train in (in_torch, in_jax):
        after, count = train(config, weights)
        assert count == clipped
        for name, expected in oracle.items():
            np.testing.assert_allclose(after[name], expected, atol=1e-6 * np.abs(expected).max(), err_msg=name)
    moved = [np.abs(oracle[name] - weights[name].numpy()).max() for name in oracle]
    assert min(moved) > 0.01
