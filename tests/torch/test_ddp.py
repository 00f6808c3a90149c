"""Data parallelism: every rank clips by the maximum over all ranks, or the replicas drift apart."""

from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks

WORKER = Path(__file__).parents[1] / "support" / "ddp_worker.py"


@pytest.mark.slow
def test_replicas_stay_the_same_to_the_bit_while_the_clip_fires(tmp_path):
    run_ranks(2, WORKER, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(first["local"], second["local"])
    assert sum(first["clipped"]) > 20
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
