"""S under FlexAttention's score_mod: scaled by its factors, without what it adds, before its cap, where not masked."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from muonclip.torch import MaxLogits, QKClip
from muonclip.torch.logits import AttentionMask, PairCondition, exact_maxima
from muonclip.torch.observe import handling
from muonclip.torch.observe.flex import KERNEL
from muonclip.torch.observe.observer import take_in
from muonclip.torch.observe.score_mod import ScoreMod

BATCH, HEADS, GROUPS, LENGTH, HEAD = 2, 4, 2, 12, 4
B, H = torch.arange(BATCH)[:, None, None, None], torch.arange(HEADS)[:, None, None]
QUERY, KEY = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


def made(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 2 + [1] * 6 + [2] * 4])
PREFIX = torch.tensor([3, 6])
TEMPERATURES = torch.tensor([0.5, 3.0, -2.0, 1.0])
SLOPES = torch.tensor([3000.0, 100.0, 10.0, 0.1])  # of ALiBi, as far away as at a length of 30000
TABLE = nn.Parameter(made(2 * LENGTH, HEADS) * 30)
GATES, OF_KEYS, OF_QUERIES = (
    made(BATCH, HEADS, LENGTH, LENGTH),
    made(HEADS, LENGTH, seed=1),
    made(BATCH, LENGTH, seed=2),
)
OTHER_QUERIES, OTHER_KEYS = (made(*axes, LENGTH, 3, seed=5).requires_grad_() for axes in ((BATCH, HEADS), (BATCH,)))
PLACES = made(LENGTH, 3, seed=6)
KEPT = (made(BATCH, LENGTH, LENGTH, seed=3) > 0) | torch.eye(LENGTH, dtype=torch.bool)
SWIN, BERT = torch.where(KEPT, 0.0, -100.0), torch.where(KEPT[:, -1], 0.0, -1e4)


class OwnTanh(torch.autograd.Function):
    """The cap of attention-gym has a tanh of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def in_place(s, b, h, i, j):
    s = s + TABLE[j - i + LENGTH, h]
    s *= TEMPERATURES[h]
    s -= OF_QUERIES[b, i]
    return s.masked_fill_(j > i, -1e4)


def everything(s, b, h, i, j):
    s = 5 * torch.tanh((s * TEMPERATURES[h] + GATES[b, h, i, j]) / 5) - SLOPES[h] * (i - j).abs()
    return torch.where(i >= j, s, torch.tensor(LOWEST))


