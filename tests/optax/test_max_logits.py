"""Maximum attention logits in JAX: exact against dense float64, in tiles, without a trace in any gradient."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, PartitionSpec
from masked_values import ADDED, FORBIDDING, LOWEST_BIAS, added_tensors

from muonclip.optax.attention_mask import AttentionMask
from muonclip.optax.max_logits import certified_max_logits, dot_product_attention, exact_max_logits


def dense_maxima(q, k, scale=None, allowed=None):
    """[H] in float64, head by head: q [B, T, H, d], k [B, S, G, d], allowed bool [B, H, T, S]."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, _, heads, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    maxima = np.full(heads, -np.inf)
    for b in range(batch):
        for h in range(heads):
            logits = scale * q[b, :, h] @ k[b, :, h * k.shape[2] // heads].T
            if allowed is not None:
                logits = logits[allowed[b, h]]
            maxima[h] = max(maxima[h], logits.max(initial=-np.inf))
    return maxima


@st.composite
def attentions(draw):
    """Keyword arguments and the pairs they allow, [B, H, T, S], each condition spelled out pair by pair."""
    batch, groups, sharing = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, columns, heads = draw(st.integers(1, 23)), draw(st.integers(1, 23)), groups * sharing
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    arguments = {}
    if draw(st.booleans()):
        arguments["is_causal"] = True
    if draw(st.booleans()):
        arguments["local_window_size"] = draw(st.sampled_from([0, 3, (2, 5), (6, 0), (-2, 4)]))
    if draw(st.booleans()):
        arguments["query_seq_lengths"] = rng.integers(0, rows + 1, batch).astype(np.int32)
    if draw(st.booleans()):
        arguments["key_value_seq_lengths"] = rng.integers(0, columns + 1, batch).astype(np.int32)
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, size])) for size in (batch, heads, rows, columns)]
        arguments["mask"] = rng.random(shape[draw(st.integers(0, 2)) if shape[:2] == [1, 1] else 0 :]) < 0.5
    if draw(st.booleans()):
        arguments["segment_ids"] = tuple(rng.integers(0, 3, (batch, length)) for length in (rows, columns))
    allowed = np.ones((batch, heads, rows, columns), bool)
    if "mask" in arguments:
        allowed &= arguments["mask"]
    window = arguments.get("local_window_size")
    left, right = window if isinstance(window, tuple) else (window, window)
    for b, h, i, j in np.ndindex(allowed.shape):
        allowed[b, h, i, j] &= not (
            ("is_causal" in arguments and j > i)
            or (window is not None and not i - left <= j <= i + right)
            or ("query_seq_lengths" in arguments and i >= arguments["query_seq_lengths"][b])
            or ("key_value_seq_lengths" in arguments and j >= arguments["key_value_seq_lengths"][b])
            or ("segment_ids" in arguments and arguments["segment_ids"][0][b, i] != arguments["segment_ids"][1][b, j])
        )
    if draw(st.booleans()):  # keys are unit vectors, queries the logits: what is forbidden is louder than what is not
        q = rng.normal(size=(batch, rows, heads, columns)) + 30 * ~allowed.swapaxes(1, 2)
        k = np.broadcast_to(np.eye(columns)[:, None], (batch, columns, groups, columns))
    else:
        width = draw(st.integers(1, 6))
        q, k = rng.normal(size=(batch, rows, heads, width)), rng.normal(size=(batch, columns, groups, width))
    return q, k, arguments, allowed


def on_device(arguments):
    """Arrays of NumPy as those of JAX; numbers and tuples of them as they are."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, arguments)


def random_qk(batch=2, rows=37, columns=37, heads=6, groups=3, width=8, dtype=np.float32, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    q = size * rng.normal(size=(batch, rows, heads, width))
    k = size * rng.normal(size=(batch, columns, groups, width))
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype)


def causal(q, k):
    return np.broadcast_to(
        np.tri(q.shape[1], k.shape[1], dtype=bool), (*q.shape[:1], q.shape[2], q.shape[1], k.shape[1])
    )


def equations(jaxpr, into_branches=True):
    """Every equation, those of inner functions too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and (into_branches or eqn.primitive.name != "cond"):
                    yield from equations(inner, into_branches)


# Exact


