"""Attention written out with tensor operations, in the ways of models: what is found is exact, what is not is named."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from written_out_attention import (
    CHECKERED,
    FORBIDDEN,
    HEAD,
    HEADS,
    LENGTH,
    SCALE,
    WIDTH,
    Attention,
    check,
    product,
    refused,
)

from muonclip.torch import MaxLogits, QKClip, QKProjection


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, LENGTH, WIDTH)


# A sink


def sink_of(scores, model):
    return model.sink.expand(len(scores), -1, scores.shape[-2], 1)


def mask_of(columns_in_front=0, columns_behind=0, mask=CHECKERED):
    return F.pad(mask, (columns_in_front, columns_behind))


def sink_in_front(q, k, v, model, fill=lambda s: s, mask=lambda s: s):
    scores = fill(product(q, k))
    scores = mask(torch.cat([sink_of(scores, model), scores], -1))
    return scores.softmax(-1)[..., 1:] @ v


@pytest.mark.parametrize(
    ("fill", "mask"),
    [
        (lambda s: s.masked_fill(CHECKERED, -1e4), lambda s: s),
        (lambda s: s, lambda s: s.masked_fill(mask_of(1), -1e4)),
        (lambda s: s, lambda s: s + torch.zeros(LENGTH, 1 + LENGTH).masked_fill(mask_of(1), -math.inf)),
        (  # of different widths
            lambda s: s.masked_fill(CHECKERED & (torch.arange(LENGTH) < 4), -1e4),
            lambda s: s.masked_fill(mask_of(1) & (torch.arange(1 + LENGTH) >= 5), -1e9),
        ),
        (
            lambda s: s.masked_fill(CHECKERED, -1e4),
            lambda s: s + torch.zeros(3, 1, 1, 1),  # a mask that forbids nothing, of one column
        ),
    ],
)
def test_a_sink_in_front_of_the_keys(fill, mask, x):
    check(lambda *heads: sink_in_front(*heads, fill, mask), x, CHECKERED)


def sinks_on_both_sides(q, k, v, model):
    scores = product(q, k).masked_fill(CHECKERED, -1e4)
    sink = sink_of(scores, model)
    scores = torch.cat((torch.cat([sink, sink, scores], dim=-1), sink), 3)
    return scores.masked_fill(mask_of(2, 1), -1e4).softmax(-1)[..., 2:-1] @ v


def sink_behind(q, k, v, model):
    scores = product(q, k).masked_fill(CHECKERED, -1e4)
    scores = torch.cat([scores, sink_of(scores, model)], -1)
    return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("attend", [sinks_on_both_sides, sink_behind])
def test_sinks_elsewhere(attend, x):
    check(attend, x, CHECKERED)


# Writing in place, into a part of the scores or all


def in_place(write):
    def attend(q, k, v, _):
        scores = product(q, k)
        write(scores)
        return scores.softmax(-1) @ v

    return attend


BIAS = torch.zeros(LENGTH, LENGTH).masked_fill(FORBIDDEN, -1e4)
ROWS = torch.arange(LENGTH)[:, None]
PART = FORBIDDEN & (torch.arange(LENGTH) < 4)


def add_to_part(scores):
    scores[..., :4] += BIAS[..., :4]


def add_to_rows(scores):
    scores[:, :, :4] -= -BIAS[:4]


def assign_masked_part(scores):
    scores[..., :4] = scores[..., :4].masked_fill(FORBIDDEN[:, :4], -1e4)


def add_to_parts_of_masked(scores):
    scores.masked_fill_(FORBIDDEN & (ROWS < 2), -1e4)
    scores[..., :4] += BIAS[..., :4]
    scores[:, :, 2:].add_(BIAS[2:])


def assign_number(scores):
    scores[..., FORBIDDEN] = -math.inf


def assign_by_boolean(scores):
    scores[FORBIDDEN.expand_as(scores)] = -1e4


def add_by_index(scores):
    rows = torch.tensor([1, 2])
    scores[:, :, rows] += BIAS[rows]


def fill_heads(scores):
    for head in range(HEADS):
        scores[:, head].masked_fill_(FORBIDDEN, -1e4)


@pytest.mark.parametrize(
    ("write", "forbidden"),
    [
        (lambda s: s.masked_fill_(FORBIDDEN, -1e4), FORBIDDEN),
        (lambda s: s[..., :4].masked_fill_(FORBIDDEN[:, :4], -1e4), PART),
        (lambda s: s.narrow(-1, 0, 4).masked_fill_(FORBIDDEN[:, :4], -1e4), PART),
        (lambda s: s.select(2, 3).masked_fill_(FORBIDDEN[3], -1e4), FORBIDDEN & (ROWS == 3)),
        (lambda s: s.flatten(0, 1).masked_fill_(FORBIDDEN, -1e4), FORBIDDEN),
        (lambda s: s.data.masked_fill_(FORBIDDEN, -1e4), FORBIDDEN),
        (lambda s: s[:, 1:3].add_(BIAS), FORBIDDEN & torch.tensor([0, 1, 1, 0], dtype=torch.bool)[:, None, None]),
        (add_to_part, PART),
        (add_to_parts_of_masked, FORBIDDEN),
        (add_to_rows, FORBIDDEN & (ROWS < 4)),
        (assign_masked_part, PART),
        (assign_number, FORBIDDEN),
        (assign_by_boolean, FORBIDDEN),
        (add_by_index, FORBIDDEN & ((ROWS == 1) | (ROWS == 2))),
        (fill_heads, FORBIDDEN),
    ],
)
def test_masks_written_in_place(write, forbidden, x):
    check(in_place(write), x, forbidden)


def changed_through_another_view(scores):
    scores.mT.masked_fill_(FORBIDDEN.mT, -1e4)


def scaled_in_part(scores):
    scores[:, :2] *= 0.5


def moved(scores):
    scores[..., 1:] = scores[..., :-1].clone()


def filled_into_a_buffer(q, k, v, _):
    scores = torch.empty(len(q), HEADS, LENGTH, LENGTH)
    for rows in (slice(0, 3), slice(3, None)):
        scores[:, :, rows] = product(q[:, :, rows], k)
    return scores.softmax(-1) @ v


def copied_into_a_part_of_a_buffer(q, k, v, _):
    scores = torch.zeros(len(q), HEADS, LENGTH, LENGTH)
    scores[..., :].copy_(product(q, k))
    return scores.softmax(-1) @ v


def added_in_place(q, k, v, _):
    scores = BIAS.expand(len(q), HEADS, -1, -1).clone()
    scores += product(q, k)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (in_place(changed_through_another_view), "are changed in part"),
        (in_place(scaled_in_part), "are changed in part"),
        (in_place(moved), "are changed in part"),
        (in_place(lambda s: s[:, 1].mul_(2.0)), "are changed in part"),
        (in_place(lambda s: s[:, :, 1:][..., :4].masked_fill_(FORBIDDEN[1:, :4], -1e4)), "are changed in part"),
        (
            in_place(lambda s: s.fill_diagonal_(0.0) if s.ndim == 2 else s[0, 0].fill_diagonal_(0.0)),
            "are changed in part",
        ),
        (filled_into_a_buffer, "are copied into another tensor"),
        (copied_into_a_part_of_a_buffer, "are copied into another tensor"),
        (added_in_place, "are copied into another tensor"),
    ],
)
def test_what_is_written_in_other_ways_is_refused_by_name(attend, reason, x):
    refused(attend, reason, x)


# Several products


def memory(q, k, v, model):
    """Memory keys, masked keys, one softmax over both."""
    scores = torch.cat([product(q, model.m), product(q, k).masked_fill(FORBIDDEN, -1e4)], -1)
    return scores.softmax(-1) @ torch.cat([v, v], -2)


def memory_behind(q, k, v, model):
    """Products of other scales, masked behind the cat."""
    scores = torch.cat([product(q, k), q @ model.m.mT], -1).masked_fill(mask_of(0, LENGTH, FORBIDDEN), -1e4)
    return scores.softmax(-1) @ torch.cat([v, v], -2)


def memory_by_einsum(q, k, v, model):
    scores = [torch.einsum("bhid,bhjd->bhij", q, keys) for keys in (model.m, k)]
    return (torch.cat(scores, -1) * SCALE).softmax(-1) @ torch.cat([v, v], -2)


@pytest.mark.parametrize(
    ("attend", "keys", "masked", "scale"),
    [
        (memory, "mk", (LENGTH, 0), SCALE),
        (memory_behind, "km", (0, LENGTH), torch.tensor([SCALE] * LENGTH + [1.0] * LENGTH)),
        (memory_by_einsum, "mk", None, SCALE),
    ],
)
def test_products_with_two_sets_of_keys_under_one_softmax(attend, keys, masked, scale, x):
    forbidden = None if masked is None else mask_of(*masked, FORBIDDEN)
    check(attend, x, forbidden, scale, keys)


def two_queries(q, k, v, model):
    return torch.cat([product(q, k), product(v, model.m)], -1).softmax(-1) @ torch.cat([v, v], -2)


def heads_joined(q, k, v, _):
    return torch.cat([product(q[:, :2], k[:, :2]), product(q[:, 2:], k[:, 2:])], 1).softmax(-1) @ v


def heads_stacked(q, k, v, _):
    return torch.stack([product(q[:, h], k[:, h]) for h in range(HEADS)], 1).softmax(-1) @ v


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (two_queries, "are joined with those of other queries"),
        (heads_joined, "are joined along dimension 1"),
        (heads_stacked, "pass through stack"),
        (lambda q, k, v, m: torch.cat([product(q, k), product(q, m.m).relu()], -1).softmax(-1), "pass through relu"),
        (lambda q, k, v, m: torch.where(FORBIDDEN, product(q, m.m), product(q, k)).softmax(-1), "are chosen from two"),
        (lambda q, k, v, m: (lambda s: s + s.mT)(product(q, k)).softmax(-1), "are added to themselves, rearranged"),
    ],
)
def test_products_joined_in_other_ways_are_refused_by_name(attend, reason, x):
    refused(attend, reason, x)


def differential(q, k, v, _):
    """Two products, then two softmaxes."""
    first, second = product(q[:, :2], k[:, :2]), product(q[:, 2:], k[:, 2:]).masked_fill(FORBIDDEN, -1e4)
    first = first.masked_fill(FORBIDDEN, -1e4)
    return (first.softmax(-1) - 0.5 * second.softmax(-1)) @ v[:, :2]


def chunked(q, k, v, _):
    first, second = product(q, k).masked_fill(FORBIDDEN, -1e4).chunk(2, dim=1)
    return torch.cat([first.softmax(-1), second.softmax(-1)], 1) @ v


def split_unevenly(q, k, v, _):
    parts = torch.split(product(q, k).masked_fill(FORBIDDEN, -1e4), [1, 3], 1)
    return torch.cat([part.softmax(-1) for part in parts], 1) @ v


def sliced(q, k, v, _):
    scores = product(q, k).masked_fill(FORBIDDEN, -1e4)
    return torch.cat([scores[:, :2].softmax(-1), F.softmax(scores[:, 2:, ...], dim=-1)], 1) @ v


def of_one_axis(q, k, v, _):
    """[B · H, T, T] for the product, [B, H, T, T] for the mask and the parts."""
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(len(q), HEADS, LENGTH, LENGTH) * SCALE
    parts = scores.masked_fill(FORBIDDEN, -1e4).split(2, 1)
    return torch.cat([part.softmax(-1) for part in parts], 1) @ v


def one_by_one(q, k, v, _):
    parts = product(q, k).masked_fill(FORBIDDEN, -1e4).unbind(1)
    return torch.stack([part.softmax(-1) for part in parts], 1) @ v


PARTS = [
    (differential, ("", "#2")),
    (chunked, ("", "#2")),
    (split_unevenly, ("", "#2")),
    (sliced, ("", "#2")),
    (of_one_axis, ("", "#2")),
    (one_by_one, ("", "#2", "#3", "#4")),
]


@pytest.mark.parametrize(("attend", "names"), PARTS)
def test_each_softmax_has_heads_of_its_own(attend, names, x):
    check(attend, x, FORBIDDEN, names=names)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, k, v, _: product(q, k).chunk(2, -1)[0].softmax(-1), "pass through chunk"),
        (lambda q, k, v, _: torch.cat([s.softmax(-1) for s in product(q, k).split(3, 2)], 2), "pass through split"),
        (lambda q, k, v, _: product(q, k).unbind(-1)[0].softmax(-1), "pass through unbind"),
        (lambda q, k, v, _: product(q, k)[:, [0, 1]].softmax(-1), "pass through __getitem__"),
        (lambda q, k, v, _: product(q, k)[..., 1:].softmax(-1), "pass through __getitem__"),
        (lambda q, k, v, _: product(q, k).topk(3).values.softmax(-1), "pass through topk"),
        (lambda q, k, v, _: product(q, k).sort(-1)[0].softmax(-1), "pass through sort"),
        (lambda q, k, v, _: torch.addcmul(product(q, k), k.mean(), BIAS).softmax(-1), "pass through addcmul"),
        (lambda q, k, v, _: torch.lerp(product(q, k), BIAS, 0.5).softmax(-1), "pass through lerp"),
        (lambda q, k, v, _: F.pad(product(q, k), (1, 0)).softmax(-1), "pass through pad"),
        (lambda q, k, v, _: product(q, k).mT.softmax(-1), "pass through mT"),
        (lambda q, k, v, _: product(q, k).flatten().softmax(-1), "pass through flatten"),
    ],
)
def test_parts_that_are_not_heads_are_refused_by_name(attend, reason, x):
    refused(attend, reason, x)


MIXTURE = nn.Parameter(torch.randn(HEADS, HEADS, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda s: F.linear(s.permute(0, 2, 3, 1), MIXTURE).permute(0, 3, 1, 2), "pass through permute"),
        (
            lambda s: (s.permute(0, 2, 3, 1) @ MIXTURE).permute(0, 3, 1, 2).masked_fill(FORBIDDEN, -1e4),
            "pass through permute",
        ),
        (lambda s: torch.einsum("bhij,hg->bgij", s, MIXTURE), "pass through einsum"),
        (lambda s: F.conv2d(s, MIXTURE[:, :, None, None]) + BIAS, "pass through conv2d"),
    ],
)
def test_heads_that_are_mixed_before_the_softmax_are_refused_by_name(mix, reason, x):
    refused(lambda q, k, v, _: mix(product(q, k)).softmax(-1) @ v, reason, x)


@pytest.mark.parametrize(
    "after",
    [
        lambda y: (
            F.linear(y, torch.eye(HEAD)).mean((1, 2)).softmax(-1).sum() * y
        ),  # each head by itself, a class of each
        lambda y: F.linear(y, torch.eye(HEAD)).transpose(1, 2).flatten(2).softmax(-1).sum() * y,
        lambda y: (F.linear(y, torch.eye(HEAD)).mT.reshape(3, 2, -1, LENGTH) * 2).flatten(1).softmax(-1).sum() * y,
        lambda y: F.conv2d(y, MIXTURE[:, :, None, None]).flatten(2).softmax(-1).sum() * y,
        lambda y: F.linear(y.transpose(1, 2).flatten(2), torch.eye(HEADS * HEAD)).softmax(-1).sum() * y,
    ],
)
def test_what_attention_has_weighed_is_not_taken_for_logits(after, x):
    check(lambda q, k, v, _: after(product(q, k).masked_fill(FORBIDDEN, -1e4).softmax(-1) @ v), x, FORBIDDEN)


def test_an_einsum_that_is_not_understood_ends_no_forward(x):
    """As of relative positions, whose axes are not those of the scores."""

    def attend(q, k, v, model):
        positions = torch.einsum("bhid,ghd->ibgh", v, model.m[0].transpose(0, 1).reshape(LENGTH, HEADS, HEAD))
        bias = F.linear(positions.permute(1, 3, 0, 2), torch.eye(LENGTH))
        scores = product(q, k) + bias[:, :, :1] * PER_HEAD + positions[:, :, :3].sum() + bias.flatten(0, 1)[0]
        return scores.masked_fill(FORBIDDEN, -1e4).softmax(-1) @ v

    check(attend, x, FORBIDDEN)


@pytest.mark.parametrize(
    "second",
    [
        lambda s: s.log_softmax(-1),  # an entropy
        lambda s: s.softmax(-2),  # as of two modalities that attend to each other
        lambda s: (s + 3.0).softmax(-1),
    ],
)
def test_a_second_softmax_of_the_same_pairs_changes_nothing(second, x):
    def attend(q, k, v, _):
        scores = product(q, k)
        masked = scores.masked_fill(FORBIDDEN, -1e4)
        return masked.softmax(-1) @ v + second(scores).sum()

    check(attend, x, FORBIDDEN)


# Factors of heads and queries

PER_HEAD = torch.linspace(0.5, 2, HEADS)[:, None, None]
PER_QUERY = torch.linspace(0.5, 2, LENGTH)[:, None]


def batched(q, k):
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(len(q), HEADS, LENGTH, LENGTH)


@pytest.mark.parametrize(
    ("attend", "scale"),
    [
        (lambda q, k, v, _: (q @ k.mT * PER_HEAD).softmax(-1) @ v, PER_HEAD),
        (lambda q, k, v, _: (batched(q, k) * PER_HEAD).softmax(-1) @ v, PER_HEAD),
        (
            lambda q, k, v, _: (PER_HEAD * batched(q, k)).flatten(0, 1).softmax(-1).unflatten(0, (-1, HEADS)) @ v,
            PER_HEAD,
        ),
        (lambda q, k, v, _: (batched(q, k) / PER_HEAD).softmax(-1) @ v, 1 / PER_HEAD),
        (lambda q, k, v, _: (batched(q, k) * PER_QUERY).softmax(-1) @ v, PER_QUERY),
        (lambda q, k, v, _: (batched(q, k) * PER_HEAD).mul_(PER_QUERY).softmax(-1) @ v, PER_HEAD * PER_QUERY),
    ],
)
def test_factors_of_heads_and_queries(attend, scale, x):
    check(attend, x, scale=scale)


def test_what_cannot_be_read_is_not_watched_in_silence(x):
    def repeated(q, k, v, _):
        return product(q, k).repeat(2, 1, 1, 1).softmax(-1)[: len(q)] @ v

    refused(repeated, "pass through repeat", x)
    model = Attention(repeated)
    watched = QKProjection("mha", HEADS, MaxLogits(HEADS), reason="repeated")
    clip = QKClip(model, declare={"": watched}, example_inputs=x)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="cannot watch an attention whose logits pass through repeat"):
        clip.step()
