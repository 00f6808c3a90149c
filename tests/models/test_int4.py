"""Experts in INT4: what is rounded and how, to the bit; whose gradient it is; who keeps the weights before."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_moe import random_tokens, routers, small_model

from benchmarks.training.activation_memory import held_bytes
from muonclip.models import MoEConfig
from muonclip.models import jax as jax_moe
from muonclip.models.int4 import round_to_int4
from muonclip.models.parallel import DegreeError, Parallelism
from muonclip.models.recompute import recompute
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

SIZES = {"hidden_size": 64, "moe_intermediate_size": 32}


def nearest(weights):
    """Rounded by exact fractions, weight by weight: integer times scale, the scale as float32 has it."""
    rounded = []
    for start in range(0, len(weights), 32):
        group = weights[start : start + 32]
        scale = np.float32(np.abs(group).max()) / np.float32(7)
        codes = [round(Fraction(float(each)) / Fraction(float(scale))) if scale else 0 for each in group]
        assert max(map(abs, codes)) <= 7
        rounded += [np.float32(code) * scale for code in codes]
    return np.array(rounded, np.float32)


def int4_model(**overrides):
    return small_model(**{"dtype": torch.float32, "expert_weight_bits": 4, **SIZES, **overrides})


def gradients(model):
    loss = model.loss(random_tokens(model.config), random_tokens(model.config, seed=1))
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def experts_rounded(model):
    """The same model, without the option, whose experts' weights are those that 4 bits hold."""
    plain = small_model(**SIZES, dtype=next(model.parameters()).dtype)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".mlp.experts." in name:
                rows = parameter.numpy().reshape(-1, parameter.shape[-1])
                parameter.copy_(torch.from_numpy(np.stack([nearest(row) for row in rows])).view_as(parameter))
    return plain


# The rounding


@pytest.mark.parametrize("xp", [torch, jnp], ids=["torch", "jax"])
def test_a_group_of_32_inputs_has_its_own_scale_and_15_values(xp):
    weights = np.random.default_rng(0).normal(size=(3, 5, 96)).astype(np.float32)
    weights *= np.logspace(-3, 3, 96, dtype=np.float32)
    weights[0, 0, :32] = 0
    weights[0, 1, 7] = -weights[0, 1].max() * 3  # the largest is negative: −7, not −8
    rounded = np.asarray(round_to_int4(xp.asarray(weights), xp))
    expected = np.stack([nearest(row) for row in weights.reshape(-1, 96)]).reshape(weights.shape)
    if xp is torch:
        assert np.array_equal(rounded, expected)
    else:  # XLA divides by 7 as it likes: the last bit of a scale
        np.testing.assert_allclose(rounded, expected, rtol=2.5e-7)
    groups, before = rounded.reshape(-1, 32), weights.reshape(-1, 32)
    largest = np.abs(before).argmax(1)
    kept, of = groups[range(len(groups)), largest], before[range(len(groups)), largest]
    np.testing.assert_allclose(kept, of, rtol=3e-7)  # nothing is cut off
    assert max(len(np.unique(group)) for group in groups) <= 15


@pytest.mark.parametrize("xp", [torch, jnp], ids=["torch", "jax"])
def test_the_smallest_weights_stay_within_seven_steps(xp):
    """Of a group of subnormals the scale is rounded by up to a half, so that ten steps would be taken for seven."""
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    weights = xp.asarray(np.full((1, 32), 10 * smallest, np.float32))
    assert np.abs(np.asarray(round_to_int4(weights, xp))).max() <= 7 * smallest


# The model


def test_loss_and_gradients_are_those_of_rounded_weights_to_the_bit():
    """And a weight's gradient is that of what it was rounded to: straight through."""
    model = int4_model()
    loss, found = gradients(model)
    expected, of_rounded = gradients(experts_rounded(model))
    assert torch.equal(loss, expected)
    assert found.keys() == of_rounded.keys()
    for name in found:
        assert torch.equal(found[name], of_rounded[name]), name
    assert found["layers.1.mlp.experts.gate_up_proj"].abs().max() > 0


def test_nothing_but_routed_experts_is_rounded():
    plain, rounded = small_model(**SIZES, dtype=torch.float32), int4_model()
    x = torch.randn(9, 64)
    for name, module in plain.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            given = torch.arange(9) if isinstance(module, torch.nn.Embedding) else torch.randn(9, module.in_features)
            assert torch.equal(module(given), rounded.get_submodule(name)(given)), name
    dense, other = plain.layers[0].mlp, rounded.layers[0].mlp
    assert torch.equal(dense(x), other(x))
    mixture, other = plain.layers[1].mlp, rounded.layers[1].mlp
    assert torch.equal(mixture.shared_experts(x), other.shared_experts(x))
    assert not torch.equal(mixture(x[None]), other(x[None]))