@pytest.mark.slow
@given(attention=attentions(), block_size=st.sampled_from([1, 4, 7, 256]), scale=st.sampled_from([None, 0.3, -0.7]))
@settings(max_examples=60)
def test_the_maxima_are_those_of_the_dense_logits(attention, block_size, scale):
    q, k, arguments, allowed = attention
    maxima = exact_max_logits(
        jnp.asarray(q), jnp.asarray(k), scale=scale, block_size=block_size, **on_device(arguments)
    )
    assert maxima.dtype == jnp.float64
    np.testing.assert_allclose(maxima, dense_maxima(q, k, scale, allowed), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"local_window_size": (3, 1)},
        {"local_window_size": 2, "is_causal": True},
        {"query_seq_lengths": jnp.array([5, 9], jnp.int32)},
        {"key_value_seq_lengths": jnp.array([4, 11], jnp.int32), "is_causal": True},
        {"mask": jnp.asarray(np.random.default_rng(3).random((2, 4, 9, 11)) < 0.3)},
        {"mask": jnp.asarray(np.random.default_rng(4).random((4, 1, 11)) < 0.3)},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_the_pairs_are_those_to_which_the_host_gives_weight(arguments):
    """Each key's value is a unit vector: the host's output is its probabilities."""
    rows, columns = 9, 11
    q, k = random_qk(2, rows, columns, heads=4, groups=2, width=columns, dtype=np.float64)
    value = jnp.broadcast_to(jnp.eye(columns)[None, :, None], (2, columns, 2, columns))
    weights = np.array(jax.nn.dot_product_attention(q, k, value, **arguments)).transpose(0, 2, 1, 3)
    no_pair = np.ptp(weights, axis=-1) < 1e-9  # of a row without keys the host makes a mean
    allowed = (weights > 0) & ~no_pair[..., None]
    assert 0 < allowed.sum() < allowed.size
    maxima = exact_max_logits(q, k, block_size=4, **arguments)
    np.testing.assert_allclose(maxima, dense_maxima(q, k, None, allowed), rtol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(10, 13, 4), (13, 10, 7), (9, 9, 8)])
@pytest.mark.parametrize("kind", ["is_causal", "local_window_size", "mask", "segment_ids"])
def test_tiles_that_lengths_do_not_fill_see_no_forbidden_pair(kind, rows, columns, block_size):
    """Keys are unit vectors, queries the logits; those of forbidden pairs are the largest."""
    rng = np.random.default_rng(0)
    i, j = np.arange(rows)[:, None], np.arange(columns)
    ids = rng.integers(0, 3, (1, rows)), rng.integers(0, 3, (1, columns))
    mask = rng.random((rows, columns)) < 0.5
    allowed, value = {
        "is_causal": (j <= i, True),
        "local_window_size": ((i - 2 <= j) & (j <= i + 1), (2, 1)),
        "mask": (mask, jnp.asarray(mask)),
        "segment_ids": (ids[1] == ids[0].T, tuple(map(jnp.asarray, ids))),
    }[kind]
    logits = rng.normal(size=(rows, columns)) + 30 * ~allowed
    q, k = jnp.asarray(logits)[None, :, None], jnp.eye(columns)[None, :, None]
    maxima = exact_max_logits(q, k, scale=1.0, block_size=block_size, **{kind: value})
    np.testing.assert_allclose(maxima, [logits[allowed].max()], rtol=1e-12)


def test_segments_are_for_queries_and_keys_alike():
    q, k = random_qk()
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 4, q.shape[:2]))
    allowed = np.broadcast_to((ids[:, :, None] == ids[:, None, :])[:, None], (2, 6, 37, 37))
    np.testing.assert_allclose(
        exact_max_logits(q, k, segment_ids=ids, block_size=8), dense_maxima(q, k, None, allowed), rtol=1e-5
    )
    shared = exact_max_logits(q, k, segment_ids=ids[0], block_size=8)
    assert jnp.array_equal(shared, exact_max_logits(q, k, segment_ids=jnp.stack((ids[0], ids[0])), block_size=8))


def test_a_sequence_without_a_batch_axis():
    q, k = random_qk()
    one = exact_max_logits(q[1], k[1], is_causal=True)
    assert jnp.array_equal(one, exact_max_logits(q[1:], k[1:], is_causal=True))
    assert jnp.array_equal(certified_max_logits(q[1], k[1], 0.5, lse=jnp.full((37, 6), 50.0), is_causal=True), one)


