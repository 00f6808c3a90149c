"""Logits that are more than one product: factors of pairs, other products that are added, positions, other axes."""

import copy
import math

import pytest
import torch
from torch import nn

from muonclip.torch import QKClip

WIDTH, HEADS, HEAD, ROWS, COLUMNS = 20, 4, 6, 2, 3
LENGTH = ROWS * COLUMNS
ALLOWED = torch.ones(LENGTH, LENGTH).tril()


class Attention(nn.Module):
    """`logits` are to be overridden. `counted` of them must be held; what is masked is far below."""

    def __init__(self, key_heads=HEADS):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * HEAD) for n in (HEADS, key_heads, HEADS))
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def heads(self, x, width=HEAD):
        return x.unflatten(-1, (-1, width)).transpose(1, 2)

    def queries_and_keys(self, x):
        q, k = self.heads(self.q(x)), self.heads(self.k(x))
        return q, k.repeat_interleave(HEADS // k.shape[1], 1)

    def product(self, x):
        q, k = self.queries_and_keys(x)
        return q @ k.mT / math.sqrt(HEAD)

    def counted(self, x):
        return self.logits(x)

    def forward(self, x):
        y = self.logits(x).softmax(-1) @ self.heads(self.v(x))
        return self.o(y.transpose(1, 2).flatten(2))


class MaskInTheDtypeOfLogits(Attention):
    def logits(self, x):
        s = self.product(x)
        return s + ((1 - ALLOWED.double()) * -1e9).type_as(s)


class MaskInTheShapeOfLogits(Attention):
    def logits(self, x):
        s = self.product(x)
        return s + ((1 - ALLOWED) * -1e9).to(s).expand_as(s)


class MaskAsAFactor(Attention):
    """As OpenAI's GPT."""

    def logits(self, x):
        s = self.product(x)
        allowed = ALLOWED.to(s.dtype)
        return s * allowed + -1e4 * (1 - allowed)


class FactorOfPairs(Attention):
    """The nearer the keys the more they count."""

    def logits(self, x):
        distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
        return self.product(x) / (1 + distance)


class Decomposed(Attention):
    """Positions of rows and columns, in axes of their own, as of ViTDet."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rows, self.columns = (nn.Parameter(torch.randn(n, n, HEAD)) for n in (ROWS, COLUMNS))

    def logits(self, x):
        q, k = (t.flatten(0, 1) for t in self.queries_and_keys(x))
        places = q.unflatten(1, (ROWS, COLUMNS))
        rows = torch.einsum("bhwc,hkc->bhwk", places, self.rows)
        columns = torch.einsum("bhwc,wkc->bhwk", places, self.columns)
        s = (q @ k.mT).view(-1, ROWS, COLUMNS, ROWS, COLUMNS) + rows[..., None] + columns[..., None, :]
        return s.view(-1, HEADS, LENGTH, LENGTH)


class DecomposedMask(Decomposed):
    """Masked where the axes are others."""

    def logits(self, x):
        q, k = self.queries_and_keys(x)
        s = (q @ k.mT).flatten(0, 1).view(-1, ROWS, COLUMNS, ROWS, COLUMNS)
        s = s.masked_fill(ALLOWED.view(ROWS, COLUMNS, ROWS, COLUMNS) == 0, -1e4)
        return s.view(-1, HEADS, LENGTH, LENGTH)


class SumOfTwo(Attention):
    """As MLA without a cat: a part of each head's own, and one of a key that all heads share."""

    width, scale = 5, 1.0

    def __init__(self, *args):
        super().__init__(*args)
        self.qr, self.kr = nn.Linear(WIDTH, HEADS * self.width), nn.Linear(WIDTH, self.width)

    def logits(self, x):
        return self.product(x) + self.heads(self.qr(x), self.width) @ self.kr(x)[:, None].mT * self.scale


class SumOfTwoScales(SumOfTwo):
    scale = 0.3


class Twice(Attention):
    def logits(self, x):
        s = self.product(x)
        return s + s


class KeysAndValues(Attention):
    """The query meets what is weighed, too, and takes all of γ."""

    def logits(self, x):
        q, _ = self.queries_and_keys(x)
        return self.product(x) + q @ self.heads(self.v(x)).mT


class Difference(SumOfTwo):
    def logits(self, x):
        return self.product(x) - self.heads(self.qr(x), self.width) @ self.kr(x)[:, None].mT


class SharedBias(SumOfTwo):
    """A product of its own, the same for all heads: a bias."""

    def __init__(self, *args):
        super().__init__(*args)
        self.qr = nn.Linear(WIDTH, self.width)

    def logits(self, x):
        return self.product(x) + (self.qr(x) @ self.kr(x).mT)[:, None]

    def counted(self, x):
        return self.product(x)


class TransformerXL(Attention):
    """(q + u)·k + (q + v)·r, the second shifted; Dai, 1901.02860, eq. 7."""

    def __init__(self, *args):
        super().__init__(*args)
        self.u, self.v_ = (nn.Parameter(torch.randn(HEADS, HEAD)) for _ in range(2))
        self.r = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.register_buffer("positions", torch.randn(2 * LENGTH - 1, WIDTH))

    def logits(self, x):
        q, k = self.queries_and_keys(x)
        r = self.heads(self.r(self.positions)[None])
        distance = LENGTH - 1 + torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
        by_position = (q + self.v_[:, None]) @ r.mT
        shifted = by_position.gather(-1, distance.expand(*by_position.shape[:2], -1, -1))
        return ((q + self.u[:, None]) @ k.mT + shifted) / math.sqrt(HEAD)


class TransformerXLOfAKernel(TransformerXL):
    """Its positions are handed to the kernel."""

    def forward(self, x):
        q, k = self.queries_and_keys(x)
        added = self.logits(x) - (q + self.u[:, None]) @ k.mT / math.sqrt(HEAD)
        y = nn.functional.scaled_dot_product_attention(q + self.u[:, None], k, self.heads(self.v(x)), attn_mask=added)
        return self.o(y.transpose(1, 2).flatten(2))


class Disentangled(Attention):
    """q·k + q·r + p·k, as of DeBERTa: linear in q and p together."""

    def __init__(self, *args):
        super().__init__(*args)
        self.r, self.p = (nn.Linear(WIDTH, HEADS * HEAD) for _ in range(2))
        self.register_buffer("positions", torch.randn(LENGTH, WIDTH))

    def logits(self, x):
        q, k = self.queries_and_keys(x)
        r, p = (self.heads(m(self.positions)[None]) for m in (self.r, self.p))
        index = ((torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)) % LENGTH).expand(len(x), HEADS, -1, -1)
        return q @ k.mT + ((q @ r.mT).gather(-1, index) + (k @ p.mT).gather(-1, index).mT)


