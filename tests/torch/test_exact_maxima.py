"""Exact where they must be, certified where they may be, and computed no more than needed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masked_values import ADDED, FORBIDDING, LOWEST_BIAS, added_tensors
from tiny_attention import dense_max_logits

from muonclip.torch import AttentionMask, MaxLogits, attention, measure_max_logits
from muonclip.torch.logits import exact_maxima

HEADS, GROUPS, LENGTH, WIDTH = 4, 2, 23, 6


def case(seed, dtype=torch.float32, loudness=6.0):
    torch.manual_seed(seed)
    loud = torch.rand(HEADS)[:, None, None] * loudness
    q = torch.randn(2, HEADS, LENGTH, WIDTH) * loud
    k = torch.randn(2, GROUPS, LENGTH, WIDTH)
    return q.to(dtype), k.to(dtype)


def masks(seed):
    """AttentionMask and the same as bool [B, H, T, T]."""
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    full = torch.ones(2, HEADS, LENGTH, LENGTH, dtype=torch.bool)
    documents = torch.randint(0, 3, (2, LENGTH), generator=generator).sort(-1).values
    same = (documents[:, :, None] == documents[:, None, :])[:, None]
    per_head = torch.rand(2, HEADS, LENGTH, LENGTH, generator=generator) < 0.6
    keep = torch.rand(2, 1, 1, LENGTH, generator=generator) < 0.7
    bias = torch.randn(1, HEADS, LENGTH, LENGTH, generator=generator).masked_fill(~per_head[:1], -math.inf)
    of_queries = torch.randint(0, 3, (2, LENGTH), generator=generator)
    other = (of_queries[:, :, None] == documents[:1, None, :])[:, None]
    offsets = torch.randint(-9, 9, (2, LENGTH), generator=generator)
    shifts = offsets[:, None, :, None]
    size = (LENGTH, LENGTH)
    return {
        "none": (AttentionMask(*size), full),
        "causal": (AttentionMask(*size, is_causal=True), full & (j <= i)),
        "window": (AttentionMask(*size, is_causal=True, window=5), full & (j <= i) & (i - j < 5)),
        "documents": (AttentionMask(*size, is_causal=True, document_ids=documents), full & (j <= i) & same),
        "bool": (AttentionMask(*size, attn_mask=per_head), full & per_head),
        "one for all": (AttentionMask(*size, attn_mask=per_head[0, 0]), full & per_head[0, 0]),
        "padding": (AttentionMask(*size, is_causal=True, attn_mask=keep), full & (j <= i) & keep),
        "bias": (AttentionMask(*size, attn_mask=bias), full & per_head[:1]),
        "bottom right": (AttentionMask(*size, is_causal=True, query_offset=7), full & (j <= i + 7)),
        "moved window": (
            AttentionMask(*size, window=(3, 1), query_offset=-4),
            full & (j <= i - 3) & (i - 4 - j <= 3),
        ),
        "past alone": (AttentionMask(*size, window=(None, 0)), full & (j <= i)),
        "packed": (
            AttentionMask(*size, True, (9, 3), of_queries, key_document_ids=documents[:1], query_offset=offsets),
            full & other & (j <= i + shifts) & (i + shifts - j <= 9),
        ),
    }


def lse_of(q, k, scale, allowed):
    scores = scale * q.float() @ k.float().repeat_interleave(HEADS // GROUPS, 1).mT
    return scores.masked_fill(~allowed, -math.inf).logsumexp(-1)


def truth(q, k, scale, allowed):
    """[H]: masks may differ between heads."""
    heads = [(q[:, h : h + 1].float(), k[:, h // 2 : h // 2 + 1].float(), allowed[:, h]) for h in range(HEADS)]
    return np.array([dense_max_logits(*head, scale)[0] for head in heads])


@pytest.mark.parametrize("kind", masks(0))
@given(
    seed=st.integers(0, 10_000),
    threshold=st.one_of(st.just(-math.inf), st.floats(0.1, 12)),
    with_lse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([0.4, -0.4]),
    tiles=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    few=st.integers(0, 5),
)
def test_what_matters_is_exact_and_the_rest_is_bounded(kind, seed, threshold, with_lse, dtype, scale, tiles, few):
    q, k = case(seed, dtype)
    mask, allowed = masks(seed)[kind]
    expected = truth(q, k, scale, allowed.numpy())
    statistic = MaxLogits(HEADS)
    statistic.threshold = threshold
    with_lse = with_lse and kind != "bias"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_maxima, "_TILE_ROWS", tiles[0])
        patch.setattr(exact_maxima, "_TILE_COLUMNS", tiles[1])
        patch.setattr(exact_maxima, "_FEW_ROWS", few)
        lse = lse_of(q, k, scale, allowed) if with_lse else None
        statistic.observe(q, k, scale=scale, mask=mask, lse=lse)
    maximum, bound = statistic.maximum.numpy(), statistic.bound.numpy()
    exact = bound <= maximum
    np.testing.assert_allclose(maximum[exact], expected[exact], rtol=3e-6, atol=1e-6)
    assert (maximum <= expected + 1e-5 * abs(expected) + 1e-6).all()
    assert (bound >= expected - 1e-5 * abs(expected) - 1e-6)[~exact].all()
    assert exact[expected > threshold + 1e-5].all()
    assert (bound[~exact] <= threshold).all()
    assert statistic.observed == 1


@pytest.mark.parametrize("kind", masks(0))
def test_one_operator_for_the_compiler_takes_every_mask(kind):
    q, k = case(3)
    mask, _ = masks(3)[kind]
    statistic, opaque = MaxLogits(HEADS), MaxLogits(HEADS)
    statistic.observe(q, k, scale=0.4, mask=mask)
    exact_maxima.observe_opaquely(q, k, opaque.packed, scale=0.4, threshold=-math.inf, mask=mask, lse=None)
    assert torch.equal(opaque.packed, statistic.packed)


@given(seed=st.integers(0, 10_000), threshold=st.floats(0.1, 8))
def test_forwards_accumulate(seed, threshold):
    statistic, expected = MaxLogits(HEADS), np.full(HEADS, -np.inf)
    statistic.threshold = threshold
    mask, allowed = masks(seed)["causal"]
    for part in range(3):
        q, k = case(seed + part)
        statistic.observe(q, k, scale=0.4, mask=mask, lse=lse_of(q, k, 0.4, allowed))
        expected = np.maximum(expected, truth(q, k, 0.4, allowed.numpy()))
    exact = (statistic.bound <= statistic.maximum).numpy()
    assert exact[expected > threshold * (1 + 1e-5)].all()
    np.testing.assert_allclose(statistic.maximum[exact], expected[exact], rtol=3e-6)
    assert (statistic.bound.numpy() >= expected * (1 - 1e-6)).all()


def by_tiles(q, k, mask, lse):
    return measure_max_logits(q, k, scale=0.4, mask=mask)


def by_rows(q, k, mask, lse):
    statistic = MaxLogits(q.shape[1])
    statistic.observe(q, k, scale=0.4, mask=mask, lse=lse)
    return statistic.maximum


def by_norms(q, k, mask, lse):
    return by_rows(q, k, mask, None)


def by_attention(q, k, mask, lse):
    statistic = MaxLogits(HEADS)
    attention(q, k, k, scale=0.4, attn_mask=torch.atleast_2d(mask.attn_mask.to(q.dtype)), max_logits=statistic)
    return statistic.maximum


@pytest.mark.parametrize(("dtype", "masked"), FORBIDDING)
@pytest.mark.parametrize("source", [by_tiles, by_rows, by_norms, by_attention])
def test_whatever_forbids_a_pair_does_so_for_every_source(source, dtype, masked):
    """A mask of floats counts as the dense boolean mask of its forbidden pairs; a bias is not a mask."""
    dtype = getattr(torch, dtype)
    q, k = case(0, dtype)
    allowed = torch.rand(1, HEADS, LENGTH, LENGTH) < 0.2
    bias = torch.linspace(LOWEST_BIAS, 0, LENGTH)[:, None]
    mask = AttentionMask(LENGTH, LENGTH, attn_mask=torch.where(allowed, bias.to(dtype), masked))
    seen = source(q, k, mask, lse_of(q, k, 0.4, allowed))
    expected = truth(q, k, 0.4, allowed.expand(2, -1, -1, -1).numpy())
    np.testing.assert_allclose(seen.double().numpy(), expected, rtol=1e-5)
    assert (truth(q, k, 0.4, np.ones((2, HEADS, LENGTH, LENGTH), dtype=bool)) > 1.05 * expected).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("source", [by_tiles, by_rows, by_norms, by_attention])
def test_the_whole_mask_says_which_of_its_values_forbid(source, name, dtype, monkeypatch):
    """Tiles, rows and heads are parts of it."""
    monkeypatch.setattr(exact_maxima, "_TILE_ROWS", 7)
    monkeypatch.setattr(exact_maxima, "_TILE_COLUMNS", 5)
    q, k = case(3, getattr(torch, dtype))
    added, allowed = added_tensors(2, HEADS, LENGTH, dtype)[name]
    added = torch.from_numpy(added).to(q.dtype)
    mask = AttentionMask(LENGTH, LENGTH, attn_mask=added[None] if added.ndim == 3 else added)
    seen = source(q, k, mask, lse_of(q, k, 0.4, torch.tensor(allowed)))
    np.testing.assert_allclose(seen.double().numpy(), truth(q, k, 0.4, allowed), rtol=1e-5)


def test_what_forbids_is_said_by_all_heads(monkeypatch):
    """Two values of one head may be a mask, and those of all heads are a bias. The first head is decided at once."""
    monkeypatch.setattr(exact_maxima, "_FEW_ROWS", 0)
    q, k = case(0)
    q[:, 0] *= 1e-3
    mask = torch.where(torch.rand(1, HEADS, LENGTH, LENGTH) < 0.5, 0.0, -100.0)
    mask[:, 0, 0, 0] = -1.0
    statistic = MaxLogits(HEADS)
    statistic.threshold = 0.5
    statistic.observe(q, k, scale=0.4, mask=AttentionMask(LENGTH, LENGTH, attn_mask=mask))
    expected = truth(q, k, 0.4, np.ones((2, HEADS, LENGTH, LENGTH), bool))
    assert expected[0] < 0.5 < expected[1:].min()
    np.testing.assert_allclose(statistic.maximum[1:], expected[1:], rtol=1e-5)


@pytest.mark.parametrize("causal", [None, -math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("source", [by_tiles, by_norms])
def test_the_far_pairs_of_alibi_count_at_30000_positions(source, causal):
    """Its bias is below −1e4 there. Four queries of the 30000, one head."""
    length, positions = 30_000, torch.tensor([0, 900, 29_000, 29_999])
    distances = (positions[:, None] - torch.arange(length)).float()
    bias = -0.5 * distances.abs()
    if causal is not None:
        bias = bias.masked_fill(distances < 0, causal)
    torch.manual_seed(0)
    q, k = torch.rand(1, 1, 4, 2) + 0.5, torch.rand(1, 1, length, 2)
    k[..., 40, :] = 9.0  # the loudest, 28960 positions and more before the last queries
    k[..., 29_999, :] = 50.0  # for the last one alone, where the future is masked
    q[..., 3, :] = 1e-3
    allowed = distances >= 0 if causal is not None else torch.ones(4, length, dtype=torch.bool)
    seen = source(q, k, AttentionMask(4, length, attn_mask=bias), None)
    expected = (0.4 * q.double() @ k.double().mT)[0, 0].masked_fill(~allowed, -math.inf)
    assert expected.max() == expected[2].max() if causal is not None else expected[:, 29_999].max()
    np.testing.assert_allclose(seen, [expected.max()], rtol=1e-5)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the logits that products compute."""

    def __init__(self):
        super().__init__()
        self.logits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.mv):
            self.logits += result.numel()
        return result


