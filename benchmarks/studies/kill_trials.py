"""`python -m benchmarks.studies.kill_trials --trials 20 --processes 4 --out FILE.jsonl`: does a run survive kill -9?

Each trial starts a tiny run under torchrun, kills one rank with SIGKILL, drawn at random: after a step, or while a
checkpoint is being written. torchrun starts all ranks again, and what the run ends with is compared with what it ends
with undisturbed, bit for bit: every record but its speed. After a line of the environment, one JSON line per trial:

    trial, arm, processes, rank        which rank was killed
    what, step, seen                   "after step" or "during save"; the step drawn, and the last one recorded by then
    folder                             during a save: what was in the folder being written, just before the kill
                                       (nothing: by then it was complete)
    restarts, resumed_from             as the ranks counted; the step of the checkpoint that each restart went on from
    final_loss, val_loss, equal        of the last record; whether all records are those of the undisturbed run
    seconds
    failure                            where torchrun gave up, with what status
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.execution.rank_runs import STARTS
from benchmarks.execution.ranks import PIDS
from benchmarks.execution.worker import run_folder
from benchmarks.records import metrics
from benchmarks.records.environment import environment
from benchmarks.training.run import METRICS

STEPS, EVERY = 12, 3  # updates, and updates between checkpoints
_PATIENCE = 600.0  # seconds for one torchrun
_POLL = 0.002


@dataclass(frozen=True, slots=True)
class Trial:
    """Rank `rank` is killed once `step` is recorded, or while the checkpoint of that step is written."""

    rank: int
    step: int
    files: int  # that the folder of the save must hold; 0: after the step, whatever is saved


class Missed(RuntimeError):
    """The run was over before the moment that the trial waits for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 every trial ended as the undisturbed run, 1 one did not."""
    options = parser().parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, options.out.open("w") as log:
        more = ["--async-checkpoints"] if options.async_checkpoints else []
        lines = kill_trials(Path(scratch), options.trials, options.processes, options.arm, options.seed, *more)
        equal = []
        made = environment() | {
            "command": shlex.join(["python", "-m", "benchmarks.studies.kill_trials", *sys.argv[1:]])
        }
        log.write(json.dumps({"environment": made}) + "\n")
        for line in lines:
            equal.append(line["equal"])
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(json.dumps(line), flush=True)
    print(f"{sum(equal)} of {len(equal)} trials ended as the undisturbed run, bit for bit.")
    return 0 if all(equal) else 1


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.kill_trials", description="Does a run survive kill -9?"
    )
    options.add_argument("--trials", type=int, default=20, metavar="N")
    options.add_argument("--processes", type=int, default=4, metavar="N")
    options.add_argument("--async-checkpoints", action="store_true", help="written beside the training")
    options.add_argument("--arm", default="muonclip")
    options.add_argument("--seed", type=int, default=0, help="of the draws")
    options.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    return options


def kill_trials(scratch: Path, trials: int, processes: int, arm: str, seed: int, *more: str) -> Any:
    """Yields the line of each trial; every third kills during a save. `more`: options of the runs."""
    draws = random.Random(seed)
    reference = scratch / "undisturbed"
    finish(start(scratch, reference, processes, arm, *more))
    expected = records(reference, arm)
    for number in range(trials):
        during_save = number % 3 == 2
        step = draws.randrange(EVERY, STEPS + 1, EVERY) if during_save else draws.randrange(1, STEPS)
        files = draws.randint(1, processes + 1) if during_save else 0
        trial = Trial(draws.randrange(processes), step, files)
        begun = time.monotonic()
        out = scratch / str(number)
        process = start(scratch, out, processes, arm, *more)
        told, failure = {}, {}
        try:
            told = kill_at(trial, out, process, arm)
            finish(process)
        except subprocess.TimeoutExpired as error:
            failure = {"failure": f"not done {error.timeout:g} s after the kill"}
        except RuntimeError as error:
            failure = {"failure": str(error)}
        finally:
            stop(process)
        seen = records(out, arm)
        starts = [json.loads(line) for line in (run_folder(out, arm, 0) / STARTS).read_text().splitlines()]
        yield {
            "trial": number,
            "arm": arm,
            "processes": processes,
            "rank": trial.rank,
            "what": "during save" if during_save else "after step",
            "step": trial.step,
            **told,
            "restarts": starts[-1]["restart"],
            "resumed_from": [start["resumed_from"] for start in starts if start["restart"]],
            "final_loss": seen[-1]["loss"],
            "val_loss": seen[-1].get("val_loss"),
            "equal": not failure and seen == expected,
            "seconds": round(time.monotonic() - begun, 1),
            **failure,
        }


def command(out: Path, text: Path, processes: int, arm: str) -> list[str]:
    """A run of `STEPS` tiny steps with a checkpoint every `EVERY`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launch = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "3"]
    options = f"--preset cpu --arms {arm} --seeds 0 --steps {STEPS} --batch {processes} --tau 0.2 --precision fp32"
    more = ["--checkpoint-every", str(EVERY), "--data", str(text), "--out", str(out)]
    return [*torchrun, *launch, "-m", "benchmarks", "explosion", *options.split(), *more]


def start(scratch: Path, out: Path, processes: int, arm: str, *more: str) -> subprocess.Popen[str]:
    """torchrun, in a session of its own; what it and the ranks say goes to `out`.log."""
    text = scratch / "text.txt"
    if not text.exists():
        text.write_text(" ".join(map(str, range(20_000))))
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command(out, text, processes, arm), *more],
            stdout=log,
            stderr=log,
            text=True,
            env=environment,
            cwd=root,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str]) -> None:
    """Raises RuntimeError where it fails."""
    if status := process.wait(_PATIENCE):
        raise RuntimeError(f"torchrun ended with status {status}")


def stop(process: subprocess.Popen[str]) -> None:
    """torchrun and its ranks, if they are still there."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_at(trial: Trial, out: Path, process: subprocess.Popen[str], arm: str) -> dict[str, Any]:
    """Kill the rank at the moment of the trial; what had been recorded and written by then."""
    folder = run_folder(out, arm, 0)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Missed(f"the run ended with status {process.returncode} before {trial}")
        complete = folder / "checkpoints" / f"step-{trial.step:09d}"
        written = _files(complete.with_suffix(".tmp"))
        saved = trial.files and (len(written) >= trial.files or complete.exists())  # over between two looks, perhaps
        if saved or (not trial.files and _recorded(folder) >= trial.step):
            pid = json.loads((out / PIDS / f"{trial.rank}.json").read_text())["pid"]
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                raise Missed(f"rank {trial.rank} had ended before {trial}") from None
            return {"seen": _recorded(folder), **({"folder": written} if trial.files else {})}
        time.sleep(_POLL)
    raise Missed(f"{trial} did not come within {_PATIENCE:g} s")


def records(out: Path, arm: str) -> list[dict[str, Any]]:
    """All of the run's, but for their speed."""
    every = metrics.read(run_folder(out, arm, 0) / METRICS)
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in every]


def records_so_far(out: Path, arm: str) -> int:
    return _recorded(run_folder(out, arm, 0))


def _recorded(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (folder / METRICS).read_bytes().count(b"\n")
    return 0


def _files(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in folder.iterdir())
    return []


if __name__ == "__main__":
    sys.exit(main())
