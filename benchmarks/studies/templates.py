"""The Markdown pages of the studies: a template of jinja2 for each, next to its study."""

from __future__ import annotations

from numbers import Number
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.experiment.errors import UsageError
from benchmarks.records.environment import made_with

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def render(name: str, **values: Any) -> str:
    """Fill in a template. `f` formats a number, – where there is none; `made_with` words an environment."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"f": lambda value, form: format(value, form) if isinstance(value, Number) else "–"}
    environment.filters |= {"made_with": lambda recorded: f"Made with {made_with(recorded)}"}
    template = environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return template.render(values)


def write_between_marks(page: Path, sections: str) -> None:
    """Put the sections between the marks of the page. Raises UsageError without marks."""
    try:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise UsageError("--page", f"{page} does not have the lines {BEGIN} and {END}, once each.") from error
    page.write_text(f"{before}{BEGIN}\n{sections}{END}{after}", encoding="utf-8")
