"""MuonClip trains a Llama whose linears are torchao's Float8Linear, on the CPU's own float8 products or emulated."""

import copy
import dataclasses
import math

import pytest
import torch
from tiny_llama import GROUPS, HEAD, HEADS, attentions_of, tiny_llama, tiny_tokens
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from muonclip.torch import MuonClip, QKClip

TAU, RATE = 0.6, 2e-2
TOKENS = tiny_tokens(8)


def in_float8(model, recipe="tensorwise", emulate=True):
    config = Float8LinearConfig.from_recipe_name(recipe)
    config = dataclasses.replace(config, emulate=emulate, pad_inner_dim=True)
    return convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name != "lm_head")


class Products:
    """The outputs of the projections of queries and keys as the model computes them, and what follows from them."""

    def __init__(self, model):
        self.q, self.k, self.positions = ({} for _ in range(3))
        for layer, attention in enumerate(attentions_of(model)):
            for kept, module in ((self.q, attention.q_proj), (self.k, attention.k_proj)):
                module.register_forward_hook(lambda m, a, output, kept=kept, layer=layer: kept.update({layer: output}))
            attention.register_forward_pre_hook(
                lambda m, a, kwargs, layer=layer: self.positions.update({layer: kwargs["position_embeddings"]}),
                with_kwargs=True,
            )

    @torch.no_grad()
    def maxima(self, layer):
        """fp64 [heads]: the largest causal logits of the last forward."""
        q = self.q[layer].unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        k = self.k[layer].unflatten(-1, (GROUPS, HEAD)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *self.positions[layer])
        k = k.repeat_interleave(HEADS // GROUPS, 1)
        logits = q.double() @ k.double().mT / math.sqrt(HEAD)
        allowed = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        return logits.masked_fill(~allowed, -math.inf).amax((0, 2, 3))


def step(model, optimizer):
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def factors(maxima):
    """γ of each head, and the factors of the query rows: keys are shared by two heads, so queries get all of γ."""
    return (TAU / maxima).clamp(max=1.0)


@pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "of the CPU"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_gamma_is_that_of_the_rounded_products_and_the_master_weight_is_scaled(recipe, emulate):
    model = in_float8(tiny_llama(), recipe, emulate)
    without = copy.deepcopy(model)
    clipped = MuonClip(model, lr=RATE, weight_decay=0.1, tau=TAU)
    unclipped = MuonClip(without, lr=RATE, weight_decay=0.1, qk_clip=None)
    products = Products(model)
    was_clipped = False
    for _ in range(3):
        without.load_state_dict(model.state_dict())  # so that both update the same weights by the same gradients
        step(without, unclipped)
        step(model, clipped)
        for layer, (own, other) in enumerate(zip(attentions_of(model), attentions_of(without), strict=True)):
            wanted = products.maxima(layer)
            seen = clipped.qk_clip.report().layers[f"model.layers.{layer}.self_attn"]
            known = seen.exact
            torch.testing.assert_close(seen.max_logits[known].double(), wanted[known], rtol=1e-5, atol=0)
            torch.testing.assert_close(seen.gamma.double(), factors(wanted), rtol=1e-5, atol=0)
            rows = seen.gamma.repeat_interleave(HEAD)[:, None]
            assert torch.equal(own.q_proj.weight, other.q_proj.weight * rows)
            assert torch.equal(own.k_proj.weight, other.k_proj.weight)
            was_clipped |= bool((seen.gamma < 1).any())
    assert was_clipped


def test_the_plan_says_which_linears_muon_trains():
    model = in_float8(tiny_llama())
    plan = MuonClip(model, lr=RATE, weight_decay=0.1).plan
    muon = {row.name for row in plan.parameters if row.use == "muon"}
    projections = {f"{name}.weight" for name, each in model.named_modules() if type(each).__name__ == "Float8Linear"}
    assert projections == muon
    assert len(projections) == 14


def test_losses_are_those_of_float32_but_for_the_rounding():
    def losses(model):
        optimizer = MuonClip(model, lr=RATE, weight_decay=0.1, tau=TAU)
        return torch.tensor([step(model, optimizer) for _ in range(12)])

    rounded, exact = losses(in_float8(tiny_llama())), losses(tiny_llama())
    assert exact[-1] < exact[0] - 2  # nats; the two differ by a few hundredths of one
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    assert not torch.equal(rounded, exact)


def test_a_compiled_model_is_clipped_as_an_eager_one():
    gammas = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = in_float8(tiny_llama())
        optimizer = MuonClip(model, lr=RATE, weight_decay=0.1, tau=TAU)
        running = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            step(running, optimizer)
        gammas.append(torch.stack([each.gamma for each in optimizer.qk_clip.report().layers.values()]))
    assert (gammas[0] < 1).any()
    torch.testing.assert_close(gammas[1], gammas[0], rtol=1e-4, atol=0)


def test_a_model_that_is_converted_behind_its_optimizer_stays_found():
    """The weights are the same parameters in other modules."""
    model = tiny_llama()
    optimizer = MuonClip(model, lr=RATE, weight_decay=0.1, tau=TAU)
    products = Products(in_float8(model))
    step(model, optimizer)
    for layer, seen in enumerate(optimizer.qk_clip.report().layers.values()):
        torch.testing.assert_close(seen.gamma.double(), factors(products.maxima(layer)), rtol=1e-5, atol=0)


def test_a_projection_with_a_bias_in_bfloat16():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            q, k, v = (each(x).unflatten(-1, (2, 16)).transpose(1, 2) for each in (self.q, self.k, self.v))
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.manual_seed(0)
    model = convert_to_float8_training(Attention(), config=Float8LinearConfig(emulate=True))
    x = torch.randn(2, 16, 32).bfloat16()
    clip = QKClip(model, tau=1e-3, example_inputs=x)  # float32 weights and bfloat16 inputs, as under mixed precision
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    model(x).sum().backward()
    clip.step()
    (seen,) = clip.report().layers.values()
    assert (seen.gamma < 0.1).all()
    rows = seen.gamma.sqrt().repeat_interleave(16)
    for name in ("q.weight", "q.bias", "k.weight", "k.bias"):
        own = rows[:, None] if name.endswith("weight") else rows
        torch.testing.assert_close(model.get_parameter(name), before[name] * own, rtol=1e-6, atol=0)
