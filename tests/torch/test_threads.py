"""Models in several threads: the attention of a thread belongs to the model that runs in it, and to nobody else."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from muonclip.torch import MaxLogits, MuonClip, QKClip, attention
from muonclip.torch.logits import unobserved

WIDTH, HEADS, HEAD = 12, 3, 4
PATIENCE = 30.0  # seconds for what takes milliseconds


def in_a_thread(function, *args):
    """What the function returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(PATIENCE)


class Attention(nn.Module):
    kind = "sdpa"

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT * HEAD**-0.5).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)


class WrittenOut(Attention):
    kind = "written out"


class Torchs(nn.Module):
    """torch's own, which writes its attention out where the weights are asked for."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=True)[0]


class Model(nn.Module):
    def __init__(self, kind, meet=None, reentrant=False):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.meet, self.reentrant = [meet], reentrant

    def forward(self, *, x):  # by a name that cannot be guessed: the first forward is traced
        x = self.first(x)
        for layer in self.layers:
            if self.meet[0] is not None:
                self.meet[0](x)
            x = x + (checkpoint(layer, x, use_reentrant=True) if self.reentrant else layer(x))
        return x


def data(seed=0, size=1.0):
    return size * torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def logits_of(kind, x):
    """[layers, heads] as they are where nothing else runs."""
    model = Model(kind)
    clip = QKClip(model, observe="always")
    model(x=x)
    return maxima(clip)


def maxima(clip):
    return np.array([p.max_logits.maximum.tolist() for p in clip.projections.values()])


def watch_and_wait(kind, other):
    """A model whose first layer waits, inside its own hook, until `other` has run in another thread."""
    model = Model(kind)
    clip = QKClip(model, tau=1e6, observe="always")
    model(x=data())
    clip.step()  # behind which no forward is traced
    model.layers[0].register_forward_pre_hook(lambda *_: in_a_thread(other) and None)
    model(x=data())
    return clip


@pytest.mark.parametrize("kind", [Attention, WrittenOut, Torchs])
def test_attention_of_an_unrelated_thread_is_not_the_models(kind):
    loud = data(3, 50.0).requires_grad_()

    def unrelated():
        q = loud.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        (q @ q.mT).softmax(-1)
        return F.scaled_dot_product_attention(q, q, q).sum()

    clip = watch_and_wait(kind, unrelated)
    np.testing.assert_array_equal(maxima(clip), logits_of(kind, data()))
    clip.step()


@pytest.mark.parametrize("kind", [Attention, WrittenOut, Torchs])
def test_a_model_that_nobody_watches_trains_in_its_thread_undisturbed(kind):
    def train():
        model = Model(kind)
        model(x=data(4)).sum().backward()
        return sum(p.grad.abs().sum() for p in model.parameters())

    expected, results = train(), []
    clip = watch_and_wait(kind, lambda: results.append(train()) or True)
    assert results == [expected]
    np.testing.assert_array_equal(maxima(clip), logits_of(kind, data()))


def train(model, x):
    """The weights after three steps whose heads are clipped, the maxima seen and the factors."""
    optimizer = MuonClip(model, lr=1e-2, tau=0.05, qk_clip=QKClip(model, tau=0.05, observe="always"))
    seen = []
    for _ in range(3):
        model(x=x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        report = optimizer.qk_clip.report()
        assert report.clipped_heads > 0
        seen += [(layer.max_logits, layer.gamma) for layer in report.layers.values()]
    return [*model.parameters(), *(t for pair in seen for t in pair)]


@pytest.mark.parametrize("kinds", [(Attention, Attention), (Attention, WrittenOut), (Torchs, WrittenOut)])
def test_two_models_in_two_threads_end_where_they_end_one_after_the_other(kinds):
    """They meet before every layer of every forward, the traced ones included."""
    barrier, inputs = threading.Barrier(2), [data(seed) for seed in range(2)]
    one_after_the_other = [train(Model(kind), x) for kind, x in zip(kinds, inputs, strict=True)]
    models = [Model(kind, lambda _: barrier.wait(PATIENCE)) for kind in kinds]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(train, model, x) for model, x in zip(models, inputs, strict=True)]
        together = [run.result(PATIENCE) for run in runs]
    for expected, found in zip(one_after_the_other, together, strict=True):
        assert all(map(torch.equal, expected, found))


def test_what_two_overlapping_traces_change_for_the_process_is_put_back():
    begun, second_begun, ended = (threading.Event() for _ in range(3))

    def in_first(_):
        torch.rand(3)
        begun.set()
        assert second_begun.wait(PATIENCE)

    def in_second(_):
        second_begun.set()
        assert ended.wait(PATIENCE)
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"

    first, second = Model(Attention, in_first).eval(), Model(Attention, in_second).eval()
    state = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(QKClip, first, example_inputs={"x": data()})]
        assert begun.wait(PATIENCE)
        runs.append(pool.submit(QKClip, second, example_inputs={"x": data()}))
        runs[0].result(PATIENCE)
        ended.set()
        runs[1].result(PATIENCE)
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [Attention, WrittenOut])
def test_what_is_recomputed_in_another_thread_is_observed(kind):
    """As autograd does on accelerators: with re-entrant checkpoints only the recomputation has gradients."""
    model = Model(kind, reentrant=True)
    clip = QKClip(model, observe="always")
    x = data().requires_grad_()
    loss = model(x=x).sum()
    assert all(not p.max_logits.observed for p in clip.projections.values())
    in_a_thread(loss.backward)
    np.testing.assert_array_equal(maxima(clip), logits_of(kind, data()))
    clip.step()


def test_an_engines_trial_in_one_thread_does_not_silence_another():
    statistic, q = MaxLogits(HEADS), torch.randn(1, HEADS, 5, HEAD, requires_grad=True)
    with unobserved():
        attention(q, q, q, max_logits=statistic)
        assert not statistic.observed
        in_a_thread(lambda: attention(q, q, q, max_logits=statistic))
    assert statistic.observed
    assert statistic.maximum.isfinite().all()


def test_following_torchs_attention_changes_no_function_of_torch():
    """Other threads call them meanwhile."""
    original = F.has_torch_function
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, F.has_torch_function is original))
            return func(*args, **(kwargs or {}))

    model = Model(Torchs)
    clip = QKClip(model, observe="always")
    with Look():
        model(x=data())
    products = torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default
    assert any(func in products for func, _ in seen)
    assert all(unchanged for _, unchanged in seen)
    assert maxima(clip).size == 2 * HEADS
