"""`memory_efficient_attention` of xFormers, imported by name long before: its heads are found, observed and clipped."""

import importlib

import numpy as np
import pytest
import torch
from kernel_case import HEADS, WIDTH, Attention, assert_clipped_to, stand_ins

from muonclip.torch import QKClip

ROWS, COLUMNS = 11, 15
SCALE = 0.6


@pytest.fixture
def attend(monkeypatch, no_other_patches):
    """The function, as a user holds it who has imported it by name."""
    with stand_ins(monkeypatch):
        yield importlib.import_module("xformers.ops").memory_efficient_attention


def biases():
    of = importlib.import_module("xformers.ops.fmha.attn_bias")
    torch.manual_seed(1)
    per_head = torch.randn(1, HEADS, ROWS, COLUMNS)
    per_head[:, :, torch.rand(ROWS, COLUMNS) < 0.3] = -torch.inf
    lengths, of_keys = (4, 1, 6), (6, 2, 7)
    return {
        "none": None,
        "tensor": per_head,
        "causal": of.LowerTriangularMask(),
        "causal with bias": of.LowerTriangularMask().add_bias(per_head),
        "bottom right": of.LowerTriangularFromBottomRightMask(),
        "local bottom right": of.LowerTriangularFromBottomRightLocalAttentionMask(3),
        "two-sided": of.LocalAttentionFromBottomRightMask(2, 1),
        "blocks": of.BlockDiagonalMask.from_seqlens(lengths, of_keys),
        "causal blocks": of.BlockDiagonalCausalMask.from_seqlens(lengths, of_keys),
        "bottom right blocks": of.BlockDiagonalCausalFromBottomRightMask.from_seqlens(lengths, of_keys),
        "local blocks": of.BlockDiagonalCausalLocalAttentionMask.from_seqlens(lengths, of_keys, _window_size=2),
        "local bottom right blocks": of.BlockDiagonalCausalLocalAttentionFromBottomRightMask.from_seqlens(
            lengths, of_keys, _window_size=2
        ),
    }


KINDS = (
    *("none", "tensor", "causal", "causal with bias", "bottom right", "local bottom right", "two-sided", "blocks"),
    *("causal blocks", "bottom right blocks", "local blocks", "local bottom right blocks"),
)


def largest(model, x, memory, bias):
    """[H] in float64, over the pairs that the bias says it allows."""
    with torch.no_grad():
        q, k, _ = model.double().heads(x.double(), memory.double())
    model.float()
    scores = SCALE * torch.einsum("bihd,bjhd->bhij", q, k)
    if bias is not None:
        dense = bias if isinstance(bias, torch.Tensor) else bias.materialize((q.shape[1], k.shape[1]))
        scores = scores.masked_fill(dense == -torch.inf, -torch.inf)
    return scores.amax((0, 2, 3)).numpy()


def run(call, bias, **more):
    torch.manual_seed(0)
    model = Attention(lambda q, k, v: call(q, k, v, bias), groups=HEADS)
    batch = 1 if "BlockDiagonal" in type(bias).__name__ else 2
    x, memory = torch.randn(batch, ROWS, WIDTH), torch.randn(batch, COLUMNS, WIDTH)
    return assert_clipped_to(model, (x, memory), lambda: largest(model, x, memory, bias), **more)


@pytest.mark.parametrize("kind", KINDS)
def test_loud_heads_end_at_tau_and_others_stay(attend, kind):
    run(lambda q, k, v, bias: attend(q, k, v, bias, scale=SCALE), biases()[kind])


@pytest.mark.parametrize("kind", ["none", "tensor", "bottom right"])
def test_heads_may_be_among_the_sequences_or_in_groups(attend, kind):
    def among_sequences(q, k, v, bias):
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        bias = bias.expand(2, -1, -1, -1).flatten(0, 1) if isinstance(bias, torch.Tensor) else bias
        return attend(q, k, v, bias, scale=SCALE).unflatten(0, (-1, HEADS)).transpose(1, 2)

    def in_groups(q, k, v, bias):
        q, k, v = (t.unflatten(2, (2, -1)) for t in (q, k, v))
        bias = bias.unflatten(1, (2, -1)) if isinstance(bias, torch.Tensor) else bias
        return attend(q, k, v, bias, scale=SCALE).flatten(2, 3)

    run(among_sequences, biases()[kind])
    run(in_groups, biases()[kind])


def test_the_log_sum_exp_of_the_kernel_certifies_quiet_heads(attend):
    report, before = run(lambda q, k, v, bias: attend(q, k, v, bias, scale=SCALE), None, observe="needed", tau=1e3)
    assert not report.exact.any()
    assert (report.bound.numpy() >= before).all()
    assert (report.bound.numpy() <= before + np.log(COLUMNS) + 0.01).all()


def test_a_bias_keeps_the_log_sum_exp_from_being_a_bound(attend):
    """All logits are lowered by 30, so that the log-sum-exp of every row is below zero."""
    bias = torch.full((1, HEADS, ROWS, COLUMNS), -30.0)
    run(lambda q, k, v, bias: attend(q, k, v, bias, scale=SCALE), bias, observe="needed")


def test_a_bias_that_is_not_known_is_named(attend):
    of = importlib.import_module("xformers.ops.fmha.attn_bias")
    bias = of.BlockDiagonalPaddedKeysMask.from_seqlens((4, 1, 6))
    model = Attention(lambda q, k, v: attend(q, k, v, bias), groups=HEADS)
    with pytest.raises(ValueError, match="of xFormers with a BlockDiagonalPaddedKeysMask, which QK-Clip does not know"):
        QKClip(model, example_inputs=torch.randn(1, ROWS, WIDTH))
