"""Trials of a run against kill -9: `python -m benchmarks kill-trials --trials 20 --processes 4 --out FILE.jsonl`.

Each trial starts a tiny run under torchrun, kills one rank with SIGKILL, drawn at random: after a step, or while a
checkpoint is being written. With `--all-ranks` every second trial kills all ranks at once. torchrun starts all ranks
again, and what the run ends with is compared with what it ends with undisturbed, bit for bit: every record but its
speed, and every tensor of the last checkpoint, of the model and of the optimizer. After a line of the environment, one
JSON line per trial:

    trial, arm, processes, ranks       which ranks were killed
    what, step, seen                   "after step" or "during save"; the step drawn, and the last one recorded by then
    folder                             during a save: what was in the folder being written, just before the kill
                                       (nothing: by then it was complete)
    restarts, resumed_from             as the ranks counted; the step of the checkpoint that each restart went on from
    final_loss, val_loss, state        of the last record; SHA-256 of the tensors of the last checkpoint
    equal                              whether all records and tensors are those of the undisturbed run
    seconds
    failure                            where torchrun gave up, with what status
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from benchmarks.execution.processes import ROOT, kill_session
from benchmarks.execution.processes import start as start_process
from benchmarks.execution.ranks import PIDS
from benchmarks.experiment.errors import RunFailed
from benchmarks.records import metrics
from benchmarks.records.environment import environment
from benchmarks.records.folders import CHECKPOINTS, METRICS, STARTS, run_folder

STEPS, EVERY = 12, 3  # updates, and updates between checkpoints
PATIENCE = 600.0  # seconds for one torchrun
_POLL = 0.002


@dataclass(frozen=True, slots=True)
class Trial:
    """Kills these ranks once `step` is recorded, or while the checkpoint of that step is written."""

    ranks: tuple[int, ...]
    step: int
    files: int  # that the folder of the save must hold; 0: after the step, whatever is saved


def run(options: argparse.Namespace) -> None:
    """Write the lines and print them. Raises RunFailed where a trial did not end as the undisturbed run."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    more = ["--experts", str(options.experts)]
    if options.async_checkpoints:
        more.append("--async-checkpoints")
    equal = []
    with tempfile.TemporaryDirectory() as scratch, options.out.open("w", buffering=1) as log:
        print(json.dumps({"environment": environment()}), file=log)
        drawn = options.trials, options.processes, options.arm, options.seed
        for line in lines(Path(scratch), *drawn, *more, all_ranks=options.all_ranks):
            equal.append(line["equal"])
            print(json.dumps(line), file=log)
            print(json.dumps(line), flush=True)
    told = f"{sum(equal)} of {len(equal)} trials ended as the undisturbed run, bit for bit."
    if not all(equal):
        raise RunFailed(told)
    print(told)


