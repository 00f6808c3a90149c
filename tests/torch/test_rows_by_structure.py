"""Rows behind queries and keys, by structure: small and zero contributions, weights with several axes of rows, cores.

Judged by dense logits in float64 after one clip: heads above τ at τ, the weights of the others not changed by a bit.
"""

import copy
import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonclip.core import MatrixLayout, orthogonalize
from muonclip.torch import HeadRows, MaxLogits, MuonClip, QKClip, QKProjection
from muonclip.torch.discover.trace import trace

WIDTH, HEADS, HEAD, LENGTH = 14, 4, 6, 5
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def by_head(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, WIDTH)
        self.build()

    def build(self):
        pass

    def heads(self, x):
        return by_head(self.q(x)), by_head(self.k(x)), by_head(self.v(x))

    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


def maxima(model, x):
    """S of every head, dense, in float64."""
    with torch.no_grad():
        q, k, _ = copy.deepcopy(model).double().heads(x.double())
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        return logits.masked_fill(~CAUSAL, -math.inf).amax((0, 2, 3))


def clipped(model, x, **options):
    """Clip the louder half of the heads, and hold each to what it should be; returns the clip and what has changed."""
    before, state = maxima(model, x), copy.deepcopy(model.state_dict())
    tau = float(before.sort().values[HEADS // 2 - 1 : HEADS // 2 + 1].mean())
    assert tau > 0
    clip = QKClip(model, tau=tau, example_inputs=x, **options)
    model(x)
    clip.step()
    torch.testing.assert_close(maxima(model, x), before.clamp(max=tau), rtol=1e-5, atol=1e-6)
    (projection,) = clip.projections.values()
    quiet = before <= tau
    for rows in projection.scaled_parts():
        for parameter, axis in rows.parameters():
            name = next(name for name, each in model.named_parameters() if each is parameter)
            first = axis if isinstance(axis, int) else axis[0]
            was, now = (rows.of(each, axis).movedim(first, 0) for each in (state[name], parameter.detach()))
            assert torch.equal(was[quiet], now[quiet])
    return clip, {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}


def example(seed=0):
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


# Small contributions


class Sum(Plain):
    share = 0.0

    def build(self):
        self.small = nn.Linear(WIDTH, HEADS * HEAD)

    def heads(self, x):
        q, k, v = super().heads(x)
        return q + self.share * by_head(self.small(x)), k, v


@pytest.mark.parametrize("share", [1e-8, 1e-3, 0.012, 0.05, 0.13])
@pytest.mark.parametrize("seed", range(3))
def test_a_small_contribution_is_scaled_with_the_rest(share, seed):
    torch.manual_seed(seed)
    model = Sum()
    model.share = share
    _, changed = clipped(model, example(seed))
    assert changed == {f"{name}.{kind}" for name in ("q", "k", "small") for kind in ("weight", "bias")}


def test_a_small_contribution_is_seen_in_bfloat16_whatever_the_seed():
    """Its share may be zero by chance, as if it were behind a norm."""
    for seed in range(80):
        torch.manual_seed(seed)
        model = Sum().to(torch.bfloat16)
        model.share = 0.03
        (call,) = trace(model, (example(seed).to(torch.bfloat16),), {}).calls
        assert len(call.query.rows) == 4, seed  # two weights and two biases


class Adapter(Plain):
    rank = 96

    def build(self):
        self.down, self.down_key = (nn.Linear(WIDTH, self.rank, bias=False) for _ in range(2))
        self.up, self.up_key = (nn.Linear(self.rank, HEADS * HEAD, bias=False) for _ in range(2))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up_key.weight)

    def heads(self, x):
        q, k, v = super().heads(x)
        scale = 16 / self.rank
        return q + scale * by_head(self.up(self.down(x))), k + scale * by_head(self.up_key(self.down_key(x))), v


@pytest.mark.parametrize("seed", range(3))
def test_an_adapter_of_high_rank_that_is_still_zero_belongs_to_the_rows(seed):
    torch.manual_seed(seed)
    model = Adapter()
    clip, _ = clipped(model, example(seed))
    (projection,) = clip.projections.values()
    assert model.up in {rows.module for rows in projection.query}
    assert model.up_key in {rows.module for rows in projection.key}
    nn.init.normal_(model.up.weight, std=0.3)  # as after some training
    nn.init.normal_(model.up_key.weight, std=0.3)
    clipped(model, example(seed))


class ZeroGate(Plain):
    def build(self):
        self.more = nn.Linear(WIDTH, HEADS * HEAD)
        self.gate = nn.Parameter(torch.zeros(1, HEADS, 1, 1))

    def heads(self, x):
        q, k, v = super().heads(x)
        return q + self.gate * by_head(self.more(x)), k, v


def test_what_is_behind_a_gate_that_is_still_zero_belongs_to_the_rows():
    torch.manual_seed(0)
    model = ZeroGate()
    clip, changed = clipped(model, example())
    (projection,) = clip.projections.values()
    assert {rows.module for rows in projection.query} == {model.q, model.more}
    assert "gate" not in changed


class OtherWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(HEADS * HEAD, HEADS, kdim=10, vdim=7, batch_first=True)
        nn.init.normal_(self.inner.in_proj_bias)

    def heads(self, x):
        biases = self.inner.in_proj_bias.chunk(3)
        q = F.linear(F.pad(x, (0, HEADS * HEAD - WIDTH)), self.inner.q_proj_weight, biases[0])
        k = F.linear(x[..., :10], self.inner.k_proj_weight, biases[1])
        return by_head(q), by_head(k), None

    def forward(self, x):
        query = F.pad(x, (0, HEADS * HEAD - WIDTH))
        mask = ~CAUSAL
        return self.inner(query, x[..., :10], x[..., :7], need_weights=False, attn_mask=mask, is_causal=True)[0]


@pytest.mark.parametrize("seed", range(4))
def test_multi_head_attention_with_keys_of_another_width(seed):
    torch.manual_seed(seed)
    _, changed = clipped(OtherWidths(), example(seed))
    assert changed == {"inner.q_proj_weight", "inner.k_proj_weight", "inner.in_proj_bias"}


class Pixels(Plain):
    """Convolutions of one pixel, [B, T, C] taken as an image of one row."""

    def build(self):
        self.q, self.k, self.v = (nn.Conv2d(WIDTH, HEADS * HEAD, 1, bias=bias) for bias in (True, False, True))

    def heads(self, x):
        image = x.mT.unsqueeze(2)
        return [m(image).unflatten(1, (HEADS, HEAD)).flatten(3).mT for m in (self.q, self.k, self.v)]


@pytest.mark.parametrize("seed", range(3))
def test_projections_by_convolutions_of_one_pixel(seed):
    torch.manual_seed(seed)
    _, changed = clipped(Pixels(), example(seed))
    assert changed == {"q.weight", "q.bias", "k.weight"}


class FusedPixels(Plain):
    def build(self):
        del self.q, self.k, self.v
        self.w = nn.Conv2d(WIDTH, 3 * HEADS * HEAD, 1)

    def heads(self, x):
        return self.w(x.mT.unsqueeze(2)).unflatten(1, (3, HEADS, HEAD)).flatten(4).mT.unbind(1)


def test_a_fused_convolution_is_several_matrices():
    torch.manual_seed(0)
    model = FusedPixels()
    clipped(model, example())
    for per_head, expected in ((False, "(24×14) + (24×14) + (24×14)"), (True, "4 × (6×14) + 4 × (6×14) + 4 × (6×14)")):
        clip = QKClip(model, example_inputs=example())
        optimizer = MuonClip(model, per_head=per_head, qk_clip=clip)
        line = next(line for line in optimizer.plan.parameters if line.name == "w.weight")
        assert line.layout.describe(line.shape) == expected
    model = Pixels()
    plan = MuonClip(model, qk_clip=QKClip(model, example_inputs=example())).plan
    assert next(line for line in plan.parameters if line.name == "q.weight").reason == "convolution, window flattened"


class Computed(Plain):
    """A low-rank sum as one weight."""

    def build(self):
        self.up, self.down = nn.Parameter(torch.randn(HEADS * HEAD, 3) / 5), nn.Parameter(torch.randn(3, WIDTH) / 5)

    def heads(self, x):
        _, k, v = super().heads(x)
        return by_head(F.linear(x, self.q.weight + self.up @ self.down)), k, v


def test_a_weight_that_is_a_sum_of_others_is_scaled_by_those_with_rows():
    torch.manual_seed(1)
    _, changed = clipped(Computed(), example())
    assert changed == {"q.weight", "up", "k.weight", "k.bias"}


class Squared(Sum):
    def heads(self, x):
        q, k, v = super().heads(x)
        return q + 0.01 * by_head(self.small(x)).square(), k, v


def test_a_small_part_that_is_not_proportional_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="its queries do not depend linearly on the output of a projection"):
        QKClip(Squared(), example_inputs=example())


