"""What a forward reaches for the first time after the first step, or calls in another way, is observed in that forward;
what cannot be is an error of the next step, and never one amid the forward."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from muonclip.torch import MaxLogits, MuonClip, QKClip, QKProjection
from muonclip.torch.clip import monitor

WIDTH, HEADS, HEAD = 10, 3, 4


class Attention(nn.Module):
    """Residual attention by a kernel or written out, whose maxima a test can compute."""

    def __init__(self, *, written_out=False):
        super().__init__()
        self.written_out = written_out
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD, WIDTH)
        self.seen = []

    def heads(self, x):
        return (m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v))

    def forward(self, x):
        if torch.is_grad_enabled() and type(x.grad_fn).__name__ != "CloneBackward0":
            self.seen.append(x.detach().clone())
        return x + self.out(attend(*self.heads(x), written_out=self.written_out).transpose(1, 2).flatten(2))

    def maxima(self):
        """The maxima of the inputs since the last look, with the weights of now."""
        q, k, _ = zip(*map(self.heads, self.seen), strict=True)
        self.seen.clear()
        return torch.stack([(a @ b.mT / 2).amax((0, 2, 3)) for a, b in zip(q, k, strict=True)]).amax(0).detach()


def attend(q, k, v, *, written_out):
    if written_out:
        return (q @ k.mT / math.sqrt(HEAD)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def clip_of(model, tau=0.05, **options):
    return QKClip(model, tau=tau, observe="always", **options)


def step(clip, *outputs):
    sum(y.square().sum() for y in outputs).backward()
    clip.step()
    for parameter in clip.attentions.model.parameters():
        parameter.grad = None


def check(clip, name, expected):
    """Its heads were observed in this step, and those above tau have come down to it."""
    layer = clip.report().layers[name]
    torch.testing.assert_close(layer.max_logits, expected)
    torch.testing.assert_close(layer.gamma, clip.tau / expected.clamp(min=clip.tau))
    assert bool((expected > clip.tau).any())


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 6, WIDTH)


class Text(nn.Module):
    """A language model that may get an image as well."""

    def __init__(self, *, written_out):
        super().__init__()
        self.text = Attention()
        self.vision = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention(written_out=written_out), Attention())
        self.last = Attention(written_out=written_out)

    def forward(self, x, image=None):
        x = self.text(x)
        return self.last(x if image is None else x + self.vision(image))


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("search", ["ahead", "in the first forward"])
def test_a_tower_that_the_first_batches_did_not_reach(written_out, search, x):
    model = Text(written_out=written_out)
    clip = clip_of(model, **({"example_inputs": x} if search == "ahead" else {}))
    for _ in range(2):
        step(clip, model(x))
    assert list(clip.projections) == ["text", "last"]
    for attention in (model.text, model.vision[1], model.vision[2], model.last):
        attention.seen.clear()
    y, image = model(x), model(x, 2 * x)
    expected = {name: model.get_submodule(name).maxima() for name in ("text", "vision.1", "vision.2", "last")}
    step(clip, y, image)
    for name, maxima in expected.items():
        check(clip, name, maxima)
    step(clip, model(x))  # need not be reached again
    assert not any(-3 in module._forward_pre_hooks for module in model.modules() if type(module) is not nn.ModuleList)


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("how", ["append", "insert", "attribute", "replace"])
def test_layers_that_are_added_while_it_trains(written_out, how, x):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.extra = nn.ModuleList([Attention()]), nn.Identity() if how == "replace" else None

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x if self.extra is None else self.extra(x)

    model = Stack()
    clip = clip_of(model)
    step(clip, model(x))
    new = Attention(written_out=written_out)
    if how == "append":
        model.layers.append(new)
    elif how == "insert":
        model.layers.insert(1, new)
    else:
        model.extra = new
    name = "extra" if how in ("attribute", "replace") else "layers.1"
    new.seen.clear()
    y = model(x)
    expected = new.maxima()
    step(clip, y)
    check(clip, name, expected)
    y = model(x)
    expected = new.maxima()
    step(clip, y)
    assert clip.report().layers[name].max_logits.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("around", ["kernel", "written out", "none"])
def test_a_branch_of_a_module_that_has_run_without_it(written_out, around, x):
    class Branch(Attention):
        def __init__(self):
            super().__init__(written_out=around == "written out")
            self.q2, self.k2 = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(2))

        def forward(self, x, second=False):
            y = x if around == "none" else super().forward(x)
            if second:
                q, k = (m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q2, self.k2))
                y = y + self.out(attend(q, k, k, written_out=written_out).transpose(1, 2).flatten(2))
            return y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.branch = Attention(), Branch()

        def forward(self, x, second=False):
            return self.branch(self.first(x), second)

    model = Model()
    clip = clip_of(model)
    step(clip, model(x))
    model.first.seen.clear()
    y = model(x, True)
    z = model.first(x).detach()
    q, k = (m(z).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (model.branch.q2, model.branch.k2))
    expected = (q @ k.mT / 2).amax((0, 2, 3)).detach()
    step(clip, y)
    new = [name for name in clip.projections if name not in ("first", "branch")] if around != "none" else ["branch"]
    assert len(new) == 1
    check(clip, new[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("written_out", [False, True])
def test_what_is_reached_first_under_checkpointing(reentrant, written_out, x):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(), Attention(written_out=written_out)

        def forward(self, x, deep=False):
            x = checkpoint(self.a, x, use_reentrant=reentrant)
            return checkpoint(self.b, x, use_reentrant=reentrant) if deep else x

    model, x = Stack(), x.requires_grad_()
    clip = clip_of(model, example_inputs=x)
    step(clip, model(x))
    model.a.seen.clear()
    y = model(x, True)
    inputs = model.a(x).detach()
    q, k, _ = model.b.heads(inputs)
    expected = (q @ k.mT / 2).amax((0, 2, 3)).detach()
    step(clip, y)
    check(clip, "b", expected)


def searches_of(clip, monkeypatch):
    searches, monitor = [], clip.attentions._monitor
    ask = monitor._ask
    monkeypatch.setattr(monitor, "_ask", lambda *args, **kwargs: searches.append(1) or ask(*args, **kwargs))
    return searches


def test_experts_that_run_for_the_first_time_are_not_searched(monkeypatch, x):
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

        def forward(self, x):
            return self.down(self.up(x).relu())

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.experts = Attention(), nn.ModuleList(Expert() for _ in range(4))

        def forward(self, x, expert=0):
            return self.experts[expert](self.attention(x))

    model = Mixture()
    clip = clip_of(model)
    step(clip, model(x))
    searches = searches_of(clip, monkeypatch)
    for expert in (1, 2, 1):
        step(clip, model(x, expert))
        assert not any(-3 in module._forward_pre_hooks for module in model.experts[expert].modules())
    assert not searches
    assert all(-3 in module._forward_pre_hooks for module in model.experts[3].modules())


# Numbers of calls


class Images(Attention):
    """Attention within each image of a batch, one call for each."""

    def forward(self, x, lengths=None):
        q, k, v = self.heads(x)
        parts = [each.split(lengths or [x.shape[1]], dim=2) for each in (q, k, v)]
        y = [attend(*part, written_out=self.written_out) for part in zip(*parts, strict=True)]
        return x + self.out(torch.cat(y, 2).transpose(1, 2).flatten(2))

    def of(self, x, lengths):
        q, k, _ = (each.split(lengths, dim=2) for each in self.heads(x))
        return torch.stack([(a @ b.mT / 2).amax((0, 2, 3)) for a, b in zip(q, k, strict=True)]).amax(0).detach()


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("first", [[6], [4, 2]])
def test_any_number_of_calls_of_the_same_attention(written_out, first, monkeypatch, x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.images = nn.Linear(WIDTH, WIDTH), Images(written_out=written_out)

        def forward(self, x, lengths):
            return self.images(self.embed(x), lengths)

    model = Model()
    clip = clip_of(model)
    step(clip, model(x, first))
    searches = searches_of(clip, monkeypatch)
    for lengths in ([3, 3], [1, 2, 3], [6], [2, 2, 1, 1], [5, 1]):
        expected = model.images.of(model.embed(x), lengths)
        step(clip, model(x, lengths))
        layer = clip.report().layers["images"]
        torch.testing.assert_close(layer.max_logits, expected)
    assert len(searches) <= 1  # the first number that is another one


class Levels(nn.Module):
    """Attentions of one module, of which a run takes the first few, or some."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(3 * HEADS * HEAD, WIDTH)) for _ in range(3)])

    def heads(self, x, level):
        return F.linear(x, self.w[level]).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)

    def forward(self, x, levels=(0, 1, 2)):
        return sum(F.scaled_dot_product_attention(*self.heads(x, level)) for level in levels)

    def of(self, x, level):
        q, k, _ = self.heads(x, level)
        return (q @ k.mT / 2).amax((0, 2, 3)).detach()