def maxima(module, x):
    return copy.deepcopy(module).double().counted(x.double()).detach().amax((0, 2, 3))


KEYS, SHARED = {"k.weight", "k.bias"}, {"kr.weight", "kr.bias"}


@pytest.mark.parametrize(
    ("kind", "args", "kept"),
    [
        (MaskInTheDtypeOfLogits, (), set()),
        (MaskInTheShapeOfLogits, (2,), KEYS),
        (MaskAsAFactor, (), set()),
        (MaskAsAFactor, (2,), KEYS),
        (FactorOfPairs, (), set()),
        (Decomposed, (), KEYS | {"rows", "columns"}),
        (DecomposedMask, (), {"rows", "columns"}),
        (SumOfTwo, (), SHARED),
        (Twice, (), set()),
        (KeysAndValues, (), KEYS),
        (Difference, (), SHARED),
        (SumOfTwoScales, (), SHARED),
        (SharedBias, (), {"qr.weight", "qr.bias", "kr.weight", "kr.bias"}),
        (TransformerXL, (), KEYS | {"r.weight"}),
        (TransformerXL, (2,), KEYS | {"r.weight"}),
        (TransformerXLOfAKernel, (), KEYS | {"r.weight"}),
        (Disentangled, (), KEYS | {"r.weight", "r.bias"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_all_terms_of_the_logits_are_held_at_tau(kind, args, kept):
    check(kind, args, kept, torch.float32)


@pytest.mark.parametrize("kind", [MaskAsAFactor, SumOfTwoScales, TransformerXL])
def test_they_are_held_in_half_precision(kind):
    check(kind, (), {MaskAsAFactor: set(), TransformerXL: KEYS | {"r.weight"}}.get(kind, SHARED), torch.bfloat16)


def check(kind, args, kept, dtype):
    torch.manual_seed(0)
    module, x = kind(*args).to(dtype), torch.randn(3, LENGTH, WIDTH, dtype=dtype)
    before, weights = maxima(module, x), {name: p.detach().clone() for name, p in module.named_parameters()}
    clip = QKClip(module, tau=0.5 * float(before.max()), observe="always")
    module(x)
    clip.step()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    reported = clip.report().layers[""].max_logits.double()
    torch.testing.assert_close(reported, before, rtol=tolerance, atol=tolerance * clip.tau)
    torch.testing.assert_close(maxima(module, x), before.clamp(max=clip.tau), rtol=tolerance, atol=tolerance * clip.tau)
    same = {name for name, parameter in module.named_parameters() if torch.equal(parameter, weights[name])}
    assert same == kept | {"v.weight", "v.bias", "o.weight", "o.bias"}


@pytest.mark.parametrize("kind", [SumOfTwo, SumOfTwoScales, Difference, Decomposed, MaskAsAFactor])
def test_a_sum_of_products_is_read_from_queries_and_keys(kind):
    """And not from its logits, which are more to read."""
    torch.manual_seed(0)
    clip = QKClip(kind(), example_inputs=torch.randn(3, LENGTH, WIDTH))
    assert clip.attentions.projections[""].counts_added == (kind in {Decomposed, MaskAsAFactor})


class FactorAndBias(FactorOfPairs):
    def logits(self, x):
        return super().logits(x) + torch.arange(LENGTH)


class FactorOfTheQueries(FactorOfPairs):
    def logits(self, x):
        q, _ = self.queries_and_keys(x)
        return super().logits(x) * torch.sigmoid(q @ torch.ones(HEAD, LENGTH))


class AwayAtTheSoftmax(Attention):
    def logits(self, x):
        return self.product(x).view(-1, HEADS, LENGTH // 2, 2 * LENGTH)

    def forward(self, x):
        return self.logits(x).softmax(-1).sum() * x


class ScaledWhileAway(Decomposed):
    """By rows of the image, which are no rows of the logits."""

    def logits(self, x):
        s = self.product(x).view(-1, HEADS, ROWS, COLUMNS * LENGTH) * torch.arange(1, 1 + ROWS)[:, None]
        return s.view(-1, HEADS, LENGTH, LENGTH)[..., :1].expand(-1, -1, -1, LENGTH)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (FactorAndBias, "multiplied by a factor of each pair"),
        (FactorOfTheQueries, "multiplied by"),
        (AwayAtTheSoftmax, "pass through view"),
        (ScaledWhileAway, "pass through"),
    ],
)
def test_what_is_not_held_is_refused_by_name(kind, why):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"the model: its logits {'are ' if 'multi' in why else ''}{why}"):
        QKClip(kind(), example_inputs=torch.randn(3, LENGTH, WIDTH))


def test_a_factor_that_was_not_there_when_the_attention_was_found_is_an_error():
    class Later(FactorOfPairs):
        factor = False

        def logits(self, x):
            return super().logits(x) if self.factor else self.product(x)

    torch.manual_seed(0)
    module, x = Later(), torch.randn(3, LENGTH, WIDTH)
    clip = QKClip(module, example_inputs=x)
    module(x)
    clip.step()
    module.factor = True
    module(x)
    with pytest.raises(RuntimeError, match="factor of each pair"):
        clip.step()
