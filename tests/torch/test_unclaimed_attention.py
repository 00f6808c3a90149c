"""What looks like attention and is not observed is an error by name; what has no logits is said to have none."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonclip.torch import AttentionMask, MaxLogits, MuonClip, QKClip, QKProjection

HEADS, HEAD, WIDTH = 2, 6, 10


class Seen(nn.Module):
    """[B, T, WIDTH] → the same; `attend` has q, k, v [B, HEADS, T, HEAD]."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Model(nn.Module):
    """One layer whose attention is seen, and others."""

    def __init__(self, *layers):
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList([Seen(), *layers])

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def inputs():
    return torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))


def step(clip, model):
    model(inputs()).square().mean().backward()
    clip.step()


class ByHand(Seen):
    """As Reformer: exp(logits − logsumexp)."""

    def attend(self, q, k, v):
        logits = q @ k.mT / HEAD**0.5
        return (logits - logits.logsumexp(-1, keepdim=True)).exp() @ v


class SigmoidInPlace(Seen):
    def attend(self, q, k, v):
        return (q @ k.mT / HEAD**0.5).sigmoid_() @ v


class SquaredReLU(Seen):
    def attend(self, q, k, v):
        return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).relu().square(), v)


class Scattered(Seen):
    """As PyG's TransformerConv: an edge for each pair, a softmax over those that enter a node."""

    def attend(self, q, k, v):
        pairs = torch.cartesian_prod(torch.arange(q.shape[2]), torch.arange(q.shape[2]))
        source, target = pairs.unbind(1)
        logits = (q[:, :, target] * k[:, :, source]).sum(-1) / HEAD**0.5
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        sums = torch.zeros_like(q[..., 0]).index_add(2, target, weights)
        weights = weights / sums.index_select(2, target)
        return torch.zeros_like(v).index_add(2, target, v[:, :, source] * weights[..., None])


class ByLinear(Seen):
    """A product by `F.linear`, for each sequence."""

    def attend(self, q, k, v):
        return (
            torch.stack(
                [
                    torch.stack([F.linear(*heads).softmax(-1) for heads in zip(*each, strict=True)])
                    for each in zip(q, k, strict=True)
                ]
            )
            @ v
        )


class MixedHeads(Seen):
    """Two heads' logits are mixed into three before the softmax, and the weights into two behind it."""

    def __init__(self):
        super().__init__()
        self.before, self.behind = nn.Parameter(torch.randn(3, HEADS)), nn.Parameter(torch.randn(HEADS, 3))

    def attend(self, q, k, v):
        logits = torch.einsum("gh,bhij->bgij", self.before, q @ k.mT)
        return torch.einsum("hg,bgij->bhij", self.behind, logits.softmax(-1)) @ v


def softmax_in_numpy(q, k, v):
    q, k, v = (each.detach().numpy() for each in (q, k, v))
    logits = q @ k.swapaxes(-1, -2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True) @ v)


class InNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return softmax_in_numpy(q, k, v)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient, gradient


kept_apply = InNumPy.apply  # as users of Triton kernels do, before anything is traced


class Applied(Seen):
    def attend(self, q, k, v):
        return kept_apply(q, k, v)


class WithoutContext(InNumPy):
    """Its `forward` has no context, which another method fills."""

    @staticmethod
    def forward(q, k, v):
        return softmax_in_numpy(q, k, v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


kept_other = WithoutContext.apply


class AppliedWithoutContext(Seen):
    def attend(self, q, k, v):
        return kept_other(q, k, v)


def operator(name, function):
    made = torch.library.custom_op(f"muonclip_test::{name}", function, mutates_args=())
    made.register_autograd(lambda ctx, gradient: (gradient, gradient, gradient))
    return made


def softmax_operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax_in_numpy(q, k, v)


def linear_operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.detach().numpy() for each in (q, k, v))
    return torch.from_numpy(q @ (k.swapaxes(-1, -2) @ v) + 10.0)


def writing_operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(softmax_in_numpy(q, k, v))


