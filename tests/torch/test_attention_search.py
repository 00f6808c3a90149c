"""Which rows feed which heads, found by watching: in every layout, under any name, or refused with a reason."""

import copy
import importlib.util
import math
import re
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from dense_probe import Replay
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.llama import modeling_llama

from muonclip.torch import HeadRows, MaxLogits, MuonClip, QKClip, QKProjection

WIDTH, HEADS, HEAD, GROUPS = 10, 4, 6, 2
LENGTH = 9


def rotated(x):
    """Rotary embedding over part of the head."""
    half = 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / torch.tensor([1.0, 7.0], dtype=x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), -1)


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)


class Base(nn.Module):
    """[B, T, WIDTH] → the same; `heads(x)` gives q, k, v with heads in front."""

    def __init__(self):
        super().__init__()
        self.build()
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x):
        return self.o(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return attend(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


class Separate(Base):
    def build(self):
        self.a, self.b, self.c = (nn.Linear(WIDTH, HEADS * HEAD) for _ in range(3))

    def heads(self, x):
        q, k, v = (m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.a, self.b, self.c))
        return rotated(q), rotated(k), v


class Grouped(Base):
    def build(self):
        self.a = nn.Linear(WIDTH, HEADS * HEAD)
        self.b, self.c = (nn.Linear(WIDTH, GROUPS * HEAD) for _ in range(2))

    def heads(self, x):
        q, k, v = (m(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for m in (self.a, self.b, self.c))
        return rotated(q), rotated(k), v


class RepeatedKeys(Grouped):
    def heads(self, x):
        q, k, v = super().heads(x)
        return q, k.repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)


class Blocks(Base):
    def build(self):
        self.a = nn.Linear(WIDTH, 3 * HEADS * HEAD)

    def heads(self, x):
        return self.a(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4).unbind(0)


class Interleaved(Base):
    def build(self):
        self.a = nn.Linear(WIDTH, 3 * HEADS * HEAD)

    def heads(self, x):
        return self.a(x).unflatten(-1, (HEADS, 3 * HEAD)).transpose(1, 2).split(HEAD, -1)


class InterleavedByGroup(Base):
    """[q q k v] for every key head: Falcon, InternLM2."""

    def build(self):
        self.a = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * HEAD)

    def heads(self, x):
        parts = self.a(x).unflatten(-1, (GROUPS, HEADS // GROUPS + 2, HEAD))
        q, k, v = parts.split((HEADS // GROUPS, 1, 1), -2)
        return q.flatten(2, 3).transpose(1, 2), k.squeeze(3).transpose(1, 2), v.squeeze(3).transpose(1, 2)


class HeadsLast(Base):
    """Row r belongs to head r mod H."""

    def build(self):
        self.a, self.b, self.c = (nn.Linear(WIDTH, HEADS * HEAD) for _ in range(3))

    def heads(self, x):
        return [m(x).unflatten(-1, (HEAD, HEADS)).permute(0, 3, 1, 2) for m in (self.a, self.b, self.c)]


class RawWeights(Base):
    """Parameters [in, heads, head width] and products without modules."""

    def build(self):
        self.a, self.b, self.c = (nn.Parameter(torch.randn(WIDTH, HEADS, HEAD) / 3) for _ in range(3))
        self.d = nn.Parameter(torch.zeros(HEADS, HEAD))

    def heads(self, x):
        q = torch.einsum("btd,dhe->bhte", x, self.a) + self.d[:, None]
        return q, torch.einsum("btd,dhe->bhte", x, self.b), torch.einsum("btd,dhe->bhte", x, self.c)


class RawMatrices(Base):
    def build(self):
        self.a, self.b, self.c = (nn.Parameter(torch.randn(WIDTH, HEADS * HEAD) / 3) for _ in range(3))
        self.d = nn.Parameter(torch.zeros(HEADS * HEAD))

    def heads(self, x):
        q, k, v = (x @ w for w in (self.a, self.b, self.c))
        return [y.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for y in (q + self.d, k, v)]


class Latent(Base):
    """MLA with one fused down-projection for keys and values, as in DeepSeek."""

    full_rank = False

    def build(self):
        self.a = nn.Linear(WIDTH, 5)
        self.b = nn.Linear(WIDTH if self.full_rank else 5, HEADS * HEAD)
        self.c = nn.Linear(WIDTH, 7 + 2)
        self.d = nn.RMSNorm(7)
        self.e = nn.Linear(7, HEADS * (4 + HEAD))

    def heads(self, x):
        q = self.b(x if self.full_rank else self.a(x)).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        latent, shared = self.c(x).split((7, 2), -1)
        k, v = self.e(self.d(latent)).unflatten(-1, (HEADS, -1)).transpose(1, 2).split((4, HEAD), -1)
        return q, torch.cat((k, shared[:, None].expand(-1, HEADS, -1, -1)), -1), v


class LatentFullRank(Latent):
    full_rank = True


class WrittenOut(Separate):
    def attend(self, q, k, v):
        scores = q @ k.transpose(-2, -1) / math.sqrt(HEAD)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


class Einsum(Separate):
    """[B, T, H, d], capped, additive mask."""

    def attend(self, q, k, v):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        scores = 5 * torch.tanh(torch.einsum("bihd,bjhd->bhij", q * HEAD**-0.5, k) / 5)
        scores = scores + torch.full(scores.shape[-2:], -1e9).triu(1)
        return F.softmax(scores, dim=-1) @ v


class Flex(Grouped):
    def attend(self, q, k, v):
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[-2], k.shape[-2], device="cpu")
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


class Keywords(Separate):
    """Every argument by its name."""

    def heads(self, x):
        q = F.linear(input=x, weight=self.a.weight, bias=self.a.bias)
        k = torch.addmm(input=torch.zeros(1), mat1=x.flatten(0, 1), mat2=self.b.weight.T).view(*x.shape[:2], -1)
        v = torch.matmul(input=x, other=self.c.weight.T)
        return [y.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for y in (q, k, v)]

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)


class KeywordsWrittenOut(Keywords):
    def attend(self, q, k, v):
        scores = torch.bmm(input=q.flatten(0, 1), mat2=k.flatten(0, 1).mT).view(*q.shape[:3], -1)
        scores = torch.div(input=scores, other=math.sqrt(HEAD))
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = torch.masked_fill(input=scores, mask=~seen, value=-1e4)
        return torch.matmul(input=torch.softmax(input=scores, dim=-1), other=v)


class AgainInBackward(torch.autograd.Function):
    """Keeps nothing but its inputs, and runs `function` again to differentiate it."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        inputs = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        return None, *torch.autograd.grad(output, inputs, gradient)


class InAFunction(Separate):
    def attend(self, q, k, v):
        return AgainInBackward.apply(attend, q, k, v)


class RotatedInAFunction(Separate):
    """As by a Triton kernel, whose backward computes again."""

    def heads(self, x):
        q, k, v = super().heads(x)
        return AgainInBackward.apply(rotated, q), AgainInBackward.apply(rotated, k), v


def _operator(name, function):
    operator = torch.library.custom_op(f"muonclip_test::{name}", function, mutates_args=())
    operator.register_fake(lambda q, k, v: torch.empty_like(q))

    def backward(ctx, gradient):
        return AgainInBackward.backward(ctx, gradient)[1:]

    def setup(ctx, inputs, output):
        ctx.function = function
        ctx.save_for_backward(*inputs)

    operator.register_autograd(backward, setup_context=setup)
    return operator


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v).clone()


def _linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention without logits."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


ATTEND, LINEAR = _operator("attend", _attend), _operator("linear", _linear)


class InAnOperator(Separate):
    def attend(self, q, k, v):
        return ATTEND(q, k, v)


class InAnOperatorOfItsOwn(InAnOperator):
    """The module holds the operator, which cannot be copied."""

    def build(self):
        super().build()
        self.operators = [ATTEND]

    def attend(self, q, k, v):
        return self.operators[0](q, k, v)


class AfterLinearAttention(Separate):
    """Which has no logits and projections of its own."""

    def build(self):
        super().build()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, HEADS * HEAD) for _ in range(6))

    def attend(self, q, k, v):
        return super().attend(q, k, v) + self.linear

    def heads(self, x):
        heads = [m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in self.projections]
        self.linear = LINEAR(*heads[:3]) + AgainInBackward.apply(_linear, *heads[3:])
        return super().heads(x)


class WithExperts(Separate):
    """Experts as one batch of products, with squared ReLU between them."""

    def build(self):
        super().build()
        self.up, self.down = (nn.Parameter(torch.randn(2, *shape) / 3) for shape in ((WIDTH, 13), (13, WIDTH)))

    def forward(self, x):
        x = super().forward(x)
        h = torch.bmm(x, self.up).relu()
        return x + torch.bmm(h * h, self.down)


class Torch(nn.Module):
    def __init__(self, weights=False):
        super().__init__()
        self.a, self.weights = nn.MultiheadAttention(24, HEADS, batch_first=True), weights

    def forward(self, x):
        x = F.pad(x, (0, 24 - WIDTH))
        return self.a(x, x, x, need_weights=self.weights)[0][..., :WIDTH]


class TorchWithWeights(Torch):
    def __init__(self):
        super().__init__(weights=True)


class TorchCross(Torch):
    def forward(self, x):
        x = F.pad(x, (0, 24 - WIDTH))
        return self.a(x, x.flip(1), x.flip(1), need_weights=False)[0][..., :WIDTH]


LAYOUTS = {
    Separate: "mha",
    Grouped: "gqa",
    RepeatedKeys: "gqa",
    Blocks: "mha",
    Interleaved: "mha",
    InterleavedByGroup: "gqa",
    HeadsLast: "mha",
    RawWeights: "mha",
    RawMatrices: "mha",
    Latent: "mla",
    LatentFullRank: "mla",
    WrittenOut: "mha",
    Einsum: "mha",
    Flex: "gqa",
    Keywords: "mha",
    KeywordsWrittenOut: "mha",
    InAFunction: "mha",
    RotatedInAFunction: "mha",
    InAnOperator: "mha",
    InAnOperatorOfItsOwn: "mha",
    AfterLinearAttention: "mha",
    WithExperts: "mha",
    Torch: "mha",
    TorchWithWeights: "mha",
    TorchCross: "mha",
}


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


def loud(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(torch.rand(parameter.shape[-1]) * 4)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.randn(2, LENGTH, WIDTH)


def heads_of(module, x):
    """q, k of our own attentions; the library's see nothing of it."""
    with torch.no_grad():
        return module.heads(x)[:2]


def maxima(q, k, scale=HEAD**-0.5):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = scale * q.double() @ k.double().mT
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~allowed, -math.inf).amax((0, 2, 3)).numpy()


@pytest.fixture(autouse=True)
def _flex_backward_on_the_cpu(monkeypatch):
    """Its written-out form has one, but it is refused there: enough to observe it without a GPU."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks
@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if issubclass(kind, Base)])
@pytest.mark.parametrize("seed", range(3))
def test_every_layout_is_found_and_clipped_exactly(kind, seed):
    model, x = loud(Stack(kind), seed)
    clip = QKClip(model, observe="always")
    inputs = {}
    for name, layer in model.named_modules():
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.__setitem__(name, args[0]))
    model(x)
    names = [f"layers.{i}" for i in range(2)]
    before = {name: heads_of(model.get_submodule(name), inputs[name]) for name in names}
    seen = {name: maxima(*before[name]) for name in names}
    clip.tau = float(np.median(np.concatenate(list(seen.values()))))
    clip.step()
    report = clip.report()
    assert list(report.layers) == names
    assert {p.kind for p in clip.projections.values()} == {LAYOUTS[kind]}
    assert 0 < report.clipped_heads < report.heads
    for name in names:
        np.testing.assert_allclose(report.layers[name].max_logits, seen[name], rtol=1e-5)
        q, k = heads_of(model.get_submodule(name), inputs[name])
        np.testing.assert_allclose(maxima(q, k), np.minimum(seen[name], clip.tau), rtol=1e-5)
        quiet = torch.from_numpy(seen[name] <= clip.tau)
        assert torch.equal(q[:, quiet], before[name][0][:, quiet])
        if LAYOUTS[kind] == "gqa":
            assert torch.equal(k, before[name][1])


@pytest.mark.parametrize("kind", [Torch, TorchWithWeights, TorchCross])
def test_torch_s_own_attention(kind):
    model, x = loud(Stack(kind))
    clip = QKClip(model, tau=2.0, observe="always")
    first = model.layers[0].a
    inputs = F.pad(model.norm(x), (0, 24 - WIDTH)).detach()
    other = inputs.flip(1) if kind is TorchCross else inputs

    def logits():
        with torch.no_grad():
            q, k, _ = F.linear(inputs, first.in_proj_weight, first.in_proj_bias).chunk(3, -1)
            k = F.linear(other, first.in_proj_weight, first.in_proj_bias).chunk(3, -1)[1]
        q, k = (t.unflatten(-1, (HEADS, 6)).transpose(1, 2).double() for t in (q, k))
        return (q @ k.mT / math.sqrt(6)).amax((0, 2, 3)).numpy()

    model(x)
    before, values = logits(), first.in_proj_weight[48:].clone()
    assert list(clip.projections) == ["layers.0.a", "layers.1.a"]
    clip.step()
    assert 0 < (before > 2).sum() < HEADS or before.min() > 2
    np.testing.assert_allclose(clip.report().layers["layers.0.a"].max_logits, before, rtol=1e-5)
    np.testing.assert_allclose(logits(), np.minimum(before, 2.0), rtol=1e-5)
    assert torch.equal(first.in_proj_weight[48:], values)


def test_nn_transformer_s_attentions_cross_attention_included():
    torch.manual_seed(0)
    model = nn.Transformer(24, 4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=20, batch_first=True)
    clip = QKClip(model, tau=0.05)
    names = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    assert list(clip.projections) == names
    model(torch.randn(2, 5, 24), torch.randn(2, 7, 24)).sum().backward()
    clip.step()
    assert clip.report().clipped_heads == 12


def renamed(source):
    """The source with every class, module and parameter called something else."""
    names = sorted(set(re.findall(r"class (Llama\w+)", source)), key=len, reverse=True)
    names += ["self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "mlp"]
    names += ["embed_tokens", "input_layernorm", "post_attention_layernorm", "lm_head", "rotary_emb", "layers"]
    for number, name in enumerate(names):
        if name not in ("LlamaPreTrainedModel",):
            source = re.sub(rf"\b{name}\b(?!\s*import)", f"thing{number}", source)
    return source.replace("thing", "Thing_")


def test_nothing_depends_on_names(tmp_path):
    text = renamed(Path(modeling_llama.__file__).read_text(encoding="utf-8"))
    file = tmp_path / "modeling_llama.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("transformers.models.llama.renamed", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
            num_key_value_heads=2, head_dim=10,
        )  # fmt: skip
        classes = re.findall(r"^class (Thing_\d+)\(LlamaPreTrainedModel, GenerationMixin\)", text, re.MULTILINE)
        model = getattr(module, classes[0])(config)
        original = transformers.LlamaForCausalLM(config)
        found, expected = QKClip(model), QKClip(original)
    finally:
        del sys.modules[module.__name__]
    assert not any("attn" in name or "proj" in name for name, _ in model.named_modules())
    rows = [
        [[(r.num_heads, r.size, r.start, r.step, r.axis) for _, r in p.parts()] for p in clip.projections.values()]
        for clip in (found, expected)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2


class Normed(Separate):
    """QK-norm with a gain for each channel of a head, shared by the heads."""

    def build(self):
        super().build()
        self.f, self.g = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def heads(self, x):
        q, k, v = super().heads(x)
        return self.f(q), self.g(k), v


class L2Normed(Separate):
    def heads(self, x):
        q, k, v = super().heads(x)
        return F.normalize(q, dim=-1) * 5, F.normalize(k, dim=-1) * 5, v


class NormedWhole(Separate):
    """OLMo 2: one norm over all heads, with a gain for each channel of each head."""

    def build(self):
        super().build()
        self.f, self.g = nn.RMSNorm(HEADS * HEAD), nn.RMSNorm(HEADS * HEAD)

    def heads(self, x):
        q, k = self.f(self.a(x)), self.g(self.b(x))
        return [y.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for y in (q, k, self.c(x))]


class LatentNormed(Latent):
    """QK-Normed MLA: one norm over the head's own part of the key and the part that heads share."""

    def build(self):
        super().build()
        self.f, self.g = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def heads(self, x):
        q, k, v = super().heads(x)
        return self.f(q), self.g(k), v


@pytest.mark.parametrize("kind", [Normed, L2Normed, NormedWhole, LatentNormed])
def test_qk_norm_is_recognised_and_left_alone(kind):
    model, x = loud(Stack(kind))
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, tau=1e-3)
    assert "QK-norm: scaling the projection would change nothing" in str(optimizer.plan)
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.qk_clip.report().max_logit > 1e-3


