"""Where a search or an observer could be misled: branches, strange layouts and masks, other people's patches."""

import functools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from masked_values import ADDED, added_tensors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from muonclip.torch import MaxLogits, QKClip
from muonclip.torch.logits.host_sdpa import host_sdpa
from muonclip.torch.observe.eager import ScoreTracker
from muonclip.torch.observe.observer import take_in

# torch.compile looks at the gradients of its inputs, whatever they are.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
WIDTH, HEADS, HEAD = 20, 4, 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        with torch.no_grad():
            self.q.weight.mul_(torch.linspace(1, 9, HEADS).repeat_interleave(HEAD)[:, None])

    def heads(self, x):
        return [m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v)]

    def forward(self, x, mask=None):
        return F.scaled_dot_product_attention(*self.heads(x), mask).sum() * x


def maxima(layer, x, allowed=None, scale=HEAD**-0.5):
    with torch.no_grad():
        q, k, _ = layer.heads(x)
    scores = scale * q.double() @ k.double().mT
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return scores.amax((0, 2, 3)).numpy()


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 7, WIDTH)


def step(clip, *outputs):
    sum(output.sum() for output in outputs).backward()
    clip.step()
    return clip.report()


def check(clip, layer, x, before, tau, name, **options):
    np.testing.assert_allclose(clip.report().layers[name].max_logits, before, rtol=1e-5)
    np.testing.assert_allclose(maxima(layer, x, **options), np.minimum(before, tau), rtol=1e-5)


# Attention that not every forward reaches


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Attention(), Attention()

    def forward(self, x, which="a"):
        y = self.a(x) if which[0] == "a" else x
        if "b" in which or ("training" in which and self.training):
            y = y + self.b(x)
        return y


def test_attention_that_runs_in_training_only(x):
    model = Branches()
    before = maxima(model.b, x)
    clip = QKClip(model, tau=2.0, observe="always")
    step(clip, model(x, "a training") + model.a(x))
    check(clip, model.b, x, before, 2.0, "b")


def test_attention_that_another_micro_batch_of_the_first_step_reaches(x):
    model = Branches()
    before = maxima(model.b, x)
    clip = QKClip(model, tau=2.0, observe="always")
    step(clip, model(x, "a"), model(x, "b"))
    check(clip, model.b, x, before, 2.0, "b")


def test_a_part_that_is_called_by_itself(x):
    model = Branches()
    before = maxima(model.b, x)
    clip = QKClip(model, tau=2.0, observe="always")
    step(clip, model(x, "a"), model.b(x))
    check(clip, model.b, x, before, 2.0, "b")


@pytest.mark.parametrize("known", [False, True])
def test_a_part_that_was_removed_and_is_called_by_itself_is_nobodys(known, x):
    """Whether its name was known before or not."""
    model = nn.ModuleDict({"attention": Attention(), "branch": Attention(), "head": nn.Linear(WIDTH, 3)})
    expected = maxima(model["attention"], x)
    clip = QKClip(model, tau=1.0)
    outputs = [model["attention"](x)] if known else []
    branch, head = model.pop("branch"), model.pop("head")
    step(clip, *outputs, branch(x), head(x), model["attention"](x))
    assert set(clip.projections) == {"attention"}
    np.testing.assert_allclose(clip.report().layers["attention"].max_logits, expected, rtol=1e-5)


def test_attention_that_appears_later_is_found_in_that_forward(x):
    model = Branches()
    clip = QKClip(model, tau=2.0, observe="always")
    step(clip, model(x, "a"))
    before = maxima(model.b, x)
    step(clip, model(x, "ab"))
    check(clip, model.b, x, before, 2.0, "b")