SOFTMAX = operator("softmax", softmax_operator)
LINEAR = operator("linear", linear_operator)
WRITING = torch.library.custom_op("muonclip_test::writing", writing_operator, mutates_args=("out",))


class Operator(Seen):
    def attend(self, q, k, v):
        return SOFTMAX(q, k, v)


class SoftmaxKernel(Seen):
    """A fused softmax between two products, as an operator."""

    def attend(self, q, k, v):
        return SOFTMAX_ALONE(q @ k.mT) @ v


def softmax_of(logits: torch.Tensor) -> torch.Tensor:
    weights = np.exp(logits.detach().numpy())
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True))


SOFTMAX_ALONE = torch.library.custom_op("muonclip_test::softmax_alone", softmax_of, mutates_args=())
SOFTMAX_ALONE.register_autograd(lambda ctx, gradient: gradient)


class Script(Seen):
    def __init__(self):
        super().__init__()
        self.core = torch.jit.script(ScriptCore())

    def attend(self, q, k, v):
        return self.core(q, k, v)


class ScriptCore(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        logits = torch.matmul(q, k.transpose(-2, -1))
        weights = torch.exp(logits - logits.amax(-1, keepdim=True))
        return torch.matmul(weights / weights.sum(-1, keepdim=True), v)


UNSEEN = [
    (ByHand, "it weighs by exp of a product of projections (bmm)"),
    (SigmoidInPlace, "it weighs by sigmoid of a product of projections (bmm)"),
    (SquaredReLU, "it weighs by relu of a product of projections (bmm)"),
    (Scattered, "it weighs by exp of a product of projections (mul and sum)"),
    (ByLinear, "it weighs by softmax of a product of projections (mm)"),
    (MixedHeads, "it weighs by softmax of a product of projections (its heads mixed into others)"),
    (Applied, "it calls InNumPy, whose results are those of attention"),
    (AppliedWithoutContext, "it calls WithoutContext, whose results are those of attention"),
    (Operator, "it calls muonclip_test.softmax, whose results are those of attention"),
    (SoftmaxKernel, "it weighs by muonclip_test.softmax_alone of a product of projections (bmm)"),
    (Script, "it weighs by exp of a product of projections (bmm)"),
]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(("layer", "seen"), UNSEEN, ids=[layer.__name__ for layer, _ in UNSEEN])
def test_attention_that_nobody_observes_is_an_error_by_name_unless_it_is_ignored(layer, seen):
    torch.manual_seed(0)
    model = Model(layer())
    with pytest.raises(ValueError, match=r"layers\.1") as error:
        step(QKClip(model), model)
    assert f"layers.1: {seen}, which is not observed." in str(error.value)
    assert "ignore=('layers.1',)" in str(error.value)
    clip = QKClip(model, ignore=("layers.1",), tau=1e-3)
    kept = copy.deepcopy(model.layers[1].state_dict())
    step(clip, model)
    assert list(clip.projections) == ["layers.0"]
    assert clip.report().clipped_heads == HEADS
    assert all(torch.equal(kept[name], value) for name, value in model.layers[1].state_dict().items())


class Linear(Seen):
    def attend(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)


class Retention(Seen):
    def attend(self, q, k, v):
        return (q @ k.mT * 0.9 ** torch.arange(q.shape[2])).tril() @ v


class Graph(Seen):
    """Additive attention: its logits are sums of two projections onto a vector."""

    def forward(self, x):
        q, k = self.q(x).mean(-1), self.k(x).mean(-1)
        weights = F.leaky_relu(q[:, :, None] + k[:, None]).softmax(-1)
        return self.o(weights @ self.v(x))


class Pooling(Seen):
    """A vector of weights for each head that is learned: softmax(K w) along the tokens."""

    def forward(self, x):
        weights = self.k(x)[..., :HEADS].softmax(1)
        return self.o((weights.mT @ self.v(x)).repeat(1, 4, 1)[:, : x.shape[1]])


class LinearOperator(Seen):
    def attend(self, q, k, v):
        return LINEAR(q, k, v)


@pytest.mark.parametrize(
    ("layer", "seen"),
    [
        (Linear, "products of activations, without a softmax"),
        (Retention, "products of activations, without a softmax"),
        (Graph, "a softmax of no product weighs"),
        (Pooling, "a softmax of no product weighs"),
        (LinearOperator, "muonclip_test.linear, linear in its arguments"),
    ],
)
def test_what_has_no_logits_is_left_alone_and_listed(layer, seen):
    torch.manual_seed(0)
    model = Model(layer())
    optimizer = MuonClip(model, lr=1e-3)
    model(inputs()).square().mean().backward()
    optimizer.step()
    assert list(optimizer.qk_clip.projections) == ["layers.0"]
    assert f"layers.1: no logits: nothing to clip ({seen})" in str(optimizer.plan)


class Experts(Seen):
    """A mixture of gated experts: softmax of one projection, joined by `index_add`, and by `einsum`."""

    def forward(self, x):
        weights = self.q(x).softmax(-1)[..., :2]
        y = F.silu(self.k(x)) * self.v(x)
        out = torch.zeros_like(y).flatten(0, 1)
        rows = torch.arange(len(out))
        for index in range(2):
            out = out.index_add(0, rows, (y * weights[..., index, None]).flatten(0, 1))
        everyone = torch.einsum("bte,bted->btd", self.q(x).softmax(-1), torch.stack([self.v(x)] * HEADS * HEAD, 2))
        return self.o((out.view_as(y) + everyone) * torch.sigmoid(y.mean(1, keepdim=True)))


class Contrast(Seen):
    """Keeps the loss of two towers, whose products weigh nothing."""

    def forward(self, x):
        one, other = (F.normalize(m(x).mean(1), dim=-1) for m in (self.q, self.k))
        self.loss = F.cross_entropy(one @ other.T * 14.0, torch.arange(len(x)))
        weights = (one @ other.T).exp()
        self.loss = self.loss - (weights * (one @ other.T)).sum(-1).log().mean()
        products = self.q(x) @ self.k(x).mT
        self.loss = self.loss + (products.mean() + products.amax()).log1p()
        return self.o(self.v(x)) + self.loss


class Recurrent(Seen):
    """An LSTM, then a selective scan."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        x = self.lstm(x)[0]
        u, b, c = self.v(x), self.q(x), self.k(x)
        state, decay, out = 0, torch.exp(-F.softplus(u)), []
        for t in range(x.shape[1]):
            state = decay[:, t, :, None] * state + u[:, t, :, None] * b[:, t, None]
            out.append((state @ c[:, t, :, None])[..., 0])
        return self.o(F.silu(torch.stack(out, 1)))


class Dynamic(Seen):
    """Sparse R-CNN's heads: two products with matrices that a projection makes, a norm and a ReLU between them."""

    def forward(self, x):
        first, second = self.k(x).mean(1).view(-1, HEAD, HEADS), self.v(x).mean(1).view(-1, HEADS, HEAD)
        y = F.layer_norm(self.q(x)[..., :HEAD] @ first, (HEADS,)).relu() @ second
        return self.o(torch.cat((y, y), -1))


def loss_operator(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    logits = one.detach().numpy() @ other.detach().numpy().T
    return torch.tensor(np.log(np.exp(logits).sum(-1)).mean() - np.diag(logits).mean())


LOSS = torch.library.custom_op("muonclip_test::loss", loss_operator, mutates_args=())
LOSS.register_autograd(lambda ctx, gradient: (None, None))


class FusedContrast(Seen):
    """A contrastive loss as an operator: its gauge holds, and nothing is weighed."""

    def forward(self, x):
        return self.o(self.v(x)) + LOSS(self.q(x).mean(1), self.k(x).mean(1))


@pytest.mark.parametrize("layer", [Dynamic, FusedContrast, Experts, Contrast, Recurrent])
def test_what_is_no_attention_is_no_error(layer):
    torch.manual_seed(0)
    model = Model(layer())
    clip = QKClip(model)
    step(clip, model)
    assert list(clip.projections) == ["layers.0"]
    assert not any("softmax of no product" in what for what in clip.attentions.without_logits.values())


def test_an_operator_is_tried_on_copies_of_what_it_writes_to():
    class Writing(Seen):
        def attend(self, q, k, v):
            with torch.no_grad():
                WRITING(q, k, v, self.out)
            return v + self.out

    model = Model(Writing())
    model.layers[1].out = torch.zeros(2, HEADS, 7, HEAD)
    with pytest.raises(ValueError, match=r"it calls muonclip_test\.writing, whose results are those of attention"):
        step(QKClip(model), model)
    assert not model.layers[1].out.any()


class WrittenOut(Seen):
    """Its weights are reported too: a second softmax, and an entropy."""

    def attend(self, q, k, v):
        logits = q @ k.mT / HEAD**0.5
        self.entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        return F.dropout(logits.softmax(-1), 0.1) @ v * torch.sigmoid(logits.mean())


def test_attention_that_is_written_out_and_found_is_no_error():
    torch.manual_seed(0)
    model = Model(WrittenOut())
    clip = QKClip(model)
    step(clip, model)
    assert list(clip.projections) == ["layers.0", "layers.1"]
    assert not clip.attentions.without_logits


def test_a_declared_attention_is_the_users_own():
    class Own(ByHand):
        def __init__(self):
            super().__init__()
            self.max_logits = MaxLogits(HEADS)

        def attend(self, q, k, v):
            self.max_logits.observe(q, k, scale=HEAD**-0.5, mask=AttentionMask(q.shape[2], k.shape[2]))
            return super().attend(q, k, v)

    torch.manual_seed(0)
    model = Model(Own())
    attn = model.layers[1]
    projection = QKProjection.mha(q=attn.q, k=attn.k, num_heads=HEADS, max_logits=attn.max_logits)
    clip = QKClip(model, declare={"layers.1": projection}, observe="always")
    step(clip, model)
    assert list(clip.projections) == ["layers.0", "layers.1"]


def test_an_ignored_attention_that_would_be_found_is_left_alone():
    torch.manual_seed(0)
    model = Model(Seen(), Seen())
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, qk_clip=QKClip(model, tau=1e-3, ignore=("layers.[12]",)))
    kept = copy.deepcopy(model.state_dict())
    for _ in range(2):
        model(inputs()).square().mean().backward()
        optimizer.step()
    changed = {
        name.partition(".q")[0].partition(".k")[0] for name, v in model.state_dict().items() if (v != kept[name]).any()
    }
    assert changed == {"layers.0"}
    assert "layers.1: ignored\nlayers.2: ignored" in str(optimizer.plan)


def test_ignore_is_kept_in_copies():
    model = Model(ByHand())
    clip = QKClip(model, ignore=("layers.1",))
    for other, copied in (copy.deepcopy((model, clip)), pickle.loads(pickle.dumps((model, clip)))):
        step(copied, other)
        assert list(copied.projections) == ["layers.0"]


def test_ignore_names_modules_of_the_model():
    model = Model(ByHand())
    with pytest.raises(ValueError, match=r"ignore names 'layers\.7', which is not a module of the model"):
        QKClip(model, ignore=("layers.7",))
    with pytest.raises(ValueError, match="is one name; give a tuple of them"):
        QKClip(model, ignore="layers.1")
    with pytest.raises(ValueError, match=r"layers\.0 is declared, and named by ignore, too"):
        QKClip(model, declare={"layers.0": QKProjection("mha", 2, MaxLogits(2), reason="no")}, ignore=("layers.*",))


def apply_of_torch():
    apply = vars(torch.autograd.Function)["apply"]  # a function in Python until torch 2.13, compiled since
    code = getattr(getattr(apply, "__func__", None), "__code__", None)
    return apply, code, vars(type(torch.autograd.Function)).get("__getattribute__")


def test_a_trace_leaves_autograd_functions_as_they_were():
    before = apply_of_torch()
    model = Model()
    step(QKClip(model), model)
    assert apply_of_torch() == before
