"""Attention by a sigmoid in the softmax's place has the same logits, and is clipped by them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from written_out_attention import CHECKERED, FORBIDDEN, LENGTH, TAU, WIDTH, Attention, check, product, refused

from muonclip.torch import QKClip


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, LENGTH, WIDTH)


def normalised(weights):
    return weights / weights.sum(-1, keepdim=True)


KEPT = (~FORBIDDEN).float()
WAYS = {
    "plain": lambda q, k, v, _: product(q, k).sigmoid() @ v,
    "biased": lambda q, k, v, _: torch.sigmoid(product(q, k) - math.log(LENGTH)) @ v,
    "module": lambda q, k, v, _: nn.Sigmoid()(product(q, k)).matmul(v),
    "expit": lambda q, k, v, _: torch.special.expit(product(q, k)) @ v,
    "einsum": lambda q, k, v, _: torch.einsum("bhij,bhjd->bhid", F.sigmoid(product(q, k)), v),
    "bmm": lambda q, k, v, _: torch.bmm(product(q, k).sigmoid().flatten(0, 1), v.flatten(0, 1)).view_as(v),
    "dropout": lambda q, k, v, _: F.dropout(product(q, k).sigmoid(), 0.5) @ v,
    "normalised": lambda q, k, v, _: normalised(product(q, k).sigmoid()) @ v,
    "gated": lambda q, k, v, _: (product(q, k).sigmoid() * v.mean(-1, keepdim=True).exp()) @ v,
}
MASKED = {
    "filled before": lambda q, k, v, _: product(q, k).masked_fill(FORBIDDEN, -math.inf).sigmoid() @ v,
    "added before": lambda q, k, v, _: (product(q, k) + FORBIDDEN * -1e9).sigmoid() @ v,
    "filled behind": lambda q, k, v, _: product(q, k).sigmoid().masked_fill(FORBIDDEN, 0.0) @ v,
    "chosen behind": lambda q, k, v, _: torch.where(FORBIDDEN, 0.0, product(q, k).sigmoid()) @ v,
    "multiplied": lambda q, k, v, _: (product(q, k).sigmoid() * KEPT) @ v,
    "multiplied in place": lambda q, k, v, _: product(q, k).sigmoid().clone().mul_(KEPT) @ v,
    "lower triangle": lambda q, k, v, _: product(q, k).sigmoid().tril() @ v,
}


@pytest.mark.parametrize("way", WAYS)
def test_sigmoid_attention_is_clipped_by_the_logits_of_a_softmax(way, x):
    check(WAYS[way], x)


@pytest.mark.parametrize("way", MASKED)
def test_pairs_without_a_weight_do_not_count(way, x):
    check(MASKED[way], x, FORBIDDEN)


def test_the_plan_names_the_function(x):
    clip = QKClip(Attention(WAYS["plain"]), example_inputs=x)
    assert clip.sources() == {"": "product and sigmoid: norm bound, then exact tiles"}


def test_a_softmax_of_the_weights_is_refused(x):
    refused(lambda q, k, v, _: product(q, k).sigmoid().softmax(-1) @ v, "pass through sigmoid before the softmax", x)


def test_what_all_logits_of_a_query_have_in_common_is_a_part_of_them(x):
    """A softmax does not see it, a sigmoid does."""

    def scores(q, k):
        scores = product(q, k)
        return scores - scores.mean(-1, keepdim=True)

    model = Attention(lambda q, k, v, _: scores(q, k).sigmoid() @ v)
    clip = QKClip(model, tau=TAU, observe="always", example_inputs=x)

    def maxima():
        with torch.no_grad():
            return scores(*model.heads(x)[:2]).amax((0, 2, 3))

    before = maxima()
    model(x).sum().backward()
    clip.step()
    torch.testing.assert_close(clip.report().layers[""].max_logits, before)
    torch.testing.assert_close(maxima(), before.clamp(max=TAU))


def test_a_sigmoid_that_weighs_nothing_is_no_attention(x):
    def gate(q, k, v, _):
        return v * product(q, k).sigmoid().mean((-2, -1), keepdim=True)

    with pytest.raises(ValueError, match="no attention was found"):
        QKClip(Attention(gate), example_inputs=x)


def test_both_functions_of_the_same_logits_are_one_attention(x):
    def both(q, k, v, _):
        scores = product(q, k).masked_fill(CHECKERED, -math.inf)
        return scores.sigmoid() @ v + scores.softmax(-1) @ v

    check(both, x, CHECKERED)


def test_heads_that_are_mixed_before_the_sigmoid_are_refused_by_name(x):
    mix = nn.Parameter(torch.randn(4, 3))

    class Mixed(Attention):
        def __init__(self):
            super().__init__(lambda q, k, v, m: self.talk(q, k, v))
            self.mix, self.behind = mix, nn.Parameter(torch.randn(3, 4))

        def talk(self, q, k, v):
            weights = torch.einsum("bhij,hg->bgij", product(q, k), self.mix).sigmoid()
            return torch.einsum("bgij,gh->bhij", weights, self.behind) @ v

    with pytest.raises(ValueError, match="weighs by sigmoid of a product of projections"):
        QKClip(
            nn.Sequential(Attention(lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v)), Mixed()),
            example_inputs=x,
        )