@pytest.mark.parametrize("how", [{}, {"store_activations": "float8"}, {"offload_activations": True}], ids=str)
def test_recomputation_rounds_again_and_changes_no_loss(how):
    loss, plain = gradients(int4_model())
    model = int4_model()
    for layer in model.layers:
        recompute(layer, **how)
    again, kept = gradients(model)
    assert torch.equal(loss, again)
    if not how.get("store_activations"):
        assert all(torch.equal(plain[name], kept[name]) for name in plain)


def test_autocast_rounds_the_weights_before_the_products():
    model = int4_model()
    tokens = random_tokens(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(tokens), experts_rounded(model)(tokens))


def test_the_experts_of_jax_are_those_of_torch():
    """Loss and gradients in float64: the groups, the integers and the straight gradient are the same."""
    model = int4_model(dtype=torch.float64)
    config = model.config
    tokens, targets = random_tokens(config), random_tokens(config, seed=1)
    loss = model.loss(tokens, targets)
    loss.backward()
    with jax.enable_x64(True):
        params = {name: jnp.asarray(each.detach().numpy()) for name, each in model.named_parameters()}
        buffers = {name: jnp.asarray(each.numpy()) for name, each in model.named_buffers()}
        (found, _), moved = jax.value_and_grad(jax_moe.loss, has_aux=True)(
            params, buffers, jnp.asarray(tokens.numpy()), jnp.asarray(targets.numpy()), config
        )
        assert abs(float(found) - loss.item()) < 1e-10
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(moved[name], parameter.grad.numpy(), rtol=1e-7, atol=1e-10, err_msg=name)


# The optimizer


def test_updates_act_on_the_weights_before_and_go_on_from_a_checkpoint():
    """A step smaller than a step of INT4 is not lost, and a stop leaves no trace."""

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model.loss(random_tokens(model.config, seed=step), random_tokens(model.config, seed=step + 100)).backward()
            optimizer.step()

    def begin():
        model = int4_model()
        return model, MuonClip(model, lr=1e-4, tau=2.0)

    whole, optimizer = begin()
    first = whole.layers[1].mlp.experts.down_proj.detach().clone()
    train(whole, optimizer, range(4))
    moved = (whole.layers[1].mlp.experts.down_proj - first).abs()
    step = first.unflatten(-1, (-1, 32)).abs().amax(-1).min() / 7
    assert 0 < moved.max() < step / 10
    assert (moved > 0).float().mean() > 0.99
    model, optimizer = begin()
    train(model, optimizer, range(2))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    model, optimizer = begin()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(2, 4))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_checkpoint_without_the_option_goes_on_with_it():
    """The state dict has the same names, shapes and numbers: Kimi K2 Thinking is quantised after pre-training."""
    plain = small_model(**SIZES, dtype=torch.float32)
    model = int4_model(seed=1)
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in model.state_dict().items())
    x = torch.randn(2, 3, 64)
    mixture, rounded = model.layers[1].mlp, experts_rounded(model).layers[1].mlp
    assert torch.equal(mixture(x), rounded(x))
    assert len(routers(model)) == 1


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"expert_weight_bits": 8}, "expert_weight_bits=8 is unknown; give 4, or None"),
        ({"expert_weight_bits": 4, "hidden_size": 40}, "hidden_size=40 must be a multiple of 32"),
        ({"expert_weight_bits": 4, "moe_intermediate_size": 48}, "moe_intermediate_size=48 must be a multiple of 32"),
    ],
)
def test_what_cannot_be_rounded_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig.cpu(**overrides)
    MoEConfig.cpu(hidden_size=40, moe_intermediate_size=48)


def test_tensor_parallelism_cuts_no_group():
    plain, rounded = (MoEConfig.cpu(expert_weight_bits=bits, moe_intermediate_size=32) for bits in (None, 4))
    Parallelism(tensor=2).check(plain, 2)
    with pytest.raises(DegreeError, match="moe_intermediate_size=32 into multiples of 32"):
        Parallelism(tensor=2).check(rounded, 2)


def test_the_rounded_weights_are_not_kept_where_inputs_alone_are():
    """With float8 storage the experts' rounded weights are made again: no copy of them waits for the backward pass."""
    held = []
    for bits in (None, 4):
        torch.manual_seed(0)
        model = MoE(MoEConfig.cpu(num_layers=1, num_dense_layers=0, num_experts=32, expert_weight_bits=bits))
        recompute(model.layers[0], store_activations="float8")
        held.append(held_bytes(model, torch.arange(9)[None]))
    assert held[1] - held[0] < model.layers[0].mlp.experts.down_proj.nbytes / 4