def test_negative_maxima_stay_negative():
    q, k = abs(random_qk()[0]) + 0.1, -abs(random_qk()[1]) - 0.1
    maxima = exact_max_logits(q, k, is_causal=True, block_size=16)
    assert (maxima < 0).all()
    np.testing.assert_allclose(maxima, dense_maxima(q, k, None, causal(q, k)), rtol=1e-5)


def test_a_head_without_a_pair_has_none():
    q, k = random_qk()
    mask = jnp.ones((1, 6, 1, 1), bool).at[:, 4].set(False)
    maxima = exact_max_logits(q, k, mask=mask)
    assert maxima[4] == -jnp.inf
    assert jnp.isfinite(maxima[jnp.array([0, 1, 2, 3, 5])]).all()
    assert (exact_max_logits(q[:, :0], k) == -jnp.inf).all()
    assert (exact_max_logits(q, k[:, :0]) == -jnp.inf).all()
    assert (exact_max_logits(q, k, local_window_size=(-50, 60)) == -jnp.inf).all()


@pytest.mark.parametrize("block_size", [8, 256])
def test_nan_is_not_hidden_by_larger_logits(block_size):
    q, k = random_qk()
    maxima = exact_max_logits(q.at[1, 20, 2, 3].set(jnp.nan), k, is_causal=True, block_size=block_size)
    assert jnp.isnan(maxima).tolist() == [False, False, True, False, False, False]
    maxima = exact_max_logits(q, k.at[0, 30, 1, 0].set(jnp.nan), is_causal=True, block_size=block_size)
    assert jnp.isnan(maxima).tolist() == [False, False, True, True, False, False]
    lengths = jnp.array([30, 37], jnp.int32)
    hidden = exact_max_logits(q, k.at[0, 30, 1, 0].set(jnp.nan), key_value_seq_lengths=lengths, block_size=block_size)
    assert jnp.array_equal(hidden, exact_max_logits(q, k, key_value_seq_lengths=lengths, block_size=block_size))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_inputs_are_multiplied_exactly(dtype):
    q, k = random_qk(width=200, dtype=dtype)
    maxima = exact_max_logits(q, k, is_causal=True)
    assert maxima.dtype == jnp.float32
    np.testing.assert_allclose(maxima, dense_maxima(q, k, None, causal(q, k)), rtol=2e-6)


