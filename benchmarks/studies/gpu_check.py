"""Everything that only a GPU can settle, in one call of nine minutes: `python -m benchmarks gpu-check --out DIR`.

The parts run in the order of their worth, each in a process of its own with a time limit. What a part has found is in
DIR/PART.json as soon as it is found, its output in DIR/PART.log; no part can stop the next. DIR/gpu-check.json has the
environment and how each part ended. `--dry-run` runs all of it on a CPU: small shapes, Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.execution.processes import kill_session, start
from benchmarks.experiment.errors import RunFailed, UsageError
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment

SECONDS = 540.0
PARTS = {
    "check": 65.0,
    "tests": 60.0,
    "kernels": 60.0,
    "step": 50.0,
    "sets": 60.0,
    "sets-compiled": 70.0,
    "clip-cost": 60.0,
    "explosion": 115.0,
}
"""The parts of `gpu_parts`, with the seconds that each may take."""


def run(options: argparse.Namespace) -> None:
    """Run the parts and print how each ended. Raises RunFailed, when all are done, where one failed."""
    if not options.dry_run and not torch.cuda.is_available():
        raise UsageError("--dry-run", f"torch {torch.__version__} sees no CUDA device; --dry-run runs without one.")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "environment": environment("cpu" if options.dry_run else "cuda") | _versions(),
        "dry_run": options.dry_run,
        "parts": {},
    }
    end = time.monotonic() + SECONDS
    for name, limit in PARTS.items():
        report["parts"][name] = ended = _run_part(name, out, min(limit, end - time.monotonic()), options.dry_run)
        atomic_files.write_json(out / "gpu-check.json", report)
        print(f"{name:14} {ended['ended']:10} {ended['seconds']:6.1f} s", flush=True)
    if failed := [name for name, part in report["parts"].items() if part["ended"] not in ("passed", "absent")]:
        raise RunFailed(f"{', '.join(failed)}: see {out}/PART.json and {out}/PART.log.")


def _versions() -> dict[str, str | None]:
    """Return the version of each package that a part may use; None where it is not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        package: version(package) for package in ("triton", "dion", "gram-newton-schulz", "quack-kernels", "pytest")
    }


def _run_part(name: str, out: Path, limit: float, dry_run: bool) -> dict[str, Any]:
    """Run a part, for `limit` seconds at most; return how it ended: passed, failed, absent, out of time."""
    found = out / f"{name}.json"
    found.unlink(missing_ok=True)
    begun = time.monotonic()
    if limit <= 0:
        return {"ended": "no time", "seconds": 0.0, "records": 0}
    with (out / f"{name}.log").open("w") as log:
        process = start(
            "benchmarks.studies.gpu_parts",
            *(name, str(out), *(["--dry-run"] if dry_run else [])),
            variables={"TRITON_INTERPRET": "1"} if dry_run else None,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill_session(process)
    records = atomic_files.read_record(found, "records")["records"] if found.exists() else []
    good = [record["ok"] for record in records if "ok" in record]
    if status is None:
        ended = "out of time"
    elif status or not all(good):
        ended = "failed"
    else:
        ended = "passed" if good else "absent"
    return {"ended": ended, "seconds": round(time.monotonic() - begun, 1), "records": len(records)}
