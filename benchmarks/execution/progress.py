"""One bar over all runs with the time left; a plain line per run now and then where there is no terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm

_LINE_SECONDS = 15.0


def news(record: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a step's record that is shown."""
    logits = [logit for heads in record["max_logits"].values() for logit in heads]
    return {"step": record["step"], "loss": record["loss"], "max_logit": max(logits, default=math.nan)}


class Progress:
    """Counts the steps of all runs; writes to standard error where it is shown."""

    def __init__(self, *, total: int, done: int, shown: bool = True) -> None:
        self._terminal, self._shown = shown and sys.stderr.isatty(), shown
        self._begun = time.monotonic()
        self._new, self._left = 0, total - done  # steps made since the command began, and those still to make
        self._steps: dict[str, int] = {}
        self._news: dict[str, str] = {}
        self._lines: dict[str, float] = {}
        self._bar = tqdm(
            total=total, initial=done, unit="step", disable=not self._terminal, dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar:20}| {n}/{total} steps [{elapsed}, {remaining} left] {desc}",
        )  # fmt: skip

    def update(self, title: str, steps: int, record: dict[str, Any]) -> None:
        """Note that a run is at `record["step"]` of `steps`; its first record says where it begins."""
        made = record["step"] - self._steps.get(title, 0)
        if title in self._steps:
            self._new += made
        elif self._terminal:  # a bar that is off has no such field
            self._bar.initial += made
        self._advance(title, record["step"])
        if "loss" not in record:
            return
        self._news[title] = f"{title} loss {record['loss']:.2f} max logit {record['max_logit']:.0f}"
        self._bar.set_description_str(" · ".join(self._news.values()), refresh=False)
        now = time.monotonic()
        if not self._terminal and now - self._lines.get(title, self._begun) >= _LINE_SECONDS:
            self._lines[title] = now
            rate = self._new / (now - self._begun)
            left = tqdm.format_interval(self._left / rate) if rate else "?"
            self._print(f"{self._news[title]}, step {record['step']}/{steps}; {left} left for all")

    def finish(self, title: str, steps: int) -> None:
        """Note that a run is done, perhaps before its last step."""
        self._advance(title, steps)
        self._print(f"{self._news.pop(title, title)}, finished")

    def close(self) -> None:
        self._bar.close()

    def _advance(self, title: str, step: int) -> None:
        made = step - self._steps.get(title, 0)
        self._steps[title] = step
        self._left -= made
        self._bar.update(made)

    def _print(self, line: str) -> None:
        if self._terminal:
            self._bar.write(line, file=sys.stderr)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)
