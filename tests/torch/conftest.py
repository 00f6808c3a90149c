import gc

import pytest
import torch

from muonclip.torch.observe.handlers import of_thread
from muonclip.torch.observe.patches import PATCHES


@pytest.fixture(autouse=True)
def nobody_handles_calls_any_more():
    """Whatever ended a forward, nothing of it goes on handling calls."""
    yield
    assert not of_thread.handlers
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.fixture
def no_other_patches():
    """No patch is in place for a clip of another test."""
    gc.collect()
    others = PATCHES.users
    if others:
        PATCHES.users = 1
        PATCHES.remove_user()
    yield
    PATCHES.users += others
