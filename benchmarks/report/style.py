"""What all pictures share: their look, and the line at the foot that says what they were made with."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.experiment.arms import label, model_changes, parse, setup
from benchmarks.experiment.experiment import Panel
from benchmarks.records.atomic_files import replacing

INK, QUIET, FAINT = "#333333", "#6E6E6E", "#999999"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # titles and commands hold file names, and those may hold dollar signs
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "grid.color": "#e8e8e8",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
}
DPI = 120
DASHED = (0, (3, 3))  # drawn over a solid line that coincides with it, so that both are seen
THRESHOLD: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3))}  # the line of τ
_FOOTER_SIZE = 9.0  # points
_MARGIN = 0.06  # inches, left and right of it


def caption(panel: Panel, arm: str) -> str:
    """An arm with its rate, for titles and legends: "Muon, QK-norm, rate 0.03 (changes the model)"."""
    rate = "" if "lr" in parse(arm)[1] else f", rate {setup(panel, arm).lr:g}"
    return f"{label(arm)}{rate}{' (changes the model)' if model_changes(panel, arm) else ''}"


def footer(environment: Mapping[str, Any]) -> str:
    """Command, date, versions and machine, of an environment as `benchmarks.environment` records it."""
    trained = ("jax", "jaxlib", "optax") if "jax" in environment else ("torch",)  # which JAX's runs only measure with
    commit = str(environment.get("git_commit") or "")
    if commit:
        commit = f" (commit {commit[:7]}{' with changes' if commit.endswith('+') else ''})"
    versions = [
        f"muonclip {environment['muonclip']}{commit}" if "muonclip" in environment else "",
        *(f"{package} {environment[package]}" for package in trained if package in environment),
        f"Python {environment['python']}" if "python" in environment else "",
    ]
    machine = [
        f"{environment['gpu']}" if "gpu" in environment else "",
        f"{environment['cores']} cores of {environment['cpu']}" if {"cores", "cpu"} <= environment.keys() else "",
    ]
    parts = [
        environment.get("command", ""),
        str(environment.get("date", "")).partition("T")[0],
        ", ".join(filter(None, versions)),
        ", ".join(filter(None, machine)),
    ]
    return " · ".join(filter(None, parts))


def save(figure: Figure, path: Path, environments: Sequence[Mapping[str, Any]]) -> None:
    """Write the PNG with its footer, a line for each different one, and close the figure."""
    figure.set_dpi(DPI)
    lines = [line for text in dict.fromkeys(map(footer, environments)) for line in _wrapped(text, figure)]
    if lines:
        figure.set_figheight(figure.get_figheight() + 0.18 * len(lines))  # the axes keep their size
        left = _MARGIN / figure.get_figwidth()
        figure.supxlabel("\n".join(lines), x=left, ha="left", size=_FOOTER_SIZE, color=QUIET)
    with replacing(path) as stream:
        figure.savefig(stream, dpi=DPI, format="png")
    pyplot.close(figure)


def _wrapped(text: str, figure: Figure) -> list[str]:
    """Lines that fit the figure's width, broken between the parts where that is possible."""
    room = DPI * (figure.get_figwidth() - 2 * _MARGIN)
    probe = figure.text(0, 0, "", size=_FOOTER_SIZE)

    def width(line: str) -> float:
        probe.set_text(line)
        return probe.get_window_extent().width

    lines: list[str] = []
    for part in text.split(" · ") if text else []:
        if lines and width(f"{lines[-1]} · {part}") <= room:
            lines[-1] += f" · {part}"
            continue
        letters, broken = len(part), [part]
        while (widest := max(map(width, broken))) > room:
            letters = min(letters - 1, math.ceil(letters * room / widest))
            broken = textwrap.wrap(part, letters)
        lines += broken
    probe.remove()
    return lines
