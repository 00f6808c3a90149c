"""What forbids a pair in a tensor that is added to the logits, told by the tensor as a whole, in every framework."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from masked_values import ADDED, LOWEST, added_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from muonclip.core import attention_mask as core
from muonclip.torch.logits import added_mask


def in_numpy(added, dtype):
    return core.is_masked(added.astype(dtype), xp=np)


def in_jax(added, dtype):
    return core.is_masked(jnp.asarray(added, dtype), xp=jnp)


def in_torch(added, dtype):
    return core.is_masked(torch.from_numpy(added).to(getattr(torch, dtype)), xp=torch).numpy()


def on_the_host(added, dtype):
    return added_mask.is_masked(torch.from_numpy(added).to(getattr(torch, dtype))).numpy()


# NumPy has no bfloat16 of its own.
JUDGES = [(judge, dtype) for judge in (in_numpy, in_jax, in_torch, on_the_host) for dtype in LOWEST]
JUDGES = [(judge, dtype) for judge, dtype in JUDGES if not (judge is in_numpy and dtype == "bfloat16")]


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize(("judge", "dtype"), JUDGES)
def test_the_whole_tensor_says_which_of_its_values_forbid(judge, name, dtype):
    added, allowed = added_tensors(3, 4, 24, dtype)[name]
    np.testing.assert_array_equal(~np.broadcast_to(judge(added, dtype), allowed.shape), allowed)


@pytest.mark.parametrize("name", ADDED)
def test_parts_and_broadcast_axes_say_the_same(name, monkeypatch):
    """A tensor is read by rows, and an axis that was broadcast once."""
    added, allowed = added_tensors(3, 4, 24)[name]
    monkeypatch.setitem(added_mask._PART, "cpu", added.size // 5)
    monkeypatch.setattr(added_mask, "_highest_masked_on_host", lambda added: None)
    added = torch.from_numpy(added).float()
    for each in (added, added.expand(3, 4, 24, 24)):
        np.testing.assert_array_equal(~added_mask.is_masked(each).expand(3, 4, 24, 24).numpy(), allowed)


def test_what_is_broadcast_is_not_a_batch_of_sequences():
    """Sequences that share all of it have no mask of their own."""
    bias = torch.randn(1, 1, 8, 8) * 40
    assert not added_mask.is_masked(bias.expand(5, -1, -1, -1)).any()


@pytest.mark.parametrize("value", [-math.inf, -1e4, -1e9])
def test_a_tensor_that_forbids_everything(value):
    assert added_mask.is_masked(torch.full((3, 3), value)).all()


@pytest.mark.parametrize("value", [0.0, -100.0, math.nan, math.inf])
def test_a_tensor_of_one_value_that_forbids_nothing(value):
    assert not added_mask.is_masked(torch.full((3, 3), value)).any()


def test_nan_neither_forbids_nor_hides_a_mask():
    mask = torch.tensor([[0.0, math.nan, -100.0], [0.0, 0.0, -1e4]])
    assert added_mask.is_masked(mask).tolist() == [[False] * 3, [False, False, True]]


def test_integers_and_nothing_may_be_added_too():
    assert added_mask.is_masked(torch.tensor([0, -100, 0])).tolist() == [False, True, False]
    assert added_mask.is_masked(torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_device_is_not_waited_for(batch):
    """Where there are no values, to read one is an error."""
    assert added_mask.highest_masked(torch.zeros(batch, 1, 8, 8, device="meta")).is_meta
    with FakeTensorMode():
        assert added_mask.is_masked(torch.zeros(batch, 1, 8, 8)).shape == (batch, 1, 8, 8)
