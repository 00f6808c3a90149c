"""The environment of a result: as it is recorded, and as the one line that pictures, pages and tables show."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import muonclip
from benchmarks.experiment.settings import Framework


def environment(device: str = "cpu", framework: Framework = "torch") -> dict[str, Any]:
    """Return versions, machine, commit, date (UTC) and command; `gpu` where that is the device."""
    packages = ("jax", "jaxlib", "optax") if framework == "jax" else ()
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return gpu | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
        "muonclip": muonclip.__version__,
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def made_with(environment: Mapping[str, Any]) -> str:
    """Write command, date, versions and machine, as `environment` recorded them, in one line."""
    trained = ("jax", "jaxlib", "optax") if "jax" in environment else ("torch",)  # which JAX's runs only measure with
    commit = str(environment.get("git_commit") or "")
    commit = commit and f" (commit {commit[:7]}{' with changes' if commit.endswith('+') else ''})"
    versions = [
        f"muonclip {environment['muonclip']}{commit}" if "muonclip" in environment else "",
        *(f"{package} {environment[package]}" for package in trained if package in environment),
        f"Python {environment['python']}" if "python" in environment else "",
    ]
    machine = [
        environment.get("gpu") or "",
        f"{environment['cores']} cores of {environment['cpu']}" if {"cores", "cpu"} <= environment.keys() else "",
    ]
    parts = [
        environment.get("command", ""),
        str(environment.get("date", "")).partition("T")[0],
        ", ".join(filter(None, versions)),
        ", ".join(filter(None, machine)),
    ]
    return " · ".join(filter(None, parts))


def available_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the commit of this source tree, with "+" where files differ from it; None outside a repository."""
    root = str(Path(__file__).resolve().parents[2])
    commit = _output("git", "-C", root, "rev-parse", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
