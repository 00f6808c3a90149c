"""Projections whose product is inside an autograd function, as in Megatron-core and DeepSpeed, and what such code does.

The same attention with `nn.Linear` says which rows feed which heads.
"""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonclip.torch import QKClip

WIDTH, HEADS, GROUPS, HEAD = 20, 8, 4, 6
ROWS = (HEADS + 2 * GROUPS) * HEAD


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.matmul(x, weight.t()) + bias

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        return gradient @ weight, flat.t() @ x.flatten(0, -2), flat.sum(0)


class ProductWithSetup(torch.autograd.Function):
    """The other form of such a function."""

    @staticmethod
    def forward(x, weight, bias):
        return torch.matmul(x, weight.t()) + bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    backward = Product.backward


class NeedsItsContext(Product):
    """Asks its context for what there is in a real call alone."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.set_materialize_grads(False)
        assert type(ctx) is not torch.autograd.function.FunctionCtx
        return Product.forward(ctx, x, weight, bias)


class CrossEntropy(torch.autograd.Function):
    """Writes into tensors of its own, as functions without a graph may."""

    @staticmethod
    def forward(ctx, logits, targets):
        exponentials = torch.empty_like(logits)
        torch.exp(logits - logits.amax(-1, keepdim=True), out=exponentials)
        probabilities = exponentials / exponentials.sum(-1, keepdim=True)
        ctx.save_for_backward(probabilities, targets)
        return -probabilities.gather(-1, targets[..., None]).log().mean()

    @staticmethod
    def backward(ctx, gradient):
        probabilities, targets = ctx.saved_tensors
        difference = probabilities - F.one_hot(targets, probabilities.shape[-1])
        return gradient * difference / targets.numel(), None


class InFunction(nn.Linear):
    function = Product

    def forward(self, x):
        return self.function.apply(x, self.weight, self.bias)


class Groups:
    """Cannot be copied, and two modules have the same one."""

    def __init__(self):
        self.first, self.lock, self.last = 1, threading.Lock(), 2


class Attention(nn.Module):
    """Fused by group, [q q k v] each, with sequences behind tokens, and written out, as Megatron-core has it."""

    def __init__(self, linear, groups=None):
        super().__init__()
        self.groups = groups
        self.qkv, self.out = linear(WIDTH, ROWS), linear(HEADS * HEAD, WIDTH)

    def forward(self, x):  # [T, B, width]
        assert self.groups is None or self.groups.last == 2
        length, batch = x.shape[:2]
        mixed = self.qkv(x).view(length, batch, GROUPS, -1)
        q, k, v = mixed.split([HEADS // GROUPS * HEAD, HEAD, HEAD], -1)
        k, v = (each.repeat_interleave(HEADS // GROUPS, 2) for each in (k, v))
        q, k, v = (each.reshape(length, batch * HEADS, HEAD).transpose(0, 1) for each in (q, k, v))
        scores = torch.baddbmm(torch.empty(len(q), length, length), q, k.mT, beta=0.0, alpha=HEAD**-0.5)
        scores = scores.view(batch, HEADS, length, length)
        scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -10000.0)
        y = torch.bmm(scores.softmax(-1).view(-1, length, length), v)
        return self.out(y.view(batch, HEADS, length, HEAD).permute(2, 0, 1, 3).reshape(length, batch, -1))


class Model(nn.Module):
    def __init__(self, linear, groups=None):
        super().__init__()
        self.layers = nn.ModuleList([Attention(linear, groups) for _ in range(2)])

    def forward(self, x, targets):
        for layer in self.layers:
            x = x + layer(x)
        return CrossEntropy.apply(x, targets)


def rows_of(model):
    """{name: {part: rows [heads, size]}}, found in a forward with gradients."""
    torch.manual_seed(0)
    clip = QKClip(model, tau=1e-3)
    model(torch.randn(7, 3, WIDTH), torch.randint(WIDTH, (7, 3))).backward()
    clip.step()
    assert clip.report().clipped_heads == 2 * HEADS
    return {
        name: {
            part: getattr(projection, part)[0].rows("cpu").tolist()
            for part in ("query_facing_shared", "shared_key")
            if getattr(projection, part)
        }
        for name, projection in clip.projections.items()
    }


EXPECTED = {
    "query_facing_shared": [[24 * (head // 2) + 6 * (head % 2) + row for row in range(HEAD)] for head in range(HEADS)],
    "shared_key": [[24 * group + 12 + row for row in range(HEAD)] for group in range(GROUPS)],
}


@pytest.mark.parametrize("function", [None, Product, ProductWithSetup])
def test_the_rows_of_heads_are_found_behind_a_product_in_a_function(function):
    linear = nn.Linear if function is None else type("Linear", (InFunction,), {"function": function})
    assert rows_of(Model(linear)) == {"layers.0": EXPECTED, "layers.1": EXPECTED}


def test_a_function_that_cannot_be_looked_into_is_refused():
    model = Model(type("Linear", (InFunction,), {"function": NeedsItsContext}))
    with pytest.raises(
        ValueError, match=r"layers\.0: its queries do not depend linearly on the output of a projection"
    ):
        rows_of(model)


def test_what_cannot_be_copied_is_shared_by_all_modules_that_have_it():
    groups = Groups()
    assert list(rows_of(Model(nn.Linear, groups))) == ["layers.0", "layers.1"]
    assert groups.last == 2
