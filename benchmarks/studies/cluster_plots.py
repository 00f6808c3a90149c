"""The picture of the cluster on paper: shares of the optimizer, memory and utilisation over the number of GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.report.style import picture

COLOURS = {"muonclip": "#0072B2", "gathering": "#D55E00", "adamw": "#E69F00"}  # Okabe–Ito, colour-blind safe
LABELS = {"muonclip": "MuonClip", "gathering": "Muon that gathers", "adamw": "AdamW"}
_DASHES = {"k2": "solid", "moonlight": (0, (4, 2)), "llama": (0, (1, 1.5))}
_PARTS = {
    "parameters": "#0072B2",
    "gradients": "#56B4E9",
    "masters": "#E69F00",
    "momentum": "#F0E442",
    "activations": "#009E73",
}


def draw(result: Mapping[str, Any], path: Path, *, dark: bool = False) -> None:
    """Draw three panels of the steps on H800, as `paper` made them."""
    made = result["paper"]
    with picture(path, [result["environments"]["paper"]], "", dark=dark, figsize=(12.5, 4.6)) as figure:
        share, memory, utilisation = figure.subplots(1, 3)
        for name, rows in made["scaling"].items():
            for optimizer, colour in COLOURS.items():
                look = {"color": colour, "linestyle": _DASHES[name], "linewidth": 1.8}
                fitting = [row for row in rows if row["fits"]]
                ranks = [row["ranks"] for row in fitting]
                share.plot(ranks, [100 * row["shares"][optimizer] for row in fitting], **look)
                if optimizer == "muonclip":
                    utilisation.plot(ranks, [100 * row["mfu"] for row in fitting], **look)
        share.set_title("Optimizer, % of forward and backward")
        share.set_yscale("log")
        share.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        utilisation.set_title("Model FLOPs utilisation, %, MuonClip")
        utilisation.set_ylim(0)
        _memory(memory, made)
        for axis in (share, memory, utilisation):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlabel("H800 GPUs")
        for optimizer, colour in COLOURS.items():
            share.plot([], [], color=colour, linewidth=2.5, label=LABELS[optimizer])
        share.legend(frameon=False, fontsize=9)
        for name, title in made["titles"].items():
            utilisation.plot([], [], color=COLOURS["muonclip"], linestyle=_DASHES[name], label=title)
        utilisation.legend(frameon=False, fontsize=9, loc="lower left")


def _memory(axis: Axes, made: Mapping[str, Any]) -> None:
    """Stack what a GPU has of Kimi K2, below the line of what it can hold."""
    rows = made["scaling"]["k2"]
    ranks, below = [row["ranks"] for row in rows], [0.0] * len(rows)
    widths = [0.55 * each for each in ranks]
    for part, colour in _PARTS.items():
        sizes = [row["memory"][part] / 1e9 for row in rows]
        axis.bar(ranks, sizes, widths, bottom=below, color=colour, label=part)
        below = [each + size for each, size in zip(below, sizes, strict=True)]
    limit = made["machines"]["h800"]["memory"] / 1e9
    axis.axhline(limit, linewidth=1.2, linestyle=(0, (4, 3)), color=axis.xaxis.label.get_color())
    axis.annotate(f"{limit:g} GB", (1, limit), (-4, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right")  # fmt: skip
    axis.set_ylim(0, 160)
    axis.set_title("Kimi K2, GB for each GPU")
    axis.legend(frameon=False, fontsize=9, loc="upper right")
