"""MuonClip trains with torchao's fake-quantised and MX linears: the clip scales the weight that is rounded."""

import copy

import pytest
import torch
from torch import nn
from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int4WeightOnlyConfig, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from muonclip.torch import MuonClip

WIDTH, HEADS, TAU = 64, 2, 0.5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def int4(**options):
    return IntxFakeQuantizeConfig(torch.int4, group_size=32, **options)


def prepared(**configs):
    def prepare(model):
        quantize_(model, QATConfig(step="prepare", **configs))
        return model

    return prepare


def in_mxfp8(model):
    for name, linear in list(model.named_children()):
        emulated = MXFP8Linear(WIDTH, WIDTH, bias=False, kernel_preference=KernelPreference.EMULATED)
        emulated.weight = linear.weight
        setattr(model, name, emulated)
    return model


def mx_fake_quantised(dtype):
    def prepare(model):
        emulated = KernelPreference.EMULATED
        config = MXDynamicActivationMXWeightConfig(
            activation_dtype=dtype, weight_dtype=dtype, kernel_preference=emulated
        )
        return prepared(base_config=config)(model.bfloat16())

    return prepare


KINDS = {
    "int4 weights": prepared(weight_config=int4()),
    "Int4WeightOnlyConfig": prepared(base_config=Int4WeightOnlyConfig(group_size=32)),
    "int8 activations, int4 weights": prepared(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False), weight_config=int4()
    ),
    "float8": prepared(base_config=Float8DynamicActivationFloat8WeightConfig()),
    "MXFP8": in_mxfp8,
    "MXFP8 fake-quantised": mx_fake_quantised(torch.float8_e4m3fn),
    "MXFP4 fake-quantised": mx_fake_quantised(torch.float4_e2m1fn_x2),
}


def maxima(model, x):
    """fp64 [heads], of the products as this model computes them."""
    with torch.no_grad():
        q, k = (each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).double() for each in (model.q, model.k))
    logits = q @ k.mT / (WIDTH // HEADS) ** 0.5
    return logits.masked_fill(~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -torch.inf).amax((0, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_is_that_of_the_rounded_products_and_the_weight_is_scaled(kind):
    torch.manual_seed(0)
    model = KINDS[kind](Attention())
    assert type(model.q) is not nn.Linear
    without = copy.deepcopy(model)
    options = dict(lr=1e-2, weight_decay=0.1)
    x = torch.randn(2, 16, WIDTH).to(model.q.weight.dtype)
    clipped, unclipped = MuonClip(model, **options, tau=TAU), MuonClip(without, **options, qk_clip=None)
    for _ in range(2):
        without.load_state_dict(model.state_dict())
        wanted = maxima(model, x)
        for each, optimizer in ((without, unclipped), (model, clipped)):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        (seen,) = clipped.qk_clip.report().layers.values()
        torch.testing.assert_close(seen.gamma.double(), (TAU / wanted).clamp(max=1.0), rtol=1e-5, atol=0)
        assert (seen.gamma < 0.9).any()
        rows = seen.gamma.sqrt().repeat_interleave(WIDTH // HEADS)[:, None]
        for own, other in ((model.q, without.q), (model.k, without.k)):
            tolerance = 1e-6 if own.weight.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(own.weight.float(), other.weight.float() * rows, rtol=tolerance, atol=0)
        x = 2 * x


@pytest.mark.parametrize("learned", [False, True])
def test_weights_with_fixed_scales_are_refused(learned):
    """A weight that is scaled would be rounded to, and clamped by, the grid of what it was."""
    from torchao.quantization.qat import initialize_fake_quantizers

    model = prepared(weight_config=int4(is_dynamic=False, range_learning=learned))(Attention())
    x = torch.randn(2, 16, WIDTH)
    initialize_fake_quantizers(model, (x,))
    with pytest.raises(ValueError, match=r"FakeQuantizedLinear.*is_dynamic=True"):
        MuonClip(model, lr=1e-2, weight_decay=0.1)