def test_the_products_ask_for_the_highest_precision():
    """The default is bfloat16 on a TPU; a CPU does not show it."""
    for dtype in (jnp.bfloat16, jnp.float32):
        q, k = random_qk(dtype=dtype)
        products = [
            e for e in equations(jax.make_jaxpr(exact_max_logits)(q, k).jaxpr) if e.primitive.name == "dot_general"
        ]
        assert len(products) == 1
        assert products[0].params["precision"] == (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
        assert {v.aval.dtype for v in (*products[0].invars, *products[0].outvars)} == {jnp.dtype(jnp.float32)}


def test_a_scale_of_numpy_widens_nothing():
    q, k = random_qk()
    assert exact_max_logits(q, k, scale=np.float64(0.25)).dtype == jnp.float32
    assert certified_max_logits(q, k, np.float64(0.1), scale=np.float64(0.25)).dtype == jnp.float32


# Memory and work


def test_no_array_is_as_large_as_the_logits():
    length = 1536
    q, k = random_qk(1, length, length, heads=2, groups=1, width=4)
    arguments = {"is_causal": True, "segment_ids": jnp.zeros((1, length), jnp.int32), "block_size": 128}

    def loss(q):
        return (q**2).sum(), exact_max_logits(q, k, **arguments)

    function = jax.value_and_grad(loss, has_aux=True)
    largest = max(v.aval.size for e in equations(jax.make_jaxpr(function)(q).jaxpr) for v in e.outvars)
    assert largest <= 2 * 128 * 128
    memory = jax.jit(function).lower(q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * length / 4


def test_tiles_that_hold_no_pair_are_not_computed():
    def count(**arguments):
        names = dict(mask=None, is_causal=False, query_lengths=None, key_lengths=None, window=None, segment_ids=None)
        return len(AttentionMask.read((1, 1, 160, 160), **(names | arguments)).tiles(16, 16))

    assert count() == 100
    assert count(is_causal=True) == 55
    assert count(is_causal=True, window=(16, 7)) == 10 + 9
    assert count(window=1) == 10 + 2 * 9


# Transformations


def test_it_runs_under_jit_vmap_scan_and_rematerialisation():
    q, k = random_qk()
    layers = jnp.stack([q, 2 * q, -q])
    expected = jnp.stack([exact_max_logits(each, k, is_causal=True, block_size=16) for each in layers])

    def measure(q):
        return exact_max_logits(q, k, is_causal=True, block_size=16)

    def certify(q):
        return certified_max_logits(q, k, 1e-3, is_causal=True, block_size=16)

    for function in (measure, certify):
        for transformed in (jax.jit(jax.vmap(function)), lambda x, f=function: jax.lax.map(jax.checkpoint(f), x)):
            np.testing.assert_allclose(transformed(layers), expected, rtol=1e-6)


@pytest.mark.parametrize("measure", ["exact", "certified", "quiet"])
@pytest.mark.parametrize("remat", [False, True])
def test_the_gradients_of_the_loss_do_not_change_by_a_bit(measure, remat):
    q, k = random_qk()

    def loss(q, k, observed):
        output = jax.nn.dot_product_attention(q, k, k, is_causal=True)
        maxima = None
        if observed:
            maxima = {
                "exact": lambda: exact_max_logits(q, k, is_causal=True, block_size=16),
                "certified": lambda: certified_max_logits(q, k, 0.1, is_causal=True, block_size=16),
                "quiet": lambda: certified_max_logits(q, k, 1e3, is_causal=True, block_size=16),
            }[measure]()
        return (output**2).sum(), maxima

    def gradients(observed):
        function = lambda q, k: loss(q, k, observed)  # noqa: E731
        function = jax.checkpoint(function) if remat else function
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(q, k)

    ((value, maxima), observed), ((plain_value, _), plain) = gradients(True), gradients(False)
    assert value == plain_value
    assert all(map(jnp.array_equal, observed, plain))
    expected = dense_maxima(q, k, None, causal(q, k)) if measure != "quiet" else np.full(6, -np.inf)
    np.testing.assert_allclose(maxima, expected, rtol=1e-5)


def test_no_gradient_passes_through_a_maximum():
    q, k = random_qk()
    for function in (exact_max_logits, lambda q, k: certified_max_logits(q, k, 0.1)):
        gradients = jax.grad(lambda q, k, f=function: f(q, k).sum(), argnums=(0, 1))(q, k)
        assert not any(gradient.any() for gradient in gradients)


def test_it_runs_inside_shard_map():
    q, k = random_qk()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    rows = PartitionSpec("data")
    for tau in (0.1, 1e3):

        def maxima(q, k, tau=tau):
            local = jnp.maximum(exact_max_logits(q, k, block_size=16), certified_max_logits(q, k, tau, block_size=16))
            return jax.lax.pmax(local, "data")

        sharded = jax.jit(jax.shard_map(maxima, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec()))
        np.testing.assert_allclose(sharded(q, k), exact_max_logits(q, k), rtol=1e-6)


# Certificates

exact_jit = jax.jit(exact_max_logits, static_argnames="scale")
certified_jit = jax.jit(certified_max_logits, static_argnames="scale")


@given(
    seed=st.integers(0, 2**31),
    factor=st.sampled_from([-6e-8, 6e-8]) | st.floats(-3e-5, 3e-5),
    aligned=st.booleans(),
    scale=st.sampled_from([0.2, -0.2]),
)
@settings(max_examples=60)
def test_what_is_certified_is_at_most_tau(seed, factor, aligned, scale):
    """Even where the bound is the maximum, to the last bits, and where a kernel multiplied in bfloat16."""
    q, k = random_qk(1, 5, 5, heads=4, groups=2, width=32, seed=seed)
    if aligned:  # each head's key is its query: Cauchy–Schwarz is an equality
        q = jnp.repeat(jnp.sign(scale) * k, 2, axis=2)
    exact = exact_jit(q, k, scale=scale)
    tau = float(exact.max()) * (1 + factor)
    rounded_q, rounded_k = (x.astype(jnp.bfloat16).astype(jnp.float64) for x in (q, jnp.repeat(k, 2, axis=2)))
    lse = jax.nn.logsumexp(scale * jnp.einsum("bthd,bshd->bths", rounded_q, rounded_k), axis=-1).astype(jnp.float32)
    for given_lse in (None, lse, lse - 0.05 / 37):
        maxima = certified_jit(q, k, tau, lse=given_lse, scale=scale)
        assert (exact <= tau).all() if (maxima == -jnp.inf).all() else (abs(maxima - exact) < 1e-5).all()


def test_products_rounded_down_by_a_kernel_certify_nothing_above_tau():
    """Every factor lies just below the middle between two bfloat16 numbers."""
    q = k = jnp.full((1, 1, 1, 64), 1 + 2.0**-8 - 2.0**-12, jnp.float32)
    lse = jnp.square(q.astype(jnp.bfloat16).astype(jnp.float32)).sum(-1)
    exact = exact_max_logits(q, k, scale=1.0)
    tau = exact.item() * (1 - 1e-3)
    assert 1.005 * lse.item() < tau
    assert jnp.array_equal(certified_max_logits(q, k, tau, lse=lse, scale=1.0), exact)


def test_bounds_certify_where_they_are_clear_of_tau_and_nowhere_else():
    q, k = random_qk(dtype=np.float64)
    norms = [np.linalg.norm(np.asarray(x), axis=-1).max(1) for x in (q, k)]
    bound = (0.5 * norms[0] * norms[1].repeat(2, 1)).max()
    exact = exact_max_logits(q, k, scale=0.5)
    assert exact.max() < 0.95 * bound
    assert (certified_max_logits(q, k, bound * (1 + 1e-9), scale=0.5) == -jnp.inf).all()
    assert jnp.array_equal(certified_max_logits(q, k, bound * (1 - 1e-9), scale=0.5), exact)
    assert jnp.array_equal(certified_max_logits(q, k, bound, scale=0.5), exact)
    lse = jnp.full((2, 37, 6), -30.0).at[1, 5, 3].set(0.6 * bound)
    assert (certified_max_logits(q, k, 0.65 * bound, lse=lse, scale=0.5) == -jnp.inf).all()
    for tau in (0.602, 0.6, 0.595):
        assert jnp.array_equal(certified_max_logits(q, k, tau * bound, lse=lse, scale=0.5), exact)


def test_each_head_may_be_certified_by_another_bound():
    q, k = random_qk()
    q = q.at[:, :, 0].multiply(20.0)
    lse = jnp.full((2, 37, 6), 40.0).at[:, :, 0].set(1.0)
    norm = exact_max_logits(abs(q[:, :, 1:]), jnp.repeat(abs(k), 2, 2)[:, :, 1:]).max()
    assert norm < 12
    assert (certified_max_logits(q, k, 12.0, lse=lse) == -jnp.inf).all()
    assert jnp.array_equal(certified_max_logits(q, k, 12.0, lse=jnp.full((2, 37, 6), 40.0)), exact_max_logits(q, k))


def test_one_loud_head_has_all_of_them_computed():
    q, k = random_qk()
    q = q.at[:, :, 4].multiply(50.0)
    maxima = certified_max_logits(q, k, 30.0, is_causal=True, block_size=16)
    assert maxima[4] > 30
    assert jnp.array_equal(maxima, exact_max_logits(q, k, is_causal=True, block_size=16))


def test_certified_heads_cost_no_product():
    q, k = random_qk()
    lse = jnp.zeros((2, 37, 6))
    jaxpr = jax.make_jaxpr(lambda q, k, lse: certified_max_logits(q, k, 10.0, lse=lse))(q, k, lse).jaxpr
    assert not [e for e in equations(jaxpr, into_branches=False) if e.primitive.name == "dot_general"]
    assert [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]


@pytest.mark.parametrize("tau", [1.0, 1e30, math.inf])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e30])
def test_what_is_not_finite_is_never_certified(tau, bad):
    q, k = random_qk()
    q, k = q.at[1, 20, 2, 3].set(bad), k.at[:, :, 1, 3].set(1e12)
    for lse in (None, jnp.zeros((2, 37, 6))):  # 0 is what some kernels give to a row of NaN
        maxima = certified_max_logits(q, k, tau, lse=lse)
        assert not jnp.isfinite(maxima[2])
        assert maxima[2] != -jnp.inf
        assert jnp.isfinite(maxima[jnp.array([0, 1, 4, 5])]).all()
    maxima = certified_max_logits(*random_qk(size=100.0), 1.0, lse=jnp.full((2, 37, 6), jnp.nan))
    assert jnp.array_equal(maxima, exact_max_logits(*random_qk(size=100.0)))


