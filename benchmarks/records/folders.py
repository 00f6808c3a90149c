"""The files of an experiment's folder, and of a run's inside it.

config.json                   what the experiment is, and what its first start was made with
summary.json                  what its finished runs come to
runs/ARM-SEED/                metrics.jsonl, result.json, and the checkpoint that the run goes on from
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

CONFIG, SUMMARY = "config.json", "summary.json"
METRICS, RESULT, LOG = "metrics.jsonl", "result.json", "log.txt"
CHECKPOINT = "checkpoint.pt"  # of one process
CHECKPOINTS, STARTS = "checkpoints", "starts.jsonl"  # of many ranks


class Result(TypedDict):
    """The summary that a finished run writes next to its records.

    Seconds are summed over the parts of an interrupted run.
    """

    steps: int
    diverged: bool  # ended early by a loss or gradient that is not finite
    final_val_loss: float  # mean nats per token
    wall_seconds: float
    train_seconds: float  # the steps alone, without validation and checkpoints


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """Return the run's folder in that of its experiment."""
    return folder / "runs" / f"{arm}-{seed}"
