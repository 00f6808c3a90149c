"""Functions of flash-attn that a user has imported by name, long before: their heads are found, observed and clipped.

The package does not run without a GPU; stand-ins with its signatures and structure compute dense attention.
"""

import importlib
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from muonclip.torch import QKClip

STAND_INS = Path(__file__).parents[1] / "support" / "kernel_packages"
WIDTH, HEADS, GROUPS, HEAD, VALUE = 10, 4, 2, 8, 6


@pytest.fixture
def kernels(monkeypatch, no_other_patches):
    """The stand-ins, and the module of a user who has imported their functions."""
    names = {path.stem for path in STAND_INS.iterdir()}

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(STAND_INS)
    yield importlib.import_module("calls_bound_early")
    forget()


class Attention(nn.Module):
    """A user's attention. Queries of `x`, keys of `memory`, of another number of heads and another width of values."""

    def __init__(self, call, groups=GROUPS, value=VALUE):
        super().__init__()
        self.call = [call]
        self.groups = groups
        self.q = nn.Linear(WIDTH, HEADS * HEAD)
        self.k = nn.Linear(WIDTH, groups * HEAD)
        self.v = nn.Linear(WIDTH, groups * value)
        self.o = nn.Linear(HEADS * value, WIDTH)
        with torch.no_grad():
            self.q.weight.view(HEADS, -1).mul_(torch.tensor([3.0, 0.5, 6.0, 1.0])[:, None])

    def heads(self, x, memory):
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        return q.unflatten(-1, (HEADS, -1)), k.unflatten(-1, (self.groups, -1)), v.unflatten(-1, (self.groups, -1))

    def forward(self, x, memory=None, options=None):
        q, k, v = self.heads(x, x if memory is None else memory)
        return self.o(self.call[0](q, k, v, **(options or {})).flatten(2))