SCORE_MODS = {  # the function, its factor of the score, the pairs that it allows
    "nothing": (lambda s, b, h, i, j: s, 1, True),
    "causal": (lambda s, b, h, i, j: torch.where(j <= i, s, -INF), 1, KEY <= QUERY),
    "sliding window": (
        lambda s, b, h, i, j: torch.where(i - j < 4, torch.where(i < j, -1e9, s), -1e9),
        1,
        (KEY <= QUERY) & (QUERY - KEY < 4),
    ),
    "prefix": (
        lambda s, b, h, i, j: torch.where((i >= j) | (j < PREFIX[b]), s, -INF),
        1,
        (KEY <= QUERY) | (PREFIX[B] > KEY),
    ),
    "documents": (
        lambda s, b, h, i, j: torch.where(DOCUMENTS[b][i] == DOCUMENTS[b][j], s, torch.finfo(s.dtype).min),
        1,
        DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None],
    ),
    "neighbourhood": (
        lambda s, b, h, i, j: torch.where(((i // 4 - j // 4).abs() < 2) & ((i % 4 - j % 4).abs() < 2), s, -INF),
        1,
        ((QUERY // 4 - KEY // 4).abs() < 2) & ((QUERY % 4 - KEY % 4).abs() < 2),
    ),
    "dilated": (lambda s, b, h, i, j: s.masked_fill((i - j) % 3 != 0, -1e4), 1, (QUERY - KEY) % 3 == 0),
    "filled with 0": (lambda s, b, h, i, j: torch.where((i - j) % 2 == h % 2, s, 0.0), 1, (QUERY - KEY) % 2 == H % 2),
    "ALiBi": (lambda s, b, h, i, j: s + SLOPES[h] * (j - i), 1, True),
    "relative": (lambda s, b, h, i, j: TABLE[i - j + LENGTH, h].add(s), 1, True),
    "by distance": (lambda s, b, h, i, j: s - PLACES[i].norm() + torch.dot(PLACES[i], PLACES[j]), 1, True),
    "of positions and queries": (
        lambda s, b, h, i, j: s + torch.dot(OTHER_QUERIES[b, h, i], OTHER_KEYS[0, (i - j).abs()]),
        1,
        True,
    ),
    "-inf added": (lambda s, b, h, i, j: s + torch.where(KEPT[b, i, j], 0.0, -INF), 1, KEPT[:, None]),
    "-100 added": (lambda s, b, h, i, j: s + SWIN[b][i][j], 1, KEPT[:, None]),
    "-1e4 and ALiBi added": (lambda s, b, h, i, j: s + SLOPES[h] * (j - i) + BERT[b, j], 1, KEPT[:, None, -1:]),
    "-100 subtracted": (lambda s, b, h, i, j: torch.sub(s, SWIN[b, i, j], alpha=-2), 1, KEPT[:, None]),
    "cap": (lambda s, b, h, i, j: 0.3 * torch.tanh(s / 0.3), 1, True),
    "cap of one's own": (lambda s, b, h, i, j: OwnTanh.apply(2 * s / 0.3) * 0.3, 2, True),
    "clamp": (lambda s, b, h, i, j: torch.clamp(s, -0.1, 0.1), 1, True),
    "minimum with a mask": (lambda s, b, h, i, j: torch.minimum(torch.where(j <= i, INF, -INF), s), 1, KEY <= QUERY),
    "temperatures": (lambda s, b, h, i, j: s * TEMPERATURES[h], TEMPERATURES[H], True),
    "a number": (lambda s, b, h, i, j: -(2 - s) / 4, 0.25, True),
    "a tensor": (lambda s, b, h, i, j: s / torch.tensor(0.5), 2, True),
    "of queries": (lambda s, b, h, i, j: OF_QUERIES[b, i] * s, OF_QUERIES[:, None, :, None], True),
    "of keys": (lambda s, b, h, i, j: s / OF_KEYS[0, j], 1 / OF_KEYS[0], True),
    "of keys and heads": (lambda s, b, h, i, j: s * OF_KEYS[h, j], OF_KEYS[:, None], True),
    "of pairs": (lambda s, b, h, i, j: torch.where(j <= i, s * GATES[b, h, i, j], -INF), GATES, KEY <= QUERY),
    "of the near": (
        lambda s, b, h, i, j: torch.where((i - j).abs() < 3, torch.where(i < j, -INF, 3 * s), s + SWIN[0, 0, 0]),
        torch.where((QUERY - KEY).abs() < 3, 3.0, 1.0),
        ~((QUERY < KEY) & (KEY - QUERY < 3)),
    ),
    "twice": (lambda s, b, h, i, j: s + s.float() * 2, 3, True),
    "in place": (in_place, TEMPERATURES[H], KEY <= QUERY),
    "everything": (everything, TEMPERATURES[H], KEY <= QUERY),
}  # fmt: skip


def logits(q, k):
    return q.detach().double() @ k.detach().double().repeat_interleave(HEADS // GROUPS, 1).mT / math.sqrt(HEAD)


def maxima(s, factor, allowed):
    return torch.where(torch.as_tensor(allowed), s * factor, -INF).amax((0, 2, 3))


class Taking:
    """Takes the calls of a kernel into a statistic, and makes none."""

    observes, owner, graph_task = True, None, -1

    def __init__(self):
        self.statistic = MaxLogits(HEADS)

    def attention(self, call):
        assert not call.problem
        take_in(call, self.statistic, None)


def seen(score_mod, block_mask=None):
    """The maxima that are observed of one call, and its logits."""
    q, k = made(BATCH, HEADS, LENGTH, HEAD), made(BATCH, GROUPS, LENGTH, HEAD, seed=4)
    with handling(taking := Taking()):
        KERNEL.patch(flex_attention)(q, k, k, score_mod, block_mask, enable_gqa=True)
    return taking.statistic.maximum.double(), logits(q, k)


@pytest.mark.parametrize("kind", SCORE_MODS)
def test_the_statistic_is_of_what_the_softmax_sees_of_the_score(kind):
    score_mod, factor, allowed = SCORE_MODS[kind]
    found, s = seen(score_mod)
    torch.testing.assert_close(found, maxima(s, factor, allowed), rtol=2e-6, atol=1e-6)


def test_a_block_mask_and_a_score_mod_both_mask():
    score_mod, factor, _ = SCORE_MODS["of keys and heads"]
    block_mask = create_block_mask(lambda b, h, i, j: i - j > h, None, HEADS, LENGTH, LENGTH, device="cpu")
    found, s = seen(score_mod, block_mask)
    torch.testing.assert_close(found, maxima(s, factor, QUERY - KEY > H), rtol=2e-6, atol=1e-6)


class Attention(nn.Module):
    def __init__(self, score_mod):
        super().__init__()
        self.score_mod = score_mod
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, heads * HEAD) for heads in (HEADS, GROUPS, GROUPS))

    def heads(self, x):
        return (each(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for each in (self.q, self.k, self.v))

    def forward(self, x):
        return flex_attention(*self.heads(x), self.score_mod, enable_gqa=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:The .grad attribute")
def test_heads_are_clipped_by_what_a_forward_reads_anew(monkeypatch):
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)  # right on the CPU
    temperatures, ends, x = torch.ones(HEADS), torch.tensor([LENGTH]), made(BATCH, LENGTH, 6)

    def score_mod(s, b, h, i, j):
        return torch.where(j < ends[0], 2 * torch.tanh(s * temperatures[h] / 2), -INF)

    model = Attention(score_mod)
    clip = QKClip(model, tau=1.0, example_inputs=x)

    def true_maxima():
        return maxima(logits(*list(model.heads(x))[:2]), temperatures[H], ends > KEY)

    for run, temperature, end in ((model, 1.5, LENGTH), (torch.compile(model, backend="eager"), 0.5, 7)):
        temperatures[1], ends[0] = temperature, end
        before = true_maxima()
        clip.tau = before.median().item()
        run(x)
        clip.step()
        torch.testing.assert_close(true_maxima(), before.clamp(max=clip.tau), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("score_mod", "problem"),
    [
        (lambda s, b, h, i, j: s * s, "multiplies the score by itself"),
        (lambda s, b, h, i, j: s + GATES[b, h, i, j] * s**2, "passes the score through pow"),
        (lambda s, b, h, i, j: torch.where(s > 1, 1.0, s), "passes the score through gt"),
        (lambda s, b, h, i, j: 1 / s, "passes the score through"),
        (lambda s, b, h, i, j: OF_KEYS[0, 0] / s, "divides by the score"),
        (lambda s, b, h, i, j: torch.where(j > i, -INF, s) + s, "adds scores of which some are masked"),
        (lambda s, b, h, i, j: torch.log_softmax(s, 0), "passes the score through log_softmax"),
        (lambda s, b, h, i, j: GATES[b, h, i, j], "does not use the score"),
        (
            lambda s, b, h, i, j: s + torch.dot(OTHER_QUERIES[b, h, i], OTHER_KEYS[b, j]),
            "has a product of other queries and keys",
        ),
        (
            lambda s, b, h, i, j: (OTHER_QUERIES[b][h][i] * OTHER_KEYS[b, j]).sum() + s,
            "has a product of other queries and keys",
        ),
        (lambda s, b, h, i, j: s + OF_KEYS[h, j, i], "could not be run on single pairs (IndexError"),
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_proportional_is_refused(score_mod, problem):
    with pytest.raises(ValueError, match=f"the model: its score_mod {re.escape(problem)}"):
        QKClip(Attention(score_mod), tau=1.0, example_inputs=made(BATCH, LENGTH, 6))


class OfTheQueries(Attention):
    """Its score_mod holds a tensor that the forward makes: of the queries, or of the input alone."""

    def __init__(self, kind):
        super().__init__(None)
        self.kind, self.positions, self.gate = kind, nn.Parameter(made(2 * LENGTH, HEAD)), nn.Linear(6, HEADS)

    def forward(self, x):
        q, k, v = self.heads(x)
        near = (q @ self.positions.mT).detach() if self.kind == "detached" else q @ self.positions.mT
        of_queries, gate = torch.sigmoid(q.sum(-1)), torch.sigmoid(self.gate(x)).transpose(1, 2)
        score_mod = {
            "positions": lambda s, b, h, i, j: s + near[b, h, i, j - i + LENGTH],
            "detached": lambda s, b, h, i, j: s + near[b, h, i, j - i + LENGTH],
            "slopes": lambda s, b, h, i, j: s * of_queries[b, h, i],
            "masks": lambda s, b, h, i, j: torch.where((near[b, h, i, j] > 1) & (i != j), -INF, s),
            "input": lambda s, b, h, i, j: s * gate[b, h, i] + gate[b, h, j],
        }[self.kind]
        return flex_attention(q, k, v, score_mod, enable_gqa=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["positions", "detached", "slopes", "masks"])
def test_what_it_holds_of_the_queries_is_refused(kind, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    with pytest.raises(ValueError, match="the model: its logits hold more than the products of queries and keys"):
        QKClip(OfTheQueries(kind), tau=1.0, example_inputs=made(BATCH, LENGTH, 6))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_it_holds_of_the_input_is_not(monkeypatch):
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    clip = QKClip(OfTheQueries("input"), tau=1.0, example_inputs=made(BATCH, LENGTH, 6))
    assert [each.scaled_parts() != () for each in clip.projections.values()] == [True]


def test_without_numbers_nothing_is_refused():
    """Of a model on the meta device, whose score_mod may hold tensors elsewhere."""
    q, k = made(BATCH, HEADS, LENGTH, HEAD).to("meta"), made(BATCH, GROUPS, LENGTH, HEAD).to("meta")
    for kind in ("causal", "everything"):
        assert not ScoreMod(SCORE_MODS[kind][0], q, k).problem
    assert ScoreMod(lambda s, b, h, i, j: s * s, q, k).problem


def counted(score_mod):
    def counting(*args):
        counting.calls += 1
        return score_mod(*args)

    counting.calls = 0
    return counting


@pytest.mark.parametrize("kind", ["causal", "ALiBi", "relative", "a number"])
def test_nothing_is_evaluated_where_a_bound_decides(kind):
    score_mod, factor, _ = SCORE_MODS[kind]
    score_mod = counted(score_mod)
    q, k = made(BATCH, HEADS, LENGTH, HEAD), made(BATCH, GROUPS, LENGTH, HEAD)
    scores = ScoreMod(score_mod, q, k).modify(q, k, 0.5)
    statistic = MaxLogits(HEADS)
    statistic.threshold = 1e6
    mask = AttentionMask(LENGTH, LENGTH, condition=scores.condition)
    statistic.observe(scores.q, scores.k, scale=scores.scale, mask=mask)
    assert score_mod.calls == 1
    assert (statistic.maximum == -INF).all()
    assert (statistic.bound >= maxima(logits(q, k), factor, True).float()).all()


@pytest.mark.parametrize("rank", [None, 0, 40, 400])
def test_long_sequences_are_read_in_tiles(rank, monkeypatch):
    """From all rows down to a few: whatever the threshold, a maximum above it is exact."""
    length = 150
    documents, padding = torch.arange(length) // 90, torch.where(torch.arange(length) % 7 > 0, 0.0, -1e4)

    def score_mod(s, b, h, i, j):
        s = torch.where(documents[i] == documents[j], TEMPERATURES[h] * s, -INF)
        return torch.where((j < i - h) | (h == 0), s + padding[j] - 0.5 * (i - j), -INF)

    i, j = torch.arange(length)[:, None], torch.arange(length)
    allowed = (documents[i] == documents[j]) & (padding[j] == 0) & ((j < i - H) | (H == 0))
    q, k = made(BATCH, HEADS, length, HEAD), made(BATCH, GROUPS, length, HEAD)
    s = torch.where(allowed, logits(q, k) * TEMPERATURES[H], -INF)
    monkeypatch.setattr(exact_maxima, "_TILE_ROWS", 32)
    monkeypatch.setattr(exact_maxima, "_TILE_COLUMNS", 64)
    sizes = []
    tile = PairCondition.tile
    monkeypatch.setattr(
        PairCondition, "tile", lambda self, *at: (sizes.append(tile(self, *at).numel()), tile(self, *at))[1]
    )
    statistic = MaxLogits(HEADS)
    if rank is not None:
        statistic.threshold = s[:, 1].flatten().topk(rank + 1).values[-1].item()
    scores = ScoreMod(score_mod, q, k).modify(q, k, 0.5)
    mask = AttentionMask(length, length, condition=scores.condition)
    statistic.observe(scores.q, scores.k, scale=scores.scale, mask=mask)
    expected, above = s.amax((0, 2, 3)), s.amax((0, 2, 3)) > statistic.threshold
    torch.testing.assert_close(statistic.maximum[above].double(), expected[above], rtol=2e-6, atol=0)
    assert (statistic.bound >= expected.float() * (1 - 1e-6)).all()
    assert max(sizes, default=0) <= BATCH * HEADS * 32 * 64


def test_a_condition_is_kept_evaluated_along_the_axes_on_which_it_depends():
    q, k = made(BATCH, HEADS, LENGTH, HEAD), made(BATCH, GROUPS, LENGTH, HEAD)
    for kind, shape in (
        ("causal", (1, 1, LENGTH, LENGTH)),
        ("-100 added", (BATCH, 1, LENGTH, LENGTH)),
        ("ALiBi", (1, HEADS, LENGTH, LENGTH)),
    ):
        score_mod, _, allowed = SCORE_MODS[kind]
        condition = ScoreMod(score_mod, q, k).modify(q, k, 0.5).condition
        dense = condition.dense(LENGTH, LENGTH, most=10**6)
        assert dense.shape == shape
        assert torch.equal(
            dense.expand(BATCH, HEADS, -1, -1), torch.as_tensor(allowed).expand(BATCH, HEADS, LENGTH, LENGTH)
        )
        assert condition.dense(LENGTH, LENGTH, most=dense.numel() - 1) is None
        rows = torch.arange(BATCH * HEADS).view(BATCH, HEADS)
        of_rows = condition.of_rows(rows, LENGTH)
        assert torch.equal(of_rows, dense.expand(BATCH, HEADS, -1, -1)[B[..., 0], H[..., 0], rows[..., None], KEY])


def test_a_device_computes_the_same_with_an_evaluated_condition(monkeypatch):
    q, k = made(BATCH, HEADS, LENGTH, HEAD), made(BATCH, GROUPS, LENGTH, HEAD)
    score_mod, factor, allowed = SCORE_MODS["everything"]
    scores = ScoreMod(score_mod, q, k).modify(q, k, 0.5)
    padding = torch.where(KEY == 0, -1e4, 0.0)
    mask = AttentionMask(LENGTH, LENGTH, attn_mask=padding, condition=scores.condition)
    expected = maxima(logits(q, k), factor, allowed & (KEY > 0))
    for most in (2**20, 1):
        monkeypatch.setattr(exact_maxima, "_MOST_PAIRS", most)
        floor = torch.full((HEADS,), -INF)
        found, _ = exact_maxima._exact_on_device(scores.q, scores.k, floor, scores.scale, mask, None)
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
