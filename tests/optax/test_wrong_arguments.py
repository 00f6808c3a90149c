"""Wrong arguments of the public functions for Optax, by kind: each is named when the transformation is made."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers
from wrong_arguments import (
    NO_COUNT,
    NO_FLAG,
    NO_INDEX,
    NO_NAME,
    NO_NUMBER,
    NO_RATE,
    NO_SHARE,
    NOT_BELOW_ONE,
    NOT_POSITIVE,
    assert_all_named,
    assert_named,
    but_none,
    one_tau,
)

from muonclip.optax import (
    AccumulateState,
    QKProjection,
    accumulate,
    certified_max_logits,
    check,
    dot_product_attention,
    exact_max_logits,
    muonclip,
    plan,
    qk_clip,
    scale_by_muon,
)
from muonclip.optax.head_rows import HeadRows

MHA = {"attn": QKProjection.mha(q="q", k="k", num_heads=2)}
OPTIONS = dict(
    beta=NOT_BELOW_ONE, eps=NO_RATE, ns_coefficients=NO_NAME, ns_steps=but_none(NO_COUNT), nesterov=NO_NUMBER.filter(
        lambda x: not isinstance(x, bool)
    ), adjust_lr_fn=but_none(NOT_POSITIVE), ns_form=NO_NAME, mu_dtype=st.sampled_from(["x", "int16", bool, 3, 1j, len]),
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
        tau=one_tau(NOT_POSITIVE), alpha=NO_SHARE, adamw=st.sampled_from([3, "x", [1], ()]),
        weight_decay_mask=st.sampled_from(["x", 3, 0.5, {"a": 1}, jnp.ones(3)]),
    )  # fmt: skip
    yield from add("qk_clip", lambda **o: qk_clip(MHA, **o), tau=one_tau(NOT_POSITIVE), alpha=NO_SHARE)
    part = (HeadRows("q", 2),)
    parts = dict(query=part, key=(HeadRows("k", 2),))
    yield from add(
        "QKProjection", lambda **o: QKProjection(**dict(num_heads=2, **parts) | o), num_heads=NO_COUNT,
        reason=NO_NUMBER.filter(lambda x: not isinstance(x, str)),
        **dict.fromkeys(
            ["query", "key", "query_facing_shared", "shared_key"], st.sampled_from([3, None, "q", ("q",), *part])
        ),
    )  # fmt: skip
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


NO_ARRAY = st.one_of(
    st.sampled_from([None, "x", 3, 1.5, 1j, [1.0], (1.0,), {}, len, object()]),
    st.sampled_from([np.ones((1, 2, 1, 2), complex), np.zeros((1, 2, 1, 2), bool)]),
)
NO_INTEGERS = st.one_of(but_none(NO_ARRAY), st.just(np.ones(1, np.float32)))


def measured():
    x = jnp.ones((1, 2, 1, 2), jnp.float32)
    shared = dict(
        query=NO_ARRAY, key=NO_ARRAY, mask=but_none(NO_ARRAY),
        scale=but_none(NO_NUMBER), is_causal=NO_FLAG, query_seq_lengths=NO_INTEGERS, key_value_seq_lengths=NO_INTEGERS,
        local_window_size=st.sampled_from(["x", 1.5, (1, 2, 3), (1.0, 2.0), [1, 2], True, {}, len, (None, 1)]),
    )  # fmt: skip
    tiled = dict(block_size=NO_COUNT, segment_ids=NO_INTEGERS.filter(lambda x: not isinstance(x, tuple)))
    tau, exact = NOT_POSITIVE, dict(query=x, key=x)
    yield "exact_max_logits", lambda **o: exact_max_logits(**exact | o), shared | tiled
    certified = exact | dict(tau=0.1)
    lse = but_none(NO_ARRAY)
    yield (
        "certified_max_logits",
        lambda **o: certified_max_logits(**certified | o),
        shared | tiled | dict(tau=tau, lse=lse),
    )
    whole = exact | dict(value=x)
    names = dict(value=NO_ARRAY, bias=but_none(NO_ARRAY), tau=but_none(tau), implementation=NO_NAME)
    yield "dot_product_attention", lambda **o: dot_product_attention(**whole | o), shared | names


@pytest.mark.parametrize(
    ("name", "call", "arguments"), list(measured()), ids=lambda it: it if isinstance(it, str) else ""
)
def test_a_wrong_argument_of_what_measures_is_named(name, call, arguments):
    for argument, wrong in arguments.items():
        assert_all_named(call, argument, wrong)


ADAMW = dict(
    b1=NOT_BELOW_ONE, b2=NOT_BELOW_ONE, eps=NO_RATE, eps_root=NO_RATE, nesterov=NO_FLAG,
    learning_rate=no_schedule(but_none(NO_RATE)), weight_decay=no_schedule(but_none(NO_RATE)),
    mask=st.sampled_from(["x", 3, {"a": 1}]), mu_dtype=OPTIONS["mu_dtype"],
    beta1=st.just(0.9), betas=st.just((0.9, 0.95)),
)  # fmt: skip


@pytest.mark.parametrize("argument", ADAMW)
def test_a_wrong_argument_of_the_adamw_half_is_named(argument):
    assert_all_named(lambda **o: muonclip(1e-3, qk_projections=None, adamw=o), argument, ADAMW[argument])


MATRIX = {"w": jnp.ones((3, 4))}


@pytest.mark.parametrize(
    ("call", "argument", "wrong"),
    [
        (lambda params: plan(params), "params", [3, "x", {"w": 1.0}, [MATRIX, len]]),
        (lambda qk_projections: plan(MATRIX, None, qk_projections), "qk_projections", [3, "x", {"a": "q"}, {}, [1]]),
        (
            lambda weight_dimension_numbers: plan(MATRIX, weight_dimension_numbers),
            "dimension_numbers",
            [3, "x", {"w": 1}, {"a": None}, lambda params: 3],
        ),
        (lambda shardings: scale_by_muon(shardings=shardings), "shardings", [3, "x", {"w": 1}]),
        (lambda shardings: muonclip(1e-3, qk_projections=None, shardings=shardings), "shardings", [3, "x", {"w": 1}]),
        (
            lambda wide_updates: muonclip(1e-3, qk_projections=None, wide_updates=wide_updates),
            "wide_updates",
            ["x", 2, None],
        ),
        (lambda wide_updates: qk_clip(MHA, wide_updates=wide_updates), "wide_updates", ["x", 2, None]),
        (lambda heads_last: HeadRows("q", 2, heads_last=heads_last), "heads_last", ["x", 2, None]),
    ],
)
def test_trees_and_flags_of_a_wrong_kind_are_named(call, argument, wrong):
    for value in wrong:
        assert_named(call, argument, value)


PAIR = {"q": jnp.ones((4, 2, 3)), "k": jnp.ones((4, 2, 3))}
MAXIMA = {"attn": jnp.ones(2)}
LOUD = {"attn": jnp.full(2, 500.0)}


@pytest.mark.parametrize(("tx", "inside"), [(qk_clip(MHA), 0), (accumulate(qk_clip(MHA), 2), 0), (scale_by_muon(
    weight_dimension_numbers=MuonDimensionNumbers(0, (1, 2))
), 1)], ids=["qk_clip", "accumulate", "scale_by_muon"])  # fmt: skip
def test_a_state_of_another_transformation_and_updates_of_a_wrong_kind_are_named(tx, inside):
    state = tx.init(PAIR)
    for wrong in (None, 3, "x", (), {}, [state]):
        assert_named(lambda it: tx.update(PAIR, it, PAIR, max_logits=MAXIMA), "state", wrong)
    for wrong in (3, "x", {"q": "x", "k": 1}):
        if not isinstance(state, AccumulateState):  # JAX's own words, which name the structures
            assert_named(
                lambda it: tx.update(it, state, PAIR, max_logits=MAXIMA), ("updates", "parameter")[inside], wrong
            )


def test_updates_of_another_shape_are_refused_before_they_are_broadcast():
    tx = qk_clip(MHA)
    narrow = {name: x[:1] for name, x in PAIR.items()}
    with pytest.raises(ValueError, match=r"updates: '[qk]' has shape \(1, 2, 3\), and params \(4, 2, 3\)"):
        tx.update(narrow, tx.init(PAIR), PAIR, max_logits=LOUD)


def test_what_schedules_return_is_checked():
    tx = accumulate(qk_clip(MHA), 2)
    for wrong in (0, "x", None, -1.0, [2]):
        assert_named(
            lambda it: accumulate(qk_clip(MHA), lambda _: it).update(PAIR, tx.init(PAIR), PAIR, max_logits=MAXIMA),
            "every", wrong,
        )  # fmt: skip
        tau = -1.0 if wrong == 0 else wrong
        assert_named(
            lambda it: qk_clip(MHA, lambda _: it).update(PAIR, qk_clip(MHA).init(PAIR), PAIR, max_logits=MAXIMA),
            "tau",
            tau,
        )


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("apply", [3, None, "x", lambda params, batch: 1, lambda params, batch: [1, 2]]),
        ("params", [3, {"q": "x"}, [1.0]]),
        ("qk_projections", [3, None, "x", {"a": 1}]),
    ],
)
def test_a_wrong_argument_of_check_is_named(argument, wrong):
    right = dict(apply=lambda params, batch: (batch, MAXIMA), params=PAIR, batch=jnp.ones(2), qk_projections=MHA)
    for value in wrong:
        assert_named(lambda it: check(**right | {argument: it}), argument, value)


def test_a_bias_of_whole_numbers_is_named_and_a_window_of_any_integer_taken():
    x = jnp.ones((1, 2, 1, 2), jnp.float32)
    with pytest.raises(TypeError, match="bias is an array of int32; give one of floating numbers"):
        dot_product_attention(x, x, x, bias=jnp.zeros((2, 2), jnp.int32))
    given = [dot_product_attention(x, x, x, local_window_size=each) for each in (1, np.int64(1), jnp.int32(1), (1, 1))]
    assert all(map(jnp.array_equal, given[0], each) for each in given)


def test_a_bias_of_another_shape_is_not_called_a_mask():
    x = jnp.ones((1, 2, 1, 2), jnp.float32)
    for name in ("bias", "mask"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 3\)"):
            dot_product_attention(x, x, x, **{"bias": jnp.ones((1, 1, 2, 2)), name: jnp.ones((3, 3))})


@pytest.mark.parametrize("axes", ["x", 0.5, None, (0.5,), (0, "x"), {}, True])
def test_axes_of_a_wrong_kind_are_named(axes):
    with pytest.raises((TypeError, ValueError), match="dimension numbers"):
        scale_by_muon(weight_dimension_numbers={"w": MuonDimensionNumbers(axes, 1)}).init(MATRIX)


WRONG_MAXIMA = [
    None,
    3,
    "x",
    [1.0],
    {"attn": "x"},
    {"attn": len},
    {"attn": np.ones(2, complex)},
    {"attn": np.ones(3)},
    {},
]


@pytest.mark.parametrize("wrong", WRONG_MAXIMA, ids=repr)
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: accumulate(tx, 2)], ids=["plain", "accumulate"])
def test_wrong_maxima_are_named_and_leave_model_and_state_as_they_were(wrap, wrong):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.q, self.k = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, wrap(muonclip(0.1, qk_projections=MHA, ns_steps=1)), wrt=nnx.Param)
    before = jax.tree.map(np.array, (nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(optimizer))))
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    with pytest.raises((TypeError, ValueError), match="max_logits"):
        optimizer.update(model, gradients, max_logits=wrong)
    after = jax.tree.map(np.array, (nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(optimizer))))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


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