def largest(model, x, memory, options):
    """[H] in float64: of each sequence alone, over the pairs that the kernel computes."""
    pairs_of = importlib.import_module("dense_attention").pairs_of
    with torch.no_grad():
        q, k, _ = model.double().heads(x.double(), memory.double())
    model.float()
    q, k = q.numpy(), k.numpy().repeat(HEADS // model.groups, 2)
    sequences = list(zip(q, k, strict=True))
    if "starts" in options:
        of_q, of_k = (each.tolist() for each in options["starts"])
        ends = zip(of_q, of_q[1:], of_k, of_k[1:], strict=False)
        sequences = [(q[0, a:b], k[0, c:d]) for a, b, c, d in ends]
    scale = options.get("softmax_scale") or HEAD**-0.5
    maxima = np.full(HEADS, -np.inf)
    for q, k in sequences:
        allowed = pairs_of(len(q), len(k), options.get("causal", False), options.get("window_size") or (None, None))
        scores = np.where(allowed, scale * np.einsum("ihd,jhd->hij", q, k), -np.inf)
        maxima = np.maximum(maxima, scores.max((1, 2), initial=-np.inf))
    return maxima


def starts(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


OPTIONS = {
    "all": {},
    "causal": dict(causal=True),
    "scale": dict(softmax_scale=0.7, causal=True),
    "window": dict(window_size=(2, 1)),
    "past window": dict(causal=True, window_size=(2, 1)),
    "future": dict(window_size=(-1, 1)),
    "softcap": dict(softcap=2.0, causal=True),
}
PACKED = {  # cumulative lengths of queries and keys, in rows of 11 and 15
    "same": (starts(4, 1, 6),) * 2,
    "more keys": (starts(4, 1, 6), starts(6, 2, 7)),
    "an empty one": (starts(4, 0, 7), starts(6, 3, 6)),
    "rest": (starts(4, 1, 3), starts(6, 2, 4)),
}


def run_case(kernels, name, options, *, cross, observe="always", tau=None):
    torch.manual_seed(0)
    kinds = dict(groups=HEADS, value=HEAD) if "qkv" in name else dict(value=HEAD) if "kv" in name else {}
    kinds = kinds if name != "3 qkv" else dict(value=HEAD)
    model = Attention(kernels.CALLS[name], **kinds)
    batch = 1 if "starts" in options else 2
    x = torch.randn(batch, 11, WIDTH)
    memory = torch.randn(batch, 15, WIDTH) if cross else x
    before = largest(model, x, memory, options)
    expected = model(x, memory, options)
    expected.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    clip = QKClip(model, tau=float(np.median(before)) if tau is None else tau, observe=observe)
    result = model(x, memory, options)
    assert torch.equal(result, expected)
    result.square().mean().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    clip.step()
    return model, clip, before, weights, lambda: largest(model, x, memory, options)


def assert_clipped(case):
    model, clip, before, weights, after = case
    report = clip.report().layers[""]
    loud = before > clip.tau
    of_all = report.exact.numpy()
    assert of_all[loud].all()
    np.testing.assert_allclose(report.max_logits[of_all], before[of_all], rtol=1e-5)
    np.testing.assert_allclose(after(), np.minimum(before, clip.tau), rtol=1e-5)
    assert 0 < loud.sum() < HEADS
    for name, parameter in model.named_parameters():
        if not name.startswith(("q.", "k.")):
            assert torch.equal(parameter, weights[name])
        elif name.startswith("q.") or model.groups == HEADS:
            for head in np.flatnonzero(~loud):
                old, new = (each.unflatten(0, (HEADS, -1))[head] for each in (weights[name], parameter))
                assert torch.equal(old, new)
        else:
            assert torch.equal(parameter, weights[name])  # keys that several heads share


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["2", "2 kv", "2 qkv", "3", "3 qkv", "4"])
def test_loud_heads_end_at_tau_and_others_stay(kernels, name, option, cross):
    """With more keys than queries, causality and windows are aligned at the last position."""
    if cross and "qkv" in name:
        return
    assert_clipped(run_case(kernels, name, OPTIONS[option], cross=cross))


@pytest.mark.parametrize("lengths", PACKED)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["2 varlen", "2 varlen kv", "2 varlen qkv", "3 varlen", "4 varlen"])
def test_packed_sequences_do_not_see_each_other(kernels, name, option, lengths):
    if lengths != "same" and "qkv" in name:
        return
    options = dict(OPTIONS[option], starts=PACKED[lengths])
    assert_clipped(run_case(kernels, name, options, cross=lengths != "same"))


def test_a_bias_by_distance_is_not_part_of_a_logit(kernels):
    slopes = torch.tensor([0.5, 0.2, 0.1, 0.05])
    assert_clipped(run_case(kernels, "2", dict(causal=True, alibi_slopes=slopes), cross=True))


@pytest.mark.parametrize("name", ["2", "2 varlen", "3", "4", "4 varlen"])
@pytest.mark.parametrize("sink", [False, True])
def test_the_log_sum_exp_of_the_kernel_certifies_quiet_heads(kernels, name, sink):
    """A norm bound would be larger; a sink makes the kernel's number larger, and no less a bound."""
    options = dict(causal=True) | (dict(starts=PACKED["same"]) if "varlen" in name else {})
    if sink:
        if not name.startswith("4"):
            return
        options["learnable_sink"] = torch.full((HEADS,), 0.5)
    _, clip, before, _, _ = run_case(kernels, name, options, cross=False, observe="needed", tau=1e3)
    bound = clip.report().layers[""].bound.numpy()
    assert (bound >= before).all()
    assert not clip.report().layers[""].exact.any()
    assert clip.sources() == {"": f"flash-attn {name[0]}: row LSE or norm bound, then exact rows"}
    longest = 6 if "varlen" in name else 11
    assert (bound <= before + math.log(longest + sink * math.exp(0.5)) + 0.1).all()


def test_a_soft_cap_or_a_bias_keeps_the_log_sum_exp_from_being_a_bound(kernels):
    """Capped at 0.5, the log-sum-exp of every row is below the largest logit."""
    assert_clipped(run_case(kernels, "2", dict(softcap=0.5), cross=True, observe="needed"))
    slopes = torch.full((HEADS,), 40.0)
    assert_clipped(run_case(kernels, "2", dict(alibi_slopes=slopes), cross=True, observe="needed"))


