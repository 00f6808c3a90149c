"""The Markdown pages of the studies: a template of jinja2 for each, next to its study."""

from __future__ import annotations

from numbers import Number
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.records.environment import made_with


def render(name: str, **values: Any) -> str:
    """Fill in a template. `f` formats a number, – where there is none; `made_with` words an environment."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"f": lambda value, form: format(value, form) if isinstance(value, Number) else "–"}
    environment.filters |= {"made_with": lambda recorded: f"Made with {made_with(recorded)}"}
    template = environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return template.render(values)
