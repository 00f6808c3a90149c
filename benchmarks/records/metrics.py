"""The record of a run: one JSON object per step in a text file that survives being cut anywhere.

    step              updates done, from 1
    loss              mean nats per token of the update's batch, before the update
    lr                the update's rate
    grad_norm         global gradient norm before clipping
    max_logits        {attention: [heads]}, largest logit of the update's forward, before a soft cap
    clipped_heads     heads that the update rescaled
    tokens_per_second of this step: forward, backward and update
    probe_loss        where it was asked for: mean nats per token after the update, on the same held-out windows always
    val_loss          where the validation text was evaluated: mean nats per token after the update

and where it was, on a sample of that text and after the update (`benchmarks.training.probe`):

    attention_entropy {attention: [heads]}, nats, mean over queries
    query_norms       {attention: [heads]}, spectral norm of the head's rows of W_q (MLA: W_uq)
    key_norms         {attention: [key heads]}, of W_k (MLA: W_uk, without the shared rotary key)
    update_rms        root mean square of (W_t − W_{t−1}) / rate over the layers' matrices, decay and clip included

JSON has no infinities and no NaN; they are written as the strings "inf", "-inf", "nan", which `float` reads back.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.experiment.errors import DamagedFile


class MetricsLog:
    """Appends records; `begin(step)` drops every line after the step that a checkpoint goes back to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> bool:
        """Cut the file after the record of `step`. False: not all records up to it were there, and now it is empty."""
        with self.path.open("a+b") as stream:
            stream.seek(0)
            steps = [_step_of(line) for line in itertools.islice(stream, step)]
            found = steps == list(range(1, step + 1))
            stream.truncate(stream.tell() if found else 0)
        return found

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("ab") as stream:
            stream.write((json.dumps(to_json(record), allow_nan=False) + "\n").encode())

    def sync(self) -> None:
        """Write the file to the disk, so that no checkpoint is ever ahead of its records."""
        with self.path.open("ab") as stream:
            os.fsync(stream.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Read all records, numbers as numbers. Raises DamagedFile, naming the line, for one that is not a record."""
    records: list[dict[str, Any]] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if _step_of(line) != number:
                raise damaged(f"{path}, line {number},", f"it is not the record of step {number}", path)
            records.append(from_json(json.loads(line)))
            wrong = next((name for name, value in records[-1].items() if not _is_measure(value)), None)
            if wrong is not None:
                raise damaged(f"{path}, line {number},", f"its {wrong} is not a measure", path)
    return records


def damaged(where: object, why: str, path: Path) -> DamagedFile:
    """Return the error for records that are not what a run has written."""
    again = f"Restore it, or remove {path.parent} and start the command again: it makes that run anew."
    return DamagedFile(where, why, again)


def to_json(value: Any) -> Any:
    """Return the value with every non-finite float as a string."""
    return _each(value, lambda item: str(item) if isinstance(item, float) and not math.isfinite(item) else item)


def from_json(value: Any) -> Any:
    """Invert `to_json`."""
    return _each(value, lambda item: float(item) if item in ("inf", "-inf", "nan") else item)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    return [_each(item, change) for item in value] if isinstance(value, list | tuple) else change(value)


def _is_measure(value: Any) -> bool:
    """Tell whether it is a number, or has a list of numbers for each attention."""
    if isinstance(value, dict):
        return all(isinstance(heads, list) and all(map(_is_number, heads)) for heads in value.values())
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _step_of(line: bytes) -> int | None:
    """Return the step of a complete line."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
