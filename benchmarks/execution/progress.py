"""One bar over the steps of all runs, with the time left: redrawn on a terminal, elsewhere a line every 15 seconds."""

from __future__ import annotations

import math
import sys
from typing import Any


def news(record: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a step's record that is shown."""
    logits = [logit for heads in record["max_logits"].values() for logit in heads]
    return {"step": record["step"], "loss": record["loss"], "max_logit": max(logits, default=math.nan)}


class Progress:
    """Counts the steps of all runs; writes to standard error where it is shown."""

    def __init__(self, *, total: int, done: int, shown: bool = True) -> None:
        from tqdm import tqdm  # which commands that train nothing do without

        terminal = sys.stderr.isatty()
        form = "{percentage:3.0f}% |{bar:20}| {n}/{total} steps [{elapsed}, {remaining} left] {desc}"
        self._shown, self._steps, self._news = shown, dict[str, int](), dict[str, str]()
        self._bar = tqdm(
            total=total, disable=not shown, dynamic_ncols=True, bar_format=form + "\n" * (not terminal),
            mininterval=0.1 if terminal else 15, maxinterval=10 if terminal else 15,
        )  # fmt: skip
        self._resume(done)

    def update(self, title: str, record: dict[str, Any]) -> None:
        """Note that a run is at `record["step"]`; its first record says where it begins."""
        made = record["step"] - self._steps.get(title, 0)
        if title not in self._steps:
            self._resume(made)
        else:
            self._bar.update(made)
        self._steps[title] = record["step"]
        if "loss" in record:
            self._news[title] = f"{title} loss {record['loss']:.2f} max logit {record['max_logit']:.0f}"
            self._bar.set_description_str(" · ".join(self._news.values()), refresh=False)

    def finish(self, title: str, steps: int) -> None:
        """Note that a run is done, perhaps before its last step."""
        self.update(title, {"step": steps})
        if self._shown:
            self._bar.write(f"{self._news.pop(title, title)}, finished", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def _resume(self, steps: int) -> None:
        """Count steps that an earlier command made: they say nothing of this one's speed."""
        if self._shown:
            self._bar.initial += steps
            self._bar.n += steps