def counted(q, k, mask, lse, threshold):
    statistic = MaxLogits(q.shape[1])
    statistic.threshold = threshold
    with Products() as products:
        statistic.observe(q, k, scale=1.0, mask=mask, lse=lse)
    return products.logits, statistic


def peaked(length=512):
    """Heads in which one row stands out, as in a trained model whose logits grow."""
    torch.manual_seed(0)
    q, k = torch.randn(1, HEADS, length, WIDTH), torch.randn(1, GROUPS, length, WIDTH)
    q[:, :, 7] *= 40
    mask, allowed = AttentionMask(length, length), torch.ones(length, length, dtype=torch.bool)
    return q, k, mask, lse_of(q, k, 1.0, allowed)


@pytest.mark.usefixtures("seen_observation")
def test_a_certified_forward_computes_no_logit():
    q, k, mask, lse = peaked()
    assert counted(q, k, mask, lse, 1e4)[0] == 0
    assert counted(q, k, mask, None, 1e4)[0] == 0


@pytest.mark.parametrize("head", range(HEADS))
def test_a_log_sum_exp_below_its_maximum_does_not_certify(head):
    """Kernels round: one's log-sum-exp was 6e-5 below the logit that made it."""
    q, k = case(0)
    rows = (0.4 * q @ k.repeat_interleave(HEADS // GROUPS, 1).mT).amax(-1)
    expected = rows.amax((0, 2))
    statistic = MaxLogits(HEADS)
    statistic.threshold = expected[head].item() - 3e-5
    statistic.observe(q, k, scale=0.4, mask=AttentionMask(LENGTH, LENGTH), lse=rows - 6e-5)
    assert statistic.bound[head] <= statistic.maximum[head]
    torch.testing.assert_close(statistic.maximum[head], expected[head])


@pytest.mark.usefixtures("seen_observation")
def test_one_row_settles_a_loud_head():
    q, k, mask, lse = peaked()
    logits, statistic = counted(q, k, mask, lse, 1.0)
    assert logits == HEADS * 512
    assert (statistic.bound <= statistic.maximum).all()


@pytest.mark.usefixtures("seen_observation")
def test_a_running_maximum_settles_later_micro_batches():
    q, k, mask, lse = peaked()
    _, statistic = counted(q, k, mask, lse, 1.0)
    quiet = 0.1 * q
    lse = lse_of(quiet, k, 1.0, torch.ones(512, 512).bool())
    with Products() as products:
        statistic.observe(quiet, k, scale=1.0, mask=mask, lse=lse)
    assert products.logits == 0
    assert (statistic.bound <= statistic.maximum).all()


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("threshold", [-math.inf, 1e6])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_a_non_finite_logit_is_seen_whatever_the_bounds_say(with_lse, threshold, value, where):
    """A kernel gives a row of NaN the LSE 0, and nothing may certify it."""
    q, k = case(0)
    mask = AttentionMask(LENGTH, LENGTH, is_causal=True)
    if where == "q":
        q[1, 2, 5, 0] = value
    else:
        k[1, 1, 5] = value
    lse = torch.zeros(2, HEADS, LENGTH) if with_lse else None
    statistic = MaxLogits(HEADS)
    statistic.threshold = threshold
    statistic.observe(q, k, scale=0.4, mask=mask, lse=lse)
    expected = [2] if where == "q" else [2, 3]
    assert statistic.nonfinite.nonzero().flatten().tolist() == expected
    assert statistic.maximum.isfinite()[:2].all() or threshold > 0


def test_empty_inputs():
    statistic = MaxLogits(HEADS)
    statistic.observe(torch.zeros(0, HEADS, 3, 2), torch.zeros(0, GROUPS, 3, 2), scale=1.0, mask=AttentionMask(3, 3))
    assert statistic.maximum.tolist() == [-math.inf] * HEADS
    assert statistic.observed == 1
