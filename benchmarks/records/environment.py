"""The environment of a result: as it is recorded, and as the one line that pictures, pages and tables show."""

from __future__ import annotations

import datetime
import importlib.metadata
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
from muonclip.selftest import available_cores, cpu_model


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
    commit = environment.get("git_commit") or ""
    changed = " with changes" if commit.endswith("+") else ""
    known = {name: value for name, value in environment.items() if value}
    known["commit"] = f" (commit {commit[:7]}{changed})" if commit else ""
    trained = ("jax", "jaxlib", "optax") if "jax" in environment else ("torch",)  # which JAX's runs only measure with
    versions = ["muonclip {muonclip}{commit}", *(f"{name} {{{name}}}" for name in trained), "Python {python}"]
    parts = [["{command}"], ["{date:.10}"], versions, ["{gpu}", "{cores} cores of {cpu}"]]
    written = [", ".join(filter(None, (_filled(each, known) for each in part))) for part in parts]
    return " · ".join(filter(None, written))


def git_commit() -> str | None:
    """Return the commit of this source tree, with "+" where files differ from it; None outside a repository."""
    root = str(Path(__file__).resolve().parents[2])
    return _output("git", "-C", root, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+")


def _filled(words: str, known: Mapping[str, Any]) -> str:
    """Fill the words in; return nothing where one of their values is not known."""
    try:
        return words.format_map(known)
    except KeyError:
        return ""


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
