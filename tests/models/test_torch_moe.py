"""The reference model: counts, its mathematics against slow loops, routing and its balance, masks, precision."""

import copy
import math

import naive_moe
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_moe import SMALL, random_tokens, routers, small_model
from torch.utils.checkpoint import checkpoint

from muonclip.models import MoEConfig
from muonclip.models.torch import Attention, Experts, MoE
from muonclip.torch import MuonClip, QKClip

# Counts


@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
@pytest.mark.parametrize("preset", ["cpu", "gpu", "node", "moonlight", "k2"])
def test_the_model_has_the_parameters_that_the_configuration_counts(preset, attention):
    config = getattr(MoEConfig, preset)(attention=attention)
    check_counts(config)


@pytest.mark.parametrize(
    "overrides",
    [
        {"q_lora_rank": None},
        {"qk_norm": True},
        {"qk_norm": True, "attention": "gqa"},
        {"num_shared_experts": 0},
        {"num_shared_experts": 3},
        {"num_dense_layers": 0},
        {"num_dense_layers": 3},
    ],
)
def test_options_are_counted(overrides):
    check_counts(MoEConfig.cpu(**overrides))


def check_counts(config):
    with torch.device("meta"):
        model = MoE(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == config.num_parameters()
    idle = sum(size for name, size in sizes.items() if ".experts." in name)
    idle -= idle * config.num_experts_per_tok // config.num_experts
    assert sum(sizes.values()) - idle == config.num_active_parameters()


# Mathematics


@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"yarn_factor": 4.0, "yarn_original_seq_len": 64, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 1.3},
        {"qk_norm": True},
        {"softcap": 2.0},
        {"q_lora_rank": None},
    ],
    ids=lambda overrides: "_".join(overrides) or "plain",
)
def test_attention_equals_the_naive_one(attention, overrides):
    model = small_model(attention=attention, **overrides)
    tokens = random_tokens(model.config)
    seen = {}
    attn = model.layers[0].attn
    attn.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    model(tokens)
    naive = [naive_moe.attention(attn, x, model.config) for x in seen["x"].detach()]
    torch.testing.assert_close(seen["y"], torch.stack([y for y, _ in naive]), rtol=1e-9, atol=1e-10)
    maxima = torch.tensor([maxima for _, maxima in naive]).amax(0)
    torch.testing.assert_close(attn.max_logits.maximum, maxima.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "overrides", [{}, {"num_shared_experts": 0}, {"num_shared_experts": 2, "num_experts_per_tok": 3}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_mixture_equals_a_loop_over_tokens(dtype, overrides):
    """Forward and every gradient; one expert is never chosen, and its gradient is zero."""
    model = small_model(**overrides)
    mlp = model.layers[1].mlp
    mlp.router.correction_bias[5] = -10.0
    fast = copy.deepcopy(mlp).to(dtype)
    x = torch.randn(2, 17, model.config.hidden_size, dtype=torch.float64)
    probe = torch.randn_like(x)
    expected = naive_moe.mixture(mlp, x.flatten(0, 1), model.config).view_as(x)
    actual = fast(x.to(dtype))
    (expected * probe).sum().backward()
    (actual * probe.to(dtype)).sum().backward()
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual, expected.to(dtype), **tolerance)
    for (name, parameter), reference in zip(fast.named_parameters(), mlp.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, reference.grad.to(dtype), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not fast.experts.gate_up_proj.grad[5].any()


@torch.no_grad()
def test_the_layers_are_pre_norm_residual_and_the_first_is_dense():
    model = small_model()
    tokens = random_tokens(model.config)
    x = model.embed_tokens.weight[tokens[0]]
    for i, layer in enumerate(model.layers):
        x = x + naive_moe.attention(layer.attn, naive_moe.rms_norm(layer.attn_norm, x), model.config)[0]
        h = naive_moe.rms_norm(layer.mlp_norm, x)
        if i == 0:
            gate_up, down = layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight
            x = x + torch.stack([naive_moe.swiglu(gate_up, down, token) for token in h])
        else:
            x = x + naive_moe.mixture(layer.mlp, h, model.config)
    expected = naive_moe.linear(model.lm_head, naive_moe.rms_norm(model.norm, x))
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-8, atol=1e-9)


def test_the_loss_is_the_mean_cross_entropy_in_nats():
    model = small_model()
    tokens, targets = random_tokens(model.config), random_tokens(model.config, seed=1)
    log_probabilities = model(tokens).log_softmax(-1)
    picked = [log_probabilities[b, t, targets[b, t]] for b in range(2) for t in range(11)]
    torch.testing.assert_close(model.loss(tokens, targets), -sum(picked) / 22)
    targets[1] = -100
    torch.testing.assert_close(model.loss(tokens, targets), -sum(picked[:11]) / 11)


@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
def test_a_fresh_model_knows_nothing(attention):
    torch.manual_seed(0)
    model = MoE(MoEConfig.cpu(attention=attention))
    tokens, targets = random_tokens(model.config, 8, 64), random_tokens(model.config, 8, 64, seed=1)
    assert model.loss(tokens, targets).item() == pytest.approx(math.log(256), abs=0.06)


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in MoE(MoEConfig.cpu(**SMALL)).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_what_writes_to_the_residual_stream_starts_smaller():
    torch.manual_seed(0)
    config = MoEConfig.cpu(num_layers=8)
    for name, parameter in MoE(config).named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
        expected = config.init_std / (4.0 if residual else 1.0)
        assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


# Masks and positions


@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
def test_the_future_does_not_change_the_past(attention):
    model = small_model(attention=attention)
    tokens = random_tokens(model.config)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % model.config.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("overrides", [{}, {"attention": "gqa"}, {"softcap": 2.0}])
def test_a_document_sees_only_itself_wherever_it_stands(overrides):
    """Relative positions: packed behind another document or alone, a document gives the same logits."""
    model = small_model(**overrides)
    first, second = random_tokens(model.config, 1, 5), random_tokens(model.config, 1, 7, seed=1)
    packed = model(torch.cat((first, second), 1), torch.tensor([[0] * 5 + [1] * 7]))
    torch.testing.assert_close(packed[:, :5], model(first), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[:, 5:], model(second), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(packed[:, 5:], model(torch.cat((first, second), 1))[:, 5:])


def test_too_long_a_sequence_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="tokens has 17 positions; max_seq_len=16"):
        model(random_tokens(model.config, length=17))


def test_widths_that_the_grouped_product_cannot_read_are_refused():
    with pytest.raises(ValueError, match="moe_intermediate_size=20 must be a multiple of 8"):
        MoE(MoEConfig.cpu(moe_intermediate_size=20))


# Routing and balance


def test_the_correction_bias_chooses_but_does_not_weigh():
    router = routers(small_model())[0]
    router.correction_bias.zero_()
    x = torch.randn(50, 40, dtype=torch.float64)
    scores = torch.sigmoid(x @ router.weight.T)
    free, _ = router(x)
    assert not (free == 3).any(1).all()
    router.correction_bias[3] = 2.0  # scores are below 1: expert 3 is always chosen
    chosen, weights = router(x)
    assert (chosen == 3).any(1).all()
    picked = scores.gather(1, chosen)
    torch.testing.assert_close(weights, 2.5 * picked / picked.sum(1, keepdim=True))
    torch.testing.assert_close(weights.sum(1), torch.full((50,), 2.5, dtype=torch.float64))


def test_the_bias_is_state_but_not_a_parameter_and_stays_fp32():
    model = small_model()
    name = "layers.1.mlp.router.correction_bias"
    assert name in model.state_dict()
    assert name not in dict(model.named_parameters())
    kept = routers(model)[0].correction_bias.clone()
    model.bfloat16()
    assert torch.equal(routers(model)[0].correction_bias, kept)
    assert routers(model)[0].weight.dtype == torch.bfloat16
    other = small_model(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(routers(other)[0].correction_bias, kept)


def test_the_load_is_what_training_forwards_chose_over_micro_batches():
    model = small_model()
    router = routers(model)[0]
    expected = torch.zeros(8)

    def count(module, inputs, output):
        expected.add_(torch.bincount(output[0].flatten(), minlength=8))

    router.register_forward_hook(count)
    for seed in range(3):
        model(random_tokens(model.config, seed=seed))
    assert torch.equal(router.load, expected)
    assert expected.sum() == 3 * 2 * 11 * 2
    with torch.no_grad():
        model(random_tokens(model.config, seed=9))
    assert router.load.sum() == 3 * 2 * 11 * 2
    bias, rate = router.correction_bias.clone(), model.config.router_bias_update_rate
    load = router.load.clone()
    model.step_hook()
    signs = torch.tensor([float(v < load.mean()) - float(v > load.mean()) for v in load])
    torch.testing.assert_close(router.correction_bias, bias + rate * signs)
    assert not router.load.any()
    bias = router.correction_bias.clone()
    model.step_hook()  # nothing was seen
    assert torch.equal(router.correction_bias, bias)


def test_the_step_hook_balances_the_experts():
    model = small_model(dtype=torch.float32, router_bias_update_rate=0.02)
    router = routers(model)[0]
    router.correction_bias.copy_(torch.linspace(-0.4, 0.4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_post_hook(model.step_hook)
    tokens = random_tokens(model.config, 16, 16)
    imbalance = []
    for _ in range(40):
        model(tokens)
        imbalance.append((router.load.max() / router.load.mean()).item())
        optimizer.step()
    assert imbalance[0] > 2.0
    assert sum(imbalance[-5:]) / 5 < 1.2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_does_not_change_the_balance(use_reentrant):
    plain = small_model()
    recomputed = copy.deepcopy(plain)
    for layer in recomputed.layers:
        inner = layer.forward
        layer.forward = lambda *args, f=inner: checkpoint(f, *args, use_reentrant=use_reentrant)
    tokens, targets = random_tokens(plain.config), random_tokens(plain.config, seed=1)
    for model in (plain, recomputed):
        model.loss(tokens, targets).backward()
        model.step_hook()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(recomputed.get_parameter(name).grad, parameter.grad)
    assert torch.equal(routers(plain)[0].correction_bias, routers(recomputed)[0].correction_bias)
    torch.testing.assert_close(plain.layers[1].attn.max_logits.maximum, recomputed.layers[1].attn.max_logits.maximum)


def test_the_load_is_summed_over_ranks(monkeypatch):
    model = small_model(router_bias_update_rate=0.5)
    router = routers(model)[0]
    router.correction_bias.zero_()
    router.load.copy_(torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0]))
    reduced = []

    def all_reduce(loads):
        reduced.append(loads.shape)
        loads += torch.tensor([0.0, 80, 8, 8, 8, 8, 8, 8])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    model.step_hook()
    assert reduced == [(1, 8)]
    assert router.correction_bias.tolist() == [0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


# With the optimizer


@pytest.mark.parametrize(
    "overrides", [{"attention": "mla"}, {"q_lora_rank": None}, {"attention": "gqa"}, {"attention": "mha"}]
)
def test_a_clipped_head_shows_tau_when_its_inputs_are_seen_again(overrides):
    """The declared rows are the rows that make the logits: YaRN's scale, latents and shared keys included."""
    model = small_model(yarn_factor=4.0, num_layers=1, **overrides)
    tokens = random_tokens(model.config)
    clip = QKClip(model, tau=torch.inf)
    model(tokens)
    before = model.layers[0].attn.max_logits.maximum.clone()
    tau = before.sort().values[1:3].mean().item()
    assert tau > 0
    clip = QKClip(model, tau=tau, observe="always")
    clip.step()
    model(tokens)
    torch.testing.assert_close(model.layers[0].attn.max_logits.maximum, before.clamp(max=tau), rtol=1e-5, atol=1e-5)
    assert list(clip.report().layers) == ["layers.0.attn"]


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_with_qk_norm_the_attention_is_observed_only(attention):
    model = small_model(attention=attention, qk_norm=True)
    clip = QKClip(model, tau=0.1)
    model(random_tokens(model.config))
    state = copy.deepcopy(model.state_dict())
    clip.step()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "QK-norm" in model.layers[0].attn.qk_projection().reason
    assert (clip.report().layers["layers.1.attn"].max_logits > 0.1).any()


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model = MoE(MoEConfig.cpu(num_layers=2))
    optimizer = MuonClip(model, lr=1e-2)
    optimizer.register_step_post_hook(model.step_hook)
    tokens, targets = random_tokens(model.config, 2, 32), random_tokens(model.config, 2, 32, seed=1)
    losses = []
    for _ in range(40):
        loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# Precision and construction


def test_bf16_autocast_stays_near_fp32():
    model = small_model(dtype=torch.float32)
    tokens, targets = random_tokens(model.config), random_tokens(model.config, seed=1)
    exact = model.loss(tokens, targets)
    exact.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if ".experts." not in name and ".router." not in name:  # a token near a tie may change its expert
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 0.25, (name, error)


def test_a_bf16_model_runs_in_bf16_and_near_float64():
    model = small_model()
    tokens, targets = random_tokens(model.config), random_tokens(model.config, seed=1)
    exact = model.loss(tokens, targets).item()
    model.bfloat16()
    assert model(tokens).dtype == torch.bfloat16
    loss = model.loss(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.03)


def test_a_model_first_run_in_inference_mode_trains():
    model, fresh = small_model(), small_model()
    tokens, targets = random_tokens(model.config), random_tokens(model.config, seed=1)
    with torch.inference_mode():
        model(tokens)
    for m in (model, fresh):
        m.loss(tokens, targets).backward()
    assert torch.equal(model.lm_head.weight.grad, fresh.lm_head.weight.grad)


def test_a_model_built_on_meta_is_filled_by_reset_parameters():
    with torch.device("meta"):
        model = MoE(MoEConfig.cpu())
    model.to_empty(device="cpu")
    model.reset_parameters()
    tokens, targets = random_tokens(model.config, 4, 64), random_tokens(model.config, 4, 64, seed=1)
    loss = model.loss(tokens, targets)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    assert not routers(model)[0].correction_bias.any()
    assert routers(model)[0].load.sum() == 4 * 64 * 2
    assert model.layers[0].attn.max_logits.maximum.isfinite().all()


def test_a_model_copied_to_another_dtype_rotates_in_it():
    """The table of cosines follows the dtype: a cast model equals one that was never run before the cast."""
    model = small_model(dtype=torch.float32)
    tokens = random_tokens(model.config)
    model(tokens)
    fresh = small_model(dtype=torch.float32).double()
    assert torch.equal(model.double()(tokens), fresh(tokens))


def test_names_are_the_ones_both_frameworks_share():
    names = {name for name, _ in MoE(MoEConfig.cpu(num_layers=2)).named_parameters()}
    attention = {"q_a_proj", "q_a_norm", "q_b_proj", "kv_a_proj", "kv_a_norm", "kv_b_proj", "k_rope_proj", "o_proj"}
    expected = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    expected |= {f"layers.{i}.attn.{part}.weight" for i in (0, 1) for part in attention}
    expected |= {f"layers.{i}.{part}_norm.weight" for i in (0, 1) for part in ("attn", "mlp")}
    expected |= {f"layers.0.mlp.{part}_proj.weight" for part in ("gate_up", "down")}
    expected |= {f"layers.1.mlp.shared_experts.{part}_proj.weight" for part in ("gate_up", "down")}
    expected |= {"layers.1.mlp.router.weight", "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"}
    assert names == expected


def test_modules_are_what_the_plan_expects():
    model = MoE(MoEConfig.cpu())
    assert [n for n, m in model.named_modules() if isinstance(m, Attention)] == [f"layers.{i}.attn" for i in range(3)]
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    assert experts.gate_up_proj.shape == (8, 128, 128)
    assert experts.down_proj.shape == (8, 128, 64)


def test_gate_rows_come_first():
    model = small_model()
    mlp = model.layers[0].mlp
    x = torch.randn(3, 40, dtype=torch.float64)
    gate, up = mlp.gate_up_proj.weight[:56], mlp.gate_up_proj.weight[56:]
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down_proj.weight.T)


@pytest.mark.parametrize("config", [None, {}, "cpu", MoEConfig])
def test_what_is_no_configuration_is_named(config):
    with pytest.raises(TypeError, match=r"config=.* give a MoEConfig"):
        MoE(config)


TOKENS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "targets", "message"),
    [
        (None, TOKENS, "tokens=None is a NoneType"),
        ([[1]], TOKENS, "tokens=.* is a list"),
        (TOKENS.float(), TOKENS, r"tokens is torch.float32 \(2, 5\)"),
        (TOKENS[0], TOKENS[0], r"tokens is torch.int64 \(5,\)"),
        (TOKENS, None, "targets=None is a NoneType"),
        (TOKENS, TOKENS[:, :3], r"targets is torch.int64 \(2, 3\)"),
        (TOKENS, TOKENS.int(), "targets is torch.int32"),
    ],
)
def test_what_are_no_tokens_or_targets_is_named(tokens, targets, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MoE(MoEConfig.cpu(num_layers=1)).loss(tokens, targets)
