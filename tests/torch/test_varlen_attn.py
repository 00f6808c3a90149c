"""torch's `varlen_attn`, imported by name long before: its heads are found, observed and clipped.

Its operators have no implementation for the CPU; the tests give them one.
"""

import importlib
import warnings

import numpy as np
import pytest
import torch
from kernel_case import WIDTH, Attention, assert_clipped, largest, run_case, stand_ins, starts
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from muonclip.torch import QKClip


@pytest.fixture
def on_cpu(monkeypatch, no_other_patches):
    """Implementations of its operators, as long as the test runs."""
    with stand_ins(monkeypatch):
        dense = importlib.import_module("dense_attention").Dense

        def of(q, k, v, cu_seq_q, cu_seq_k, is_causal, scale, window_size):
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            return dense(q, k, v, scale, is_causal, window_size, starts=(cu_seq_q, cu_seq_k))

        def forward(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *more):
            out, lse = of(q, k, v, cu_seq_q, cu_seq_k, is_causal, scale, window_size).outputs()
            return out, lse, torch.zeros(2, dtype=torch.uint64)

        def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, state, scale=None, window_size=None):
            return of(q, k, v, cu_q, cu_k, is_causal, scale, window_size).gradients(dout)

        library = torch.library.Library("torch_attn", "IMPL", "CPU")
        library.impl("_varlen_attn", forward, with_keyset=False)
        library.impl("_varlen_attn_backward", backward)
        yield
        library._destroy()


def call(q, k, v, starts, window_size=(-1, -1), **options):
    longest = (int(each.diff().max()) for each in starts)
    packed = (q[0], k[0], v[0], *starts, *longest)
    return varlen_attn(*packed, window_size=window_size, enable_gqa=True, **options)[None]


PACKED = {
    "same": (starts(4, 1, 6),) * 2,
    "more keys": (starts(4, 1, 6), starts(6, 2, 7)),
    "an empty one": (starts(4, 0, 7), starts(6, 3, 6)),
    "rest": (starts(4, 1, 3), starts(6, 2, 4)),
}


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        *(({}, lengths) for lengths in PACKED),
        *((dict(window_size=(-1, 0)), lengths) for lengths in PACKED),
        (dict(window_size=(2, 1)), "more keys"),
        (dict(scale=0.7), "same"),
    ],
)
def test_loud_heads_end_at_tau_and_others_stay(on_cpu, options, lengths):
    named = {"softmax_scale": options["scale"]} if "scale" in options else options
    case = run_case(
        lambda q, k, v, starts, softmax_scale=None, **more: call(q, k, v, starts, scale=softmax_scale, **more),
        dict(named, starts=PACKED[lengths]),
        cross=lengths != "same",
        value=8,
    )
    assert_clipped(case)


def test_the_log_sum_exp_of_the_kernel_certifies_quiet_heads(on_cpu):
    options = dict(starts=PACKED["same"], window_size=(-1, 0))
    _, clip, before, _, _ = run_case(call, options, cross=False, value=8, observe="needed", tau=1e3)
    report = clip.report().layers[""]
    assert not report.exact.any()
    assert (report.bound.numpy() >= before).all()
    assert (report.bound.numpy() <= before + np.log(6) + 0.01).all()
    assert clip.sources() == {"": "varlen_attn: row LSE or norm bound, then exact rows"}


def test_the_log_sum_exp_that_was_asked_for_is_returned(on_cpu):
    seen = []

    def with_lse(q, k, v, starts):
        seen.append(varlen_attn(q[0], k[0], v[0], *starts, 6, 6, enable_gqa=True, return_aux=AuxRequest(lse=True)))
        return seen[-1][0][None]

    run_case(with_lse, dict(starts=PACKED["same"]), cross=False, value=8)
    assert all(lse.shape == (4, 11) for _, lse in seen)


@pytest.mark.parametrize("argument", ["seqused_k", "block_table"])
def test_keys_in_pages_are_refused_by_name(on_cpu, argument):

    def with_pages(q, k, v, starts):
        keys = (k, v) if argument == "block_table" else (k[0], v[0])  # [pages, size of a page, G, d], or [Tk, G, d]
        more = {argument: torch.tensor([4, 1, 6])}
        return varlen_attn(q[0], *keys, *starts, 6, 6, enable_gqa=True, **more)[None]

    model = Attention(with_pages, value=8)
    x = torch.randn(1, 11, WIDTH)
    clip = QKClip(model)
    with pytest.raises(ValueError, match=f"it calls varlen_attn with {argument}"):
        model(x, x, dict(starts=PACKED["same"]))
    clip.remove()


def test_the_operator_keeps_what_others_know_it_by(on_cpu):
    """Policies of selective checkpointing name the overload of the operator."""
    overload = torch.ops.torch_attn._varlen_attn.default
    clip = QKClip(Attention(call, value=8))
    assert torch.ops.torch_attn._varlen_attn.default is overload
    assert len(torch._decomp.core_aten_decompositions().keys()) > 100  # which asks every operator for its overloads
    clip.remove()
    assert torch.ops.torch_attn._varlen_attn.default is overload


def test_under_the_compiler_it_is_observed_too(on_cpu):
    def of_six(q, k, v, starts, window_size):
        return varlen_attn(q[0], k[0], v[0], *starts, 6, 6, window_size=window_size, enable_gqa=True)[None]

    torch.manual_seed(0)
    model = Attention(of_six, value=8)
    x, options = torch.randn(1, 11, WIDTH), dict(starts=PACKED["same"], window_size=(-1, 0))
    before = largest(model, x, x, options)
    clip = QKClip(model, tau=float(np.median(before)), observe="always")
    model(x, None, options)
    clip.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        torch.compile(model, backend="eager", fullgraph=True)(x, None, options).sum().backward()
    clip.step()
    np.testing.assert_allclose(clip.report().layers[""].max_logits, before, rtol=1e-5)
    np.testing.assert_allclose(largest(model, x, x, options), np.minimum(before, clip.tau), rtol=1e-5)
