"""One rule for the parts of heads: every term of a logit shrinks by γ, and both adapters scale the same rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from muonclip.core import clip_factors
from muonclip.core.head_parts import FACTOR_OF, SIDE_OF, check_parts, factors_of, grouped_parts, latent_parts
from muonclip.optax import QKProjection as JaxProjection
from muonclip.torch import MaxLogits
from muonclip.torch import QKProjection as TorchProjection

HEADS = 4
LATENT = dict(qk_nope_head_dim=5, qk_rope_head_dim=3, v_head_dim=7)


@pytest.mark.parametrize(
    ("parts", "terms"),
    [
        (grouped_parts(4, 4)[1], [("query", "key")]),
        (grouped_parts(4, 2)[1], [("query_facing_shared", "shared_key")]),
        (grouped_parts(4, 1)[1], [("query_facing_shared", "shared_key")]),
        (latent_parts(4, 5, 3, 7)[1], [("query", "key"), ("query_facing_shared", None)]),  # the rotary key: no part
    ],
    ids=["mha", "gqa", "mqa", "mla"],
)
@given(maxima=st.lists(st.floats(0.1, 1e3), min_size=HEADS, max_size=HEADS), alpha=st.floats(0, 1))
def test_every_term_of_a_logit_shrinks_by_gamma_and_what_heads_share_does_not_move(parts, terms, maxima, alpha):
    factors = clip_factors(np.array(maxima), 10.0, alpha, xp=np)
    taken = {part.part: getattr(factors, FACTOR_OF[part.part]) for part in parts if part.part in FACTOR_OF}
    for query, key in terms:
        np.testing.assert_allclose(taken[query] * taken.get(key, 1.0), factors.gamma, rtol=1e-12)
    assert not {"shared_key", "value"} & taken.keys()
    assert {part.num_heads for part in parts if part.part in FACTOR_OF} == {HEADS}


SCALED = {
    "mha": ["query", "key"],
    "gqa": ["query_facing_shared", "shared_key"],
    "mla": ["query", "key", "query_facing_shared"],
}


@pytest.mark.parametrize(
    ("kind", "fixed", "left"),
    [
        ("mha", ["key"], {"query": "gamma"}),
        ("mha", ["query"], {"key": "gamma"}),
        ("mha", ["query", "key"], {}),
        ("gqa", ["shared_key"], {"query_facing_shared": "gamma"}),
        ("gqa", ["query_facing_shared"], {}),
        ("mla", ["key"], {"query": "gamma", "query_facing_shared": "gamma"}),
        ("mla", ["query"], {"key": "gamma", "query_facing_shared": "gamma"}),
        ("mla", ["query_facing_shared"], {}),
        ("mla", ["query", "query_facing_shared"], {}),
        ("mha", [], {"query": "query", "key": "key"}),
        ("mla", [], FACTOR_OF),
    ],
)
def test_what_is_scaled_where_parts_are_fixed(kind, fixed, left):
    """Each term of a logit shrinks by γ, or nothing is scaled."""
    assert factors_of(SCALED[kind], fixed) == left


@pytest.mark.parametrize("how", ["mha", "gqa", "mqa", "mla"])
def test_both_adapters_scale_the_same_rows(how):
    if how == "mla":
        q, kv = nn.Linear(9, HEADS * 8), nn.Linear(9, HEADS * 12)
        ours = TorchProjection.mla(q=q, kv=kv, num_heads=HEADS, max_logits=MaxLogits(HEADS), **LATENT)
        theirs = JaxProjection.mla(q="q", kv="kv", num_heads=HEADS, **LATENT)
        sizes = {"q": HEADS * 8, "kv": HEADS * 12}
    else:
        groups = dict(mha=HEADS, gqa=2, mqa=1)[how]
        q, k = nn.Linear(9, HEADS * 6), nn.Linear(9, groups * 6)
        ours = TorchProjection.gqa(q=q, k=k, num_heads=HEADS, num_kv_heads=groups, max_logits=MaxLogits(HEADS))
        theirs = JaxProjection.gqa(q="q", k="k", num_heads=HEADS, num_kv_heads=groups)
        sizes = {"q": HEADS * 6, "k": groups * 6}
    assert ours.kind == how
    for part in FACTOR_OF:
        torch_rows, jax_rows = getattr(ours, part), getattr(theirs, part)
        assert len(torch_rows) == len(jax_rows)
        for one, other in zip(torch_rows, jax_rows, strict=True):
            np.testing.assert_array_equal(one.rows("cpu").numpy(), other.index(sizes[other.path]))


def test_the_rows_of_latent_attention_are_nope_and_rope_then_key_and_value():
    labels = {"q": ["query"] * 5 + ["query_facing_shared"] * 3, "kv": ["key"] * 5 + ["value"] * 7}
    found = {"q": [""] * 8 * HEADS, "kv": [""] * 12 * HEADS}
    for part in latent_parts(HEADS, **LATENT)[1]:
        for head in range(part.num_heads):
            first = head * part.stride + part.start
            found[part.projection][first : first + part.size] = [part.part] * part.size
    assert found == {name: own * HEADS for name, own in labels.items()}


def test_a_part_is_on_the_side_of_its_projection():
    parts = [*grouped_parts(4, 4)[1], *grouped_parts(4, 2)[1]]
    assert all(SIDE_OF[part.part][0] == part.projection for part in parts)
    assert SIDE_OF.keys() >= FACTOR_OF.keys()
    assert {part.num_heads for part in grouped_parts(4, 2)[1] if part.part == "value"} == {2}


def test_parts_that_leave_a_term_untouched_are_refused():
    for parts, reason in (((), "QK-norm"), (("query", "key"), ""), (("query_facing_shared",), "")):
        check_parts(parts, reason)
    for parts in ((), ("query",), ("key", "value"), ("shared_key",)):
        with pytest.raises(ValueError, match="needs `query` and `key`"):
            check_parts(parts, "")
    with pytest.raises(ValueError, match="num_kv_heads=3 must divide num_heads=4"):
        grouped_parts(4, 3)
    with pytest.raises(ValueError, match="num_kv_heads=-2 must be a whole number of at least 1"):
        grouped_parts(4, -2)
