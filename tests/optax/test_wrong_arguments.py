"""Wrong arguments of the public functions for Optax, by kind: each is named when the transformation is made."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from wrong_arguments import (
    NO_COUNT,
    NO_INDEX,
    NO_NAME,
    NO_NUMBER,
    NO_RATE,
    NO_SHARE,
    NOT_BELOW_ONE,
    NOT_POSITIVE,
    assert_all_named,
    but_none,
)

from muonclip.optax import QKProjection, accumulate, muonclip, qk_clip, scale_by_muon
from muonclip.optax.head_rows import HeadRows

MHA = {"attn": QKProjection.mha(q="q", k="k", num_heads=2)}
OPTIONS = dict(
    beta=NOT_BELOW_ONE, eps=NO_RATE, ns_coefficients=NO_NAME, ns_steps=but_none(NO_COUNT), nesterov=NO_NUMBER.filter(
        lambda x: not isinstance(x, bool)
    ), adjust_lr_fn=but_none(NOT_POSITIVE), ns_form=NO_NAME, mu_dtype=st.sampled_from(["x", "int8", bool, 3, 1j, len]),
    ns_dtype=st.sampled_from([jnp.int32, "float33", complex, jnp.float32(1), [], object()]),
)  # fmt: skip


def no_schedule(strategy):
    return strategy.filter(lambda x: not callable(x))


def table():
    def add(name, call, **arguments):
        for argument, wrong in arguments.items():
            yield pytest.param(call, argument, wrong, id=f"{name} {argument}")

    clip = dict(qk_projections=MHA)
    yield from add("scale_by_muon", scale_by_muon, **OPTIONS)
    yield from add(
        "muonclip", lambda **o: muonclip(**dict(learning_rate=1e-3, **clip) | o), **OPTIONS,
        learning_rate=no_schedule(but_none(NO_RATE)), weight_decay=no_schedule(NO_RATE),
        tau=no_schedule(NOT_POSITIVE), alpha=NO_SHARE, adamw=st.sampled_from([3, "x", [1], ()]),
        weight_decay_mask=st.sampled_from(["x", 3, 0.5, {"a": 1}, jnp.ones(3)]),
    )  # fmt: skip
    yield from add("qk_clip", lambda **o: qk_clip(MHA, **o), tau=no_schedule(NOT_POSITIVE), alpha=NO_SHARE)
    yield from add("accumulate", lambda every: accumulate(qk_clip(MHA), every), every=no_schedule(NO_COUNT))
    yield from add("accumulate", lambda inner: accumulate(inner, 2), inner=NO_NUMBER)
    rows = dict(path="q", num_heads=2)
    yield from add(
        "HeadRows", lambda **o: HeadRows(**rows | o), path=NO_NUMBER.filter(lambda x: not isinstance(x, str)),
        num_heads=NO_COUNT, size=but_none(NO_COUNT), start=NO_INDEX, stride=but_none(NO_COUNT),
        layer_axis=but_none(NO_NUMBER), in_axis=but_none(NO_NUMBER),
    )  # fmt: skip
    gqa = dict(q="q", k="k", num_heads=4, num_kv_heads=2)
    yield from add("gqa", lambda **o: QKProjection.gqa(**gqa | o), num_heads=NO_COUNT, num_kv_heads=NO_COUNT)
    mla = dict(q="q", kv="kv", num_heads=2, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2)
    yield from add("mla", lambda **o: QKProjection.mla(**mla | o), **dict.fromkeys(list(mla)[2:], NO_COUNT))


@pytest.mark.parametrize(("call", "argument", "wrong"), list(table()))
def test_a_wrong_argument_is_named(call, argument, wrong):
    assert_all_named(call, argument, wrong)


def test_schedules_traced_numbers_and_masks_are_taken():
    mask = {"a": True, "b": jnp.array(False)}
    muonclip(optax.constant_schedule(1e-3), optax.constant_schedule(0.1), qk_projections=None, weight_decay_mask=mask)
    muonclip(jnp.float32(1e-3), jnp.float32(0.1), jnp.float32(0.9), qk_projections=MHA, eps=jnp.float32(0))
    accumulate(qk_clip(MHA), lambda step: 2)
    for dtype in (np.float32, jnp.bfloat16, "float16", jnp.dtype("float32"), float):
        scale_by_muon(mu_dtype=dtype, ns_dtype=dtype)