# Trained factors


class Scaled(Plain):
    def build(self):
        self.factor = nn.Parameter(torch.ones(HEADS * HEAD, 1))
        self.requires_grad_(False)
        self.factor.requires_grad_(True)

    def heads(self, x):
        q, _, v = super().heads(x)
        return q, by_head(self.k(x) * self.factor.flatten()), v


def test_a_trained_factor_of_a_frozen_projection_is_what_is_scaled():
    torch.manual_seed(0)
    clip, changed = clipped(Scaled(), example())
    assert changed == {"factor"}
    assert not clip.report().frozen_heads


def test_of_a_factor_and_a_projection_that_are_both_trained_the_projection_is_scaled():
    torch.manual_seed(0)
    model = Scaled()
    model.requires_grad_(True)
    _, changed = clipped(model, example())
    assert changed == {"q.weight", "q.bias", "k.weight", "k.bias"}


# Several axes of rows


class Stacked(Plain):
    """All queries, keys and values in one parameter; `shape` and `product` say how."""

    shape = (3, HEADS, HEAD, WIDTH)
    equation = "btc,nhdc->nbhtd"

    def build(self):
        del self.q, self.k, self.v
        self.w = nn.Parameter(torch.randn(self.shape) / 4)

    def heads(self, x):
        return torch.einsum(self.equation, x, self.w).unbind(0)


