"""Codes of blocks and stochastic rounding: the same bits in NumPy, torch and JAX, and no bias."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stored_momentum import noise, stored

from muonclip.core.state_storage import (
    Storage,
    as_absmax,
    blocks_of,
    cut_bits,
    encode,
    noise_bits,
    steps,
    stream_of,
)


class Framework:
    """How arrays are made in a namespace, and read as NumPy's."""

    def __init__(self, xp):
        self.xp = xp

    def array(self, values):
        return torch.from_numpy(np.array(values)) if self.xp is torch else self.xp.asarray(values)

    def rounded(self, x, bits=None):
        """Codes and sizes of x [rows, columns] in one block for each row."""
        x = self.array(x)
        wide = self.array(np.zeros(0, np.float64)).dtype if x.dtype == self.array(np.zeros(0)).dtype else None
        largest = abs(x).amax(-1, keepdim=True) if self.xp is torch else abs(x).max(-1, keepdims=True)
        absmax = as_absmax(largest.float() if self.xp is torch else largest.astype("float32"), xp=self.xp)
        of_block = steps(absmax)
        if wide is not None:
            of_block = of_block.to(wide) if self.xp is torch else of_block.astype(wide)
        own = None if bits is None else self.array(bits.astype(str(x.dtype).removeprefix("torch.")))
        return np.asarray(encode(x, of_block, own, xp=self.xp)), np.asarray(absmax)


FRAMEWORKS = {"numpy": Framework(np), "torch": Framework(torch), "jax": Framework(jnp)}


def halves():
    """Rows whose step is exactly one, so that every other entry is a tie."""
    return np.concatenate([np.arange(-253, 254) / 2, [127.0 / np.float32(127 * np.float32(1 / 127))]])[None]