def test_tiny_queries_before_huge_keys_are_not_lost():
    """Squares of 1e-25 are below float32's numbers, the logits are not."""
    q, k = random_qk()
    q, k = 1e-25 * q, 1e19 * k / 3
    maxima = certified_max_logits(q, k, 1e-7)
    assert jnp.array_equal(maxima, exact_max_logits(q, k))
    assert (maxima > 1e-7).any()


# The host's attention


MASKS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "local_window_size": (9, 0)},
    {"key_value_seq_lengths": jnp.array([20, 37], jnp.int32), "query_seq_lengths": jnp.array([37, 11], jnp.int32)},
    {"mask": jnp.asarray(np.random.default_rng(0).random((2, 6, 37, 37)) < 0.5), "scale": 0.7},
    {"bias": jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 37, 37)), jnp.float32), "implementation": "xla"},
]


@pytest.mark.parametrize(("tau", "dtype"), [(None, jnp.bfloat16), (2.0, jnp.float32), (1e3, jnp.float64)])
@pytest.mark.parametrize("arguments", MASKS, ids=lambda arguments: "-".join(arguments) or "all")
def test_the_output_is_the_hosts_bit_for_bit(arguments, dtype, tau):
    q, k = random_qk(dtype=dtype)
    value = jnp.asarray(np.random.default_rng(7).normal(size=k.shape), dtype)

    def ours(q, k, value):
        return dot_product_attention(q, k, value, tau=tau, **arguments)

    def loss(q, k, value, attend):
        output, maxima = attend(q, k, value)
        return jnp.sum(output.astype(jnp.float32) ** 2), (output, maxima)

    def host(q, k, value):
        return jax.nn.dot_product_attention(q, k, value, **arguments), None

    if tau == 2.0:
        assert jnp.array_equal(ours(q, k, value)[0], host(q, k, value)[0])
    (_, (output, maxima)), gradients = jax.jit(
        jax.value_and_grad(lambda *x: loss(*x, ours), argnums=(0, 1, 2), has_aux=True)
    )(q, k, value)
    (_, (expected, _)), expected_gradients = jax.jit(
        jax.value_and_grad(lambda *x: loss(*x, host), argnums=(0, 1, 2), has_aux=True)
    )(q, k, value)
    assert jnp.array_equal(output, expected)
    assert all(map(jnp.array_equal, gradients, expected_gradients))
    statistic = {name: value for name, value in arguments.items() if name not in ("bias", "implementation")}
    exact = exact_max_logits(q, k, **statistic) if tau != 1e3 else jnp.full(6, -jnp.inf)
    np.testing.assert_allclose(maxima, exact, rtol=1e-6)