def test_a_gain_per_head_is_clipped_on_request():
    model, x = loud(Stack(NormedWhole))
    clip = QKClip(model, observe="always", clip_gains=True)
    weights = model.layers[0].a.weight.clone()
    normed = model.norm(x).detach()
    before = maxima(*heads_of(model.layers[0], normed))
    clip.tau = float(np.median(before))
    model(x)
    clip.step()
    np.testing.assert_allclose(maxima(*heads_of(model.layers[0], normed)), np.minimum(before, clip.tau), rtol=1e-5)
    assert torch.equal(model.layers[0].a.weight, weights)


def test_a_gain_that_heads_share_is_not_clipped_on_request_either():
    model, _ = loud(Stack(Normed))
    optimizer = MuonClip(model, qk_clip=QKClip(model, clip_gains=True))
    assert "its gain is shared by the heads and not clipped" in str(optimizer.plan)


class Clamped(Separate):
    def heads(self, x):
        return [t.clamp(-8, 8) for t in super().heads(x)]


class Gated(Separate):
    """A query that is the square of a projection."""

    def heads(self, x):
        q, k, v = super().heads(x)
        return q * q.abs(), k, v


class Quantised(Separate):
    """The weight is made of integers in the forward."""

    def build(self):
        super().build()
        self.register_buffer("w8", torch.randint(-8, 8, (HEADS * HEAD, WIDTH), dtype=torch.int8))

    def heads(self, x):
        _, k, v = super().heads(x)
        q = F.linear(x, self.w8.float() / 8).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        return q, k, v


