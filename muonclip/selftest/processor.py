"""The processor of this machine: its name, the cores that this process may use, its units for matrix products."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_UNITS = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX": "amx_bf16"}


def cpu_model() -> str:
    """Return the name of the processor."""
    model = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return model[1] if model else _brand_of_macs() or platform.processor() or platform.machine()


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instructions() -> dict[str, bool]:
    """Tell which units for products the processor has; empty where the system does not say it."""
    flags = re.search(r"^flags\s*:\s*(.+)", _cpuinfo(), re.MULTILINE)
    return {name: flag in flags[1].split() for name, flag in _UNITS.items()} if flags else {}


def _cpuinfo() -> str:
    return _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""


def _brand_of_macs() -> str:
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
