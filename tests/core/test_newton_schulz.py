import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from svd_oracle import svd_polynomial

from muonclip.core import (
    COEFFICIENT_SETS,
    newton_schulz,
    normalize,
    orthogonalize,
    plain_products,
    resolve_coefficients,
)

NAMESPACES = {"numpy": np, "torch": torch, "jax": jnp, "strict": array_api_strict}
SHAPES = [(5, 9), (9, 5), (7, 7), (1, 4), (3, 6, 6), (2, 3, 8, 4)]
seeds = st.integers(0, 2**32 - 1)


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def orthogonal(seed, n):
    return np.linalg.qr(gaussian(seed, n, n))[0]


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
@pytest.mark.parametrize("name", COEFFICIENT_SETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_polynomial_of_the_singular_values(xp, name, shape):
    x = gaussian(0, *shape)
    u = orthogonalize(xp.asarray(x), name, xp=xp)
    assert u.dtype == xp.float64
    np.testing.assert_allclose(np.asarray(u), svd_polynomial(x, resolve_coefficients(name)), atol=1e-10)


@given(seeds, st.sampled_from([(4, 7), (7, 4), (6, 6)]))
def test_is_equivariant_under_rotations_and_transposition(seed, shape):
    x, left, right = gaussian(seed, *shape), orthogonal(seed + 1, shape[0]), orthogonal(seed + 2, shape[1])
    u = orthogonalize(x, xp=np)
    np.testing.assert_allclose(orthogonalize(left @ x @ right, xp=np), left @ u @ right, atol=1e-9)
    np.testing.assert_allclose(orthogonalize(x.T, xp=np), u.T, atol=1e-9)


@given(seeds, st.floats(1e-300, 1e300))
def test_does_not_see_the_scale(seed, scale):
    x = gaussian(seed, 4, 6)
    np.testing.assert_allclose(orthogonalize(x * scale, xp=np), orthogonalize(x, xp=np), atol=1e-9)


@given(seeds, st.integers(1, 5))
def test_a_batch_is_a_stack(seed, count):
    x = gaussian(seed, count, 4, 6)
    each = np.stack([orthogonalize(matrix, xp=np) for matrix in x])
    np.testing.assert_allclose(orthogonalize(x, xp=np), each, atol=1e-12)


@pytest.mark.parametrize("xp", [np, torch, jnp], ids=["numpy", "torch", "jax"])
@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1e20, 1e34])
def test_tiny_and_huge_float32_inputs_get_a_full_size_update(xp, scale):
    x = gaussian(0, 5, 8)
    u = np.asarray(orthogonalize(xp.asarray(x * scale, dtype=xp.float32), xp=xp))
    np.testing.assert_allclose(u, svd_polynomial(x, resolve_coefficients("jordan")), atol=1e-3)


@pytest.mark.parametrize("scale", [6e-8, 6e4])
def test_float16_is_normalised_before_it_is_narrowed(scale):
    x = torch.full((4, 6), scale, dtype=torch.float16)
    assert torch.linalg.matrix_norm(orthogonalize(x, xp=torch).float(), 2).item() == pytest.approx(0.7, abs=0.6)
    assert orthogonalize(x, xp=torch).isfinite().all()


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
def test_zero_stays_zero_and_does_not_disturb_its_batch(xp):
    x = np.stack([np.zeros((3, 5)), gaussian(0, 3, 5)])
    u = np.asarray(orthogonalize(xp.asarray(x), xp=xp))
    assert (u[0] == 0).all()
    np.testing.assert_allclose(u[1], orthogonalize(x[1], xp=np), atol=1e-12)


def test_an_explicit_eps_is_a_floor_of_the_norm():
    x = gaussian(0, 4, 6)
    x *= 1e-9 / np.linalg.norm(x)
    full, floored = orthogonalize(x, xp=np), orthogonalize(x, xp=np, eps=1e-3)
    assert np.linalg.norm(full) > 1
    assert np.linalg.norm(floored) < 1e-3
    np.testing.assert_allclose(normalize(x, plain_products(np), xp=np, eps=1e-3), x / 1e-3, rtol=1e-12)


def test_the_input_is_never_written_to():
    x = gaussian(0, 4, 6)
    x.flags.writeable = False
    orthogonalize(x, xp=np)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given_ = torch.from_numpy(gaussian(0, 4, 6)).to(dtype)
        before = given_.clone()
        orthogonalize(given_, xp=torch, dtype=dtype)
        assert torch.equal(given_, before)


