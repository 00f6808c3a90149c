"""Masters in two parts: every float32 number against arithmetic on its value, which knows no bits."""

import math

import numpy as np
import pytest
import torch
from rounded_masters import rounded_to_24

from muonclip.torch.update.split_weights import error_dtypes, joined, split_into

UPPER = np.arange(2**16, dtype=np.uint32)
LOWER = (
    0,
    1,
    0x7F,
    0x80,
    0x81,
    0xFF,
    0x100,
    0x180,
    0x7F7F,
    0x7F80,
    0x7F81,
    0x7FFF,
    0x8000,
    0x8001,
    0x8080,
    0xFF80,
    0xFFFF,
)


def numbers(lower):
    """All signs and exponents, subnormal ones, infinities and NaN among them, with these last 16 bits."""
    return torch.from_numpy(((UPPER << 16) + np.uint32(lower)).view(np.float32))


def split(master, bits):
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    errors = [torch.empty_like(master, dtype=dtype) for dtype in error_dtypes(bits).values()]
    split_into(master, weight, errors)
    return weight, errors


def errors_like(value, weight, bits):
    """A distance in the last place of masters as the errors in which it is kept."""
    full = torch.full(weight.shape, value, dtype=torch.int32)
    return [full.to(torch.int8)] if bits == 24 else [(full >> 8).to(torch.int8), (full & 0xFF).to(torch.uint8)]


ENDS = {bits: torch.iinfo(dtype) for bits, dtype in ((24, torch.int8), (32, torch.int16))}


@pytest.mark.parametrize("lower", LOWER)
def test_all_bits_of_a_number_come_back_and_its_weight_is_the_nearest(lower):
    master = numbers(lower)
    weight, errors = split(master, 32)
    again, real = joined(weight, errors), ~master.isnan()
    assert torch.equal(again.view(torch.int32)[real], master.view(torch.int32)[real])
    assert torch.equal(weight.isnan(), ~real)
    assert again[~real].isnan().all()
    nearest = master.bfloat16()
    ties = torch.tensor(lower == 0x8000)
    assert torch.equal((weight == nearest) | ~real | ties, torch.ones_like(real))
    if ties:
        finite = weight.isfinite() & nearest.isfinite()
        distance = (weight.double() - master.double()).abs()
        assert torch.equal(distance[finite], (nearest.double() - master.double()).abs()[finite])
        assert (weight.abs() >= nearest.abs())[finite].all()


@pytest.mark.parametrize("lower", LOWER)
def test_of_24_bits_is_kept_what_rounding_leaves_and_no_more(lower):
    master = numbers(lower)
    weight, errors = split(master, 24)
    real, again = ~master.isnan(), joined(weight, errors)
    expected = rounded_to_24(master)
    assert torch.equal(again[real], expected[real])
    assert torch.equal(again[real].signbit(), master[real].signbit())
    twice = split(again, 24)
    assert torch.equal(twice[0][real].view(torch.int16), weight[real].view(torch.int16))
    assert torch.equal(twice[1][0][real], errors[0][real])
    finite = real & weight.isfinite()
    step = (weight.double() - again.double()).abs()[finite]
    assert (step <= (again.bfloat16().double() - again.double()).abs()[finite]).all()


@pytest.mark.parametrize("bits", [24, 32])
def test_a_pair_of_bf16_and_error_is_one_master(bits):
    weight = torch.from_numpy(UPPER.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    ends = ENDS[bits]
    for value in (ends.min, ends.min + 1, -3, -1, 0, 1, 5, ends.max):
        errors = errors_like(value, weight, bits)
        again = split(joined(weight, errors), bits)
        own = ~weight.isnan() & ~(weight == 0 if value < 0 else weight.isinf() & (value > 0))
        assert torch.equal(again[0][own].view(torch.int16), weight[own].view(torch.int16))
        assert all(torch.equal(new[own], old[own]) for new, old in zip(again[1], errors, strict=True))


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, 1.0, -3e-38])
def test_a_weight_that_was_set_by_hand_is_the_weight_whatever_error_was_left(bits, value):
    weight = torch.tensor([value]).bfloat16()
    ends = ENDS[bits]
    for left in (ends.min, -1, 0, 1, ends.max):
        master = joined(weight, errors_like(left, weight, bits))
        assert torch.equal(split(master, bits)[0], weight) or abs(value) == math.inf
        assert not master.isnan().any()
        assert math.isfinite(value) or abs(master.item()) >= torch.finfo(torch.bfloat16).max


@pytest.mark.parametrize("lower", LOWER)
def test_the_error_of_24_bits_is_the_first_of_those_of_32(lower):
    weight, errors = split(numbers(lower), 24)
    master, more = joined(weight, errors), [errors[0], torch.zeros_like(errors[0], dtype=torch.uint8)]
    real = ~weight.isnan()
    assert torch.equal(joined(weight, more)[real], master[real])
    again, kept = split(master, 32)
    assert torch.equal(again[real], weight[real])
    assert all(torch.equal(new[real], old[real]) for new, old in zip(kept, more, strict=True))


def test_views_are_written_where_they_are():
    weight, error = torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(4, 6, dtype=torch.int8)
    master = torch.randn(6, 4)
    split_into(master, weight.mT, [error.mT])
    torch.testing.assert_close(joined(weight.mT, [error.mT]), master, rtol=2.0**-16, atol=0)