def hard():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 513)) * 10.0 ** rng.integers(-30, 30, size=(40, 1))
    rows[3] = 0
    rows[4, 1:] = 0
    return rows


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("values", [hard(), halves()], ids=["random", "ties"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_are_the_same_bits_in_all_frameworks_and_those_of_numpy_s_oracle(stochastic, values, dtype):
    x = values.astype(dtype)
    bits = np.random.default_rng(1).integers(0, 65536, x.shape) if stochastic else None
    codes, absmax = FRAMEWORKS["numpy"].rounded(x, bits)
    for each in FRAMEWORKS.values():
        own, sizes = each.rounded(x, bits)
        np.testing.assert_array_equal(own, codes)
        np.testing.assert_array_equal(sizes, absmax)
    assert np.abs(codes).max() == 127
    read = codes.astype(np.float64) * (absmax * np.float32(1 / 127)).astype(np.float64)
    if dtype == np.float64:
        np.testing.assert_array_equal(read, stored(x, "int8_stochastic" if stochastic else "int8", bits))
    error = np.abs(read - x) / np.maximum(np.abs(x).max(1, keepdims=True), np.finfo(dtype).tiny)
    assert error.max() <= (1 if stochastic else 0.5) / 127 * (1 + 1e-5)


def test_the_largest_of_a_block_is_127_whatever_the_noise():
    """Though its quotient may be a rounding above."""
    largest = np.random.default_rng(0).uniform(1, 2, size=(2000, 1)).astype(np.float32)
    x = largest * np.float32([[1, -1]])
    for noise_of_all in (0, 65535):
        codes, _ = FRAMEWORKS["torch"].rounded(x, np.full(x.shape, noise_of_all))
        assert np.abs(codes).max() == 127


def test_ties_go_to_even():
    codes, _ = FRAMEWORKS["torch"].rounded(np.float32([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_block_that_diverged_is_read_as_nan_and_one_of_zeros_or_next_to_nothing_as_zeros():
    for each in FRAMEWORKS.values():
        x = np.float32([[1, np.inf, 0], [1, np.nan, 0], [0, 0, 0], [1e-40, 0, -1e-40], [1, 2, 3]])
        with np.errstate(all="ignore"):
            codes, absmax = each.rounded(x)
        assert np.isnan(absmax[:2]).all()
        assert np.isfinite(absmax[2:]).all()
        assert not codes[2:4].any()
        assert codes[4].tolist() == [42, 85, 127]


def test_blocks_are_of_the_whole_matrix():
    assert list(blocks_of(((0, 2048),))) == [(0, 0, 2048)]
    assert list(blocks_of(((0, 5000),))) == [(0, 0, 2048), (1, 2048, 4096), (2, 4096, 5000)]
    assert list(blocks_of(((2500, 5000),))) == [(1, 0, 1596), (2, 1596, 2500)]
    assert list(blocks_of(((10, 20), (2040, 2060)))) == [(0, 0, 10), (0, 10, 18), (1, 18, 30)]
    assert list(blocks_of(())) == []


def drawn(each, name, step, rows, columns):
    numbers = each.array(np.arange(rows, dtype=np.int32)[:, None]), each.array(np.arange(columns, dtype=np.int32))
    with np.errstate(over="ignore"):
        return np.asarray(noise_bits(stream_of(name), each.array(np.array([step], np.int32)), *numbers))


def test_the_noise_is_the_same_in_all_frameworks_and_that_of_whole_numbers():
    for name, step in (("layers.0.weight", 1), ("kernel", 2**31 - 1)):
        expected = [[noise(name, step, i, j) for j in range(7)] for i in range(5)]
        for each in FRAMEWORKS.values():
            np.testing.assert_array_equal(drawn(each, name, step, 5, 7), expected)


def test_the_noise_is_even_and_independent_over_entries_rows_steps_and_parameters():
    first = drawn(FRAMEWORKS["torch"], "w", 1, 400, 500) / 65536
    counts = np.bincount((first * 64).astype(int).ravel(), minlength=64)
    expected = first.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 130  # χ² of 63 degrees: 1e-6
    others = {
        "column": first[:, 1:], "row": first[1:], "step": drawn(FRAMEWORKS["torch"], "w", 2, 400, 500) / 65536,
        "parameter": drawn(FRAMEWORKS["torch"], "v", 1, 400, 500) / 65536,
    }  # fmt: skip
    for name, other in others.items():
        same = first[: len(other), : other.shape[1]]
        assert abs(np.corrcoef(same.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(same.size), name


@pytest.mark.parametrize("form", ["int8_stochastic", "bfloat16_stochastic"])
def test_stochastic_rounding_has_no_bias(form):
    """The mean over many steps is x, within five of its standard errors; truncation and the nearest are not."""
    x = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    draws = [drawn(FRAMEWORKS["torch"], "w", step, *x.shape) for step in range(1, 4001)]
    read = np.array([stored_by_us(x, bits, form) for bits in draws])
    error = np.abs(read.mean(0) - x) / np.maximum(read.std(0) / np.sqrt(len(draws)), 1e-9)
    assert error.max() < 5
    assert len(np.unique(read[:, 0, 0])) == 2


def stored_by_us(x, bits, form):
    if form == "bfloat16_stochastic":
        words = torch.from_numpy(x).view(torch.int32)
        return cut_bits(words, torch.from_numpy(bits), xp=torch).view(torch.float32).double().numpy()
    codes, absmax = FRAMEWORKS["torch"].rounded(x, bits)
    return codes.astype(np.float64) * absmax / 127


def test_what_bfloat16_can_hold_and_what_is_not_finite_stay():
    x = torch.tensor([1.0, -2.5, 0.0, torch.inf, -torch.inf, torch.nan, 3e38])
    x = torch.cat([x, torch.randn(50)]).bfloat16().float()
    bits = torch.full(x.shape, 65535, dtype=torch.int32)
    kept = cut_bits(x.view(torch.int32), bits, xp=torch).view(torch.float32)
    torch.testing.assert_close(kept, x, rtol=0, atol=0, equal_nan=True)


def test_forms_by_name():
    assert Storage.named("momentum_dtype", "int8") == Storage("int8")
    assert Storage.named("momentum_dtype", "bfloat16_stochastic") == Storage("bfloat16", is_stochastic=True)
    assert Storage.named("momentum_dtype", "bfloat16") is None
    with pytest.raises(ValueError, match=r"momentum_dtype='float32_stochastic'; numbers are rounded stochastically to"):
        Storage.named("momentum_dtype", "float32_stochastic")
