"""`DotProductAttention` of TransformerEngine, imported by name before: its heads are found, observed and clipped."""

import importlib
import math

import pytest
import torch
from kernel_case import HEAD, HEADS, WIDTH, Attention, assert_clipped_to, stand_ins, starts
from torch import nn

from muonclip.torch import QKClip

ROWS, COLUMNS = 11, 15


@pytest.fixture
def kernel(monkeypatch, no_other_patches):
    """The class, as a user holds it who has imported it by name."""
    with stand_ins(monkeypatch):
        yield importlib.import_module("transformer_engine.pytorch").DotProductAttention


class Layer(Attention):
    """The attention of a user, with the kernel as a module of its own."""

    def __init__(self, core, **options):
        super().__init__(None, groups=HEADS)
        self.core, self.options = core, options

    def forward(self, x, memory):
        q, k, v = self.heads(x, memory)
        layout = self.core.qkv_format
        if layout != "bshd":
            q, k, v = (t.transpose(0, 1) if layout == "sbhd" else t[0] for t in (q, k, v))
        out = self.core(q, k, v, **self.options)
        out = out[0] if isinstance(out, tuple) else out
        return self.o(out.transpose(0, 1) if layout == "sbhd" else out[None] if layout == "thd" else out)

    def largest(self, x, memory):
        """[H] in float64, over the pairs that the kernel computed last."""
        with torch.no_grad():
            self(x, memory)
            q, k, _ = self.double().heads(x.double(), memory.double())
        self.float()
        scale = self.core.fused_attention.softmax_scale
        return (scale * torch.einsum("bihd,bjhd->bhij", q, k) + self.core.last_bias).amax((0, 2, 3)).numpy()


def padding(*lengths, of):
    return (torch.arange(of) >= torch.tensor(lengths)[:, None])[:, None, None]


ARBITRARY = torch.rand(2, 1, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) < 0.4
PADDED = dict(attention_mask=(padding(11, 4, of=ROWS), padding(9, 15, of=COLUMNS)))
PACKED = dict(cu_seqlens_q=starts(4, 1, 6), cu_seqlens_kv=starts(6, 2, 7))
GAPS = dict(
    cu_seqlens_q=starts(3, 1, 4),
    cu_seqlens_kv=starts(5, 2, 4),
    cu_seqlens_q_padded=starts(4, 1, 6),
    cu_seqlens_kv_padded=starts(6, 2, 7),
)
CASES = {  # the module's options, and those of the call
    "causal": (dict(attn_mask_type="causal"), {}),
    "in the order of positions": (dict(attn_mask_type="causal", qkv_format="sbhd"), {}),
    "bottom right": (dict(attn_mask_type="causal_bottom_right", softmax_scale=0.8), {}),
    "no mask": (dict(attn_mask_type="no_mask"), {}),
    "of the call": (dict(attn_mask_type="no_mask"), dict(attn_mask_type="causal", window_size=(3, 0))),
    "window": (dict(attn_mask_type="no_mask", window_size=(2, 1)), {}),
    "window at the first": (dict(attn_mask_type="no_mask", window_size=(2, 1), bottom_right_diagonal=False), {}),
    "arbitrary": (dict(attn_mask_type="arbitrary"), dict(attention_mask=ARBITRARY)),
    "padding": (dict(attn_mask_type="padding"), PADDED),
    "causal padding": (dict(attn_mask_type="padding,causal"), PADDED),
    "bottom right padding": (dict(attn_mask_type="padding_causal_bottom_right", window_size=(4, 0)), PADDED),
    "padding by lengths": (
        dict(attn_mask_type="padding_causal"),
        dict(cu_seqlens_q=starts(11, 4), cu_seqlens_kv=starts(9, 15)),
    ),
    "packed": (dict(attn_mask_type="padding_causal_bottom_right", qkv_format="thd"), PACKED),
    "packed at the first": (dict(attn_mask_type="padding_causal", qkv_format="thd"), PACKED),
    "packed with gaps": (dict(attn_mask_type="padding_causal_bottom_right", qkv_format="thd"), GAPS),
}


def layer_and_inputs(kernel, module, call):
    torch.manual_seed(0)
    options = dict(attention_dropout=0.0) | dict(qkv_format="bshd") | module
    layer = Layer(kernel(HEADS, HEAD, **options), **call)
    batch = 1 if layer.core.qkv_format == "thd" else 2
    return layer, (torch.randn(batch, ROWS, WIDTH), torch.randn(batch, COLUMNS, WIDTH))


@pytest.mark.parametrize("case", CASES)
def test_loud_heads_end_at_tau_and_others_stay(kernel, case):
    layer, inputs = layer_and_inputs(kernel, *CASES[case])
    assert_clipped_to(layer, inputs, lambda: layer.largest(*inputs))


@pytest.mark.parametrize("kind", ["post_scale_bias", "pre_scale_bias"])
def test_a_bias_is_not_part_of_a_logit(kernel, kind):
    bias = 10 * torch.rand(1, HEADS, ROWS, COLUMNS)
    call = dict(core_attention_bias_type=kind, core_attention_bias=bias)
    layer, inputs = layer_and_inputs(kernel, dict(attn_mask_type="no_mask"), call)
    assert_clipped_to(layer, inputs, lambda: layer.largest(*inputs))


def test_its_own_maxima_are_taken_where_it_returns_them(kernel, monkeypatch):
    layer, inputs = layer_and_inputs(kernel, dict(attn_mask_type="causal", return_max_logit=True), {})
    from muonclip.torch import MaxLogits

    def refuse(*args, **kwargs):
        raise AssertionError("computed though the kernel has computed it")

    monkeypatch.setattr(MaxLogits, "observe", refuse)
    assert_clipped_to(layer, inputs, lambda: layer.largest(*inputs), observe="needed")


def test_its_own_maxima_are_not_taken_with_a_bias(kernel):
    """They have the bias in them."""
    bias = 10 * torch.rand(1, HEADS, ROWS, COLUMNS)
    call = dict(core_attention_bias_type="post_scale_bias", core_attention_bias=bias)
    layer, inputs = layer_and_inputs(kernel, dict(attn_mask_type="no_mask", return_max_logit=True), call)
    assert_clipped_to(layer, inputs, lambda: layer.largest(*inputs))


@pytest.mark.parametrize("argument", ["score_mod", "inference_params"])
def test_an_argument_that_is_not_understood_is_named(kernel, argument):
    layer, inputs = layer_and_inputs(kernel, {}, {argument: math.sin})
    with pytest.raises(ValueError, match=f"it calls DotProductAttention with {argument}, of which QK-Clip does not"):
        QKClip(layer, example_inputs=inputs)


def test_a_mask_that_is_not_known_is_named(kernel):
    layer, inputs = layer_and_inputs(kernel, dict(attn_mask_type="tree"), {})
    with pytest.raises(ValueError, match="it calls DotProductAttention with attn_mask_type='tree'"):
        QKClip(layer, example_inputs=inputs)


def test_when_nobody_observes_any_more_the_method_is_as_it_was(kernel):
    layer, inputs = layer_and_inputs(kernel, {}, {})
    method = kernel.forward
    clip = QKClip(nn.ModuleDict({"layer": layer})["layer"], example_inputs=inputs)
    assert kernel.forward is not method
    clip.remove()
    assert kernel.forward is method