def test_attention_that_a_trace_does_not_reach_is_an_error_and_then_known(x, monkeypatch):
    """As where it is run by chance, and not in the copy."""
    model = Branches()
    clip = QKClip(model, tau=2.0, observe="always")
    step(clip, model(x, "a"))
    with monkeypatch.context() as patch:
        patch.setattr(clip.attentions._monitor, "search", lambda inputs, training: None)
        model(x, "ab").sum().backward()
    with pytest.raises(
        RuntimeError, match="attention was called 1 times in this step by modules that were not seen to call it"
    ):
        clip.step()
    before = maxima(model.b, x)
    clip.reset()
    step(clip, model(x, "ab"))
    check(clip, model.b, x, before, 2.0, "b")


class Outer(Attention):
    """Calls attention itself, and sometimes lets a module inside it do so."""

    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, x, deep=False):
        y = super().forward(x)
        return y + self.inner(3 * x) if deep else y


def test_a_module_inside_another_does_not_speak_for_it(x):
    model = Outer()
    clip = QKClip(model, tau=1e4, observe="always")
    step(clip, model(x))
    expected, inside = maxima(model, x), maxima(model.inner, 3 * x)
    step(clip, model(x, deep=True))
    layers = clip.report().layers
    np.testing.assert_allclose(layers[""].max_logits, expected, rtol=1e-5)
    np.testing.assert_allclose(layers["inner"].max_logits, inside, rtol=1e-5)


class Several(nn.Module):
    """Weights in a list, one of which a call uses."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(3 * HEADS * HEAD, WIDTH)) for _ in range(2)])

    def forward(self, x, which=0):
        q, k, v = F.linear(x, self.w[which]).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def test_one_module_with_other_weights_in_another_run_is_refused(x):
    model = Several()
    clip = QKClip(model, tau=15.0)
    model(x, 0)
    with pytest.raises(ValueError, match="it calls other attentions in one run than in another"):
        model(x, 1)
    assert clip.projections


def test_what_attentions_share_may_show_itself_late(x):
    """The guessed inputs reach the first only; the second has the same weights."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(), Attention()
            self.b.q, self.b.k = self.a.q, self.a.k

        def forward(self, x, y=None):
            return self.a(x) if y is None else self.a(x) + self.b(y)

    model = Tied()
    before = np.maximum(maxima(model.a, x), maxima(model.a, 2 * x))
    clip = QKClip(model, tau=2.0, observe="always")
    assert list(clip.projections) == ["a"]
    step(clip, model(x, 2 * x))
    assert list(clip.projections) == ["a"]
    np.testing.assert_allclose(maxima(model.a, 2 * x), np.minimum(before, 2.0), rtol=1e-5)


# Layouts


class HeadsFirst(Attention):
    """[heads · B, T, d], as in the Set Transformer."""

    def forward(self, x):
        q, k, v = (torch.cat(m(x).split(HEAD, 2), 0) for m in (self.q, self.k, self.v))
        return torch.cat(F.scaled_dot_product_attention(q, k, v).split(len(x), 0), 2)


class BatchThird(Attention):
    """[heads, B, T, d]."""

    def forward(self, x):
        return F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in self.heads(x)))


@pytest.mark.parametrize("kind", [HeadsFirst, BatchThird])
def test_heads_in_front_of_the_sequences_are_refused(kind, x):
    with pytest.raises(ValueError, match="its heads do not follow each other behind the sequences of the batch"):
        QKClip(kind(), example_inputs=x)


