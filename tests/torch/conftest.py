import gc

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader

from muonclip.torch.logits import host_modes
from muonclip.torch.observe.handlers import of_thread
from muonclip.torch.observe.loads import _loads_in_place
from muonclip.torch.observe.patches import PATCHES


@pytest.fixture(autouse=True)
def nobody_handles_calls_any_more():
    """Whatever ended a forward, nothing of it goes on handling calls."""
    yield
    assert not of_thread.handlers
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.fixture
def seen_observation(monkeypatch):
    """Modes see what observes, too."""
    monkeypatch.setattr(host_modes, "is_seen", lambda **_: False)


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


@pytest.fixture
def no_other_loads():
    """No hooks for loads are left from a clip of another test."""
    gc.collect()
    for hooks in list(_loads_in_place._hooks):
        hooks.take_off()
    assert state_dict_loader._load_state_dict.__module__ == state_dict_loader.__name__
