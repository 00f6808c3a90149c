"""A model without attention trains by default, with one warning; one that mixes tokens by products does not."""

import copy
import pickle
import warnings

import pytest
import torch
from tiny_attention import TinyModel
from torch import nn

from muonclip.torch import MuonClip, QKClip


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, pixels):
        x = self.stem(pixels)
        return self.fc((x + self.block(self.norm(x).relu())).mean((-2, -1)))


class ByName(Convolutions):
    """No inputs can be guessed for it."""

    def forward(self, *, pixels):
        return super().forward(pixels)


class LinearAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.q(x) @ (self.k(x).mT @ self.v(x))


class StateSpace(nn.Module):
    """h_t = exp(−A Δ) h_{t−1} + Δ B_t x_t, y_t = C_t · h_t, as Mamba has it."""

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(6, 4))
        self.b, self.c, self.into, self.delta = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        b, c, x, delta = self.b(x), self.c(x), self.into(x), nn.functional.softplus(self.delta(x))
        state, outputs = x.new_zeros(len(x), 6, 4), []
        for t in range(x.shape[1]):
            decay = (-self.A_log.exp() * delta[:, t, :, None]).exp()
            state = decay * state + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
            outputs.append((state @ c[:, t, :, None])[..., 0])
        return torch.stack(outputs, 1)


IMAGES = torch.randn(2, 3, 8, 8)
WITHOUT = {
    "convolutions": (Convolutions, lambda m: m(IMAGES)),
    "by name": (ByName, lambda m: m(pixels=IMAGES)),
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)), lambda m: m(torch.randn(2, 6))),
    "state space": (StateSpace, lambda m: m(torch.randn(2, 4, 6))),
    "stage with the embedding": (lambda: nn.Embedding(7, 6), lambda m: m(torch.arange(4)[None])),
    "stage with the head": (
        lambda: nn.ModuleDict({"norm": nn.LayerNorm(6), "head": nn.Linear(6, 7)}),
        lambda m: m["head"](m["norm"](torch.randn(2, 4, 6))),
    ),
    "stage with a norm": (lambda: nn.LayerNorm(6), lambda m: m(torch.randn(2, 4, 6))),
}


def train(model, call, **options):
    optimizer = MuonClip(model, lr=1e-2, **options)
    for _ in range(3):
        call(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_attention_trains_as_with_the_clip_off_and_warns_once(name):
    torch.manual_seed(0)
    make, call = WITHOUT[name]
    model = make()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = train(model, call)
    assert ["nothing to clip" in str(each.message) for each in seen] == [True]
    assert "nothing to clip" in str(optimizer.plan)
    torch.manual_seed(1)
    train(other, call, qk_clip=None)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert not optimizer.qk_clip.report().layers
    optimizer.load_state_dict(optimizer.state_dict())
    pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("name", ["convolutions", "by name", "stage with the embedding"])
def test_who_requires_attention_gets_an_error(name):
    make, call = WITHOUT[name]
    with pytest.raises((ValueError, RuntimeError), match="no attention was found"):
        train(make(), call, qk_clip="required")
    assert train(TinyModel(), lambda m: m(torch.arange(6)[None]), qk_clip="required").qk_clip.projections


@pytest.mark.parametrize("how", ["guessed", "given"])
def test_a_product_of_projections_without_a_softmax_is_not_nothing(how):
    model = LinearAttention()
    given = {"example_inputs": torch.randn(2, 4, 6)} if how == "given" else {}
    with pytest.raises(ValueError, match="no attention was found"):
        QKClip(model, required=False, **given)
    if how == "guessed":
        with pytest.raises(ValueError, match="no attention was found"):
            MuonClip(model)


def test_why_there_is_nothing_is_said():
    with pytest.warns(UserWarning, match="nothing to clip.* model mix activations without a softmax, as state"):
        MuonClip(StateSpace())
    with pytest.raises(ValueError, match=r"no attention was found.* mix activations without a softmax"):
        MuonClip(StateSpace(), qk_clip="required")
    with pytest.raises(ValueError, match=r"no attention was found.* mix activations without a softmax"):
        MuonClip(LinearAttention())


def test_attention_that_comes_later_is_an_error_or_found():
    class Late(Convolutions):
        attends = False

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, pixels):
            x = self.block(self.stem(pixels))
            if self.attends:
                x = x.flatten(2).mT[:, None]
                x = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))[:, 0].mT[..., None]
            return self.fc(x.mean((-2, -1)))

    model = Late()
    with pytest.warns(UserWarning, match="nothing to clip"):
        optimizer = train(model, lambda m: m(IMAGES))
    model.attends = True
    model(IMAGES).sum().backward()
    optimizer.step()
    assert len(optimizer.qk_clip.report().layers) == 1
    assert "nothing to clip" not in str(optimizer.plan)


def test_groups_that_are_all_of_adamw_are_built():
    weight = nn.Parameter(torch.ones(3))
    optimizer = MuonClip([dict(params=[weight], use="adamw")], qk_clip=None, lr=0.1, weight_decay=0.0)
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_groups_with_param_names_are_named_parameters():
    embedding, matrix, norm = (nn.Parameter(torch.randn(shape)) for shape in [(7, 6), (6, 6), (6,)])
    group = dict(params=[embedding, matrix], param_names=["embed.weight", "layers.0.up.weight"])
    optimizer = MuonClip([group], qk_clip=None)
    optimizer.add_param_group(dict(params=norm, param_names=["norm.weight"]))
    uses = {line.name: line.use for line in optimizer.plan.parameters}
    assert uses == {"embed.weight": "adamw", "layers.0.up.weight": "muon", "norm.weight": "adamw"}
    assert group.keys() == {"params", "param_names"}
    said = dict(params=[matrix], param_names=["up"], use="muon")
    assert MuonClip([said], qk_clip=None).param_groups[0]["param_names"] == ["up"]


@pytest.mark.parametrize(
    ("names", "what", "message"),
    [
        (["a"], lambda a, b: [a, b], "param_names lists 1 names for the 2 parameters"),
        (["a", "b"], lambda a, b: [("c", a), ("d", b)], "names in params and in param_names"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, what, message):
    params = what(*(nn.Parameter(torch.randn(3, 4)) for _ in range(2)))
    with pytest.raises(ValueError, match=message):
        MuonClip([dict(params=params, param_names=names)], qk_clip=None)
