"""Two processes of two devices each: the same as one process with four, and as one device, while the clip fires."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_jax as tiny

SUPPORT = Path(__file__).parents[1] / "support"


KINDS = ("Auto", "Explicit")


def run(folder, processes, devices):
    """Kind of mesh axes → what each process ended with."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
    }
    command = [sys.executable, SUPPORT / "process_worker.py", folder, address, str(processes)]
    folder.mkdir()
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    try:
        errors = [worker.communicate(timeout=1800)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), "\n".join(error[-3000:] for error in errors)
    return {kind: [dict(np.load(folder / f"{kind}-{rank}.npz")) for rank in range(processes)] for kind in KINDS}


def distance(one, other):
    return max(np.abs(one[name] - other[name]).max() for name in one)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return run(folder / "two", processes=2, devices=2), run(folder / "one", processes=1, devices=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_train_as_one(ended, kind):
    (first, second), (alone,) = (by_kind[kind] for by_kind in ended)
    assert distance(first, second) == 0
    assert first["clipped"].tolist() == alone["clipped"].tolist()
    assert second["clipped"].sum() >= 5
    assert distance(first, alone) < 1e-6
    params, _ = tiny.train(tiny.optimizer(), tiny.init(), tiny.batches(5))
    whole = {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    assert distance(whole, first) < 1e-5
