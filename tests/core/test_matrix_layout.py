import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muonclip.core import MatrixLayout

NAMESPACES = {"numpy": np, "torch": torch, "strict": array_api_strict}


@st.composite
def layouts_and_shapes(draw):
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    repeats = draw(st.integers(1, 3))
    heads = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    blocks = tuple(h * draw(st.integers(1, 3)) for h in heads)
    fan_in = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    transposed = draw(st.booleans())
    rows = sum(blocks) * repeats
    if transposed:
        return MatrixLayout(len(batch), True, blocks, heads, repeats), (*batch, fan_in[0], rows)
    out = (repeats, sum(blocks)) if draw(st.booleans()) else (rows,)
    return MatrixLayout(len(batch), False, blocks, heads, repeats, len(out)), (*batch, *out, *fan_in)


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
@given(layouts_and_shapes())
def test_join_inverts_split(xp, case):
    layout, shape = case
    x = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    parts = layout.split(xp.asarray(x), xp=xp)
    assert tuple(tuple(part.shape) for part in parts) == layout.matrix_shapes(shape)
    np.testing.assert_array_equal(np.asarray(layout.join(parts, shape, xp=xp)), x)


def test_join_inverts_split_on_jax():
    layout, x = MatrixLayout(1, True, (2, 4), (1, 2), 2), np.arange(2.0 * 3 * 12).reshape(2, 3, 12)
    parts = layout.split(jnp.asarray(x), xp=jnp)
    np.testing.assert_array_equal(np.asarray(layout.join(parts, x.shape, xp=jnp)), x)


def test_fused_blocks():
    x = np.arange(9 * 2).reshape(9, 2)
    q, k, v = MatrixLayout(blocks=(4, 2, 3)).split(x, xp=np)
    np.testing.assert_array_equal(q[0], x[:4])
    np.testing.assert_array_equal(k[0], x[4:6])
    np.testing.assert_array_equal(v[0], x[6:])


def test_interleaved_heads_are_gathered():
    """q, k, v of 2 rows each for head 0, then for head 1."""
    x = np.arange(12 * 3).reshape(12, 3)
    _, k, _ = MatrixLayout(blocks=(2, 2, 2), repeats=2).split(x, xp=np)
    np.testing.assert_array_equal(k[0], x[[2, 3, 8, 9]])
    _, k, _ = MatrixLayout(blocks=(2, 2, 2), heads=(2, 2, 2), repeats=2).split(x, xp=np)
    np.testing.assert_array_equal(k, [x[[2, 3]], x[[8, 9]]])


def test_experts_and_convolutions():
    experts = np.arange(2 * 6 * 3).reshape(2, 6, 3)
    gate, up = MatrixLayout(batch_ndim=1, blocks=(3, 3)).split(experts, xp=np)
    np.testing.assert_array_equal(gate, experts[:, :3])
    np.testing.assert_array_equal(up, experts[:, 3:])
    window = np.arange(4 * 2 * 3 * 3).reshape(4, 2, 3, 3)
    assert MatrixLayout().matrix_shapes(window.shape) == ((1, 4, 18),)
    np.testing.assert_array_equal(MatrixLayout().split(window, xp=np)[0][0], window.reshape(4, 18))


def test_describe():
    assert MatrixLayout(batch_ndim=1, blocks=(3, 3)).describe((2, 6, 5)) == "2 × (3×5) + 2 × (3×5)"


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (MatrixLayout(blocks=(4, 3)), (8, 2), r"blocks=\(4, 3\) repeated 1 times do not fill the 8 rows"),
        (MatrixLayout(heads=(3,)), (8, 2), "3 heads do not divide the 8 rows"),
        (MatrixLayout(batch_ndim=1), (8, 2), "no matrix behind 1 batch axes"),
        (MatrixLayout(repeats=3), (8, 2), "do not fill the 8 rows"),
    ],
)
def test_what_does_not_fit_is_named(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        layout.matrix_shapes(shape)
