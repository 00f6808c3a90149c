import gc

import pytest

from muonclip.torch.observe.calls import of_thread
from muonclip.torch.observe.patches import Doors


@pytest.fixture(autouse=True)
def nobody_listens_any_more():
    """Whatever ended a forward, nothing of it goes on listening."""
    yield
    assert not of_thread.listeners
    assert not of_thread.trackers


@pytest.fixture
def closed_doors():
    """No door stands that a clip of another test holds open."""
    gc.collect()
    others = Doors._users
    if others:
        Doors._users = 1
        Doors.close()
    yield
    Doors._users += others