def test_a_bias_does_not_certify():
    q, k = random_qk(size=4.0)
    exact = exact_max_logits(q, k)
    bias = jnp.full((1, 1, 37, 37), -50.0)
    assert jnp.array_equal(dot_product_attention(q, k, k, bias, tau=0.9 * exact.max().item())[1], exact)


@jax.jit
def maxima_under_bias(q, k, bias, keep):
    """Of both measures, without a mask of bool and with one."""
    return [dot_product_attention(q, k, k, bias, mask, tau=tau)[1] for mask in (None, keep) for tau in (None, 0.1)]


@pytest.mark.parametrize(("dtype", "masked"), FORBIDDING)
def test_a_bias_that_forbids_is_a_mask_and_one_that_does_not_is_no_part(dtype, masked):
    """It counts as the dense boolean mask of its forbidden pairs."""
    q, k = random_qk(dtype=dtype)
    distance = abs(jnp.arange(37)[:, None] - jnp.arange(37)) / 36
    bias = jnp.where(causal(q, k), (LOWEST_BIAS * distance).astype(dtype), jnp.asarray(masked, dtype))
    half = np.broadcast_to(np.arange(37) < 20, (1, 1, 1, 37))
    dense = [dense_maxima(q, k, allowed=causal(q, k) & mask) for mask in (True, half)]
    for maxima, expected in zip(maxima_under_bias(q, k, bias, jnp.asarray(half)), np.repeat(dense, 2, 0), strict=True):
        np.testing.assert_allclose(maxima, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ADDED)
