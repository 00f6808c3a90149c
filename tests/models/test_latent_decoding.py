"""Decoding from the latent cache is the forward, QK-norm included; of a token nothing is kept but a latent."""

import pytest
import torch
from small_moe import random_tokens, small_model

from muonclip.models.latent_decoding import decode

YARN = {"yarn_factor": 4.0, "yarn_original_seq_len": 64, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 1.3}


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "overrides", [{}, {"q_lora_rank": None, "softcap": 2.0}, YARN], ids=lambda each: "_".join(each)
)
@pytest.mark.parametrize("pieces", [(1,) * 11, (6, 1, 4)], ids=["by token", "by pieces"])
def test_decoding_from_latents_is_the_forward_to_rounding(pieces, overrides, qk_norm):
    """In float64; gains and weights are random, so the gain, the RMS and the rotation have their places."""
    model = small_model(qk_norm=qk_norm, **overrides)
    tokens = random_tokens(model.config)
    caches, logits = None, []
    for piece in tokens.split(pieces, 1):
        new, caches = decode(model, piece, caches)
        logits.append(new)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_queries_and_keys_are_normalised_over_the_whole_head():
    """[nope | rope] together: a louder rotary key makes the rest of each key quieter."""
    model = small_model(qk_norm=True)
    tokens = random_tokens(model.config)
    _, before = decode(model, tokens)
    model.layers[0].attn.k_rope_proj.weight.mul_(10)
    _, after = decode(model, tokens)
    assert (after[0].inverse_rms < before[0].inverse_rms).all()


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_token_leaves_a_latent_a_shared_key_and_one_number_per_head(qk_norm):
    model = small_model(qk_norm=qk_norm)
    config = model.config
    _, caches = decode(model, random_tokens(config, batch=3))
    for cache in caches:
        sizes = [part.shape for part in cache if part is not None]
        widths = [config.kv_lora_rank, config.qk_rope_head_dim] + [config.num_heads] * qk_norm
        assert sizes == [(3, 11, width) for width in widths]


@torch.no_grad()
def test_what_was_seen_is_not_projected_again():
    """Each projection meets the new token alone."""
    model = small_model(qk_norm=True)
    tokens = random_tokens(model.config)
    _, caches = decode(model, tokens[:, :-1])
    seen = []
    for name in ("kv_a_proj", "k_rope_proj", "q_b_proj"):
        module = getattr(model.layers[1].attn, name)
        module.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    decode(model, tokens[:, -1:], caches)
    assert seen == [1, 1, 1]


def test_decoding_is_not_observed():
    model = small_model()
    decode(model, random_tokens(model.config))
    assert all(torch.isinf(layer.attn.max_logits.maximum).all() for layer in model.layers)
    assert not any(router.load.any() for router in (layer.mlp.router for layer in model.layers[1:]))


def test_what_cannot_be_decoded_is_refused():
    model = small_model()
    tokens = random_tokens(model.config, length=16)
    _, caches = decode(model, tokens)
    with pytest.raises(ValueError, match=r"tokens end at position 17; max_seq_len=16"):
        decode(model, tokens[:, :1], caches)
    with pytest.raises(ValueError, match=r"caches has 1 entries; the model has 2 layers"):
        decode(model, tokens[:, :1], caches[:1])
    with pytest.raises(ValueError, match=r"attention='gqa' has no latents"):
        decode(small_model(attention="gqa"), tokens)