def test_the_products_are_the_loop_s_only_arithmetic():
    calls = []
    plain = plain_products(np)
    counted = type(plain)(
        **{
            name: lambda *args, name=name: calls.append(name) or getattr(plain, name)(*args)
            for name in ("sum_squares", "gram", "polynomial", "update")
        }
    )
    x = gaussian(0, 3, 4)
    np.testing.assert_array_equal(orthogonalize(x, "you", xp=np, products=counted), orthogonalize(x, "you", xp=np))
    assert calls == ["sum_squares", *["gram", "polynomial", "update"] * 5]


def test_newton_schulz_is_the_iteration_alone():
    x = gaussian(0, 3, 4)
    x /= np.linalg.norm(x)
    a, b, c = 3.0, -3.0, 1.0
    expected = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    np.testing.assert_allclose(newton_schulz(x, [(a, b, c)]), expected, atol=1e-14)


def test_runs_compiled():
    x = torch.from_numpy(gaussian(0, 3, 5))
    compiled = torch.compile(lambda y: orthogonalize(y, xp=torch), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), orthogonalize(x, xp=torch))


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(3,\); orthogonalize needs a matrix"):
        orthogonalize(np.ones(3), xp=np)


def test_narrow_products_come_after_the_normalisation():
    x = torch.from_numpy(gaussian(0, 4, 6) * 1e7).float()
    u = orthogonalize(x, xp=torch, dtype=torch.float16)
    torch.testing.assert_close(u, orthogonalize(x, xp=torch), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
@pytest.mark.parametrize("name", [name for name, known in COEFFICIENT_SETS.items() if known.gram_steps])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (2, 4, 30)], ids=str)
def test_the_gram_form_applies_the_same_polynomial(xp, name, shape):
    x = gaussian(0, *shape)
    u = orthogonalize(xp.asarray(x), name, form="gram", xp=xp)
    np.testing.assert_allclose(np.asarray(u), svd_polynomial(x, resolve_coefficients(name)), atol=1e-9)


@pytest.mark.parametrize("name", [name for name, known in COEFFICIENT_SETS.items() if known.gram_steps])
@pytest.mark.parametrize("rank", [1, 4, None])
def test_the_gram_form_is_as_accurate_in_narrow_products(name, rank):
    """Without restarts its error is 1e3 to 1e18 there. None: of full rank, with singular values from 1 to 1e-6."""
    torch.manual_seed(0)
    left, right = torch.randn(24, rank or 24), torch.randn(rank or 24, 64)
    if rank is None:
        left = torch.linalg.qr(left).Q * torch.logspace(0, -6, 24)
        right = torch.linalg.qr(right.mT).Q.mT
    x = left @ right
    exact = svd_polynomial(x.double().numpy(), resolve_coefficients(name))

    def error(form):
        return np.linalg.norm(
            orthogonalize(x, name, form=form, dtype=torch.bfloat16, xp=torch).double().numpy() - exact
        )

    assert error("gram") <= 4 * error("standard")


@given(seeds, st.integers(1, 4))
def test_the_gram_form_is_as_accurate_where_momentum_is_of_low_rank(seed, rank):
    x = (gaussian(seed, 24, rank) @ gaussian(seed + 1, rank, 64)).astype(np.float32)
    exact = svd_polynomial(x, resolve_coefficients("jordan"))
    gram = orthogonalize(x, form="gram", xp=np)
    assert np.linalg.norm(gram - exact) <= 0.02 * np.linalg.norm(exact)


def test_the_gram_form_is_refused_where_it_loses_its_accuracy():
    for name in ("cans", [(2.0, -1.5, 0.5)]):
        with pytest.raises(ValueError, match="the Gram form is not accurate, or not tried, with ns_coefficients="):
            orthogonalize(gaussian(0, 3, 5), name, form="gram", xp=np)


def test_the_gram_form_multiplies_less():
    """FLOPs for m × n and five steps of jordan: 12 m²n + 22 m³, with its restarts, in place of 20 m²n + 10 m³."""
    flops = {}
    m, n = 16, 128
    for form, shape in (("standard", (m, n)), ("gram", (m, n)), ("tall", (n, m))):
        count = 0

        class Counted(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal count
                if function is torch.ops.aten.mm.default:
                    count += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
                return function(*args, **(kwargs or {}))

        with Counted():
            orthogonalize(
                torch.from_numpy(gaussian(0, *shape)), form="gram" if form == "gram" else "standard", xp=torch
            )
        flops[form] = count
    assert flops["tall"] == flops["standard"], "the small side stands on the left"
    assert flops["standard"] == 5 * (4 * m * m * n + 2 * m**3)
    assert flops["gram"] == 8 * m * m * n + 28 * m**3, "float32 restarts once"
