"""Weights that are changed in kind after they were found are followed, or are an error by name; never missed."""

import copy

import numpy as np
import peft
import pytest
import torch
from tiny_attention import HEAD, HEADS, WIDTH, TinyModel, UndeclaredAttention
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from muonclip.torch import MuonClip, QKClip

TAU = 0.05


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([UndeclaredAttention(), UndeclaredAttention()])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Training:
    """A model whose weights only the clip moves, after its first step."""

    def __init__(self, make=None):
        torch.manual_seed(0)
        self.model, self.x = Model().double(), torch.randn(2, 8, WIDTH, dtype=torch.float64)
        self.clip = QKClip(self.model, tau=TAU)
        optimizer = make or (lambda model, clip: MuonClip(model, lr=0.0, weight_decay=0.0, qk_clip=clip))
        self.optimizer = optimizer(self.model, self.clip)
        self.step()

    def step(self):
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def attention(self):
        return self.model.layers[0]

    def logits(self):
        return self.attention.maxima(self.x)


def attached(model, clip):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clip.attach(optimizer)
    return optimizer


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, WIDTH)), nn.Parameter(torch.randn(HEADS * HEAD, 3))

    def forward(self, weight):
        return weight + (self.b @ self.a).to(weight.dtype)


def pruned_for_good(linear):
    prune.l1_unstructured(linear, "weight", 0.3)
    prune.remove(linear, "weight")


FOLLOWED = {
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.3), lambda m: m.weight_orig),
    "pruned for good": (pruned_for_good, lambda m: m.weight),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", Half()),
        lambda m: m.parametrizations.weight.original,
    ),
    "weight norm": (lambda m: parametrizations.weight_norm(m), lambda m: m.parametrizations.weight.original0),
    "legacy weight norm": (lambda m: torch.nn.utils.weight_norm(m), lambda m: m.weight_g),
    "bias": (lambda m: prune.l1_unstructured(m, "bias", 0.3), lambda m: m.bias_orig),
    "bias parametrized": (
        lambda m: parametrize.register_parametrization(m, "bias", Half()),
        lambda m: m.parametrizations.bias.original,
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [None, attached], ids=["MuonClip", "attached"])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_computed_weight_is_followed_to_what_it_is_computed_from(kind, make):
    training = Training(make)
    put, scaled = FOLLOWED[kind]
    for linear in (training.attention.q, training.attention.k):
        put(linear)
        with torch.no_grad():
            scaled(linear).mul_(20)
    before = training.logits()
    assert before.max() > 2 * TAU
    training.step()
    np.testing.assert_allclose(training.logits(), np.minimum(before, TAU), rtol=1e-6)
    assert training.clip.report().clipped_heads > 0


def test_what_is_put_on_and_taken_off_again_is_followed_both_ways():
    training = Training()
    query, parameter = training.attention.q, training.attention.q.weight
    prune.l1_unstructured(query, "weight", 0.3)
    training.step()
    prune.remove(query, "weight")
    assert query.weight is parameter
    for weight in (lambda: query.weight, lambda: query.parametrizations.weight.original, lambda: query.weight):
        with torch.no_grad():
            weight().mul_(5)
        before = training.logits()
        training.step()
        np.testing.assert_allclose(training.logits(), np.minimum(before, TAU), rtol=1e-6)
        if parametrize.is_parametrized(query):
            parametrize.remove_parametrizations(query, "weight")
        else:
            parametrize.register_parametrization(query, "weight", Half())


