"""Many runs side by side, each in a process of its own, with one progress display and one way to stop.

However this ends (Ctrl-C, SIGTERM, kill -9, a failing run), no worker stays behind and every run can be resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.execution.processes import start
from benchmarks.execution.progress import Progress
from benchmarks.experiment.arms import Arm
from benchmarks.experiment.errors import RunFailed, UsageError
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.folders import LOG, RESULT, run_folder
from benchmarks.training.run import Schedule

_GRACE_SECONDS = 20.0  # for a worker to finish its step and save


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    experiment: Experiment
    folder: Path  # of the experiment
    arm: Arm
    seed: int

    @property
    def title(self) -> str:
        return f"{self.experiment.name} {self.arm.name}/{self.seed}".lstrip()

    @property
    def steps(self) -> int:
        return self.arm.training.steps

    @property
    def run(self) -> Path:
        return run_folder(self.folder, self.arm.name, self.seed)

    @property
    def finished(self) -> bool:
        return (self.run / RESULT).exists()


@contextlib.contextmanager
def locked(folder: Path, patience: float = 10.0) -> Iterator[int]:
    """Hold a lock on the folder, so that only one command at a time writes there.

    Workers inherit the lock, so it is free when all are gone.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"another command is writing to {folder}; wait for it, or choose another folder."
                    raise UsageError("--out", message) from None
                time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def run_all(jobs: Sequence[Job], *, workers: int, lock: int, checkpoints: Schedule) -> None:
    """Run what is not finished yet, `workers` at a time. Raises RunFailed, KeyboardInterrupt (also for SIGTERM)."""
    waiting = [job for job in jobs if not job.finished]
    events: queue.SimpleQueue[tuple[Job, dict[str, Any] | None]] = queue.SimpleQueue()
    processes: dict[Job, subprocess.Popen[str]] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress = Progress(total=sum(job.steps for job in jobs), done=sum(job.steps for job in jobs if job.finished))
    try:
        while waiting or processes:
            while waiting and len(processes) < workers:
                job = waiting.pop(0)
                processes[job] = _start(job, lock, checkpoints, events)
            job, message = events.get()
            if message is not None:
                progress.update(job.title, message)
            elif status := _end(processes.pop(job)):
                raise RunFailed(f"{job.title} failed with status {status}:\n{_log_tail(job)}")
            else:
                progress.finish(job.title, job.steps)
    finally:
        progress.close()
        _stop(list(processes.values()))
        signal.signal(signal.SIGTERM, before)


def for_jax(threads: int) -> dict[str, str]:
    """Keep XLA to its share of the cores: it takes a thread for every core that it sees."""
    single = " --xla_cpu_multi_thread_eigen=false" if threads == 1 else ""
    flags = os.environ.get("XLA_FLAGS", "") + single
    return {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(threads), "XLA_FLAGS": flags}


def _start(job: Job, lock: int, checkpoints: Schedule, events: queue.SimpleQueue[Any]) -> subprocess.Popen[str]:
    job.run.mkdir(parents=True, exist_ok=True)
    threads = job.experiment.threads
    words = (job.folder, job.arm.name, job.seed, checkpoints.seconds, checkpoints.steps or 0)
    with (job.run / LOG).open("w") as log:
        process = start(
            "benchmarks.execution.worker",
            *map(str, words),
            threads=threads,
            variables=for_jax(threads) if job.experiment.framework == "jax" else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C reaches this process alone, which then tells the workers
        )
    threading.Thread(target=_listen, args=(job, process, events), daemon=True).start()
    return process


def _listen(job: Job, process: subprocess.Popen[str], events: queue.SimpleQueue[Any]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            events.put((job, json.loads(line)))
    events.put((job, None))


def _stop(processes: list[subprocess.Popen[str]]) -> None:
    """Ask them to save and leave; end those that do not in time, or at a second Ctrl-C."""
    for process in processes:
        process.terminate()
    try:
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()
    for process in processes:
        _end(process)


def _end(process: subprocess.Popen[str]) -> int:
    status = process.wait()
    assert process.stdin is not None
    process.stdin.close()
    return status


def _log_tail(job: Job) -> str:
    log = job.run / LOG
    return "".join(log.read_text().splitlines(keepends=True)[-15:]) + f"(all of it: {log})"
