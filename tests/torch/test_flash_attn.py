"""Functions of flash-attn that a user has imported by name, long before: their heads are found and clipped."""

import importlib
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from kernel_case import HEAD, HEADS, WIDTH, Attention, assert_clipped, largest, run_case, stand_ins, starts

from muonclip.torch import QKClip


@pytest.fixture
def kernels(monkeypatch, no_other_patches):
    """The module of a user who has imported the functions of the stand-ins."""
    with stand_ins(monkeypatch):
        yield importlib.import_module("calls_bound_early")


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


def case(kernels, name, options, *, cross, **more):
    kinds = dict(groups=HEADS, value=HEAD) if name.startswith("2") and "qkv" in name else {}
    kinds = dict(value=HEAD) if "kv" in name and not kinds else kinds
    return run_case(kernels.CALLS[name], options, cross=cross, **kinds, **more)


@pytest.mark.parametrize(
    ("name", "option", "cross"),
    [
        *(("2", option, True) for option in OPTIONS),
        *((name, "past window", False) for name in ("2", "2 qkv", "3 qkv", "4")),
        *((name, option, True) for name in ("2 kv", "3", "4") for option in ("softcap", "past window")),
    ],
)
def test_loud_heads_end_at_tau_and_others_stay(kernels, name, option, cross):
    """With more keys than queries, causality and windows are aligned at the last position."""
    assert_clipped(case(kernels, name, OPTIONS[option], cross=cross))


@pytest.mark.parametrize(
    ("name", "option", "lengths"),
    [
        *(("2 varlen", option, lengths) for option in ("all", "past window", "future") for lengths in PACKED),
        ("2 varlen qkv", "past window", "same"),
        *((name, "past window", "an empty one") for name in ("2 varlen kv", "3 varlen", "4 varlen")),
    ],
)
def test_packed_sequences_do_not_see_each_other(kernels, name, option, lengths):
    options = dict(OPTIONS[option], starts=PACKED[lengths])
    assert_clipped(case(kernels, name, options, cross=lengths != "same"))


def test_nobody_sees_what_is_behind_the_last_sequence(kernels):
    torch.manual_seed(0)
    model = Attention(kernels.CALLS["2 varlen"])
    options = dict(starts=PACKED["rest"], softcap=1e3)  # with which no log-sum-exp leaves these rows out
    x, memory = torch.randn(1, 11, WIDTH), torch.randn(1, 15, WIDTH)
    x[:, 8:] *= 100
    memory[:, 12:] *= 100
    before = largest(model, x, memory, options)
    clip = QKClip(model, observe="always")
    model(x, memory, options).sum().backward()
    clip.step()
    np.testing.assert_allclose(clip.report().layers[""].max_logits, before, rtol=1e-5)


def test_who_holds_the_autograd_function_is_observed_too(kernels):
    assert_clipped(case(kernels, "2 class", {}, cross=True))


def test_a_bias_by_distance_is_not_part_of_a_logit(kernels):
    slopes = torch.tensor([0.5, 0.2, 0.1, 0.05])
    assert_clipped(case(kernels, "2", dict(causal=True, alibi_slopes=slopes), cross=True))


@pytest.mark.parametrize("name", ["2", "2 varlen", "3", "4", "4 varlen"])
@pytest.mark.parametrize("sink", [False, True])
def test_the_log_sum_exp_of_the_kernel_certifies_quiet_heads(kernels, name, sink):
    """A norm bound would be larger; a sink makes the kernel's number larger, and no less a bound."""
    options = dict(causal=True) | (dict(starts=PACKED["same"]) if "varlen" in name else {})
    if sink:
        if not name.startswith("4"):
            return
        options["learnable_sink"] = torch.full((HEADS,), 0.5)
    _, clip, before, _, _ = case(kernels, name, options, cross=False, observe="needed", tau=1e3)
    bound = clip.report().layers[""].bound.numpy()
    assert (bound >= before).all()
    assert not clip.report().layers[""].exact.any()
    assert clip.sources() == {"": f"flash-attn {name[0]}: row LSE or norm bound, then exact rows"}
    longest = 6 if "varlen" in name else 11
    assert (bound <= before + math.log(longest + sink * math.exp(0.5)) + 0.1).all()


def test_a_soft_cap_or_a_bias_keeps_the_log_sum_exp_from_being_a_bound(kernels):
    """Capped at 0.5, the log-sum-exp of every row is below the largest logit."""
    assert_clipped(case(kernels, "2", dict(softcap=0.5), cross=True, observe="needed"))
    slopes = torch.full((HEADS,), 40.0)
    assert_clipped(case(kernels, "2", dict(alibi_slopes=slopes), cross=True, observe="needed"))


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
    model(x, x, usual | UNKNOWN[name]).sum().backward()
    with pytest.raises(RuntimeError, match=f"flash-attn with {argument}"):
        clip.step()
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
