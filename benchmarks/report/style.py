"""The style of all pictures: their look, how lines are drawn, and the foot that says what they were made with."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.records.atomic_files import replacing
from benchmarks.records.environment import made_with
from benchmarks.report.charts import Line

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
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0),
    "lines.solid_capstyle": "round",
}
_DARK: dict[Any, Any] = {  # on what is dark already, whatever it is
    **dict.fromkeys(("text.color", "axes.labelcolor"), "#e6e6e6"),
    **dict.fromkeys(("xtick.color", "ytick.color"), "#b8b8b8"),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "axes.edgecolor": "#8a8a8a",
    "grid.color": "#4a4a4a",
}
DPI = 120
DASHED = (0, (3, 3))  # drawn over a solid line that coincides with it, so that both are seen
_LOOKS: dict[str, dict[str, Any]] = {
    "seed": {"linewidth": 0.8, "alpha": 0.45},
    "mean": {"linewidth": 2, "dash_capstyle": "butt", "zorder": 2.8},
    "marks": {"linestyle": "none", "marker": "x", "markersize": 4, "alpha": 0.6, "zorder": 3},
}
_FOOT_SIZE = 9.0  # points
_MARGIN = 0.06  # inches, left and right of it


def draw_lines(axis: Axes, lines: Sequence[Line], **looks: Mapping[str, Any]) -> None:
    """Draw thin lines for seeds, thick ones for their mean, and marks; `looks` changes what a kind looks like."""
    for line in lines:
        look: dict[str, Any] = {"color": ink(line.colour), **_LOOKS[line.kind], **looks.get(line.kind, {})}
        if line.dashed:
            look["linestyle"] = DASHED
        axis.plot(line.x, line.y, **look)


def ink(colour: str) -> str:
    """Return the colour of a line: what is black is drawn in the colour of the text, which is light on dark pages."""
    return pyplot.rcParams["text.color"] if colour == "#000000" and pyplot.rcParams["text.color"] != INK else colour


def draw_threshold(axis: Axes, tau: float) -> None:
    axis.axhline(tau, color=pyplot.rcParams["text.color"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=2.5)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axis.annotate(f"τ = {tau:g}", (1, tau), (4, 0), **place)


def plain_log(axis: Axis, subs: tuple[float, ...] = (1.0, 3.0)) -> None:
    """Label a logarithmic axis with plain numbers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


@contextlib.contextmanager
def picture(
    path: Path, environments: Sequence[Mapping[str, Any]], title: str, *, dark: bool = False, **size: Any
) -> Iterator[Figure]:
    """Open a figure to draw into, which is then written to `path`; `dark`: for dark pages, and without a ground.

    Its title is on top, and at its foot a line for each different environment.
    """
    with pyplot.rc_context({**STYLE, **_DARK} if dark else STYLE):
        figure = pyplot.figure(**size, layout="constrained", dpi=DPI)
        if title:
            figure.suptitle(title, x=0.01, ha="left", size=11.5)
        yield figure
        _write_foot(figure, [line for line in dict.fromkeys(map(made_with, environments)) if line])
        with replacing(path) as stream:
            figure.savefig(stream, dpi=DPI, format="png")
        pyplot.close(figure)


def _write_foot(figure: Figure, lines: Sequence[str]) -> None:
    """Write the lines below the axes, which keep their size; broken where they are wider than the figure."""
    room = DPI * (figure.get_figwidth() - 2 * _MARGIN)
    foot = figure.supxlabel("", x=_MARGIN / figure.get_figwidth(), ha="left", size=_FOOT_SIZE)
    foot.set_color(pyplot.rcParams["xtick.color"])
    letters = max(map(len, lines), default=0)
    while letters:
        foot.set_text("\n".join(textwrap.fill(line, letters, break_on_hyphens=False) for line in lines))
        wide = foot.get_window_extent().width / room
        if wide <= 1:
            break
        letters = min(letters - 1, math.ceil(letters / wide))
    figure.set_figheight(figure.get_figheight() + 0.18 * (foot.get_text().count("\n") + bool(lines)))