class Dilated(WrittenOut):
    def attend(self, q, k, v):
        scores = torch.roll(q @ k.mT, 1, -1)
        return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Clamped, "its queries are clamped between the projection and the logits"),
        (Gated, "its queries do not depend linearly on the output of a projection"),
        (Quantised, r"its queries come from a product \(linear\) whose weight is not a parameter that could be scaled"),
        (Dilated, "its logits pass through roll before the softmax"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_declaration_to_write(kind, reason):
    model, _ = loud(Stack(kind))
    with pytest.raises(ValueError, match=reason) as error:
        MuonClip(model)
    text = str(error.value)
    assert "layers.0" in text
    assert "layers.1" in text
    code = re.search(r"  attn = .*\n  projection = .*\n  QKClip.*", text)[0]
    names = dict(model=model, QKProjection=QKProjection, QKClip=QKClip, MaxLogits=MaxLogits)
    if kind is Dilated:
        exec("\n".join(line.strip() for line in code.splitlines()[:2]), names)
        assert names["projection"].num_heads == HEADS
    # What scales nothing runs as it is written.
    _, x = loud(Stack(kind))
    watched = eval(re.search(r"  (QKClip\(model, declare=\{.*reason=.*\))\n", text)[1], names)
    model(x).square().mean().backward()
    watched.step()
    assert {name: layer.gamma.tolist() for name, layer in watched.report().layers.items()} == {
        f"layers.{i}": [1.0] * HEADS for i in range(2)
    }


def test_a_refused_attention_can_be_declared_or_watched_only():
    model, x = loud(Stack(Clamped))
    declare = {
        f"layers.{i}": QKProjection("mha", HEADS, MaxLogits(HEADS), reason="clamped: watched only") for i in range(2)
    }
    clip = QKClip(model, tau=1e-3, declare=declare)
    model(x)
    clip.step()
    assert clip.report().clipped_heads == 0
    assert clip.report().max_logit > 1e-3
    with pytest.raises(ValueError, match=r"declare names 'layers\.7', which is not a module"):
        QKClip(model, declare={"layers.7": declare["layers.0"]})


@pytest.mark.parametrize("wrong", ["start", "stride", "halves"])
def test_a_wrong_declaration_is_caught_before_it_is_trained_with(wrong):
    """Interleaved heads declared as blocks, a wrong start, two halves of heads exchanged."""
    model, x = loud(Stack(Interleaved))
    layer = model.layers[0].a
    stride, start = 3 * HEAD, HEAD
    if wrong == "start":
        parts = HeadRows(layer, HEADS, HEAD, 2 * HEAD, stride), HeadRows(layer, HEADS, HEAD, start, stride)
    elif wrong == "stride":
        parts = HeadRows(layer, HEADS, HEAD), HeadRows(layer, HEADS, HEAD, HEADS * HEAD)
    else:
        swapped = HeadRows(layer, HEADS, HEAD, 0, stride).rows("cpu")[[1, 0, 2, 3]]
        parts = HeadRows.from_index(swapped, layer), HeadRows(layer, HEADS, HEAD, start, stride)
    projection = QKProjection("mha", HEADS, MaxLogits(HEADS), query=(parts[0],), key=(parts[1],))
    clip = QKClip(model, declare={"layers.0": projection})
    with pytest.raises(ValueError, match=r"the declaration of layers\.0 is wrong\. It gives head \d the rows"):
        model(x)
    clip.remove()


def test_a_declared_projection_behind_a_norm_is_caught():
    model, x = loud(Stack(Normed))
    projection = QKProjection.mha(
        q=model.layers[0].a, k=model.layers[0].b, num_heads=HEADS, max_logits=MaxLogits(HEADS)
    )
    clip = QKClip(model, declare={"layers.0": projection})
    with pytest.raises(ValueError, match=r"layers\.0 normalises its queries after the projection"):
        model(x)
    clip.remove()


def test_a_layer_used_twice_is_clipped_once_by_the_larger_maximum():
    model, x = loud(Stack(Separate))
    model.layers[1] = model.layers[0]
    layer, inputs = model.layers[0], []
    clip = QKClip(model, observe="always", tau=1.0)
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    model(x)
    before = np.maximum(*(maxima(*heads_of(layer, each)) for each in inputs))
    assert list(clip.projections) == ["layers.0"]
    clip.step()
    np.testing.assert_allclose(clip.report().layers["layers.0"].max_logits, before, rtol=1e-5)
    after = np.maximum(*(maxima(*heads_of(layer, each)) for each in inputs))
    np.testing.assert_allclose(after, np.minimum(before, 1.0), rtol=1e-5)


def test_tied_weights_are_clipped_once_by_the_larger_maximum():
    model, x = loud(Stack(Separate))
    for name in ("a", "b"):
        getattr(model.layers[1], name).weight = getattr(model.layers[0], name).weight
        getattr(model.layers[1], name).bias = getattr(model.layers[0], name).bias
    clip = QKClip(model, observe="always", tau=1.0)
    inputs = {}
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda module, args, i=index: inputs.__setitem__(i, args[0].detach()))
    model(x)
    before = np.maximum(*(maxima(*heads_of(model.layers[i], inputs[i])) for i in range(2)))
    clip.step()
    assert list(clip.projections) == ["layers.0"]
    after = np.maximum(*(maxima(*heads_of(model.layers[i], inputs[i])) for i in range(2)))
    np.testing.assert_allclose(after, np.minimum(before, 1.0), rtol=1e-5)