class BatchedKeys(Attention):
    """Learned queries, one set for all sequences."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 5, WIDTH))

    def heads(self, x):
        q = self.q(self.latents).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        return q, *super().heads(x)[1:]

    def forward(self, x):
        q, k, v = self.heads(x)
        return F.scaled_dot_product_attention(q, k, v)


def test_queries_that_are_broadcast_over_the_batch(x):
    model = BatchedKeys()
    before = maxima(model, x)
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    step(clip, model(x))
    check(clip, model, x, before, 1.0, "")


class Windows(Attention):
    """[B, windows, heads, t, d], with a mask for each window."""

    def forward(self, x, mask):
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.heads(F.pad(x, (0, 0, 0, 1))))
        return F.scaled_dot_product_attention(q, k, v, mask)


def test_windows_with_masks_of_their_own(x):
    model = Windows()
    everything = torch.ones(1, 4, 4, dtype=torch.bool)
    mask = torch.stack((everything.tril(-1), everything.triu(1))) | torch.eye(4, dtype=torch.bool).roll(2, 0)
    allowed, exchanged = torch.zeros(2, 1, 1, 8, 8, dtype=torch.bool)
    allowed[..., :4, :4], allowed[..., 4:, 4:] = exchanged[..., 4:, 4:], exchanged[..., :4, :4] = mask[0], mask[1]
    padded = F.pad(x, (0, 0, 0, 1))
    before = maxima(model, padded, allowed)
    assert (maxima(model, padded, exchanged) != before).sum() > 1
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=(x, mask))
    step(clip, model(x, mask))
    check(clip, model, padded, before, 1.0, "", allowed=allowed)


# Masks


@pytest.mark.parametrize("value", [-math.inf, -1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("written_out", [False, True])
def test_what_is_as_good_as_minus_infinity_masks(value, written_out, x):
    class Masked(Attention):
        def forward(self, x, mask):
            q, k, v = self.heads(x)
            if written_out:
                return ((q @ k.mT) * HEAD**-0.5 + mask).softmax(-1) @ v
            return F.scaled_dot_product_attention(q, k, v, mask)

    model = Masked()
    allowed = torch.eye(7, dtype=torch.bool)
    mask = torch.zeros(7, 7).masked_fill(~allowed, value)
    before = maxima(model, x, allowed)
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=(x, mask))
    step(clip, model(x, mask))
    check(clip, model, x, before, 1.0, "", allowed=allowed)


# Where heads and sequences are one axis, a mask of windows cannot be told from a bias.
FORMS = [(form, name) for form in ("kernel", "added", "subtracted", "batched") for name in ADDED]
FORMS.remove(("batched", "of windows"))


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_the_whole_of_what_is_added_says_which_values_forbid(form, name):
    class Masked(Attention):
        def forward(self, x, mask):
            q, k, v = self.heads(x)
            if form == "kernel":
                return F.scaled_dot_product_attention(q, k, v, mask)
            scores = q @ k.mT * HEAD**-0.5
            if form == "added":
                scores = mask + scores + torch.arange(12.0)
            elif form == "subtracted":
                scores = torch.sub(scores, mask / -4, alpha=4)
            else:
                flat = (2 * mask).expand(*scores.shape).flatten(0, 1)
                scores = flat.baddbmm(q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=HEAD**-0.5).view_as(scores)
            return scores.softmax(-1) @ v

    torch.manual_seed(0)
    x, model = torch.randn(3, 12, WIDTH), Masked()
    mask, allowed = (torch.tensor(each) for each in added_tensors(3, HEADS, 12)[name])
    mask = torch.atleast_2d(mask.float())
    before = maxima(model, x, allowed)
    clip = QKClip(model, tau=0.5, observe="always", example_inputs=(x, mask))
    step(clip, model(x, mask))
    check(clip, model, x, before, 0.5, "", allowed=allowed)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_windows_of_swin_do_not_see_each_other(implementation):
    """Its −100 is added to a trained bias first."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=16, patch_size=1, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0,
        attn_implementation=implementation,
    )  # fmt: skip
    model, x = transformers.SwinModel(config), torch.randn(2, 3, 16, 16)
    expected, unmasked = {}, {}

    def measure(name, module, args, kwargs):
        hidden, mask = args[0], kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        with torch.no_grad():
            q, k = (m(hidden).unflatten(-1, (-1, module.head_dim)).mT for m in (module.q_proj, module.k_proj))
        scores = torch.einsum("bidh,bjdh->bhij", q.double(), k.double()) * module.scaling
        unmasked[name] = scores.amax((0, 2, 3)).numpy()
        if mask is not None:
            scores = scores.masked_fill((mask != 0)[:, None].repeat(len(scores) // len(mask), 1, 1, 1), -math.inf)
        expected[name] = scores.amax((0, 2, 3)).numpy()

    for name, module in model.named_modules():
        if name.endswith(".attention"):
            module.register_forward_pre_hook(functools.partial(measure, name), with_kwargs=True)
            nn.init.normal_(module.relative_position_bias.relative_position_bias_table, std=4)
            module.q_proj.weight.data *= 300
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    report = step(clip, model(x).last_hidden_state)
    assert len(report.layers) == 4
    assert any((unmasked[name] > 1.05 * expected[name]).any() for name in expected)
    for name, layer in report.layers.items():
        np.testing.assert_allclose(layer.max_logits, expected[name], rtol=1e-5)


@pytest.mark.parametrize("batch", [3, HEADS])
def test_a_mask_of_three_axes_is_one_for_each_head(batch):
    torch.manual_seed(0)
    x, model = torch.randn(batch, 7, WIDTH), Attention()
    mask = (torch.rand(HEADS, 7, 7) < 0.4) | torch.eye(7, dtype=torch.bool)
    before = maxima(model, x, mask)
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=(x, mask))
    step(clip, model(x, mask))
    check(clip, model, x, before, 1.0, "", allowed=mask)


# Attention that is written out in other ways


def written(function):
    class Written(Attention):
        def forward(self, x):
            return function(*self.heads(x))

    return Written()


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: (torch.einsum("...id,...jd->...ij", q, k) * HEAD**-0.5).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT * HEAD**-0.5).log_softmax(-1).exp() @ v,
        lambda q, k, v: torch.special.softmax(q @ k.mT * HEAD**-0.5, -1) @ v,
        lambda q, k, v: torch.softmax(input=torch.matmul(input=q, other=k.mT) * HEAD**-0.5, dim=-1) @ v,
        lambda q, k, v: torch.softmax(torch.mul(input=torch.matmul(q, other=k.mT), other=HEAD**-0.5), axis=-1) @ v,
        lambda q, k, v: F.softmax(
            input=torch.bmm(input=q.flatten(0, 1), mat2=k.flatten(0, 1).mT).mul(other=HEAD**-0.5), dim=-1
        ),
        lambda q, k, v: F.softmax(
            torch.baddbmm(input=torch.zeros(7, 7), batch1=q.flatten(0, 1), batch2=k.flatten(0, 1).mT, alpha=HEAD**-0.5),
            dim=-1,
        ),
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
    ],
)
def test_other_ways_to_write_it(function, x):
    model = written(function)
    before = maxima(model, x)
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    step(clip, model(x))
    check(clip, model, x, before, 1.0, "")


