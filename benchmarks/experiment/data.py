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
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
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
_SCAN = 1 << 22  # tokens read at a time where a file is only scanned

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


@dataclass(eq=False)
class Corpus:
    """Two token arrays, 1-D, from these files by name; see `open_corpus`."""

    title: str
    path: Path | None
    kind: Kind
    files: Mapping[str, Path]
    train: NDArray[Any]
    validation: NDArray[Any]

    def batch(
        self, *, seed: int, step: int, batch_size: int, length: int, rows: range | None = None
    ) -> NDArray[np.int64]:
        """Return [batch_size, length + 1] windows of the train text; inputs are [:, :-1], targets [:, 1:].

        `rows`: these windows of the batch only.
        """
        return _windows(self.train, f"train/{seed}/{step}", rows or range(batch_size), length)

    def random_batch(
        self, *, seed: int, step: int, batch_size: int, length: int, rows: range | None = None
    ) -> NDArray[np.int64]:
        """Return windows as `batch` does, of tokens that are drawn evenly from the vocabulary."""
        keys = (f"random/{seed}/{step}/{row}".encode() for row in rows or range(batch_size))
        draws = [np.frombuffer(hashlib.shake_256(key).digest(8 * (length + 1)), "<u8") for key in keys]
        return (np.stack(draws) % np.uint64(self.vocab_size)).astype(np.int64)

    def validation_batch(
        self, *, index: int, batch_size: int, length: int, rows: range | None = None
    ) -> NDArray[np.int64]:
        """Return windows of the validation text, the same for every arm, seed and step."""
        return _windows(self.validation, f"validation/{index}", rows or range(batch_size), length)

    @cached_property
    def sha256(self) -> str:
        """The digest of names and contents; all is read for it, so the command asks once, and not its workers."""
        digest = hashlib.sha256()
        for name, path in self.files.items():
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
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
            split="by file" if len(self.files) > 1 else "by position",
            files=len(self.files),
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
        files = [p for p in root.rglob("*.py") if not _NOT_LIBRARY.intersection(p.relative_to(root).parts)]
        return from_files("Python standard library, bytes", None, root, files)
    if not path.exists():
        raise UsageError("--data", f"{path} does not exist; give a text file, a folder or a .bin/.u16/.u32 token file.")
    if path.is_dir():
        return from_files(f"{path.resolve().name}/, bytes", path, path, [*_text_files(path)])
    try:
        if path.suffix in TOKEN_DTYPES:
            return _from_tokens(path)
        return from_files(f"{path.name}, bytes", path, path.parent, [path])
    except OSError as error:
        raise UsageError("--data", f"{path} cannot be read: {error.strerror}.") from error


def from_files(title: str, path: Path | None, root: Path, found: Sequence[Path]) -> Corpus:
    """Read these files below `root`. Raises UsageError where they hold no text."""
    files = dict(sorted((file.relative_to(root).as_posix(), file) for file in found))
    texts = {name: file.read_bytes() for name, file in files.items()}
    if not any(texts.values()):
        raise UsageError("--data", f"{path or root} holds no text.")
    if len(files) == 1:
        (text,) = texts.values()
        return Corpus(title, path, "bytes", files, *_split(np.frombuffer(text, np.uint8)))
    # A tenth of the names, at least one: those with the smallest SHA-256.
    ranked = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = set(ranked[: max(1, len(files) // VALIDATION_SHARE)])
    train, validation = (
        np.frombuffer(b"".join(text for name, text in texts.items() if (name in held_out) == held), np.uint8)
        for held in (False, True)
    )
    return Corpus(title, path, "bytes", files, train, validation)


def _from_tokens(path: Path) -> Corpus:
    dtype, size = TOKEN_DTYPES[path.suffix], path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UsageError(
            "--data",
            f"{path} has {size} bytes; '{path.suffix}' means whole {dtype.itemsize}-byte token ids. "
            "Use .u16 or .u32 for ids, another suffix for text.",
        )
    tokens = np.memmap(path, dtype, mode="r")
    return Corpus(f"{path.name}, tokens", path, "tokens", {path.name: path}, *_split(tokens))


def _split(tokens: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(tokens, [len(tokens) - len(tokens) // VALIDATION_SHARE])


def _text_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and b"\0" not in _beginning(path):
            yield path


def _beginning(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(8192)


def _windows(part: NDArray[Any], key: str, rows: range, length: int) -> NDArray[np.int64]:
    """Draw windows at offsets from a hash of the key: no generator state, the same on every platform and version."""
    offsets = (
        int.from_bytes(hashlib.sha256(f"{key}/{row}".encode()).digest()[:8]) % (len(part) - length) for row in rows
    )
    return np.stack([part[offset : offset + length + 1] for offset in offsets]).astype(np.int64)