@pytest.mark.parametrize("when", ["before", "between"])
def test_weights_tied_in_three_places_are_clipped_once_by_the_largest_maximum(when):
    """Before the search, or between it and the first forward."""
    torch.manual_seed(0)
    model, x = loud(nn.Sequential(Stack(Separate), Stack(Separate)))
    layers = [*model[0].layers, *model[1].layers][:3]
    clip = None if when == "before" else QKClip(model, observe="always", tau=1.0)
    for layer in layers[1:]:
        for name in ("a", "b"):
            getattr(layer, name).weight = getattr(layers[0], name).weight
            getattr(layer, name).bias = getattr(layers[0], name).bias
    clip = QKClip(model, observe="always", tau=1.0) if clip is None else clip
    inputs = {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0].detach()))
    model(x)
    before = [maxima(*heads_of(layer, inputs[layer])) for layer in layers]
    clip.step()
    after = [maxima(*heads_of(layer, inputs[layer])) for layer in layers]
    loudest = np.max(before, 0)
    assert (loudest > 1.0).any()
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old * np.minimum(1.0, 1.0 / loudest), rtol=1e-5)


class SharedKeys(nn.Module):
    """Two attentions with queries of their own and the keys of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Separate(), Separate()
        self.second.b = self.first.b

    def forward(self, x):
        return self.second(x) + self.first(x)


def test_a_key_that_two_attentions_share_is_left_alone():
    model, x = loud(SharedKeys())
    clip = QKClip(model, observe="always", tau=0.5)
    key = model.first.b.weight.clone()
    before = [maxima(*heads_of(layer, x)) for layer in (model.first, model.second)]
    model(x)
    clip.step()
    assert torch.equal(model.first.b.weight, key)
    for layer, s in zip((model.first, model.second), before, strict=True):
        np.testing.assert_allclose(maxima(*heads_of(layer, x)), np.minimum(s, 0.5), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
def test_lora_scales_base_and_adapter_together():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        num_key_value_heads=2, head_dim=10, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"]))
    clip = QKClip(model, observe="always", clip_frozen=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    names = list(clip.projections)
    replay = Replay(model, names)
    with replay.recording():
        model(input_ids=torch.randint(3, 50, (2, 9))).logits.square().mean().backward()
    before = replay.run()
    clip.tau = float(np.median(np.concatenate([s for s, _ in before.values()])))
    clip.step()
    report = clip.report()
    clip.remove()
    after = replay.run()
    assert 0 < report.clipped_heads < report.heads
    for name in names:
        np.testing.assert_allclose(after[name][0], np.minimum(before[name][0], clip.tau), rtol=2e-5)


def test_the_plan_says_what_is_known_and_what_is_to_come():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stack(Grouped)

        def forward(self, *, tables):
            return self.inner(tables["x"])

    model = Odd()
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0)
    assert "attention to be found and checked: the first forward with gradients" in str(optimizer.plan)
    model(tables={"x": torch.randn(2, 5, WIDTH)}).sum().backward()
    optimizer.step()
    assert re.search(r"inner\.layers\.0,1 ×2 +gqa +4 +above tau +scaled_dot_product_attention", str(optimizer.plan))
    assert "to be found" not in str(optimizer.plan)


def test_muon_reads_a_found_fused_weight_as_its_matrices():
    for kind, shapes in ((Blocks, "3 × (24×10)"), (InterleavedByGroup, None), (Interleaved, "3 × (24×10)")):
        plan = {line.name: line for line in MuonClip(Stack(kind)).plan.parameters}
        line = plan["layers.0.a.weight"]
        assert line.layout is not None
        assert sorted(line.layout.matrix_shapes(line.shape)) == sorted(
            [(1, 24, 10), (1, 24, 10), (1, 24, 10)] if shapes else [(1, 24, 10), (1, 12, 10), (1, 12, 10)]
        ), line.layout.describe(line.shape)


def test_a_fused_weight_found_late_is_updated_as_its_matrices_too():
    class ByName(Stack):
        def forward(self, *, x):
            return super().forward(x)

    torch.manual_seed(0)
    model, x = ByName(Blocks), torch.randn(2, LENGTH, WIDTH)
    twin = copy.deepcopy(model)
    late = MuonClip(model, lr=0.1, tau=1e3)
    known = MuonClip(twin, lr=0.1, qk_clip=QKClip(twin, tau=1e3, example_inputs={"x": x}))
    for each, optimizer in ((model, late), (twin, known)):
        each(x=x).square().sum().backward()
        optimizer.step()
    line = next(line for line in late.plan.parameters if line.name == "layers.0.a.weight")
    assert [shape[1:] for shape in line.layout.matrix_shapes(line.shape)] == [(24, 10)] * 3
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_no_attention_and_no_forward_are_errors():
    with pytest.raises(ValueError, match="no attention was found"):
        MuonClip(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)), qk_clip="required")

    class NeverCalled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Separate()

        def run(self, x):
            return x @ self.inner.a.weight.mT

    model = NeverCalled()
    optimizer = MuonClip(model)
    model.run(torch.randn(2, 3, WIDTH)).sum().backward()
    with pytest.raises(RuntimeError, match="has seen no forward with an attention"):
        optimizer.step()


def test_example_inputs_find_everything_at_once():
    class Keyword(Stack):
        def forward(self, *, x):
            return super().forward(x)

    model = Keyword(Separate)
    clip = QKClip(model, example_inputs={"x": torch.randn(1, 3, WIDTH)})
    assert list(clip.projections) == ["layers.0", "layers.1"]
    with pytest.raises(ValueError, match="no attention was found"):
        QKClip(nn.Linear(3, 3), example_inputs=torch.randn(2, 3))


class SharedQueryKey(Separate):
    def heads(self, x):
        q, _, v = super().heads(x)
        return q, q, v


class QueriesAreValues(Separate):
    def heads(self, x):
        q, k, _ = super().heads(x)
        return q, k, q


class KeysAreValues(Separate):
    def heads(self, x):
        q, k, _ = super().heads(x)
        return q, k, k


class OneQueryTwoKeys(Separate):
    """A query that meets the keys of two attentions."""

    def build(self):
        super().build()
        self.d = nn.Linear(WIDTH, HEADS * HEAD)

    def attend(self, q, k, v):
        return super().attend(q, k, v) + super().attend(q, rotated(self.other), v)

    def heads(self, x):
        self.other = self.d(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        return super().heads(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (SharedQueryKey, "its queries and keys are made of the same rows"),
        (QueriesAreValues, "its queries and values are made of the same rows"),
        (OneQueryTwoKeys, r"its queries also meet the keys of layers\.0"),
    ],
)
def test_rows_that_play_two_parts_are_refused(kind, reason):
    with pytest.raises(ValueError, match=reason):
        QKClip(Stack(kind))


def test_keys_that_are_values_too_are_left_to_their_queries():
    model, x = loud(Stack(KeysAreValues))
    clip = QKClip(model, tau=0.5)
    key = model.layers[0].b.weight.clone()
    normed = model.norm(x).detach()
    before = maxima(*heads_of(model.layers[0], normed))
    model(x)
    clip.step()
    assert torch.equal(model.layers[0].b.weight, key)
    np.testing.assert_allclose(maxima(*heads_of(model.layers[0], normed)), np.minimum(before, 0.5), rtol=1e-5)


def test_a_declared_split_of_the_query_is_checked_too():
    """MLA with the rotary and the other part of the query exchanged."""
    model, x = loud(Stack(Latent))
    layer = model.layers[0]
    key = HeadRows(layer.e, HEADS, 4, 0, 4 + HEAD)
    for nope, rope, fits in (((4, 0), (2, 4), True), ((4, 2), (2, 0), False)):
        projection = QKProjection(
            "mla",
            HEADS,
            MaxLogits(HEADS),
            query=(HeadRows(layer.b, HEADS, nope[0], nope[1], HEAD),),
            key=(key,),
            query_facing_shared=(HeadRows(layer.b, HEADS, rope[0], rope[1], HEAD),),
        )
        clip = QKClip(model, declare={"layers.0": projection})
        if fits:
            model(x)
        else:
            with pytest.raises(ValueError, match=r"the declaration of layers\.0 is wrong"):
                model(x)
        clip.remove()