@pytest.mark.parametrize("first", [(0, 1), (0, 1, 2)])
def test_more_or_fewer_calls_of_several_attentions_in_the_same_order(first, x):
    model = Levels()
    clip = clip_of(model, tau=1.0, example_inputs=(x, first))
    step(clip, model(x, first))
    for levels in ((0, 1, 2), (0, 1), (0,), (0, 1, 2)):
        expected = [model.of(x, level) for level in levels]
        before = [each.detach().clone() for each in model.w]
        step(clip, model(x, levels))
        layers = list(clip.report().layers.values())
        for level, maxima in zip(levels, expected, strict=True):
            torch.testing.assert_close(layers[level].max_logits, maxima)
        assert [torch.equal(a, b) for a, b in zip(before, model.w, strict=True)] == [
            level not in levels or bool((expected[level] <= 1).all()) for level in range(3)
        ]


def test_other_attentions_than_before_are_an_error_of_the_step_which_changes_nothing(x):
    model = Levels()
    optimizer = MuonClip(model, lr=0.1, qk_clip=clip_of(model, tau=1.0, example_inputs=x))
    model(x).sum().backward()
    optimizer.step()
    before = [each.detach().clone() for each in model.parameters()]
    model(x, (0, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="it calls other attentions in one run than in another"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_new_attention_that_is_not_understood_is_an_error_of_the_step(x):
    class Clamped(Attention):
        def heads(self, x):
            return (each.clamp(-1, 1) for each in super().heads(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(), Clamped()

        def forward(self, x, deep=False):
            return self.b(self.a(x)) if deep else self.a(x)

    model = Model()
    clip = clip_of(model, example_inputs=x)
    step(clip, model(x))
    before = model.a.q.weight.detach().clone()
    for _ in range(2):
        y = model(x, True)
        with pytest.raises(RuntimeError, match="b: its queries do not depend linearly"):
            step(clip, y)
    assert torch.equal(model.a.q.weight, before)
    step(clip, model(x))


# Layouts


class InOneAxis(Attention):
    """Heads and sequences in one axis, in either order."""

    def __init__(self, order, *, written_out):
        super().__init__(written_out=written_out)
        self.order = order

    def forward(self, x):
        fold = (
            (lambda t: t.transpose(0, 1).flatten(0, 1)) if self.order == "heads first" else (lambda t: t.flatten(0, 1))
        )
        y = attend(*map(fold, self.heads(x)), written_out=self.written_out)
        y = (
            y.view(HEADS, len(x), *y.shape[1:]).transpose(0, 1)
            if self.order == "heads first"
            else y.unflatten(0, (-1, HEADS))
        )
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("order", ["heads first", "sequences first"])
def test_heads_that_were_found_on_a_single_sequence(order, written_out, x):
    model = InOneAxis(order, written_out=written_out)
    clip = clip_of(model, example_inputs=x[:1])
    step(clip, model(x[:1]))
    before, x = model.q.weight.detach().clone(), torch.randn(3, 6, WIDTH)
    q, k, _ = model.heads(x)
    expected = (q @ k.mT / 2).amax((0, 2, 3)).detach()
    y = model(x)
    if order == "sequences first":
        step(clip, y)
        check(clip, "", expected)
    else:
        with pytest.raises(RuntimeError, match="its heads do not follow each other behind the sequences of the batch"):
            step(clip, y)
        assert torch.equal(model.q.weight, before)


@pytest.mark.parametrize("written_out", [False, True])
def test_heads_in_an_axis_in_front_of_a_single_sequence_are_refused(written_out, x):
    class InFront(Attention):
        def forward(self, x):
            y = attend(*(each.transpose(0, 1) for each in self.heads(x)), written_out=self.written_out)
            return x + self.out(y.permute(1, 2, 0, 3).flatten(2))

    model = InFront(written_out=written_out)
    with pytest.raises(ValueError, match="its heads do not follow each other") as error:
        clip_of(model, example_inputs=x[:1])
    assert "Leave it alone" in str(error.value)
    alone = QKProjection("mha", 1, MaxLogits(1), reason="heads in front")
    clip = clip_of(nn.Sequential(Attention(), model), declare={"1": alone})
    for batch in (x[:1], x):
        step(clip, clip.attentions.model(batch))
    assert clip.report().layers["1"].max_logits.tolist() == [-math.inf]
    assert clip.sources()["1"].startswith("not read")


# What runs in training alone, and random numbers


class Noisy(nn.Module):
    """Attention in training alone, behind noise of generators that the module and its code hold."""

    def __init__(self, outer):
        super().__init__()
        self.embed, self.attention = nn.Linear(WIDTH, WIDTH), Attention()
        self.own = torch.Generator().manual_seed(1)
        self.noise = lambda x: x + 0.1 * torch.randn(x.shape, generator=outer)

    def forward(self, x):
        x = self.noise(self.embed(x)) + 0.1 * torch.randn(x.shape, generator=self.own)
        return self.attention(x) if self.training else x


@pytest.mark.parametrize("training", [True, False])
def test_attention_in_training_alone_is_found_ahead_and_no_random_number_is_used(training, x):
    outer = torch.Generator().manual_seed(2)
    model = Noisy(outer).train(training)
    states = model.own.get_state(), outer.get_state()
    clip = clip_of(model)
    assert list(clip.projections) == ["attention"]
    assert torch.equal(states[0], model.own.get_state())
    assert torch.equal(states[1], outer.get_state())
    model.train()
    plain = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    model.attention.seen.clear()
    y = model(x)
    own = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.attention.seen[-1], model.embed(x).detach() + 0.1 * plain + own)
    expected = model.attention.maxima()
    step(clip, y)
    check(clip, "attention", expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, of an inner layer
def test_what_a_compiled_layer_reaches_first_is_an_error_and_stays_one_graph(x):
    class Compiled(Attention):
        def forward(self, x):
            return x + self.out(attend(*self.heads(x), written_out=False).transpose(1, 2).flatten(2))

    model = Text(written_out=False)
    model.vision[1] = Compiled()
    clip = clip_of(model, example_inputs=x)
    model.vision[1].compile(backend="eager", fullgraph=True)
    step(clip, model(x))
    y = model(x, 2 * x)
    with pytest.raises(RuntimeError, match=r"attention was called .* by modules that were not seen to call it"):
        step(clip, y)
    torch._dynamo.reset()


# Matrices that a module holds and does not use at first


class Bare(Attention):
    """Attention that is written out on parameters without layers, only where there is an image."""

    def __init__(self, kind):
        super().__init__(written_out=True)
        del self.q, self.k, self.v
        matrices = [nn.Parameter(torch.randn(HEADS * HEAD, WIDTH)) for _ in range(3)]
        if kind == "attributes":
            self.wq, self.wk, self.wv = matrices
        elif kind == "list":
            self.listed = nn.ParameterList(matrices)
        else:
            self.stacked = nn.Parameter(torch.stack(matrices))
        self.attends = False

    def heads(self, x):
        matrices = getattr(self, "stacked", getattr(self, "listed", None))
        matrices = (self.wq, self.wk, self.wv) if matrices is None else matrices
        return (F.linear(x, m).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in matrices)

    def forward(self, x):
        return super().forward(x) if self.attends else x


@pytest.mark.parametrize("kind", ["attributes", "list", "stacked"])
def test_matrices_of_a_module_that_has_run_without_them(kind, x):
    model = nn.Sequential(Attention(), nn.Sequential(Bare(kind)), nn.Linear(WIDTH, WIDTH))
    clip = clip_of(model)
    for _ in range(2):
        step(clip, model(x))
    assert list(clip.projections) == ["0"]
    bare = model[1][0]
    bare.attends = True
    y = model(x)
    expected = bare.maxima()
    step(clip, y)
    check(clip, "1.0", expected)
    assert not any(
        -3 in module._forward_pre_hooks for module in model.modules() if type(module) is not nn.ParameterList
    )


class OfLayers(Bare):
    """The same with the weights of layers that it does not call."""

    def __init__(self):
        super().__init__("attributes")
        del self.wq, self.wk, self.wv
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))

    def heads(self, x):
        layers = self.wq, self.wk, self.wv
        return (F.linear(x, m.weight).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in layers)

    def forward(self, x):
        if not self.attends:
            return x
        self.seen.append(x.detach().clone())
        y = attend(*self.heads(x), written_out=True).transpose(1, 2).flatten(2)
        return x + F.linear(y, self.out.weight, self.out.bias)


def test_weights_of_layers_that_are_not_called_are_noticed_by_their_gradients(x):
    model = nn.Sequential(Attention(), OfLayers())
    clip = clip_of(model)
    step(clip, model(x))
    model[1].attends = True
    with pytest.warns(
        UserWarning, match=r"the weights of 1\.out, 1\.wk, 1\.wq, 1\.wv have gradients, though no such module"
    ):
        step(clip, model(x))
    model[1].seen.clear()
    y = model(x)
    model[1].seen = model[1].seen[-1:]
    expected = model[1].maxima()
    step(clip, y)
    check(clip, "1", expected)


def test_weights_outside_of_the_part_that_was_searched_are_noticed_too(x):
    class Parts(nn.Module):
        """Each of which is called by itself."""

        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(), OfLayers()

    model = Parts()
    clip = clip_of(model)
    step(clip, model.a(x))
    step(clip, model.a(x), model.b(model.a(x)))
    model.b.attends = True
    with pytest.warns(UserWarning, match=r"the weights of b\.out, b\.wk, b\.wq, b\.wv have gradients"):
        step(clip, model.b(model.a(x)))


def test_zero_gradients_of_layers_that_do_not_run_are_not_noticed(x):
    model = nn.Sequential(Attention(), OfLayers())
    clip = clip_of(model)
    for _ in range(2):
        y = model(x)
        for parameter in model[1].parameters():
            parameter.grad = torch.zeros_like(parameter)
        step(clip, y)


def test_what_is_in_use_is_not_watched_and_a_vector_need_not_be(x):
    class Masked(Attention):
        def __init__(self):
            super().__init__()
            self.mask_token, self.position = (nn.Parameter(torch.randn(1, n, WIDTH)) for n in (1, 6))

        def forward(self, x):
            return super().forward(x + self.position)

    model = Masked()
    step(clip_of(model), model(x))
    assert not any(-3 in module._forward_pre_hooks for module in model.modules())


def compiled_text(x, vision=None):
    """A clip and its model, compiled as a whole, which has seen no image."""
    model = Text(written_out=False)
    model.vision = model.vision if vision is None else vision
    for module in model.modules():
        if isinstance(module, Attention):  # which keeps no record
            module.forward = types.MethodType(
                lambda self, x: x + self.out(attend(*self.heads(x), written_out=False).transpose(1, 2).flatten(2)),
                module,
            )
    return clip_of(model, example_inputs=x), model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_what_a_model_compiled_as_a_whole_reaches_first_is_an_error(fullgraph, x):
    clip, model = compiled_text(x)
    count = CompileCounter()
    compiled = torch.compile(model, backend=count, fullgraph=fullgraph)
    for _ in range(3):
        step(clip, compiled(x))
    assert count.frame_count == 1
    y = compiled(x, 2 * x)
    with pytest.raises(RuntimeError, match=r"attention was called 2 times .* by modules that were not seen to call it"):
        step(clip, y)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_what_a_compiled_model_reaches_first_and_may_write_out_is_a_warning(x):
    clip, model = compiled_text(x, vision=nn.Linear(WIDTH, WIDTH))
    count = CompileCounter()
    compiled = torch.compile(model, backend=count)
    step(clip, compiled(x))
    with pytest.warns(UserWarning, match="vision ran for the first time, in code that torch.compile made"):
        step(clip, compiled(x, x))
    for _ in range(2):
        step(clip, compiled(x, x))
    assert count.frame_count == 2
    torch._dynamo.reset()


# A first forward that is like the inputs that were guessed


class ByLength(Attention):
    """More in sequences that are longer than those that are guessed: another module's attention, one that is written
    out, or one by an exponential."""

    def __init__(self, more):
        super().__init__()
        self.more, self.second = more, Attention()

    def forward(self, x):
        y = super().forward(x)
        if x.shape[1] <= 8 or not self.more:
            return y
        if self.more == "module":
            return self.second(y)
        q, k, v = self.second.heads(y)
        logits = q @ k.mT / math.sqrt(HEAD)
        weights = logits.softmax(-1) if self.more == "written out" else (logits - logits.logsumexp(-1, True)).exp()
        return y + self.second.out((weights @ v).transpose(1, 2).flatten(2))


def traces(monkeypatch, model, x):
    """A clip of a model whose attention is found ahead, and how often its first forward is traced."""
    counted = []
    clip = clip_of(model)
    search = monitor.discover
    monkeypatch.setattr(monitor, "discover", lambda *args, **options: counted.append(1) or search(*args, **options))
    return clip, model(x), len(counted)


@pytest.mark.parametrize("training", [True, False])
def test_a_first_forward_like_the_guess_is_not_traced_again(training, monkeypatch, x):
    model = ByLength("").train(training)
    clip, y, count = traces(monkeypatch, model, torch.cat([x, x], 1))
    assert count == 0
    model.seen = model.seen[-1:]
    expected = model.maxima()
    step(clip, y)
    check(clip, "", expected)


@pytest.mark.parametrize("more", ["module", "written out"])
def test_what_it_reaches_more_is_found_in_it(more, monkeypatch, x):
    model = ByLength(more)
    clip, y, count = traces(monkeypatch, model, torch.cat([x, x], 1))
    assert count > 0
    step(clip, y)
    assert clip.report().clipped_heads > HEADS


def test_what_it_weighs_unseen_is_an_error_by_name(monkeypatch, x):
    with pytest.raises(ValueError, match="it weighs by exp of a product of projections"):
        traces(monkeypatch, ByLength("exponential"), torch.cat([x, x], 1))
