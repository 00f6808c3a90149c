"""Files that are either the old one or the new one, complete, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers and strings in dicts and lists; nothing that needs pickle."""
    with replacing(path) as stream:
        torch.save(state, stream)


def load(path: Path, device: str) -> dict[str, Any] | None:
    """Return the saved state, or None where there is none. Only tensors and plain values are read (`weights_only`)."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


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