REFUSED = {
    "spectral norm": (lambda m: parametrizations.spectral_norm(m), "_SpectralNorm"),
    "legacy spectral norm": (lambda m: torch.nn.utils.spectral_norm(m), "is computed from others"),
    "adapter": (lambda m: parametrize.register_parametrization(m, "weight", Adapter(), unsafe=True), "Adapter"),
    "orthogonal": (lambda m: parametrizations.orthogonal(m), "_Orthogonal"),
    "weight norm of columns": (lambda m: parametrizations.weight_norm(m, dim=1), "weight norm whose g"),
    "weight norm of all": (lambda m: parametrizations.weight_norm(m, dim=None), "weight norm whose g"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_computed_weight_that_no_rows_scale_is_an_error_by_name(kind):
    """The norm of a spectral norm follows the rows: scaling them would shrink them for ever and change no logit."""
    training = Training()
    put, why = REFUSED[kind]
    put(training.attention.q)
    before = copy.deepcopy(list(training.model.parameters()))
    for _ in range(2):  # and goes on being one
        with pytest.raises(RuntimeError, match=rf"weight of layers\.0\.q .*{why}.*since layers\.0 was found"):
            training.step()
    assert all(map(torch.equal, training.model.parameters(), before))


def test_a_parametrization_added_to_one_that_was_followed_is_seen():
    training = Training()
    parametrize.register_parametrization(training.attention.q, "weight", Half())
    training.step()
    parametrize.register_parametrization(training.attention.q, "weight", Adapter(), unsafe=True)
    with pytest.raises(RuntimeError, match=r"weight of layers\.0\.q .*Half, Adapter"):
        training.step()


def test_given_projections_are_followed_too():
    torch.manual_seed(0)
    layer, x = TinyModel().layers[0], torch.randn(2, 8, WIDTH)
    clip = QKClip({"attn": layer.qk_projection()}, tau=TAU, observe="always")
    layer(x)
    clip.step()
    prune.l1_unstructured(layer.q, "weight", 0.3)
    with torch.no_grad():
        layer.q.weight_orig.mul_(9)
    layer(x)
    clip.step()
    layer(x)
    assert float(layer.max_logits.maximum.max()) == pytest.approx(TAU, rel=1e-5)
    layer.k.weight = layer.q.weight_orig
    with pytest.raises(RuntimeError, match="was tied to"):
        clip.step()


# Modules and ties


def replaced(model):
    model.layers[0].q = nn.Linear(WIDTH, HEADS * HEAD).double()


def adapted(model):
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"]))


@pytest.mark.parametrize("change", [replaced, adapted])
def test_a_replaced_projection_is_an_error_by_name(change):
    training = Training()
    change(training.model)
    with pytest.raises(RuntimeError, match=r"layers\.0\.q was replaced since layers\.0 was found"):
        training.step()
    again = MuonClip(training.model, lr=0.0, weight_decay=0.0, tau=1e6)
    training.model(training.x).sum().backward()
    again.step()


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_a_wrapper_without_weights_of_its_own_is_followed():
    training = Training()
    training.attention.q = Wrapped(training.attention.q)
    with torch.no_grad():
        training.attention.q.inner.weight.mul_(9)
    before = training.logits()
    training.step()
    np.testing.assert_allclose(training.logits(), np.minimum(before, TAU), rtol=1e-6)
    training.attention.q = nn.Linear(WIDTH, HEADS * HEAD).double()
    with pytest.raises(RuntimeError, match=r"layers\.0\.q was replaced"):
        training.step()


def test_a_layer_that_is_removed_is_not_missed():
    training = Training()
    training.model.layers = training.model.layers[:1]
    with torch.no_grad():
        training.attention.q.weight.mul_(9)
    before = training.logits()
    training.step()
    np.testing.assert_allclose(training.logits(), np.minimum(before, TAU), rtol=1e-6)


@pytest.mark.parametrize("other", ["layers.1.q", "layers.0.k", "layers.0.v"])
def test_weights_tied_later_are_an_error_by_name(other):
    training = Training()
    training.model.get_submodule(other).weight = training.attention.q.weight
    with pytest.raises(RuntimeError, match=r"weight was tied to layers\.\d\.\w\.weight since its attention was found"):
        training.step()


def before_the_first_forward(change):
    """A model in which the attentions were found with guessed inputs, and which was changed before it ran."""
    torch.manual_seed(0)
    model = nn.Sequential(UndeclaredAttention(), UndeclaredAttention())
    clip = QKClip(model, tau=TAU)
    assert list(clip.projections) == ["0", "1"]
    change(model)
    return model, clip


def tie(model):
    model[1].q.weight = model[0].q.weight


def share(model):
    model[1].q = model[0].q


class Added(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.added(x)


def add(model):
    model[1].q = Added(model[1].q)


@pytest.mark.parametrize("change", [tie, share, add])
def test_what_changes_the_queries_before_the_first_forward_is_refused(change):
    """Weights that were tied got the factors of both attentions; those that were added to, too small ones."""
    model, _ = before_the_first_forward(change)
    with pytest.raises(ValueError, match=r"queries also meet the keys of 0|1\.q\.weight is not in the model any more"):
        model(torch.randn(2, 8, WIDTH)).sum().backward()


def test_a_projection_that_is_replaced_before_the_first_forward_is_clipped():
    model, clip = before_the_first_forward(lambda model: setattr(model[1], "q", nn.Linear(WIDTH, HEADS * HEAD)))
    with torch.no_grad():
        model[1].q.weight.mul_(9)
    x = torch.randn(2, 8, WIDTH)
    model(x).sum().backward()
    before = model[1].maxima(model[0](x))
    assert before.max() > TAU
    inner = model[0](x).detach()
    clip.step()
    np.testing.assert_allclose(model[1].maxima(inner), np.minimum(before, TAU), rtol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_given_projections_that_scale_one_weight_twice_are_refused(when):
    torch.manual_seed(0)
    model = TinyModel()
    layers = model.layers
    if when == "before":
        layers[1].q.weight = layers[0].q.weight
    clip = QKClip([layer.qk_projection() for layer in layers], tau=1e-3)
    if when == "after":
        layers[1].q.weight = layers[0].q.weight
    model.loss(torch.randint(13, (2, 6))).backward()
    before = layers[0].q.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"weight is scaled for 0 and for 1, and would get the factors of both"):
        clip.step()
    assert torch.equal(layers[0].q.weight, before)


def test_weights_untied_later_are_an_error_by_name():
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(2, 8, WIDTH, dtype=torch.float64)
    for name in ("q", "k"):
        getattr(model.layers[1], name).weight = getattr(model.layers[0], name).weight
        getattr(model.layers[1], name).bias = getattr(model.layers[0], name).bias
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, tau=TAU)
    model(x).sum().backward()
    optimizer.step()
    assert len(optimizer.qk_clip.projections) == 1
    model.layers[1].q.weight = nn.Parameter(model.layers[0].q.weight.detach().clone())
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"layers\.1\.q\.weight was tied to layers\.0\.q\.weight when"):
        optimizer.step()


def test_parameters_that_an_engine_replaced_are_taken_as_they_are():
    training = Training(attached)
    for parameter_name in ("weight", "bias"):
        old = getattr(training.attention.q, parameter_name)
        setattr(training.attention.q, parameter_name, nn.Parameter(old.detach() * 9))
    before = training.logits()
    training.step()
    np.testing.assert_allclose(training.logits(), np.minimum(before, TAU), rtol=1e-6)


def test_the_check_is_a_look_at_each_weight_and_no_search(monkeypatch):
    training = Training()
    prune.l1_unstructured(training.attention.q, "weight", 0.3)
    training.step()
    read = []
    monkeypatch.setattr(type(training.clip.attentions._found), "read", lambda *args: read.append(args))
    training.step()
    assert not read