class InFirst(Stacked):
    shape, equation = (WIDTH, 3, HEADS, HEAD), "btc,cnhd->nbhtd"


class HeadsFirst(Stacked):
    shape, equation = (HEADS, 3, HEAD, WIDTH), "btc,hndc->nbhtd"


class InBetween(Stacked):
    """[3, in, out]: the rows are along axes that are not next to each other."""

    shape = (3, WIDTH, HEADS * HEAD)

    def heads(self, x):
        return [by_head(x @ w) for w in self.w]


class Flattened(Stacked):
    shape = (3, HEADS * HEAD, WIDTH)

    def heads(self, x):
        return F.linear(x, self.w.flatten(0, 1)).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)


class Unbound(Flattened):
    def heads(self, x):
        return [by_head(F.linear(x, w)) for w in self.w]


class Batched(Flattened):
    def heads(self, x):
        y = torch.bmm(x.flatten(0, 1).expand(3, -1, -1), self.w.mT)
        return y.view(3, *x.shape[:2], HEADS, HEAD).transpose(2, 3)


class OfHeads(Stacked):
    """[heads, in, width] for each: one matrix per head."""

    def build(self):
        del self.q, self.k, self.v
        self.qw, self.kw, self.vw = (nn.Parameter(torch.randn(HEADS, WIDTH, HEAD) / 4) for _ in range(3))

    def heads(self, x):
        return [torch.einsum("btc,hcd->bhtd", x, w) for w in (self.qw, self.kw, self.vw)]


STACKED = (Stacked, InFirst, HeadsFirst, InBetween, Flattened, Unbound, Batched, OfHeads)


@pytest.mark.parametrize("kind", STACKED)
def test_weights_stacked_on_axes_of_their_own(kind):
    torch.manual_seed(0)
    model = kind()
    clip, _ = clipped(model, example())
    (projection,) = clip.projections.values()
    assert projection.kind == "mha"
    assert all(rows.index is None for rows in projection.scaled_parts())


@pytest.mark.parametrize(
    ("kind", "whole", "per_head"),
    [
        (Stacked, "3 × (24×14)", "12 × (6×14)"),
        (Flattened, "3 × (24×14)", "12 × (6×14)"),
        (InBetween, "3 × (24×14)", "12 × (6×14)"),
        (InFirst, "(24×14) + (24×14) + (24×14)", "4 × (6×14) + 4 × (6×14) + 4 × (6×14)"),
        (HeadsFirst, "(24×14) + (24×14) + (24×14)", "4 × (6×14) + 4 × (6×14) + 4 × (6×14)"),
    ],
)
def test_the_matrices_of_a_stacked_weight(kind, whole, per_head):
    torch.manual_seed(0)
    for asked, expected in ((False, whole), (True, per_head)):
        model = kind()
        clip = QKClip(model, example_inputs=example())
        options = {"weight_decay": 0.0, "per_head": asked, "qk_clip": clip, "ns_dtype": torch.float32}
        optimizer = MuonClip(model, lr=0.01, adjust_lr_fn="original", **options)
        line = next(line for line in optimizer.plan.parameters if line.name == "w")
        assert line.layout.describe(line.shape) == expected
        model(example()).square().mean().backward()
        before = model.w.detach().clone()
        optimizer.step()
        blocks = (line.layout.split(each, xp=torch) for each in (before - model.w.detach(), model.w.grad))
        for update, gradient in zip(*blocks, strict=True):
            scale = 0.01 * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            expected = scale * orthogonalize(gradient, ns_coefficients="jordan", xp=torch)
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-5)


