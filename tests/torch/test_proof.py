"""What is clipped was tried on a copy first: the right rows, the right logits, and nothing else that moves."""

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MaxLogits, QKClip, QKProjection

WIDTH, HEADS, HEAD, LENGTH = 20, 4, 6, 7


def in_heads(x):
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


class Attention(nn.Module):
    """With parts to override. `logits` enter the softmax; `counted` is their part that the clip must hold."""

    def __init__(self, key_heads=HEADS):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * HEAD) for n in (HEADS, key_heads, HEADS))
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def queries(self, x):
        return in_heads(self.q(x))

    def keys(self, x):
        k = in_heads(self.k(x))
        return k.repeat_interleave(HEADS // k.shape[1], 1)

    def values(self, x):
        return in_heads(self.v(x))

    def added(self, q, k):
        return 0

    def logits(self, x):
        q, k = self.queries(x), self.keys(x)
        return q @ k.mT / math.sqrt(HEAD) + self.added(q, k)

    def counted(self, x):
        return self.logits(x)

    def attend(self, x):
        return self.logits(x).softmax(-1) @ self.values(x)

    def out(self, x, y):
        return self.o(y)

    def forward(self, x):
        return self.out(x, self.attend(x).transpose(1, 2).flatten(2))


class Kernel(Attention):
    def attend(self, x):
        q, k = self.queries(x), self.keys(x)
        added = self.added(q, k)
        mask = added if isinstance(added, torch.Tensor) else None
        return F.scaled_dot_product_attention(q, k, self.values(x), attn_mask=mask)


class Gate(Kernel):
    def out(self, x, y):
        return self.o(y * torch.sigmoid(self.q(x)))


class GateThatIsReturned(Kernel):
    """Which is a power of two away where the queries are."""

    def out(self, x, y):
        return y * self.q(x)


class GateOfFlex(Gate):
    """A kernel that does not run in a trace."""

    def attend(self, x):
        return flex_attention(self.queries(x), self.keys(x), self.values(x))


class GateBehindAZero(Gate):
    """As adaptive norms and layer scales begin."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return x + self.scale * super().forward(x)


class KeysMakeValues(Kernel):
    def values(self, x):
        return self.keys(x).tanh()


class DetachedNorm(Attention):
    def queries(self, x):
        q = super().queries(x)
        return 4 * q / q.norm(dim=-1, keepdim=True).detach()


class DetachedNorms(DetachedNorm):
    def keys(self, x):
        k = super().keys(x)
        return 4 * k / k.norm(dim=-1, keepdim=True).detach()


class Magnitude(Attention):
    """As DoRA trains: a magnitude for every row of a weight of length 1, through whose length no gradient flows."""

    def __init__(self):
        super().__init__()
        self.magnitude = nn.Parameter(1 + torch.rand(HEADS * HEAD))
        self.down, self.up = (nn.Parameter(torch.randn(shape) / 4) for shape in ((3, WIDTH), (HEADS * HEAD, 3)))

    def queries(self, x):
        y = x @ self.q.weight.T + x @ self.down.T @ self.up.T
        length = (self.q.weight + self.up @ self.down).norm(dim=1).detach()
        return in_heads(self.magnitude / length * y)


class BehindBatchNorm(Kernel):
    """In evaluation mode it scales with the rows before it, in training with its own alone."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(HEADS * HEAD) for _ in range(2))

    def queries(self, x):
        return in_heads(self.norms[0](self.q(x).mT).mT)

    def keys(self, x):
        return in_heads(self.norms[1](self.k(x).mT).mT)


class Relative(Attention):
    def __init__(self, *args):
        super().__init__(*args)
        self.positions = nn.Parameter(torch.randn(LENGTH, HEAD))

    def added(self, q, k):
        return q @ self.positions.T


class RelativeMask(Relative, Kernel):
    pass


class RelativeToKeys(Relative):
    """The queries hold q · k down and leave the rest as it is."""

    def added(self, q, k):
        return (k @ self.positions.T).mT

    def counted(self, x):
        return super().logits(x) - self.added(self.queries(x), self.keys(x))


class Distance(Attention):
    def added(self, q, k):
        square = lambda t: t.square().sum(-1) / (2 * math.sqrt(HEAD))  # noqa: E731
        return -square(q)[..., None] - square(k)[..., None, :]


class Forgetting(Attention):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HEADS)

    def counted(self, x):
        return super().logits(x)

    def logits(self, x):
        forgotten = F.logsigmoid(self.gate(x)).cumsum(1).transpose(1, 2)
        return super().logits(x) + forgotten[..., :, None] - forgotten[..., None, :]


