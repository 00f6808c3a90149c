"""Tensors of every kind where one is not expected: what measures names the argument, or takes it, and no operator of
torch raises in passing."""

import warnings
from collections import Counter

import pytest
import torch
from unchanged import differences, snapshot
from wrong_arguments import RAW

from muonclip.torch import AttentionMask, MaxLogits, attention, measure_max_logits


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype, torch says
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])


Q, K, MASK = torch.ones(2, 2, 4, 3), torch.ones(2, 1, 5, 3), AttentionMask(4, 5)
SHAPES = [
    *((), (1,), (3,), (2, 3), (2, 4), (2, 5), (2, 2), (4, 5), (1, 1, 4, 5), (3, 1, 4, 5), (2, 4, 2), (2, 2, 4, 5)),
    *((2, 2, 4, 3), (2, 2, 4, 4), (2, 4, 3, 3), (1, 2, 4, 3), (2, 4, 3), (0, 2, 4, 3), (2, 0, 4, 3), (2, 2, 0, 3)),
    (2, 2, 4, 0),
]
TENSORS = [torch.ones(shape).to(dtype) for shape in SHAPES for dtype in (torch.float32, torch.int64, torch.bool)]
TENSORS += [
    *(Q.to(dtype) for dtype in (torch.complex64, torch.float16, torch.float8_e4m3fn)),
    *(Q.to_sparse(), Q.to("meta"), nested()),
    *(-torch.ones(2, 5).long(), torch.tensor(float("nan"))),
]
HOSTS_WORDS = "Expected query, key, and value to have the same d"
"""The host's own words for tensors that do not go together, which name them."""

STATISTIC = MaxLogits(2)
FORWARD = dict(q=Q, k=K, scale=1.0, mask=MASK)
OF_MASK = ("is_causal", "window", "document_ids", "attn_mask", "key_document_ids", "query_offset", "condition")
CALLS = {
    "measure_max_logits": (lambda **o: measure_max_logits(**FORWARD | o), tuple(FORWARD)),
    "observe": (lambda **o: MaxLogits(2).observe(**FORWARD | o), (*FORWARD, "lse")),
    "update": (lambda **o: MaxLogits(2).update(**o), ("maxima",)),
    "AttentionMask": (lambda **o: measure_max_logits(Q, K, scale=1.0, mask=AttentionMask(4, 5, **o)), OF_MASK),
    "attention": (
        lambda **o: attention(**dict(q=Q, k=K, v=K, max_logits=STATISTIC) | o),
        ("q", "k", "v", "is_causal", "attn_mask", "window", "document_ids", "max_logits"),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_that_does_not_fit_is_named(name):
    call, arguments = CALLS[name]
    counts = Counter()
    for argument in arguments:
        for tensor in TENSORS:
            before = snapshot([Q, K, STATISTIC])
            try:
                call(**{argument: tensor})
            except (TypeError, ValueError, RuntimeError) as error:
                said, is_raw = str(error), isinstance(error, RuntimeError)
                if HOSTS_WORDS not in said:
                    is_raw |= argument not in said or any(words in said for words in RAW)
                    assert not is_raw, (argument, tensor, said)
                counts["named"] += 1
                assert not list(differences(before, snapshot([Q, K, STATISTIC])))
            else:
                counts["taken"] += 1
                STATISTIC.reset()
    print(f"{name}: {counts.total()} tensors, {counts['named']} named, {counts['taken']} taken")
    assert counts["named"] > counts["taken"]
