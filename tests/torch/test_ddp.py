"""Data parallelism: every rank clips by the maximum over all ranks, or the replicas drift apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parents[1] / "support" / "ddp_worker.py"


@pytest.mark.slow
def test_replicas_stay_the_same_to_the_bit_while_the_clip_fires(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(first["local"], second["local"])
    assert sum(first["clipped"]) > 20
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