FORBIDDEN = ~torch.ones(7, 7, dtype=torch.bool).tril()


def filled_by_index(q, k, v):
    scores = q @ k.mT * HEAD**-0.5
    scores[:, :, FORBIDDEN] = -1e4
    return scores.softmax(-1) @ v


def filled_by_index_with_little(q, k, v):
    scores = q @ k.mT * HEAD**-0.5
    scores[:, :, FORBIDDEN] = -100
    return scores.softmax(-1) @ v


def filled_in_batched_form(q, k, v):
    """As Bloom and nn.MultiheadAttention do: heads and sequences on one axis for the products, on two for the mask."""
    mask = FORBIDDEN.expand(len(q), 1, 7, 7).clone()
    mask[0] = ~torch.eye(7, dtype=torch.bool)
    scores = torch.baddbmm(torch.zeros(1, 7, 7), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=HEAD**-0.5)
    scores = scores.view(len(q), HEADS, 7, 7).masked_fill(mask, -1e4).view(-1, 7, 7)
    return scores.softmax(-1).view(len(q), HEADS, 7, 7) @ v


@pytest.mark.parametrize(
    "masked",
    [
        lambda s: (s * HEAD**-0.5).masked_fill(FORBIDDEN, -1e4),
        lambda s: s.masked_fill(FORBIDDEN, -1e4) / HEAD**0.5,
        lambda s: s.div(HEAD**0.5).masked_fill(mask=FORBIDDEN, value=torch.tensor(-1e4)),
        lambda s: torch.where(~FORBIDDEN, s * HEAD**-0.5, torch.full([], -1e4)),
        lambda s: torch.where(FORBIDDEN, torch.full((7, 7), -1e4), s) * HEAD**-0.5,
        lambda s: (s * HEAD**-0.5).where(~FORBIDDEN, -1e9),
        lambda s: (s + torch.zeros(7, 7).masked_fill(FORBIDDEN, -1e4)) * HEAD**-0.5,
        lambda s: s * HEAD**-0.5 - 1e4 * FORBIDDEN.float(),
        lambda s: torch.add(input=s * HEAD**-0.5, other=FORBIDDEN.float(), alpha=-1e4),
        lambda s: (s * HEAD**-0.5).masked_fill(FORBIDDEN, -100),
        lambda s: (s * HEAD**-0.5).masked_fill(FORBIDDEN, -1e-9),
        lambda s: torch.where(FORBIDDEN, torch.zeros(7, 7), s * HEAD**-0.5),
        lambda s: torch.where(~FORBIDDEN, s * HEAD**-0.5, -50 * torch.rand(7)),
        lambda s: s * HEAD**-0.5 + 30 * torch.randn(7, 7) - 100 * FORBIDDEN.float(),
        lambda s: s * HEAD**-0.5 - 1000 * FORBIDDEN.long() + torch.arange(7),
        lambda s: (s * HEAD**-0.5).masked_fill(FORBIDDEN, -1e4).unflatten(0, (1, -1)).flatten(0, 1),
        lambda s: 5 * torch.tanh((s * HEAD**-0.5).masked_fill(FORBIDDEN, -math.inf) / 5),
    ],
)
def test_pairs_are_forbidden_by_what_is_filled_in_or_added(masked, x):
    check_forbidden(lambda q, k, v: masked(q @ k.mT).softmax(-1) @ v, FORBIDDEN, x)


