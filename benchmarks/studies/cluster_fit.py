"""The optimizer's step on processes of this machine, measured on few of them and predicted for more.

A rank's compute is the processor time of its main thread during `optimizer.step()`; its communication is that of all
its other threads, which are gloo's: each process computes on one thread. Neither counts waiting, so both mean the same
where more processes run than there are cores; wall times would not. Processes that take turns on a core refill its
caches each time, hence b: it is met with four processes on two cores. A process that shares its core's units and caches
with others takes more processor time than one alone, so one process is measured next to a second that does the same.

    compute          a · operations of Newton–Schulz + b · these where processes take turns on a core + c
    communication    d · bytes sent and received + e · collectives

The constants are fitted by least squares of relative errors, none of them negative, on the medians of every rank.

    python -m torch.distributed.run --nproc-per-node N -m benchmarks.studies.cluster_fit DIR ROUNDS
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.execution.processes import start
from benchmarks.experiment.errors import UsageError
from benchmarks.records import atomic_files
from benchmarks.studies.sent_bytes import SentBytes
from muonclip.models import MoEConfig
from muonclip.models.parallel import Parallelism, parallelize
from muonclip.models.torch import MoE
from muonclip.selftest import available_cores
from muonclip.torch import MuonClip

FITTED_ON, PREDICTED_FOR = (1, 2, 4), 8
WARM_UP = 2
SIZES = MoEConfig.cpu(
    hidden_size=1024,
    q_lora_rank=512,
    kv_lora_rank=256,
    intermediate_size=2048,
    moe_intermediate_size=512,
    num_experts=16,
    num_heads=8,
)

Row = dict[str, Any]


def measure(out: Path, rounds: int) -> list[Row]:
    """Measure all numbers of processes, one after the other, and return a row for each rank."""
    rows: list[Row] = []
    for count in (*FITTED_ON, PREDICTED_FOR):
        process = start("benchmarks.studies.cluster_fit", str(out), str(rounds), ranks=count)
        with tempfile.TemporaryDirectory() as unread:  # one process alone: next to another one, as all others are
            words = "benchmarks.studies.cluster_fit", unread, str(rounds)
            second = start(*words, ranks=1) if count == 1 else None
            status = process.wait() or (second is not None and second.wait())
        if status:
            raise UsageError("cluster", f"{count} processes ended with status {status}; they said why above.")
        part = out / f"ranks-{count}.json"
        rows += atomic_files.read_record(part, "rows")["rows"]
        part.unlink()
    return rows


def measure_ranks(out: Path, rounds: int, config: MoEConfig = SIZES) -> None:
    """Measure as one of the ranks of torchrun; the first writes all rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = MoE(config)
    parallelize(model, Parallelism(shards=size))
    optimizer = MuonClip(model, 1e-4, tau=1e-3)  # so low that all heads are clipped
    tokens = torch.randint(config.vocab_size, (1, 33), generator=torch.Generator().manual_seed(rank))
    compute, communication, wall = list[float](), list[float](), list[float]()
    counted = SentBytes(size)
    for step in range(WARM_UP + rounds):
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        if step == WARM_UP - 1:  # before it, ranks compare what they found, once
            with counted:
                optimizer.step()
        else:
            dist.barrier()
            clocks = time.thread_time(), time.process_time(), time.perf_counter()
            optimizer.step()
            dist.barrier()  # what others are sent by this rank is still part of it
            thread, process, passed = (
                now - then
                for now, then in zip(
                    (time.thread_time(), time.process_time(), time.perf_counter()), clocks, strict=True
                )
            )
            if step >= WARM_UP:
                compute.append(thread)
                communication.append(max(0.0, process - thread))
                wall.append(passed)
        optimizer.zero_grad()
    decided = optimizer.plan.update_plan
    assert decided is not None
    row: Row = {"processes": size, "cores": available_cores(), "rank": rank, "flops": decided.flops()[rank]}
    row |= {"planned_bytes": planned_bytes(config, decided.sent(), size, rank), "counted_bytes": counted.total}
    row |= {"collectives": len(counted.calls)}
    for name, values in (("compute_ms", compute), ("communication_ms", communication), ("wall_ms", wall)):
        row[name] = round(1e3 * statistics.median(values), 3)
    row["compute_rounds_ms"] = [round(1e3 * each, 3) for each in compute]
    rows: list[Row | None] = [None] * size
    dist.all_gather_object(rows, row)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        atomic_files.write_json(out / f"ranks-{size}.json", {"rows": rows})
    dist.destroy_process_group()