def made(kind, *args, dtype=torch.float32):
    torch.manual_seed(0)
    return kind(*args).to(dtype), torch.randn(3, LENGTH, WIDTH, dtype=dtype)


def maxima(module, x):
    """Of each head, dense in float64."""
    return copy.deepcopy(module).double().counted(x.double()).detach().amax((0, 2, 3))


def clipped(module, x, *, share=0.5):
    """The maxima before and after one clip to `share` of the largest, the clip, and the parameters before."""
    before, weights = maxima(module, x), {name: p.detach().clone() for name, p in module.named_parameters()}
    clip = QKClip(module, tau=share * float(before.max()), observe="always")
    module(x)
    clip.step()
    return before, maxima(module, x), clip, weights


def unchanged(module, weights):
    return {name for name, parameter in module.named_parameters() if torch.equal(parameter, weights[name])}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:The .grad attribute")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "args", "kept"),
    [
        (Attention, (), set()),
        (Attention, (2,), {"k.weight", "k.bias"}),
        (Kernel, (), set()),
        (Forgetting, (), {"gate.weight", "gate.bias"}),
        (Gate, (), {"q.weight", "q.bias"}),
        (GateThatIsReturned, (), {"q.weight", "q.bias"}),
        (GateBehindAZero, (), {"q.weight", "q.bias", "scale"}),
        (GateOfFlex, (), {"q.weight", "q.bias"}),
        (KeysMakeValues, (), {"k.weight", "k.bias"}),
        (DetachedNorm, (), {"q.weight", "q.bias"}),
        (Magnitude, (), {"q.weight", "q.bias", "down", "up"}),
        (Relative, (), {"k.weight", "k.bias", "positions"}),
        (Relative, (2,), {"k.weight", "k.bias", "positions"}),
        (RelativeMask, (), {"k.weight", "k.bias", "positions"}),
        (RelativeToKeys, (), {"k.weight", "k.bias", "positions"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_heads_are_held_at_tau_and_nothing_else_is_scaled(kind, args, kept, dtype, monkeypatch):
    # It refuses gradients on the CPU, though they are right.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    module, x = made(kind, *args, dtype=dtype)
    before, after, clip, weights = clipped(module, x)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(after, before.clamp(max=clip.tau), rtol=tolerance, atol=tolerance * clip.tau)
    assert unchanged(module, weights) == kept | {"v.weight", "v.bias", "o.weight", "o.bias"}


def test_logits_that_are_never_positive_are_never_clipped():
    module, x = made(Distance)
    before, weights = maxima(module, x), {name: p.detach().clone() for name, p in module.named_parameters()}
    clip = QKClip(module, tau=1e-3, observe="always")
    module(x)
    clip.step()
    torch.testing.assert_close(clip.report().layers[""].max_logits.double(), before, rtol=1e-5, atol=1e-5)
    assert unchanged(module, weights) == weights.keys()


def test_what_is_normalised_is_observed_only():
    module, x = made(DetachedNorms)
    _, _, clip, weights = clipped(module, x)
    assert unchanged(module, weights) == weights.keys()
    assert "QK-norm" in clip.attentions.projections[""].reason


class TwoTerms(Attention):
    """Positions that depend on the query and others that do not: S is not to be told from the rest in a forward."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(LENGTH, HEAD))
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def added(self, q, k):
        return q @ self.positions.T + self.bias


class CappedRelative(Relative):
    def logits(self, x):
        return 5 * torch.tanh(super().logits(x) / 5)


class AddedLogits(Attention):
    def forward(self, x, before):
        logits = self.masked(self.logits(x) + before)
        return x + self.o((logits.softmax(-1) @ self.values(x)).transpose(1, 2).flatten(2)), logits

    def masked(self, logits):
        return logits


class AddedMaskedLogits(AddedLogits):
    def masked(self, logits):
        return logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -1e9)


class BehindACap(Relative):
    """A clamp against overflow is a cap, too; what is added behind it is not under it."""

    def logits(self, x):
        q, k = self.queries(x), self.keys(x)
        return (q @ k.mT / math.sqrt(HEAD)).clamp(-500, 500) + self.positions_of(q)

    def positions_of(self, q):
        return q @ self.positions.T


class SinkOfTheQueries(Attention):
    """Its column is a product that nobody follows."""

    def __init__(self):
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS, HEAD))

    def attend(self, x):
        sink = torch.einsum("bhid,hd->bhi", self.queries(x), self.sink)[..., None]
        return torch.cat([sink, self.logits(x)], -1).softmax(-1)[..., 1:] @ self.values(x)


class GateOfGivenKeys(Gate):
    """Keys that no rows of the model make."""

    def __init__(self):
        super().__init__()
        self.register_buffer("given", torch.randn(1, HEADS, LENGTH, HEAD))

    def keys(self, x):
        return self.given.expand(len(x), -1, -1, -1)


class LogitsOfTheLayerBefore(nn.Module):
    def __init__(self, kind=AddedLogits):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x):
        before = 0.0
        for layer in self.layers:
            x, before = layer(x, before)
        return x


class MaskedLogitsOfTheLayerBefore(LogitsOfTheLayerBefore):
    def __init__(self):
        super().__init__(AddedMaskedLogits)


@pytest.mark.parametrize(
    ("kind", "names", "why"),
    [
        (TwoTerms, "the model", "hold more than the products"),
        (CappedRelative, "the model", "hold more than the products"),
        (BehindACap, "the model", "hold more than the products"),
        (GateOfGivenKeys, "the model", "feed something else"),
        (SinkOfTheQueries, "the model", "hold more than the products"),
        (LogitsOfTheLayerBefore, r"layers\.1", "the logits of another layer"),
        (MaskedLogitsOfTheLayerBefore, r"layers\.1", "the logits of another layer"),  # whose rounding hides the others
    ],
)
def test_what_no_factor_holds_is_refused_by_name(kind, names, why):
    module, x = made(kind)
    with pytest.raises(ValueError, match=rf"{names}: .*{why}"):
        QKClip(module, example_inputs=x)


class ReturnsMore(Attention):
    """As a model with a cache that returns its logits, too."""

    def forward(self, x):
        q, k = self.queries(x), self.keys(x)
        logits = q @ k.mT + torch.arange(LENGTH)
        return self.o((logits.softmax(-1) @ self.values(x)).transpose(1, 2).flatten(2)), (q, k), logits


@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
def test_what_is_returned_of_queries_keys_and_logits_is_no_other_use_of_them(key_heads):
    module, x = made(ReturnsMore, key_heads)
    projection = QKClip(module, example_inputs=x).attentions.projections[""]
    assert projection.query or key_heads < HEADS
    assert projection.key or projection.shared_key
    assert not projection.fixed


class ReturnsScaledQueries(ReturnsMore):
    def forward(self, x):
        y, _, _ = super().forward(x)
        return y, self.queries(x).tanh()


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_another_use_beside_logits_that_are_returned_is_seen(key_heads):
    module, x = made(ReturnsScaledQueries, key_heads)
    if key_heads < HEADS:
        with pytest.raises(ValueError, match="feed something else"):
            QKClip(module, example_inputs=x)
    else:
        assert QKClip(module, example_inputs=x).attentions.projections[""].fixed == ("query",)


class InSteps(nn.Module):
    """Attention in training mode alone, beside one that always runs."""

    def __init__(self):
        super().__init__()
        self.always, self.training_only = Kernel(), Gate()

    def forward(self, x):
        x = x + self.always(x)
        return x + self.training_only(x) if self.training else x


def test_what_runs_in_training_alone_is_proven_there():
    module, x = made(InSteps)
    clip = QKClip(module)
    module(x)
    assert {name: each.fixed for name, each in clip.attentions.projections.items()} == {
        "always": (),
        "training_only": ("query",),
    }


class OutOfSight(Attention):
    """Declared, and computed where nobody sees queries and keys."""

    def __init__(self, *, normalised=False, of_keys=False):
        super().__init__()
        self.max_logits, self.normalised, self.of_keys = MaxLogits(HEADS), normalised, of_keys

    def qk_projection(self):
        return QKProjection.mha(q=self.q, k=self.k, num_heads=HEADS, max_logits=self.max_logits)

    def forward(self, x):
        q, k, v = self.queries(x), self.keys(x), self.keys(x) if self.of_keys else self.values(x)
        if self.normalised:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = torch.exp((q[..., :, None, :] * k[..., None, :, :]).sum(-1) / 4)
        y = (weights[..., None] * v[..., None, :, :]).sum(-2) / weights.sum(-1, keepdim=True)
        self.max_logits.update(torch.zeros(HEADS))
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("options", "why"),
    [({"of_keys": True}, "powers of two"), ({"normalised": True}, "do not move with its rows")],
)
def test_a_declaration_of_what_is_out_of_sight_is_proven_by_the_gauge(options, why):
    torch.manual_seed(0)
    x = torch.randn(3, LENGTH, WIDTH)
    QKClip(OutOfSight(), example_inputs=x)
    with pytest.raises(ValueError, match=rf"declaration of the model does not hold: .*{why}"):
        QKClip(OutOfSight(**options), example_inputs=x)


def test_the_proof_takes_two_forwards_where_all_is_as_it_was_found():
    class Counted(Kernel):
        runs = 0

        def forward(self, x):
            Counted.runs += 1
            return super().forward(x)

    module, x = made(Counted)
    clip = QKClip(module.eval())
    Counted.runs = 0
    for _ in range(3):
        module(x)
    assert Counted.runs <= 3 + 3  # one is traced, two are compared
    assert clip.attentions.projections


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m], ids=["weights", "autocast"])
def test_half_precision_is_no_reason_to_refuse(cast):
    """Factors leave some of its numbers too small to be exact."""
    for seed in range(5):
        torch.manual_seed(seed)
        module = cast(Kernel())
        for layer in (module.q, module.k):
            nn.init.normal_(layer.weight, std=0.02)
        x = torch.randn(2, LENGTH, WIDTH).to(module.q.weight.dtype)
        with torch.autocast("cpu", torch.float16):
            projection = QKClip(module, example_inputs=x).attentions.projections[""]
        assert projection.query
        assert not projection.fixed


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.float], ids=["weights", "autocast"])
@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_a_declaration_is_tried_with_the_range_that_half_precision_lacks(cast, attention, monkeypatch):
    torch.manual_seed(0)
    model = cast(MoE(MoEConfig.cpu(num_layers=2, attention=attention)))
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(256, (4, 32))

    def projections():
        with torch.autocast("cpu", torch.float16):
            return QKClip(model, example_inputs=tokens).attentions.projections

    assert projections()["layers.0.attn"].query
    attn = model.layers[0].attn
    if attention == "mha":
        wrong = dict(q=attn.q_proj, k=attn.v_proj, num_heads=4, num_kv_heads=4, max_logits=attn.max_logits)
        monkeypatch.setattr(attn, "declare", lambda: QKProjection.gqa(**wrong))
        with pytest.raises(ValueError, match=r"declaration of layers\.0\.attn does not hold"):
            projections()
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_a_gate_of_grouped_queries_is_seen_next_to_attention_with_keys_of_its_own():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"layers\.1: .*feed something else"):
        QKClip(Stack(Kernel(), Gate(2)), example_inputs=torch.randn(2, LENGTH, WIDTH))


def test_one_layer_that_is_normalised_says_nothing_of_the_others():
    class Some(DetachedNorms):
        def __init__(self, *, normalised):
            super().__init__()
            self.normalised = normalised

        def queries(self, x):
            return super().queries(x) if self.normalised else Attention.queries(self, x)

        def keys(self, x):
            return super().keys(x) if self.normalised else Attention.keys(self, x)

    torch.manual_seed(0)
    clip = QKClip(Stack(Some(normalised=True), Some(normalised=False)), example_inputs=torch.randn(2, LENGTH, WIDTH))
    assert [bool(each.reason) for each in clip.attentions.projections.values()] == [True, False]


def test_relative_positions_need_not_be_added_in_every_forward():
    class Sometimes(RelativeMask):
        def added(self, q, k):
            return super().added(q, k) if q.shape[2] == LENGTH else 0

    module, x = made(Sometimes)
    clip = QKClip(module, tau=1e-2, observe="always", example_inputs=x)
    short = x[:, :3]
    module(short)
    before = maxima(module, short)
    torch.testing.assert_close(clip.projections[""].max_logits.maximum.double(), before, rtol=1e-5, atol=1e-5)
    clip.step()
    torch.testing.assert_close(maxima(module, short), before.clamp(max=1e-2), rtol=1e-4, atol=1e-6)


def test_dropout_in_a_kernel_and_behind_it_does_not_look_like_a_leak():
    class Dropped(Kernel):
        def attend(self, x):
            return F.scaled_dot_product_attention(
                self.queries(x), self.keys(x), self.values(x), dropout_p=0.1 * self.training
            )

        def forward(self, x):
            return F.dropout(super().forward(x), 0.2, self.training) if self.training else x

    module, x = made(Dropped)
    clip = QKClip(module, example_inputs=x)
    assert clip.attentions.projections[""].query


def test_a_gate_is_seen_though_the_model_returns_a_loss_alone():
    """In bfloat16 the loss need not move at all."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Stack(Gate())

        def forward(self, x):
            return 1e4 + self.layers(x).square().mean()

    for seed in range(5):
        torch.manual_seed(seed)
        model, x = Loss().bfloat16(), torch.randn(2, LENGTH, WIDTH, dtype=torch.bfloat16)
        (projection,) = QKClip(model, example_inputs=x).attentions.projections.values()
        assert projection.fixed == ("query",)


class InTraining(Gate):
    """The gate is for training alone."""

    def out(self, x, y):
        return super().out(x, y) if self.training else self.o(y)


def test_the_proof_is_of_the_mode_that_the_model_is_in():
    module, x = made(InTraining)
    assert QKClip(module, example_inputs=x).attentions.projections[""].fixed == ("query",)


def test_of_batch_norms_behind_queries_and_keys_their_own_weights_are_scaled():
    module, x = made(BehindBatchNorm)
    before, after, clip, weights = clipped(module, x)
    torch.testing.assert_close(after, before.clamp(max=clip.tau), rtol=1e-5, atol=1e-5)
    assert unchanged(module, weights) >= {"q.weight", "q.bias", "k.weight", "k.bias"}


def test_a_loud_head_does_not_hide_the_others():
    module, x = made(Relative, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in (module.q, module.k):
            layer.weight[:HEAD] *= 20
    assert QKClip(module, example_inputs=x).attentions.projections[""].query_facing_shared


def test_nothing_waits_for_the_garbage_collector():
    module, x = made(Attention)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(each) is Attention for each in gc.get_objects())
        clip = QKClip(module, example_inputs=x)
        after = sum(type(each) is Attention for each in gc.get_objects())
    finally:
        gc.enable()
    assert clip.projections
    assert after <= before + 1  # the traced copy, whose rows are kept