@pytest.mark.parametrize("function", [filled_by_index, filled_by_index_with_little, filled_in_batched_form])
def test_pairs_are_forbidden_in_other_ways(function, x):
    forbidden = FORBIDDEN
    if function is filled_in_batched_form:
        forbidden = FORBIDDEN.expand(3, 1, 7, 7).clone()
        forbidden[0] = ~torch.eye(7, dtype=torch.bool)
    check_forbidden(function, forbidden, x)


def check_forbidden(function, forbidden, x):
    model = written(function)
    before = maxima(model, x, ~forbidden)
    assert not np.allclose(before, maxima(model, x), rtol=1e-3)
    clip = QKClip(model, tau=0.5, observe="always", example_inputs=x)
    step(clip, model(x))
    check(clip, model, x, before, 0.5, "", allowed=~forbidden)


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s - s.max(-1, keepdim=True).values,
        lambda s: s - s.amax(-1, keepdim=True),
        lambda s: s + s.max(-1, keepdim=True).values.neg(),
        lambda s: s.masked_fill(FORBIDDEN.mT & FORBIDDEN, -1e4),
        lambda s: s - 100 * torch.arange(7.0),
        lambda s: s - 5000 * (torch.arange(7.0)[:, None] - torch.arange(7)).abs(),
        lambda s: torch.where(s > 0.1, 0.1, s),
        lambda s: s.masked_fill(s > 0.1, 0.1),
    ],
)
def test_an_exploded_logit_is_not_taken_for_a_mask(function, x):
    """A softmax made stable subtracts maxima, which are as large as they are."""
    model = written(lambda q, k, v: function(q @ k.mT * HEAD**-0.5).softmax(-1) @ v)
    with torch.no_grad():
        model.q.weight.mul_(1e4)
    before = maxima(model, x)
    assert before.min() > 1e4
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    step(clip, model(x))
    check(clip, model, x, before, 1.0, "")