def planned_bytes(config: MoEConfig, sent: Mapping[str, Mapping[int, int]], size: int, rank: int) -> int:
    """Return what the plan says that a rank sends, and QK-Clip's one all-reduce of 3 · heads + 1 numbers a layer."""
    maxima = config.num_layers * (3 * config.num_heads + 1) * 4
    return sum(by_rank.get(rank, 0) for by_rank in sent.values()) + round(2 * maxima * (size - 1) / size)


def fitted(features: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Return the constants, none negative, with the least sum of squares of relative errors.

    Of all choices of constants that are zero, the best without a negative one: there are few.
    """
    a = np.array(features, float) / np.array(times, float)[:, None]
    scale = np.abs(a).max(0)
    scale[scale == 0] = 1
    best, least = np.zeros(a.shape[1]), np.inf
    for chosen in (c for n in range(1, a.shape[1] + 1) for c in itertools.combinations(range(a.shape[1]), n)):
        part = a[:, chosen] / scale[list(chosen)]
        found = np.linalg.lstsq(part, np.ones(len(a)), rcond=None)[0]
        error = float(((part @ found - 1) ** 2).sum())
        if (found >= 0).all() and error < least - 1e-12:
            best, least = np.zeros(a.shape[1]), error
            best[list(chosen)] = found / scale[list(chosen)]
    return best.tolist()


def prediction(rows: Sequence[Row]) -> dict[str, Any]:
    """Fit on the small numbers of processes; predict each rank of the large one, and say how far that is off."""
    few = [row for row in rows if row["processes"] in FITTED_ON]
    many = [row for row in rows if row["processes"] == PREDICTED_FOR]
    moved = [row for row in few if row["processes"] > 1]
    compute = fitted([_compute(row) for row in few], [row["compute_ms"] for row in few])
    communication = fitted([_communication(row) for row in moved], [row["communication_ms"] for row in moved])
    said = {
        "compute": _compared(many, "compute_ms", [float(np.dot(_compute(row), compute)) for row in many]),
        "communication": _compared(
            many, "communication_ms", [float(np.dot(_communication(row), communication)) for row in many]
        ),
    }
    return said | {
        "compute_constants": compute,
        "communication_constants": communication,
        "bytes_exact": all(row["planned_bytes"] == row["counted_bytes"] for row in rows),
        "bytes": sum(row["counted_bytes"] for row in many),
    }


def _compute(row: Row) -> list[float]:
    operations = row["flops"] / 1e9
    return [operations, operations if row["processes"] > row["cores"] else 0.0, 1.0]


def _communication(row: Row) -> list[float]:
    return [row["counted_bytes"] / 1e6, row["collectives"]]


def _compared(rows: Sequence[Row], name: str, predicted: Sequence[float]) -> dict[str, float]:
    measured = [row[name] for row in rows]
    worst = max((p / m - 1 for p, m in zip(predicted, measured, strict=True)), key=abs)
    mean, seen = statistics.fmean(predicted), statistics.fmean(measured)
    return {"predicted_ms": mean, "measured_ms": seen, "error": mean / seen - 1, "worst_error": worst}


if __name__ == "__main__":
    measure_ranks(Path(sys.argv[1]), int(sys.argv[2]))
