"""Files that are either the old one or the new one, complete, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.experiment.errors import DamagedFile


def save(path: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers and strings in dicts and lists; nothing that needs pickle."""
    with replacing(path) as stream:
        torch.save(state, stream)


def load(path: Path, device: str) -> dict[str, Any] | None:
    """Return the saved state, or None where there is none. Only tensors and plain values are read (`weights_only`).

    Raises DamagedFile for what is not a whole state.
    """
    if not path.exists():
        return None
    again = begin_anew(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise DamagedFile(path, first_line(error), again) from error
    if not isinstance(state, dict) or "done" not in state:
        raise DamagedFile(path, "it holds no state of a run", again)
    return state


def begin_anew(checkpoint: Path) -> str:
    """Say what to do about a checkpoint that cannot be used."""
    return f"Restore it, or remove it: then the run in {checkpoint.parent} begins anew with its first step."


def read_json(path: Path, what_to_do: str = "Restore it, or remove it and run the command that made it.") -> Any:
    """Return what `write_json` has written. Raises DamagedFile for what is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedFile(path, first_line(error), what_to_do) from error


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """Return the values by name that `write_json` has written. Raises DamagedFile where one of these is missing."""
    record = read_json(path)
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise DamagedFile(
            path, f"it has no {missing[0]!r}", "Restore it, or remove it and run the command that made it."
        )
    return record


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary stream to a temporary file that replaces `path` once it has reached the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
