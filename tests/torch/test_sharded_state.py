"""A checkpoint of torch.distributed.checkpoint, saved on four ranks, goes on at any number of them."""

import json
from pathlib import Path

import pytest
from forked_ranks import run_ranks

WORKER = Path(__file__).parents[1] / "support" / "dcp_worker.py"
pytestmark = pytest.mark.slow


def run(ranks, mode, folder):
    run_ranks(ranks, WORKER, mode, folder)
    return json.loads((folder / f"{mode}-{ranks}.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, run(4, "save", folder)


@pytest.mark.parametrize(
    ("mode", "ranks"),
    [("load", 1), ("load", 2), ("load", 4), ("load", 8), ("async", 2), ("plain", 1), ("plain", 2), ("unsharded", 1)],
)
def test_training_goes_on_at_another_number_of_ranks(saved, mode, ranks):
    """Every tensor of model and optimizer comes back to the bit (the worker compares), and the losses follow."""
    folder, losses = saved
    assert run(ranks, mode, folder) == pytest.approx(losses, rel=1e-5)
