"""The process of one run: `python -m benchmarks.execution.worker FOLDER ARM SEED`, which `workers` starts.

It tells its progress on standard output, one JSON object per line; SIGTERM makes it save and leave; it does not outlive
the command that started it, whose end closes its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.experiment import Panel
from benchmarks.records.metrics import to_json
from benchmarks.training.run import Checkpoints, Run

CONFIG = "config.json"
_REPORT_SECONDS = 0.2


def main(folder: Path, arm: str, seed: int, checkpoints: Checkpoints) -> int:
    """Exit status: 0 the run is finished, 1 it was told to stop."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    panel = Panel.from_json(json.loads((folder / CONFIG).read_text())["config"])
    torch.set_num_threads(panel.threads)
    corpus = open_corpus(None if panel.data.path is None else Path(panel.data.path))
    run = Run(panel, corpus, run_folder(folder, arm, seed), arm, seed)
    _tell({"step": run.done})
    told = time.monotonic()

    def on_step(record: dict[str, Any]) -> None:
        nonlocal told
        if time.monotonic() - told > _REPORT_SECONDS or run.finished:
            told = time.monotonic()
            logits = [logit for heads in record["max_logits"].values() for logit in heads]
            _tell({"step": record["step"], "loss": record["loss"], "max_logit": max(logits, default=float("nan"))})

    run.train(on_step, stop.is_set, checkpoints)
    return 0 if run.finished else 1


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    return folder / "runs" / f"{arm}-{seed}"


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(to_json(message)), flush=True)


def _leave_with_parent() -> None:
    """A checkpoint is whole or absent, so to be gone at once is safe."""
    os.read(0, 1)  # not sys.stdin: its lock would be held while the interpreter shuts down
    os._exit(1)


if __name__ == "__main__":
    every = Checkpoints(float(sys.argv[4]), int(sys.argv[5]) or None)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), every))
