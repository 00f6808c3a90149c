"""Embeddings and output heads by what a forward shows, where types and names do not tell."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding, scaled_dot_product_attention

from muonclip.torch import MuonClip, QKClip

WIDTH, WORDS = 12, 19


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return x + self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Tokens to `finish` of what its blocks make; names say nothing."""

    def __init__(self, finish=lambda model, x: model.last(x), rows=7):
        super().__init__()
        self.first = nn.Embedding(WORDS, WIDTH)
        self.stack = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.last, self.gate = nn.Linear(WIDTH, rows), nn.Linear(WIDTH, rows)
        self.finish = finish

    def forward(self, tokens):
        x = self.first(tokens)
        for block in self.stack:
            x = block(x)
        return self.finish(self, self.norm(x))


class ByName(Model):
    """No inputs can be guessed for it."""

    def forward(self, *, words):
        return super().forward(words)


def capped(model, x):
    return 5 * torch.tanh(model.last(x) / 5)


def in_a_loss(model, x):
    return {"loss": cross_entropy(model.last(x).flatten(0, 1), torch.ones(x.shape[:2], dtype=torch.int64).flatten())}


def normalised(model, x):
    y = model.last(x[:, -1])
    return (y / y.norm(dim=-1, keepdim=True),)


def returned_otherwise(model, x):
    return model.norm(x), None


RETURNED = {
    "as it is": lambda model, x: model.last(x),
    "of the last token": lambda model, x: model.last(x)[:, -1].float(),
    "capped": capped,
    "in a loss": in_a_loss,
    "normalised": normalised,
}
HIDDEN = {
    "headless": returned_otherwise,
    "gated": lambda model, x: model.last(x) * model.gate(x).sigmoid(),
    "a function of it": lambda model, x: model.last(x).relu().sum(-1),
    "a norm of it": lambda model, x: nn.functional.layer_norm(model.last(x), (7,)),
}


def use_of(optimizer, name):
    return next(line.use for line in optimizer.plan.parameters if line.name == name)


@pytest.mark.parametrize("how", RETURNED)
def test_what_the_model_returns_is_an_output_head(how):
    optimizer = MuonClip(Model(RETURNED[how]))
    assert use_of(optimizer, "last.weight") == "adamw"
    assert "the model returns its product" in str(optimizer.plan)
    assert use_of(optimizer, "stack.1.o.weight") == use_of(optimizer, "gate.weight") == "muon"


@pytest.mark.parametrize("how", HIDDEN)
def test_what_the_model_returns_otherwise_is_none(how):
    assert use_of(MuonClip(Model(HIDDEN[how])), "last.weight") == "muon"


def test_a_product_as_wide_as_the_residual_stream_is_no_head():
    assert use_of(MuonClip(Model(rows=WIDTH)), "last.weight") == "muon"


@pytest.mark.parametrize(
    "look_up", [lambda t, w: embedding(t, w), lambda t, w: w[t], lambda t, w: w.index_select(0, t[0])]
)
def test_tensors_whose_rows_are_looked_up_are_embeddings(look_up):
    class LookedUp(Model):
        def __init__(self):
            super().__init__()
            self.kinds = nn.Parameter(torch.randn(WORDS, WIDTH + 1))
            self.narrow = nn.Linear(WIDTH + 1, WIDTH)

        def forward(self, tokens):
            return super().forward(tokens) + self.narrow(look_up(tokens, self.kinds)).mean()

    plan = MuonClip(LookedUp())
    assert use_of(plan, "kinds") == "adamw"
    assert "its rows are looked up" in str(plan.plan)
    assert use_of(plan, "narrow.weight") == "muon"


def test_columns_and_single_slices_are_no_look_up():
    class Sliced(Model):
        def __init__(self):
            super().__init__()
            self.table_of = nn.Parameter(torch.randn(3, WIDTH))

        def forward(self, tokens):
            return super().forward(tokens) + self.table_of[:, torch.tensor([0, 2])].mean() + self.table_of[1].mean()

    assert use_of(MuonClip(Sliced()), "table_of") == "muon"


def test_a_first_forward_that_disagrees_warns_once_and_moves_nothing():
    model = ByName()
    words = torch.arange(8).view(2, 4)
    optimizer = MuonClip(model, lr=1e-2)
    assert use_of(optimizer, "last.weight") == "muon"
    model(words=words).square().mean().backward()
    with pytest.warns(UserWarning, match=r"last\.weight.*returns its product.*example_inputs=batch"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(words=words).square().mean().backward()
        optimizer.step()
        model(words=words).square().mean().backward()
        copy.deepcopy((model, optimizer))
    assert use_of(optimizer, "last.weight") == "muon"
    said = MuonClip(model, qk_clip=QKClip(model, example_inputs={"words": words}))
    assert use_of(said, "last.weight") == "adamw"
