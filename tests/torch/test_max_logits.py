"""The statistic: exact, masked, tiled, a maximum, and invisible to the model."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_attention import HEADS, KINDS, WIDTH, TinyAttention, dense_max_logits
from torch import nn
from torch.utils.checkpoint import checkpoint

from muonclip.torch import AttentionMask, MaxLogits, attention, measure_max_logits
from muonclip.torch.logits import exact_maxima


def qkv(seed=0, batch=2, heads=4, groups=2, length=17, width=5, value=3, dtype=torch.float64):
    torch.manual_seed(seed)
    shapes = (batch, heads, length, width), (batch, groups, length, width), (batch, groups, length, value)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def random_masks(seed, batch, length):
    generator = np.random.default_rng(seed)
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    documents = np.sort(generator.integers(0, 3, (batch, length)), axis=1)
    keep = generator.random((batch, length)) < 0.7
    window = int(generator.integers(1, length))
    padding = torch.from_numpy(keep)[:, None, None, :]
    additive = torch.where(padding, torch.randn(1, 1, length, length) * 50, -torch.inf)
    everything = np.ones((batch, length, length), dtype=bool)
    return {
        "full": ({}, everything),
        "causal": (dict(is_causal=True), everything & (j <= i)),
        "window": (dict(is_causal=True, window=window), everything & (j <= i) & (i - j < window)),
        "two-sided window": (dict(window=window), everything & (abs(i - j) < window)),
        "documents": (
            dict(is_causal=True, document_ids=torch.from_numpy(documents)),
            (j <= i) & (documents[:, :, None] == documents[:, None, :]),
        ),
        "padding": (dict(attn_mask=padding), everything & keep[:, None, :]),
        "additive bias": (dict(is_causal=True, attn_mask=additive), (j <= i) & keep[:, None, :]),
    }


@pytest.mark.parametrize("mask", random_masks(0, 1, 4))
@given(seed=st.integers(0, 1000), length=st.integers(1, 23), tiles=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_is_the_exact_masked_maximum_whatever_the_tiles(mask, seed, length, tiles):
    q, k, v = qkv(seed, length=length + 1)
    arguments, allowed = random_masks(seed, 2, length + 1)[mask]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_maxima, "_TILE_ROWS", tiles[0])
        patch.setattr(exact_maxima, "_TILE_COLUMNS", tiles[1])
        statistic = MaxLogits(4)
        attention(q, k, v, scale=0.3, max_logits=statistic, **arguments)
        mask = AttentionMask(length + 1, length + 1, **arguments)
        measured = measure_max_logits(q, k, scale=0.3, mask=mask)  # in tiles alone, where a few rows settle the former
    expected = dense_max_logits(q, k, allowed, 0.3)
    np.testing.assert_allclose(statistic.maximum, expected, rtol=1e-6)
    np.testing.assert_allclose(measured, expected, rtol=1e-12)


@given(seed=st.integers(0, 1000))
def test_attention_is_softmax_attention_under_every_mask(seed):
    q, k, v = qkv(seed, length=11)
    for arguments, allowed in random_masks(seed, 2, 11).values():
        scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
        bias = arguments.get("attn_mask")
        if bias is not None and bias.dtype != torch.bool:
            scores = scores + bias
        scores = scores.masked_fill(~torch.from_numpy(allowed)[:, None], -math.inf)
        rows = torch.from_numpy(allowed.any(-1))[:, None, :, None]
        expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
        actual = attention(q, k, v, scale=0.3, **arguments)
        torch.testing.assert_close(torch.where(rows, actual, 0), torch.where(rows, expected, 0), atol=1e-6, rtol=1e-6)


def test_softcap_is_applied_after_the_statistic():
    q, k, v = qkv(groups=4)
    q = q * 100
    statistic = MaxLogits(4)
    y = attention(q, k, v, is_causal=True, softcap=50.0, max_logits=statistic)
    np.testing.assert_allclose(statistic.maximum, dense_max_logits(q, k), rtol=1e-6)
    assert statistic.maximum.max() > 100
    scores = 50 * torch.tanh(q @ k.mT / math.sqrt(5) / 50)
    scores = scores.masked_fill(~torch.ones(17, 17, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(y, scores.softmax(-1) @ v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_is_measured(kind):
    torch.manual_seed(0)
    layer = TinyAttention(kind).double()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    layer(x)
    q, k, _ = layer.qkv_of(x)
    np.testing.assert_allclose(layer.max_logits.maximum, dense_max_logits(q, k), rtol=1e-6)


def test_never_holds_a_full_score_matrix():
    q, k, _ = qkv(batch=1, heads=2, groups=2, length=3000, width=4, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        measure_max_logits(q, k, scale=1.0, mask=AttentionMask(3000, 3000, is_causal=True))
    assert largest <= 2 * 256 * 1024


def test_micro_batches_take_the_maximum_not_the_sum_and_not_the_last():
    (q1, k1, v), (q2, k2, _) = qkv(1, dtype=torch.float32), qkv(2, dtype=torch.float32)
    statistic = MaxLogits(4)
    for q, k in ((q1, k1), (q2, k2), (q1, k1)):
        attention(q, k, v, is_causal=True, max_logits=statistic)
    expected = np.maximum(dense_max_logits(q1, k1), dense_max_logits(q2, k2))
    np.testing.assert_allclose(statistic.maximum, expected, rtol=1e-5)
    given = MaxLogits(4)
    for q, k in ((q1, k1), (q2, k2), (q1, k1)):
        given.update(torch.from_numpy(dense_max_logits(q, k)))
    np.testing.assert_allclose(given.maximum, expected, rtol=1e-6)
    assert torch.equal(given.bound, given.maximum)


def test_evaluation_is_not_observed():
    q, k, v = qkv()
    statistic = MaxLogits(4)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            attention(q, k, v, max_logits=statistic)
    assert statistic.observed == 0
    attention(q, k, v, max_logits=statistic)
    assert statistic.observed == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_observes_the_same(use_reentrant):
    torch.manual_seed(0)
    layer, x = TinyAttention(), torch.randn(2, 9, WIDTH, requires_grad=True)
    plain, recomputed = copy.deepcopy(layer), copy.deepcopy(layer)
    plain(x).sum().backward()
    checkpoint(recomputed, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(plain.max_logits.packed, recomputed.max_logits.packed)
    torch.testing.assert_close(plain.q.weight.grad, recomputed.q.weight.grad)


def test_autocast_does_not_reach_the_statistic():
    """Under autocast `q.float() @ k.float()` silently runs in bf16."""
    q, k, v = (100 * t for t in qkv(dtype=torch.float32))
    statistic = MaxLogits(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(q, k, v, is_causal=True, max_logits=statistic)
    np.testing.assert_allclose(statistic.maximum, dense_max_logits(q, k), rtol=1e-6)


def test_result_and_gradients_are_untouched():
    q, k, v = (t.requires_grad_() for t in qkv())
    watched = torch.autograd.grad(attention(q, k, v, is_causal=True, max_logits=MaxLogits(4)).square().sum(), (q, k, v))
    plain = torch.autograd.grad(attention(q, k, v, is_causal=True).square().sum(), (q, k, v))
    reference = torch.autograd.grad(
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).square().sum(), (q, k, v)
    )
    for a, b, c in zip(watched, plain, reference, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_sign_and_emptiness():
    statistic = MaxLogits(2)
    q = torch.ones(1, 2, 3, 4)
    attention(q, -q, q, scale=1.0, max_logits=statistic)
    assert statistic.maximum.tolist() == [-4.0, -4.0]
    statistic.reset()
    attention(q, q, q, attn_mask=torch.zeros(3, 3, dtype=torch.bool), max_logits=statistic)
    assert statistic.maximum.tolist() == [-math.inf, -math.inf]
    assert statistic.observed == 1
    assert statistic.nonfinite.tolist() == [0, 0]


def test_a_non_finite_logit_is_kept_apart_from_the_maximum():
    statistic = MaxLogits(2)
    statistic.update(torch.tensor([3.0, math.nan]))
    statistic.update(torch.tensor([math.inf, 5.0]))
    assert statistic.maximum.tolist() == [3.0, 5.0]
    assert statistic.nonfinite.tolist() == [1.0, 1.0]


def test_is_written_in_place_and_is_no_buffer():
    """CUDA graphs replay writes to fixed addresses; DDP overwrites buffers."""
    layer = TinyAttention()
    address = layer.max_logits.packed.data_ptr()
    layer(torch.randn(1, 5, WIDTH))
    layer.max_logits.reset()
    layer(torch.randn(1, 5, WIDTH))
    assert layer.max_logits.packed.data_ptr() == address
    assert not list(layer.buffers())
    assert not any("max_logits" in name for name in layer.state_dict())


def test_is_observed_when_compiled():
    torch.manual_seed(0)
    layer, x = TinyAttention(), torch.randn(2, 9, WIDTH)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x)
    q, k, _ = layer.qkv_of(x)
    np.testing.assert_allclose(layer.max_logits.maximum, dense_max_logits(q, k), rtol=1e-5)
    compiled(3 * x)
    q, k, _ = layer.qkv_of(3 * x)
    np.testing.assert_allclose(layer.max_logits.maximum, dense_max_logits(q, k), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: attention(q, q[:, :3], q[:, :3]), "3 key heads do not divide the 4"),
        (lambda q, k, v: attention(q, k, v, max_logits=MaxLogits(HEADS + 1)), "counts 5 heads, but q"),
        (lambda q, k, v: attention(q[0], k, v), "attention needs q"),
        (lambda q, k, v: attention(q, k, v, window=0), "window=0 must be at least 1"),
        (lambda q, k, v: attention(q, k, v, document_ids=torch.zeros(2, 3)), r"document_ids has shape \(2, 3\)"),
        (lambda q, k, v: MaxLogits(0), "num_heads=0"),
        (lambda q, k, v: MaxLogits(3).update(torch.zeros(4)), r"maxima has shape \(4,\)"),
    ],
)  # fmt: skip
def test_errors_name_the_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv())


def test_masks_that_mean_something_else_are_refused():
    q, k, v = qkv(length=5)
    for mask, message in (
        (torch.ones(5, 5, dtype=torch.int64), "attn_mask is torch.int64; it must be bool"),
        (torch.ones(2, 5, 5, dtype=torch.bool), r"attn_mask has shape \(2, 5, 5\); it must be broadcastable"),
        (torch.ones(5, 4, dtype=torch.bool), r"attn_mask has shape \(5, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, attn_mask=mask)


def test_the_lowest_number_of_a_float_mask_masks():
    """As in Hugging Face's additive masks."""
    q, k, v = qkv(length=5, dtype=torch.float32)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    statistic = MaxLogits(4)
    mask = torch.zeros(5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    attention(q, k, v, attn_mask=mask, max_logits=statistic)
    np.testing.assert_allclose(statistic.maximum, dense_max_logits(q, k), rtol=1e-5)


def test_a_query_that_may_see_nothing_gives_zeros_under_softcap_too():
    q, k, v = (t.requires_grad_() for t in qkv(length=5, groups=4))
    keep = torch.tensor([[False, True, True, True, True]]).expand(2, 5)[:, None, None, :]
    y = attention(q, k, v, is_causal=True, attn_mask=keep, softcap=5.0)
    assert (y[:, :, 0] == 0).all()
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_compiling_does_not_unroll_the_tiles():
    counted = []

    def count(graph, inputs):
        counted.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    q, k, v = qkv(length=40, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_maxima, "_TILE_ROWS", 4)
        statistic = MaxLogits(4)
        compiled = torch.compile(lambda: attention(q, k, v, is_causal=True, max_logits=statistic), backend=count)
        compiled()
    assert sum(counted) < 40
    np.testing.assert_allclose(statistic.maximum, dense_max_logits(q, k), rtol=1e-5)


def test_a_model_made_on_the_meta_device_observes_where_it_lands():
    with torch.device("meta"):
        layer = TinyAttention()
        layer(torch.randn(1, 5, WIDTH))
    assert layer.max_logits.observed == 0
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer(torch.randn(1, 5, WIDTH))
    assert layer.max_logits.observed == 1


def test_low_precision_inputs_are_multiplied_in_float32():
    q, k, v = (t.bfloat16() for t in qkv(length=40, width=64))
    statistic = MaxLogits(4)
    attention(q, k, v, is_causal=True, max_logits=statistic)
    np.testing.assert_allclose(statistic.maximum, dense_max_logits(q.float(), k.float()), rtol=2e-6)
