"""The processes that torchrun has started, as one: they train one run together, and the first of them writes.

What one rank alone can know (a folder's content, a clock, a signal) is decided there and told to all, so that every
rank comes to the same collectives. A rank that waits longer than `timeout` seconds, or whose peer is gone, says so and
ends; torchrun then ends the others and, with --max-restarts, starts all of them again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.rendezvous import rendezvous

from benchmarks.experiment.errors import UsageError
from benchmarks.records.atomic_files import write_json
from benchmarks.training.run import Alone

T = TypeVar("T")
DEFAULT_TIMEOUT = 600.0  # seconds
PIDS = ".ranks"  # folder in --out: one JSON file per rank
_TIMED_OUT = ("timed out", "timeout")
_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "socket", "remote process")


class Stopped(KeyboardInterrupt):
    """All ranks have stopped after the same step, and have saved."""


def launched() -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


@dataclass(frozen=True, slots=True)
class Ranks(Alone):
    """All processes of a run, as seen by one of them. `restarts`: how often torchrun has started them again."""

    rank: int
    size: int
    timeout: float
    restarts: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on_first(self, decide: Callable[[], T]) -> T:
        """Return on every rank what `decide` returns on the first; raise there, too, the UsageError that it raises."""
        answer = [_attempt(decide) if self.first else None]
        dist.broadcast_object_list(answer)
        assert answer[0] is not None
        made, wrong = answer[0]
        if wrong is not None:
            raise wrong
        return cast(T, made)

    def on_each(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on this rank; raise on all ranks the UsageError that it raises on any of them."""
        made, wrong = _attempt(make)
        for rank, problem in enumerate(self.gathered(wrong)):
            if problem is not None:
                raise UsageError(problem.option, f"{problem.message} (rank {rank})")
        return cast(T, made)

    def any_of(self, *flags: bool) -> list[bool]:
        device = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
        raised = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def announce(self, out: Path) -> None:
        """Leave this rank's process id in the folder of results, for whoever watches the ranks."""
        folder = out / PIDS
        folder.mkdir(exist_ok=True)
        told = {"pid": os.getpid(), "host": socket.gethostname(), "restarts": self.restarts}
        write_json(folder / f"{self.rank}.json", told)


def _attempt(make: Callable[[], T]) -> tuple[T | None, UsageError | None]:
    try:
        return make(), None
    except UsageError as error:
        return None, error


@contextlib.contextmanager
def joined(device: str, timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """Join all ranks in one process group, until all have left the block.

    On a GPU: NCCL, and gloo for objects of the host. An error of a collective, or any other, ends this process at once.
    """
    limit = timedelta(seconds=timeout)
    # Groups made later, by device meshes and optimizers, take their limit from here and not from the first group.
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit  # pyright: ignore[reportPrivateImportUsage]
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    ranks = Ranks(rank, size, timeout, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    with ending(ranks):
        store = _store_of_this_start(ranks, next(rendezvous("env://", timeout=limit))[0])
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=limit, store=store, rank=ranks.rank, world_size=ranks.size)
        yield ranks
        dist.barrier()  # a rank that leaves first would cut off those that still send to it
        dist.destroy_process_group()


def _store_of_this_start(ranks: Ranks, store: distributed_c10d.Store) -> distributed_c10d.Store:
    """Return a part of torchrun's store that no earlier start has written to.

    torchrun keeps one store over its restarts (torch 2.13, pytorch issue 135712), and a rank that reads the address of
    a dead one there waits for it in vain. The number of the restart does not distinguish starts: nodes may differ in
    it. So every rank shows the first one a name of its own, and is told the name of this start.
    """
    own = uuid.uuid4().hex
    if not ranks.first:
        store.set(f"join/{ranks.rank}", own)
        start = store.get(f"join/{own}").decode()
        store.set(f"{start}/{ranks.rank}", "joined")
        return distributed_c10d.PrefixStore(start, store)
    missing, answered = set(range(1, ranks.size)), set[str]()
    deadline = time.monotonic() + ranks.timeout
    while missing:
        for rank in sorted(missing):
            if store.check([f"join/{rank}"]):
                name = store.get(f"join/{rank}").decode()  # perhaps of an earlier start: then nobody reads the answer
                if name not in answered:
                    store.set(f"join/{name}", own)
                    answered.add(name)
            if store.check([f"{own}/{rank}"]):
                missing.remove(rank)
        if time.monotonic() > deadline:
            raise RuntimeError(f"Timed out waiting for ranks {sorted(missing)} to join.")
        time.sleep(0.01)
    return distributed_c10d.PrefixStore(own, store)


@contextlib.contextmanager
def ending(ranks: Ranks) -> Iterator[None]:
    """End this process, with a message that names the rank, at an error that one rank cannot recover from alone.

    UsageError and Stopped, which all ranks raise, pass once the group is closed.
    """
    try:
        yield
    except (UsageError, Stopped):
        dist.barrier()
        dist.destroy_process_group()
        raise
    except (Exception, CheckpointException) as error:  # whatever it is, the others wait
        if (message := lost_message(error, ranks)) is None:
            traceback.print_exc()
            message = f"rank {ranks.rank} of {ranks.size}: failed as above; the other ranks will miss it and end."
        end(message)


def end(message: str) -> NoReturn:
    """End this process at once: an orderly end would join threads that wait for ranks which are gone."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def lost_message(error: BaseException, ranks: Ranks) -> str | None:
    """Return the message for an error of a collective that another rank did not come to; None for other errors."""
    text = f"{type(error).__name__} {error}".lower()
    if not isinstance(error, RuntimeError | ConnectionError):
        return None
    if any(words in text for words in _TIMED_OUT):
        what = f"a collective timed out after {ranks.timeout:g} s: one of the ranks hangs or died"
    elif any(words in text for words in _LOST) or isinstance(error, dist.DistBackendError):
        what = "a collective lost its peer: one of the ranks died, or ended after a time-out of its own"
    else:
        return None
    first_line = str(error).strip().partition("\n")[0][:200]
    return (
        f"rank {ranks.rank} of {ranks.size} (pid {os.getpid()}, {socket.gethostname()}): {what}. This rank ends with "
        "status 1; torchrun ends the others and, with --max-restarts, starts all of them again from the newest "
        f"checkpoint. ({first_line})"
    )
