"""The process of one run: `python -m benchmarks.execution.worker FOLDER ARM SEED SECONDS STEPS`, started by `workers`.

It tells its progress on standard output, one JSON object per line; SIGTERM makes it save and leave; it does not outlive
the command that started it, whose end closes its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.execution.progress import news
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.errors import DamagedFile
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.folders import CONFIG, run_folder
from benchmarks.training.run import Run, Schedule


def main(folder: Path, arm: str, seed: int, checkpoints: Schedule) -> int:
    """Train one run; return its exit status: 0 the run is finished, 1 it was told to stop, 2 its
    checkpoint is damaged."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    experiment = Experiment.from_json(json.loads((folder / CONFIG).read_text())["config"])
    torch.set_num_threads(experiment.threads)
    corpus = open_corpus(None if experiment.data.path is None else Path(experiment.data.path))
    try:
        run = Run(experiment, corpus, run_folder(folder, arm, seed), experiment.arm(arm), seed)
    except DamagedFile as error:
        print(error, file=sys.stderr)  # which the command shows
        return 2
    _tell({"step": run.done})
    run.train(lambda record: _tell(news(record)), stop.is_set, checkpoints)
    return 0 if run.finished else 1


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)  # NaN included, which Python reads back


def _leave_with_parent() -> None:
    """End when the parent does; a checkpoint is whole or absent, so that this is safe at any time."""
    os.read(0, 1)  # not sys.stdin: its lock would be held while the interpreter shuts down
    os._exit(1)


if __name__ == "__main__":
    every = Schedule(float(sys.argv[4]), int(sys.argv[5]) or None)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), every))