def lines(
    scratch: Path, trials: int, processes: int, arm: str, seed: int, *more: str, all_ranks: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the line of each trial; every third kills during a save. `more`: options of the runs.

    `all_ranks`: every second trial kills all ranks, and not one.
    """
    draws = random.Random(seed)
    reference = scratch / "undisturbed"
    finish(start(scratch, reference, processes, arm, *more))
    expected = records(reference, arm), state(reference, arm)
    for number in range(trials):
        saving = number % 3 == 2
        step = draws.randrange(EVERY, STEPS + 1, EVERY) if saving else draws.randrange(1, STEPS)
        files = draws.randint(1, processes + 1) if saving else 0
        rank = draws.randrange(processes)
        trial = Trial(tuple(range(processes)) if all_ranks and number % 2 else (rank,), step, files)
        begun, out = time.monotonic(), scratch / str(number)
        line = {"trial": number, "arm": arm, "processes": processes, "ranks": list(trial.ranks)}
        line |= {"what": "during save" if saving else "after step", "step": step}
        failure: dict[str, str] = {}
        process = start(scratch, out, processes, arm, *more)
        try:
            line |= kill_at(trial, out, process, arm)
            finish(process)
        except RunFailed as error:
            failure = {"failure": str(error)}
        finally:
            kill_session(process)
        seen = records(out, arm)
        starts = [json.loads(start) for start in (run_folder(out, arm, 0) / STARTS).read_text().splitlines()]
        line |= {"restarts": starts[-1]["restart"]}
        line |= {"resumed_from": [start["resumed_from"] for start in starts if start["restart"]]}
        kept = state(out, arm)
        line |= {"final_loss": seen[-1]["loss"], "val_loss": seen[-1].get("val_loss"), "state": kept}
        same = not failure and (seen, kept) == expected
        line |= {"equal": same, "seconds": round(time.monotonic() - begun, 1)}
        yield line | failure


def start(scratch: Path, out: Path, processes: int, arm: str, *more: str) -> subprocess.Popen[str]:
    """Start torchrun with a run of `STEPS` tiny steps and a checkpoint every `EVERY`, in a session of its own.

    What it and the ranks say goes to `out`.log.
    """
    text = scratch / "text.txt"
    if not text.exists():
        text.write_text(" ".join(map(str, range(20_000))))
    options = f"--preset cpu --arms {arm} --seeds 0 --steps {STEPS} --batch {processes} --tau 0.2 --precision fp32"
    words = [*options.split(), "--checkpoint-every", str(EVERY), "--data", str(text), "--out", str(out), *more]
    with out.with_suffix(".log").open("w") as log:
        own = {"stdout": log, "stderr": log, "cwd": ROOT, "start_new_session": True}
        return start_process("benchmarks", "explosion", *words, ranks=processes, restarts=3, **own)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for the end. Raises RunFailed where torchrun fails or does not end."""
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"not done {PATIENCE:g} s after the kill") from error
    if status:
        raise RunFailed(f"torchrun ended with status {status}")


def kill_at(trial: Trial, out: Path, process: subprocess.Popen[str], arm: str) -> dict[str, Any]:
    """Kill the ranks at the moment of the trial; return what had been recorded and written by then.

    Raises RunFailed where the run is over before that moment.
    """
    folder = run_folder(out, arm, 0)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunFailed(f"the run ended with status {process.returncode} before {trial}")
        complete = folder / CHECKPOINTS / f"step-{trial.step:09d}"
        written = _files(complete.with_suffix(".tmp"))
        saved = trial.files and (len(written) >= trial.files or complete.exists())  # over between two looks, perhaps
        if saved or (not trial.files and recorded(out, arm) >= trial.step):
            pids = [json.loads((out / PIDS / f"{rank}.json").read_text())["pid"] for rank in trial.ranks]
            try:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                raise RunFailed(f"a rank had ended before {trial}") from None
            return {"seen": recorded(out, arm), **({"folder": written} if trial.files else {})}
        time.sleep(_POLL)
    raise RunFailed(f"{trial} did not come within {PATIENCE:g} s")


def records(out: Path, arm: str) -> list[dict[str, Any]]:
    """Return all records of the run, without their speed."""
    every = metrics.read(run_folder(out, arm, 0) / METRICS)
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in every]


def state(out: Path, arm: str) -> str | None:
    """Return the SHA-256 of the names and bytes of all tensors of the newest checkpoint, None where there is none."""
    folders = sorted((run_folder(out, arm, 0) / CHECKPOINTS).glob("step-*[0-9]"))
    if not folders:
        return None
    entries = FileSystemReader(folders[-1]).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sorted(entries.items())
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(tensors, checkpoint_id=folders[-1], no_dist=True)
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def recorded(out: Path, arm: str) -> int:
    """Return the number of steps recorded so far."""
    with contextlib.suppress(FileNotFoundError):
        return (run_folder(out, arm, 0) / METRICS).read_bytes().count(b"\n")
    return 0


def _files(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in folder.iterdir())
    return []
