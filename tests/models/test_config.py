"""Sizes, counts and rotary frequencies: plain arithmetic, against published numbers and formulas."""

import dataclasses
import math
from itertools import pairwise

import pytest

from muonclip.models import MoEConfig


def test_k2_counts_what_its_configuration_gives():
    k2 = MoEConfig.k2()
    assert k2.num_parameters() == pytest.approx(1.0264e12, rel=5e-5)  # the report rounds to 1.04T
    assert k2.num_active_parameters() == pytest.approx(32.86e9, rel=1e-4)  # and to 32.6B


def test_moonlight_counts_the_published_sizes_without_embeddings():
    moonlight = MoEConfig.moonlight()
    embeddings = 2 * moonlight.vocab_size * moonlight.hidden_size
    assert moonlight.num_parameters() - embeddings == pytest.approx(15.29e9, rel=1e-3)
    assert moonlight.num_active_parameters() - embeddings == pytest.approx(2.24e9, rel=3e-3)


@pytest.mark.parametrize(("preset", "total"), [("cpu", 0.8e6), ("gpu", 0.3e9), ("node", 3e9)])
def test_presets_have_the_size_they_promise(preset, total):
    assert getattr(MoEConfig, preset)().num_parameters() == pytest.approx(total, rel=0.06)


@pytest.mark.parametrize("preset", ["cpu", "gpu", "node", "moonlight", "k2"])
@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
def test_the_queries_never_have_the_width_of_the_model(preset, attention):
    config = getattr(MoEConfig, preset)(attention=attention)
    assert config.num_heads * config.qk_head_dim != config.hidden_size


def test_overrides_replace_fields_and_only_fields():
    config = MoEConfig.cpu(num_layers=5, q_lora_rank=None)
    assert (config.num_layers, config.q_lora_rank) == (5, None)
    assert dataclasses.replace(config, num_layers=3, q_lora_rank=96) == MoEConfig.cpu()
    with pytest.raises(TypeError, match="num_layer"):
        MoEConfig.cpu(num_layer=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention": "mqa"}, "attention='mqa'.*mla, gqa, mha"),
        ({"num_layers": 0}, "num_layers=0 must be an integer of at least 1"),
        ({"hidden_size": 128.0}, r"hidden_size=128\.0 must be an integer"),
        ({"q_lora_rank": 0}, "q_lora_rank=0"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 must be an integer of at least 2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds num_experts=8"),
        ({"num_dense_layers": 4}, "num_dense_layers=4 exceeds num_layers=3"),
        ({"num_dense_layers": -1}, "num_dense_layers=-1"),
        ({"attention": "gqa", "num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15 is odd"),
        ({"attention": "mha", "head_dim": 33}, "head_dim=33 is odd"),
        ({"softcap": 0.0}, r"softcap=0\.0 must be positive"),
        ({"softcap": True}, "softcap=True must be a finite number"),
        ({"qk_norm": "no"}, "qk_norm='no' must be True or False"),
        ({"qk_norm": None}, "qk_norm=None must be True or False"),
        ({"init_std": math.nan}, "init_std=nan must be a finite number"),
        ({"router_bias_update_rate": -1e-3}, r"router_bias_update_rate=-0\.001"),
        ({"rope_theta": 1.0}, "rope_theta=1.0 must exceed 1"),
        ({"yarn_factor": 0.5}, "yarn_factor=0.5 must be at least 1"),
        ({"yarn_beta_fast": 1.0, "yarn_beta_slow": 2.0}, "yarn_beta_fast=1.0 is below yarn_beta_slow=2.0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig.cpu(**overrides)


def test_fields_of_another_attention_are_not_judged():
    MoEConfig.cpu(num_kv_heads=3)
    MoEConfig.cpu(attention="mha", num_kv_heads=3, qk_rope_head_dim=15)


def test_plain_frequencies_follow_the_formula():
    config = MoEConfig.cpu(qk_rope_head_dim=8, rope_theta=10_000.0)
    assert config.rotary_frequencies() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-12)
    assert config.softmax_scale == pytest.approx(1 / math.sqrt(40))
    assert config.rotary_scale == 1.0


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_blends_between():
    """The paper's r(i) = L / λ_i: kept above beta_fast, over s below beta_slow (rounded outwards by up to one pair)."""
    theta, dim, length, factor, fast, slow = 10_000.0, 128, 4096, 16.0, 32.0, 1.0
    config = MoEConfig.cpu(qk_rope_head_dim=dim, rope_theta=theta, yarn_factor=factor, yarn_original_seq_len=length)
    assert (config.yarn_beta_fast, config.yarn_beta_slow) == (fast, slow)
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    turns = [length * f / (2 * math.pi) for f in plain]
    ratios = [yarn / f for yarn, f in zip(config.rotary_frequencies(), plain, strict=True)]
    kept = [i for i, r in enumerate(turns) if r >= fast]
    divided = [i for i, r in enumerate(turns) if r <= slow][1:]
    between = range(kept[-1] + 1, divided[0] - 1)
    assert len(kept) > 10
    assert len(divided) > 10
    assert len(between) > 10
    assert [ratios[i] for i in kept] == pytest.approx([1.0] * len(kept), rel=1e-12)
    assert [ratios[i] for i in divided] == pytest.approx([1 / factor] * len(divided), rel=1e-12)
    inside = [ratios[i] for i in between]
    assert all(1 > a > b > 1 / factor for a, b in pairwise(inside))
    steps = [a - b for a, b in pairwise(inside)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-9)


def test_equal_betas_make_a_step():
    """K2's long context has beta_fast = beta_slow = 1: pairs that turn at least once are kept, the others divided."""
    k2 = MoEConfig.k2(max_seq_len=131_072, yarn_factor=32.0)
    plain = MoEConfig.k2().rotary_frequencies()
    turns = [4096 * f / (2 * math.pi) for f in plain]
    expected = [f if r >= 1 else f / 32 for f, r in zip(plain, turns, strict=True)]
    assert k2.rotary_frequencies() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(1.0, 1.0), (1.0, 0.0), (0.7, 1.3)])
def test_the_temperature_of_yarn_reaches_the_logits(mscale, mscale_all_dim):
    """√(1/t) = 0.1 ln(s) + 1; however it is shared out, rotated parts carry (0.1 · mscale · ln(s) + 1)²."""
    config = MoEConfig.cpu(yarn_factor=8.0, yarn_mscale=mscale, yarn_mscale_all_dim=mscale_all_dim)
    temperature = (0.1 * mscale * math.log(8) + 1) ** 2
    assert config.softmax_scale * config.rotary_scale**2 * math.sqrt(config.qk_head_dim) == pytest.approx(temperature)
    assert config.softmax_scale == pytest.approx((0.1 * mscale_all_dim * math.log(8) + 1) ** 2 / math.sqrt(48))
