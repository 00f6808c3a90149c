"""Checkpoints of many ranks: folders of torch.distributed.checkpoint that are complete, or are recognised not to be.

    checkpoints/step-000123.tmp/     while it is written
    checkpoints/step-000123/         complete: __RANK_0.distcp (tensors), .metadata (torch's), state.json (all else),
                                     manifest.json (size and SHA-256 of every file)

Every rank hashes the files that it wrote; the manifest is written last, then the folder gets its name. Loading verifies
every byte first, each rank a share of the files, and falls back to the folder before. The two newest are kept. The
ranks of another world size may load it; all ranks must see the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.execution.ranks import Ranks, end, lost_message
from benchmarks.records import atomic_files

MANIFEST, STATE = "manifest.json", "state.json"
KEPT = 2


class ShardedCheckpoints:
    """The checkpoints of one run, in `folder`. Every method is called by all ranks together."""

    def __init__(self, folder: Path, ranks: Ranks, *, asynchronous: bool = False) -> None:
        self.folder, self.ranks, self.asynchronous = folder, ranks, asynchronous
        # Of its own, and of the host: a save during the training must not meet the training's collectives.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._saving: threading.Thread | None = None

    def save(self, done: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Save tensors, and a state that JSON can hold, after `done` updates. Asynchronous: the tensors are copied, and
        the rest goes on during the training; the next `save` or `finish` waits for it."""
        self.finish()
        temporary = self.folder / f"step-{done:09d}.tmp"
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.tmp"):
                shutil.rmtree(left)
            temporary.mkdir()
            atomic_files.write_json(temporary / STATE, dict(state))
        dist.barrier(group=self._group)
        if not self.asynchronous:
            save(dict(tensors), checkpoint_id=temporary, process_group=self._group)
            self._complete(temporary)
            return
        future: Any = async_save(dict(tensors), checkpoint_id=temporary, process_group=self._group)

        def finish() -> None:
            try:
                future.result()
                self._complete(temporary)
            except (Exception, CheckpointException) as error:  # nobody joins a thread of a rank that hangs
                end(lost_message(error, self.ranks) or f"rank {self.ranks.rank}: the checkpoint failed: {error!r}")

        self._saving = threading.Thread(target=finish, daemon=True)
        self._saving.start()

    def finish(self) -> None:
        """Wait for a save that is under way."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None

    def find(self) -> tuple[Path | None, list[str]]:
        """Find the newest checkpoint whose every file is as it was written, and what is wrong with newer ones.

        Those are put aside under the name `….damaged`.
        """
        problems: list[str] = []
        for folder in self.ranks.on_first(self._complete_ones):
            found = sorted(problem for found in self.ranks.gathered(self._damage(folder)) for problem in found)
            if not found:
                return folder, problems
            problems += found
            if self.ranks.first:
                _rename(folder, ".damaged")
        return None, problems

    def put_aside(self) -> None:
        """Rename all of them: what follows has records of its own."""
        if self.ranks.first:
            for folder in self._complete_ones():
                _rename(folder, ".unused")
        dist.barrier(group=self._group)

    def load(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Load into these tensors, in place, each as this rank's meshes hold it."""
        load(dict(tensors), checkpoint_id=folder, process_group=self._group)

    def state(self, folder: Path) -> dict[str, Any]:
        return self.ranks.on_first(lambda: json.loads((folder / STATE).read_text()))

    def shapes(self, folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors in it, by name."""
        metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def _complete(self, temporary: Path) -> None:
        """Turn what is written into a checkpoint: write the manifest, give the name, remove older ones."""
        own = sorted(temporary.glob(f"__{self.ranks.rank}_*"))
        if self.ranks.first:
            own += [temporary / ".metadata", temporary / STATE]
        mine = {path.name: _fingerprint(path) for path in own}
        parts: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(parts, mine, group=self._group)
        if self.ranks.first:
            files = {name: entry for part in parts for name, entry in part.items()}
            atomic_files.write_json(temporary / MANIFEST, {"world_size": self.ranks.size, "files": files})
            folder = temporary.with_suffix("")
            _remove(folder)
            os.replace(temporary, folder)
            atomic_files.sync_directory(self.folder)
            for old in self._complete_ones()[KEPT:]:
                _remove(old)
        dist.barrier(group=self._group)

    def _complete_ones(self) -> list[Path]:
        """List the complete checkpoints, the newest first. A folder that lost its manifest was being removed."""
        folders = (path.parent for path in self.folder.glob(f"step-*/{MANIFEST}"))
        return sorted((path for path in folders if path.suffix == ""), reverse=True)

    def _damage(self, folder: Path) -> list[str]:
        """Return what this rank finds wrong with its share of the files."""
        try:
            files = sorted(json.loads((folder / MANIFEST).read_text())["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{folder / MANIFEST} cannot be read ({error!r})"] if self.ranks.first else []
        own = files[self.ranks.rank :: self.ranks.size]
        return [wrong for name, written in own if (wrong := _difference(folder / name, written))]


def _difference(path: Path, written: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a file that was written with this size and digest; None if nothing is."""
    try:
        seen = _fingerprint(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if seen["bytes"] != written["bytes"]:
        return f"{path} has {seen['bytes']} bytes, {written['bytes']} were written"
    if seen["sha256"] != written["sha256"]:
        return f"{path} has SHA-256 {seen['sha256'][:16]}…, written was {written['sha256'][:16]}…"
    return None


def _rename(folder: Path, ending: str) -> None:
    other = folder.with_name(folder.name + ending)
    shutil.rmtree(other, ignore_errors=True)
    os.replace(folder, other)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _remove(folder: Path) -> None:
    """Remove a checkpoint, the manifest first: cut short, that leaves a folder that is not taken for a checkpoint."""
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # of torch.distributed.checkpoint itself
