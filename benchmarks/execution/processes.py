"""Start another Python of this source tree: a module by itself, or on ranks under torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def start(
    module: str,
    *words: str,
    ranks: int | None = None,
    restarts: int = 0,
    threads: int = 1,
    variables: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start `python -m module words`, with `ranks` on so many processes of this machine.

    torchrun starts these again up to `restarts` times. `options` are those of Popen.
    """
    torchrun: list[str] = []
    if ranks is not None:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": found, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, *torchrun, "-m", module, *words]
    return subprocess.Popen(command, text=True, env=os.environ | own | dict(variables or {}), **options)


def kill_session(process: subprocess.Popen[str]) -> None:
    """End a process that was started with `start_new_session`, and its children, if it is still there."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