def test_a_declaration_of_rows_over_several_axes_is_checked():
    torch.manual_seed(0)
    model = Stacked()
    axes = (0, 1, 2)

    def declared(start):
        rows = [(HeadRows(model, HEADS, HEAD, first, weight="w", axis=axes),) for first in (start, HEADS * HEAD)]
        return QKProjection("mha", HEADS, MaxLogits(HEADS), query=rows[0], key=rows[1])

    clip = QKClip(model, declare={"": declared(0)}, example_inputs=example())
    assert list(clip.projections) == [""]
    with pytest.raises(ValueError, match=r"It gives head 0 the rows 48 to 53 of w, .* of the rows 0 to 5"):
        QKClip(model, declare={"": declared(2 * HEADS * HEAD)}, example_inputs=example())
    with pytest.raises(ValueError, match=r"axis=\(1, 0\) does not name axes, in ascending order"):
        QKProjection("mha", HEADS, MaxLogits(HEADS), query=(HeadRows(model, HEADS, HEAD, weight="w", axis=(1, 0)),))


def test_a_layout_with_an_out_axis_of_several():
    layout = MatrixLayout(batch_ndim=1, out_ndim=2, heads=(2,))
    x = torch.arange(3.0 * 2 * 4 * 5).view(3, 2, 4, 5)
    (heads,) = layout.split(x, xp=torch)
    assert torch.equal(heads, x.flatten(0, 1))
    assert torch.equal(layout.join([heads], x.shape, xp=torch), x)
    assert layout.axes(4) == ((0,), (1, 2), (3,))
    with pytest.raises(ValueError, match="out_ndim=2; it must be 1 or more, and 1 where transposed"):
        MatrixLayout(transposed=True, out_ndim=2).matrix_shapes((4, 2, 3))


# Cores with matrices of their own


class Core(nn.Module):
    def __init__(self):
        super().__init__()
        self.o, self.gate = nn.Linear(HEADS * HEAD, WIDTH), nn.Linear(HEADS * HEAD, HEADS * HEAD)

    def forward(self, q, *, others):
        k, v = others
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.o(y * self.gate(y).sigmoid())


class CoreWithin(nn.Module):
    def __init__(self):
        super().__init__()
        self.core, self.more = Core(), nn.Linear(WIDTH, WIDTH)

    def forward(self, q, k, v):
        return self.more(self.core(q, others=[k, v]))


class Outer(Plain):
    def build(self):
        del self.o
        self.inner = CoreWithin()

    def forward(self, x):
        return self.inner(*self.heads(x))


def test_a_core_that_has_matrices_and_receives_queries_is_transparent():
    torch.manual_seed(0)
    clip, changed = clipped(Outer(), example())
    assert changed == {"q.weight", "q.bias", "k.weight", "k.bias"}
    assert [projection.kind for projection in clip.projections.values()] == ["mha"]


class OfTheStream(nn.Module):
    """The keys are the stream itself, which all blocks before have added to."""

    def __init__(self):
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(HEADS * HEAD, HEADS * HEAD) for _ in range(3))

    entered: ClassVar[list[bool]] = []

    def forward(self, x):
        self.entered.append(x.requires_grad)
        y = F.scaled_dot_product_attention(by_head(self.q(x)), by_head(x), by_head(self.v(x)))
        return self.o(y.transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, HEADS * HEAD)
        self.blocks = nn.ModuleList(OfTheStream() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_the_stream_is_no_projection_of_keys():
    torch.manual_seed(0)
    clip = QKClip(Blocks(), example_inputs=example())
    assert {projection.kind for projection in clip.projections.values()} == {"keys of no projection"}


def test_the_graph_does_not_grow_with_depth(monkeypatch):
    entered: ClassVar[list[bool]] = []
    monkeypatch.setattr(OfTheStream, "entered", entered)
    trace(Blocks(), (example(),), {})
    assert entered == [True, False, False]  # the output of one product, then sums of more and more


# Precision and cost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Plain, Adapter, Stacked])
def test_rows_are_found_in_every_dtype(kind, dtype):
    torch.manual_seed(0)
    model = kind().to(dtype)
    clip = QKClip(model, example_inputs=example().to(dtype))
    assert [projection.kind for projection in clip.projections.values()] == ["mha"]


@pytest.mark.parametrize("heads", [1, 16, 20, 300])
def test_two_gradients_tell_the_rows_of_many_heads_from_each_other(heads, monkeypatch):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * heads * 2)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, 2)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    count = 0
    real = torch.autograd.grad

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    (call,) = trace(Many(), (example(),), {}).calls
    to_tell_it_from_sequences = 2 if heads == 1 else 0
    assert count == 3 * (1 + math.ceil(max(1, math.log(heads, 16)))) + to_tell_it_from_sequences
    rows = torch.arange(3 * heads * 2).view(3, heads, 2)
    for side, source in enumerate((call.query, call.key, call.value)):
        weight = next(each for each in source.rows if each.parameter.ndim == 2)
        assert torch.equal(weight.masks.nonzero()[:, 1].view(heads, 2), rows[side])