@pytest.mark.usefixtures("seen_observation")
@pytest.mark.parametrize("factor", [lambda t: t, lambda t: t.view(1, 1, 1), lambda t: nn.Parameter(t)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_a_tensor_and_a_mask_are_not_read(factor, dtype):
    """The host would wait for the device in every forward."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read by the host"
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    q, k = torch.randn(2, HEADS, 7, HEAD, dtype=dtype), torch.randn(2, HEADS, 7, HEAD, dtype=dtype)
    scale, found, mask = factor(torch.tensor(0.37)), [], torch.where(FORBIDDEN, -100.0, 0.0)
    with NoReading(), ScoreTracker(found.append):
        torch.softmax(torch.tensor(3.0) * (q @ k.mT * scale) / scale / torch.tensor(7.0) + mask, -1)
    assert len(found) == 1
    assert torch.equal(found[0].attn_mask.expand(2, HEADS, 7, 7), ~FORBIDDEN.expand(2, HEADS, 7, 7))
    assert not found[0].problem
    statistic = MaxLogits(HEADS)
    with ScoreTracker(lambda call: take_in(call, statistic, None)):
        torch.softmax(torch.tensor(3.0) * (q @ k.mT * scale) / scale / torch.tensor(7.0), -1)
    expected = (q.double() @ k.double().mT * 3 / 7).amax((0, 2, 3)).float()
    torch.testing.assert_close(statistic.maximum, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda q, k, v: ((q @ k.mT).relu() * (q @ k.mT).relu()).softmax(-1) @ v, "pass through relu"),
        (lambda q, k, v: (lambda s: s * s)(q @ k.mT).softmax(-1) @ v, "are multiplied by themselves"),
        (lambda q, k, v: torch.div(torch.ones(7, 7), q @ k.mT).softmax(-1) @ v, "divide something"),
        (
            lambda q, k, v: torch.cat([(q @ k.mT)[:, :1] + (q @ k.mT)[:, 1:2]] * q.shape[1], 1).softmax(-1) @ v,
            "are a sum of two products",
        ),
        (lambda q, k, v: (1 - q @ k.mT).softmax(-1) @ v, "are subtracted from something"),
        (
            lambda q, k, v: torch.einsum("bhid,bhjd->bijh", q, k).softmax(2).permute(0, 3, 1, 2) @ v,
            "come from an einsum that is not understood, bhid,bhjd->bijh",
        ),
    ],
)
def test_ways_to_write_it_that_are_refused(function, reason, x):
    with pytest.raises(ValueError, match=f"its logits {reason}"):
        QKClip(written(function), example_inputs=x)


# Weights that are computed


class Computed(Attention):
    def heads(self, x):
        _, k, v = super().heads(x)
        return self.query(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2), k, v


class MaskedWeight(Computed):
    """Pruned: proportional to its parameter."""

    def query(self, x):
        return F.linear(x, self.q.weight * (torch.arange(WIDTH) > 3))


class NormalisedWeight(Computed):
    def query(self, x):
        return F.linear(x, F.normalize(self.q.weight, dim=-1) * 3)


class CentredWeight(Computed):
    def query(self, x):
        return torch.einsum("bti,oi->bto", x, self.q.weight + 0.5)


def test_a_weight_proportional_to_its_parameter_is_clipped(x):
    model = MaskedWeight()
    before = maxima(model, x)
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    step(clip, model(x))
    check(clip, model, x, before, 1.0, "")


@pytest.mark.parametrize("kind", [NormalisedWeight, CentredWeight])
def test_a_weight_that_is_not_is_refused(kind, x):
    with pytest.raises(ValueError, match="its queries come from"):
        QKClip(kind(), example_inputs=x)


def test_weight_norm_is_clipped_by_its_magnitude(x):
    model = Attention()
    nn.utils.parametrizations.weight_norm(model.q)
    direction = model.q.parametrizations.weight.original1.clone()
    before = maxima(model, x)
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    step(clip, model(x))
    check(clip, model, x, before, 1.0, "")
    assert torch.equal(model.q.parametrizations.weight.original1, direction)


class Gated(Attention):
    """The queries are multiplied by a number, from a product with fewer axes than usual."""

    def __init__(self, product):
        super().__init__()
        self.product = product
        self.gate, self.vector = nn.Linear(WIDTH, HEAD), nn.Parameter(torch.randn(WIDTH))

    def heads(self, x):
        q, k, v = super().heads(x)
        return q * self.product(x, self.gate.weight, self.vector).sigmoid().mean(), k, v


@pytest.mark.parametrize(
    "product",
    [
        lambda x, weight, vector: F.linear(x[0, 0], weight * vector),
        lambda x, weight, vector: F.linear(x[0, 0], weight),
        lambda x, weight, vector: F.linear(x, vector),
        lambda x, weight, vector: F.linear(x, vector * vector),
        lambda x, weight, vector: F.linear(x[0, 0], vector * vector),
        lambda x, weight, vector: x @ vector,
        lambda x, weight, vector: x @ weight.mT.expand(3, -1, -1),
    ],
)
def test_products_with_fewer_axes_are_followed_as_well(product, x):
    model = Gated(product)
    before = maxima(model, x)
    clip = QKClip(model, tau=0.5, observe="always", example_inputs=x)
    step(clip, model(x))
    check(clip, model, x, before, 0.5, "")


class OneProduct(Attention):
    """The queries come from a product of one axis."""

    def heads(self, x):
        q = F.linear(x[0, 0], self.q.weight * 2.0).view(1, HEADS, 1, HEAD)
        return q, *super().heads(x)[1:]


def test_a_query_of_one_axis_behind_a_computed_weight_is_clipped(x):
    model = OneProduct()
    before = maxima(model, x)
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    step(clip, model(x))
    check(clip, model, x, before, 1.0, "")


def test_modules_in_a_plain_list_are_refused_by_name(x):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.first = [Attention()], nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layers[0](self.first(x))

    with pytest.raises(ValueError, match="its weights are not registered"):
        QKClip(Hidden(), example_inputs=x)


# Leaving things as they are


def test_arguments_and_other_generators_are_left_alone(x):
    class InPlace(Attention):
        def forward(self, x, seen):
            seen.append(random.random() + np.random.rand())  # noqa: NPY002
            x.mul_(2)
            return super().forward(x)

    model, original, seen = InPlace(), x.clone(), []
    state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    clip = QKClip(model, example_inputs=(x, seen))
    assert torch.equal(x, original)
    assert not seen
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    assert clip.projections


def test_an_interrupted_forward_leaves_nothing_behind(x):
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = written(lambda q, k, v: (q @ k.mT * HEAD**-0.5).softmax(-1) @ v)
            self.stop = False

        def forward(self, x):
            return self.layer(x)

    model = Interrupted()
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    before = maxima(model.layer, x)
    model.layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt) if model.stop else None)
    model.stop = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.stop = False
    step(clip, model(x))
    check(clip, model.layer, x, before, 1.0, "layer")
    clip.remove()


def test_somebody_else_s_attention_is_called_and_given_back(x, monkeypatch):
    calls = []

    def mine(*args, **kwargs):
        calls.append("mine")
        return host_sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", mine)
    model = Attention()
    before = maxima(model, x)
    clip = QKClip(model, tau=1.0, observe="always", example_inputs=x)
    calls.clear()
    step(clip, model(x))
    assert "mine" in calls
    check(clip, model, x, before, 1.0, "")
    clip.remove()
    assert F.scaled_dot_product_attention is mine


def test_a_compiled_module_inside(x):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention())
    before = maxima(model[1], model[0](x))
    model[1] = torch.compile(model[1], backend="aot_eager")
    clip = QKClip(model, tau=1.0, observe="always")
    step(clip, model(x))
    np.testing.assert_allclose(next(iter(clip.report().layers.values())).max_logits, before, rtol=1e-5)
    torch._dynamo.reset()
