"""Embeddings and output heads by what a forward shows, where types and names do not tell."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding, scaled_dot_product_attention
from unchanged import Unchanged

from muonclip.torch import MaxLogits, MuonClip, QKClip, QKProjection, attention

WIDTH, WORDS = 12, 19


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return x + self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Declared(Block):
    def __init__(self):
        super().__init__()
        self.max_logits = MaxLogits(2)

    def qk_projection(self):
        return QKProjection.mha(q=self.q, k=self.k, num_heads=2, max_logits=self.max_logits)

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return x + self.o(attention(q, k, v, max_logits=self.max_logits).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Tokens to `finish` of what its blocks make; names say nothing."""

    def __init__(self, finish=lambda model, x: model.last(x), rows=7, block=Block):
        super().__init__()
        self.first = nn.Embedding(WORDS, WIDTH)
        self.stack = nn.ModuleList(block() for _ in range(2))
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


CLIPS = {  # by how a clip comes to know the attentions, if there is one
    "found": lambda *args: MuonClip(Model(*args)),
    "declared": lambda *args: MuonClip(Model(*args, block=Declared)),
    "off": lambda *args: MuonClip(Model(*args), qk_clip=None),
}
every_clip = pytest.mark.parametrize("clip", CLIPS)


def use_of(optimizer, name):
    return next(line.use for line in optimizer.plan.parameters if line.name == name)


@every_clip
@pytest.mark.parametrize("how", RETURNED)
def test_what_the_model_returns_is_an_output_head(how, clip):
    optimizer = CLIPS[clip](RETURNED[how])
    assert use_of(optimizer, "last.weight") == "adamw"
    assert "the model returns its product" in str(optimizer.plan)
    assert use_of(optimizer, "stack.1.o.weight") == use_of(optimizer, "gate.weight") == "muon"


@every_clip
@pytest.mark.parametrize("how", HIDDEN)
def test_what_the_model_returns_otherwise_is_none(how, clip):
    assert use_of(CLIPS[clip](HIDDEN[how]), "last.weight") == "muon"


@every_clip
def test_a_product_as_wide_as_the_residual_stream_is_no_head(clip):
    assert use_of(CLIPS[clip](lambda model, x: model.last(x), WIDTH), "last.weight") == "muon"


class TwoLayers(nn.Module):
    """A name that heads have for a layer in the middle, and a head of another name."""

    def __init__(self, middle="fc", end="answer"):
        super().__init__()
        self.middle, self.end = middle, end
        self.add_module(middle, nn.Linear(6, 8))
        holder, _, name = end.rpartition(".")
        if holder:
            self.add_module(holder.partition(".")[0], nn.ModuleDict({"layers": nn.ModuleDict()}))
        self.get_submodule(holder).add_module(name, nn.Linear(8, 5))

    def forward(self, x):
        return self.get_submodule(self.end)(self.get_submodule(self.middle)(x).relu())


@pytest.mark.filterwarnings("ignore:QK-Clip. nothing to clip")
@pytest.mark.parametrize("clip", ["auto", None])
@pytest.mark.parametrize("middle", ["fc", "score", "output", "proj_out"])
def test_a_head_s_name_does_not_make_one_of_a_matrix_in_the_middle(middle, clip):
    optimizer = MuonClip(TwoLayers(middle), qk_clip=clip)
    assert [use_of(optimizer, f"{name}.weight") for name in (middle, "answer")] == ["muon", "adamw"]
    by_name = MuonClip(TwoLayers(middle).named_parameters(), qk_clip=None)
    assert [use_of(by_name, f"{name}.weight") for name in (middle, "answer")] == ["adamw", "muon"]


@pytest.mark.parametrize("middle", ["lm_head", "unembed"])
def test_what_is_called_the_head_of_a_language_model_is_one(middle):
    assert use_of(MuonClip(TwoLayers(middle), qk_clip=None), f"{middle}.weight") == "adamw"


def test_the_last_layer_of_a_head_with_layers_is_the_output_head():
    assert use_of(MuonClip(TwoLayers("up", "head.layers.2"), qk_clip=None), "head.layers.2.weight") == "adamw"


def test_a_matrix_that_is_alone_is_told_by_its_name():
    for name, use in (("answer", "muon"), ("score", "adamw")):
        model = nn.Sequential()
        model.add_module(name, nn.Linear(4, 6))
        assert use_of(MuonClip(model, qk_clip=None), f"{name}.weight") == use


def test_wrappers_around_a_model_do_not_hide_its_head():
    model = torch.compile(Model(), backend="eager")
    for clip in ("auto", None):
        assert use_of(MuonClip(model, qk_clip=clip), "_orig_mod.last.weight") == "adamw"


def test_the_search_leaves_a_model_as_it_was():
    model = Model(block=Declared)
    with Unchanged(model):
        MuonClip(model, qk_clip=None)
    assert not model._forward_pre_hooks


def test_without_a_clip_the_first_forward_is_compared_too_and_its_hook_goes():
    model = ByName()
    words = torch.arange(8).view(2, 4)
    optimizer = MuonClip(model, lr=1e-2, qk_clip=None)
    assert use_of(optimizer, "last.weight") == "muon"
    assert not pickle.loads(pickle.dumps(copy.deepcopy(model.first)))._forward_pre_hooks
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model(words=words)
    assert len(model._forward_pre_hooks) == 1
    model(words=words).square().mean().backward()
    assert not model._forward_pre_hooks
    with pytest.warns(UserWarning, match=r"last\.weight.*returns its product.*use='adamw'"):
        optimizer.step()
    assert use_of(optimizer, "last.weight") == "muon"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(words=words).square().mean().backward()
        optimizer.step()
        twin(words=words).square().mean().backward()
    del optimizer


def test_the_hook_goes_with_its_optimizer():
    model = ByName()
    optimizer = MuonClip(model, qk_clip=None)
    assert model._forward_pre_hooks
    del optimizer
    gc.collect()
    assert not model._forward_pre_hooks


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