UNKNOWN = {
    "2 varlen": dict(block_table=torch.zeros(3, 1)),
    "3": dict(attention_chunk=4),
    "4": dict(score_mod=lambda score, *_: score),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_argument_that_is_not_understood_is_named(kernels, name):
    (argument,) = UNKNOWN[name]
    model = Attention(kernels.CALLS[name])
    usual = dict(starts=PACKED["same"]) if "varlen" in name else {}
    x = torch.randn(1, 11, WIDTH)
    clip = QKClip(model)
    with pytest.raises(ValueError, match=f"it calls flash-attn with {argument}, of which QK-Clip does not know"):
        model(x, x, usual | UNKNOWN[name])
    clip.remove()
    clip = QKClip(model)  # and where the first step did not give it
    model(x, x, usual).sum().backward()
    clip.step()
    with pytest.raises(RuntimeError, match=f"flash-attn with {argument}"):
        model(x, x, usual | UNKNOWN[name])
    clip.remove()


@pytest.mark.parametrize("arguments", [dict(q_descale=torch.ones(1)), dict(qv=torch.ones(2, 11, HEADS, HEAD))])
def test_tensors_that_are_part_of_the_logits_are_named(kernels, arguments):
    model = Attention(kernels.CALLS["3"])
    (argument,) = arguments
    clip = QKClip(model)
    with pytest.raises(ValueError, match=f"it calls flash-attn with {argument},"):
        model(torch.randn(2, 11, WIDTH), None, arguments)
    clip.remove()


def test_what_the_function_returns_is_what_it_returned(kernels):
    """With the attention probabilities, version 2 returns three things, and they stay three."""
    seen = []

    def call(q, k, v):
        seen.append(kernels.flash_attn_func(q, k, v, return_attn_probs=True))
        return seen[-1][0]

    model = Attention(call)
    x = torch.randn(2, 11, WIDTH)
    before = largest(model, x, x, {})
    model(x)
    clip = QKClip(model, observe="always", example_inputs=x)
    traced = seen[-1]
    model(x).sum().backward()
    clip.step()
    for out in (seen[0], traced, seen[-1]):
        assert [len(out), out[1].shape] == [3, (2, HEADS, 11)]
    assert torch.equal(seen[0][1], seen[-1][1])
    np.testing.assert_allclose(clip.report().layers[""].max_logits, before, rtol=1e-5)


def test_when_nobody_observes_any_more_the_functions_are_as_they_were(kernels):
    functions = sys.modules["flash_attn.flash_attn_interface"]
    model = Attention(kernels.CALLS["2"])
    assert "apply" not in vars(functions.FlashAttnFunc)
    clip = QKClip(model, example_inputs=torch.randn(2, 11, WIDTH))
    assert "apply" in vars(functions.FlashAttnFunc)
    clip.remove()
    assert "apply" not in vars(functions.FlashAttnFunc)
    assert model(torch.randn(2, 11, WIDTH)).shape == (2, 11, WIDTH)


def test_the_stand_ins_align_as_the_documentation_of_the_package_shows(kernels):
    pairs_of = importlib.import_module("dense_attention").pairs_of
    assert pairs_of(2, 5, True, (-1, -1)).astype(int).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert pairs_of(5, 2, True, (-1, -1)).astype(int).tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


def test_under_the_compiler_the_functions_are_observed_too(kernels):
    torch.manual_seed(0)
    model = Attention(kernels.CALLS["2"])
    x = torch.randn(2, 11, WIDTH)
    before = largest(model, x, x, dict(causal=True))
    clip = QKClip(model, tau=float(np.median(before)), observe="always", example_inputs=x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about the context of any such function
        torch.compile(model, backend="eager", fullgraph=True)(x, None, dict(causal=True)).sum().backward()
    clip.step()
    np.testing.assert_allclose(clip.report().layers[""].max_logits, before, rtol=1e-5)
    np.testing.assert_allclose(largest(model, x, x, dict(causal=True)), np.minimum(before, clip.tau), rtol=1e-5)
