"""Real text as tokens, split once into train and validation, and batches that depend on nothing but (seed, step).

Sources:
    none given        the byte text of this Python's standard library sources: on every machine, no download
    a folder          the bytes of its text files (no NUL byte), hidden ones left out
    .bin .u16 .u32    a flat file of little-endian token ids: uint16, uint16, uint32
    any other file    its bytes
Several files are split by file: a tenth of them, those whose path has the smallest SHA-256, is validation. One file is
split by position: the last tenth is validation.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiment.errors import UsageError

TOKEN_DTYPES = {".bin": np.dtype("<u2"), ".u16": np.dtype("<u2"), ".u32": np.dtype("<u4")}
VALIDATION_SHARE = 10  # one part in ten
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SCAN = 1 << 22  # tokens or bytes read at a time where a file is only scanned

Kind = Literal["bytes", "tokens"]


@dataclass(frozen=True, slots=True)
class DataRecord:
    """The data that a run saw; `sha256` is over the names and contents of all files."""

    title: str
    path: str | None  # None: the standard library
    kind: Kind
    split: str  # "by file", "by position"
    files: int
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    sha256: str

    @property
    def unit(self) -> str:
        """The unit of losses in pictures and tables."""
        return "bits per byte" if self.kind == "bytes" else "bits per token"


class Corpus:
    """Two token arrays, `train` and `validation`, 1-D; see `open_corpus`."""

    def __init__(
        self, title: str, path: Path | None, kind: Kind, parts: Sequence[NDArray[Any]], names: list[str]
    ) -> None:
        self.title, self.path, self.names = title, path, names
        self.kind: Kind = kind
        self.train, self.validation = parts
        self._digest = hashlib.sha256()

    def batch(
        self, *, seed: int, step: int, batch_size: int, length: int, rows: range | None = None
    ) -> NDArray[np.int64]:
        """Return [batch_size, length + 1] windows of the train text; inputs are [:, :-1], targets [:, 1:].

        `rows`: these windows of the batch only.
        """
        return _windows(self.train, f"train/{seed}/{step}", rows or range(batch_size), length)

    def validation_batch(
        self, *, index: int, batch_size: int, length: int, rows: range | None = None
    ) -> NDArray[np.int64]:
        """Return windows of the validation text, the same for every arm, seed and step."""
        return _windows(self.validation, f"validation/{index}", rows or range(batch_size), length)

    @cached_property
    def sha256(self) -> str:
        """The digest of the text.

        A token file is read in full for it, so the command asks once, and not its workers.
        """
        if self.kind == "bytes":
            return self._digest.hexdigest()
        assert self.path is not None
        digest = hashlib.sha256(_frame(self.path.name, self.path.stat().st_size))
        with self.path.open("rb") as stream:
            while chunk := stream.read(_SCAN):
                digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """The number of tokens: 256 for bytes; for token ids the largest one plus one."""
        if self.kind == "bytes":
            return 256
        parts = (self.train, self.validation)
        return 1 + max(int(part[i : i + _SCAN].max()) for part in parts for i in range(0, len(part), _SCAN))

    def record(self) -> DataRecord:
        return DataRecord(
            title=self.title,
            path=None if self.path is None else str(self.path.resolve()),
            kind=self.kind,
            split="by file" if len(self.names) > 1 else "by position",
            files=len(self.names),
            vocab_size=self.vocab_size,
            train_tokens=len(self.train),
            validation_tokens=len(self.validation),
            sha256=self.sha256,
        )

    def require(self, length: int) -> None:
        """Raise UsageError where a part has not even one window of `length` inputs and their targets."""
        for name, part in (("train", self.train), ("validation", self.validation)):
            if len(part) <= length:
                raise UsageError(
                    "--data",
                    f"{self.path or self.title} leaves {len(part)} tokens for {name}; a window needs {length + 1}. "
                    "Give more text.",
                )


def open_corpus(path: Path | None = None) -> Corpus:
    """Read the text; token files stay on disk. Raises UsageError where nothing usable is found."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in sorted(root.rglob("*.py")) if not _NOT_LIBRARY.intersection(p.relative_to(root).parts)]
        return _from_files("Python standard library, bytes", None, root, files)
    if not path.exists():
        raise UsageError("--data", f"{path} does not exist; give a text file, a folder or a .bin/.u16/.u32 token file.")
    if path.is_dir():
        return _from_files(f"{path.resolve().name}/, bytes", path, path, _text_files(path))
    try:
        if path.suffix in TOKEN_DTYPES:
            return _from_tokens(path)
        return _from_files(f"{path.name}, bytes", path, path.parent, [path])
    except OSError as error:
        raise UsageError("--data", f"{path} cannot be read: {error.strerror}.") from error


def _from_files(title: str, path: Path | None, root: Path, files: list[Path]) -> Corpus:
    texts = {p.relative_to(root).as_posix(): p.read_bytes() for p in files}
    if not any(texts.values()):
        raise UsageError("--data", f"{path or root} holds no text.")
    names = sorted(texts)
    if len(names) == 1:
        text = texts[names[0]]
        cut = len(text) - len(text) // VALIDATION_SHARE
        train, validation = text[:cut], text[cut:]
    else:
        held_out = set(validation_names(names))
        train = b"".join(texts[name] for name in names if name not in held_out)
        validation = b"".join(texts[name] for name in names if name in held_out)
    parts = (np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8))
    corpus = Corpus(title, path, "bytes", parts, names)
    for name in names:
        corpus._digest.update(_frame(name, len(texts[name])) + texts[name])
    return corpus


def _from_tokens(path: Path) -> Corpus:
    dtype, size = TOKEN_DTYPES[path.suffix], path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UsageError(
            "--data",
            f"{path} has {size} bytes; '{path.suffix}' means whole {dtype.itemsize}-byte token ids. "
            "Use .u16 or .u32 for ids, another suffix for text.",
        )
    tokens = np.memmap(path, dtype, mode="r")
    cut = len(tokens) - len(tokens) // VALIDATION_SHARE
    return Corpus(f"{path.name}, tokens", path, "tokens", (tokens[:cut], tokens[cut:]), [path.name])


def validation_names(names: list[str]) -> list[str]:
    """Return a tenth of the names, at least one: those with the smallest SHA-256."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return ranked[: max(1, len(names) // VALIDATION_SHARE)]


def _text_files(folder: Path) -> list[Path]:
    found = []
    for directory, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(directory, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file() and b"\0" not in _beginning(path)]


def _beginning(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(8192)


def _frame(name: str, size: int) -> bytes:
    return f"{name}\0{size}\0".encode()


def _windows(part: NDArray[Any], key: str, rows: range, length: int) -> NDArray[np.int64]:
    """Draw windows at offsets from a hash of the key: no generator state, the same on every platform and version."""
    offsets = (
        int.from_bytes(hashlib.sha256(f"{key}/{row}".encode()).digest()[:8]) % (len(part) - length) for row in rows
    )
    return np.stack([part[offset : offset + length + 1] for offset in offsets]).astype(np.int64)