def test_the_whole_bias_says_which_of_its_values_forbid(name, dtype):
    q, k = random_qk(dtype=dtype)
    added, allowed = added_tensors(2, 6, 37, dtype)[name]
    bias = jnp.asarray(added, dtype)
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    half = np.broadcast_to(np.arange(37) < 20, (1, 1, 1, 37))
    dense = [dense_maxima(q, k, allowed=allowed & mask) for mask in (True, half)]
    for maxima, expected in zip(maxima_under_bias(q, k, bias, jnp.asarray(half)), np.repeat(dense, 2, 0), strict=True):
        np.testing.assert_allclose(maxima, expected, rtol=1e-5)


def test_the_far_pairs_of_alibi_count_at_30000_positions():
    """Its bias is below −1e4 there. Four queries of the 30000, one head."""
    distances = abs(np.array([0, 900, 29_000, 29_999])[:, None] - np.arange(30_000))
    key = np.random.default_rng(0).random((1, 30_000, 1, 2))
    key[0, 40] = 9.0
    q, k = jnp.ones((1, 4, 1, 2), jnp.float32).at[0, :2].set(0.1), jnp.asarray(key, jnp.float32)
    maxima = dot_product_attention(q, k, k, jnp.asarray(-0.5 * distances, jnp.float32)[None, None])[1]
    expected = dense_maxima(q, k)
    assert distances[2, 40] * -0.5 < -1e4
    np.testing.assert_allclose(maxima, expected, rtol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": jnp.ones((37, 8))}, r"query has shape \(37, 8\)"),
        ({"query": jnp.ones((37, 6, 8))}, "or both without B"),
        ({"key": jnp.ones((2, 37, 4, 8))}, "key has 4 heads and query 6"),
        ({"key": jnp.ones((2, 37, 0, 8))}, "key has 0 heads"),
        ({"key": jnp.ones((2, 37, 3, 9))}, "differ in batch or head width"),
        ({"key": jnp.ones((1, 37, 3, 8))}, "differ in batch or head width"),
        ({"mask": jnp.full((37, 37), -1e9)}, "mask has negative numbers, as one that is added"),
        ({"mask": jnp.ones((2, 3, 37, 37), bool)}, r"mask has shape \(2, 3, 37, 37\)"),
        ({"mask": jnp.ones((1, 1, 1, 1, 37), bool)}, "mask has shape"),
        ({"mask": jnp.ones((36,), bool)}, "mask has shape"),
        ({"query_seq_lengths": jnp.ones((3,), jnp.int32)}, r"query_seq_lengths has shape \(3,\)"),
        ({"key_value_seq_lengths": jnp.ones((), jnp.int32)}, r"key_value_seq_lengths has shape \(\)"),
        ({"segment_ids": jnp.ones((2, 36), jnp.int32)}, r"segment_ids has shape \(2, 36\)"),
        ({"block_size": 0}, "block_size=0"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"tau": np.float32(-1)}, "tau=-1.0 must be positive"),
        ({"lse": jnp.ones((2, 37, 6), jnp.bfloat16)}, "lse is bfloat16.*in float32"),
        ({"lse": jnp.ones((2, 6, 37))}, r"lse has shape \(2, 6, 37\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    q, k = random_qk()
    arguments = {"query": q, "key": k, "tau": 1.0} | change
    with pytest.raises(ValueError, match=message):
        certified_max_logits(**(arguments | change))
    if not change.keys() & {"tau", "lse"}:
        arguments.pop("tau")
        with pytest.raises(ValueError, match=message):
            exact_max_logits(**(arguments | change))


def test_a_traced_tau_is_taken_as_it_is():
    q, k = random_qk()
    maxima = jax.jit(certified_max_logits)(q, k, 0.1)
    np.testing.assert_allclose(maxima, exact_max_logits(q, k), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_mask_of_zeros_and_ones_is_read_as_flax_reads_it(dtype):
    q, k = (jnp.asarray(np.random.default_rng(seed).normal(size=(1, 5, 2, 3)), jnp.float32) for seed in (0, 1))
    causal = jnp.asarray(np.tri(5), dtype)[None, None]
    for measured in (exact_max_logits(q, k, mask=causal), dot_product_attention(q, k, k, mask=causal)[1]):
        np.testing.assert_array_equal(measured, exact_max_logits(q, k, is_causal=True))
