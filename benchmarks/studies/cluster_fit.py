"""The optimizer's step on processes of this machine, measured on few of them and predicted for more.

A rank's compute is the processor time of its main thread during `optimizer.step()`; its communication is that of all
its other threads, which are gloo's: each process computes on one thread. Neither counts waiting, so both mean the same
where more processes run than there are cores; wall times would not. A process that shares its core's units and caches
with others takes more processor time than one alone, so one process is measured next to a second that does the same.
What else the machine does changes in minutes: all numbers of processes are measured in turn, `repeats` times.

Compute has two parts. The matrix products are timed in steps of their own (`product_times`); what is left of a step
passes over the rank's shards, or is there in every step.

    products         for each shape of matrices, a rate · its operations
    all else         b · elements of the rank's shards + c
    communication    d · bytes sent + e · collectives + f

A shape that does less than a twentieth of the operations has the rate of the smallest one that does more. The constants
are fitted by least squares of relative errors, none of them negative, on the least time of every rank.

    python -m torch.distributed.run --nproc-per-node N -m benchmarks.studies.cluster_fit FILE ROUNDS
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.execution.processes import start
from benchmarks.experiment.errors import UsageError
from benchmarks.records import atomic_files
from benchmarks.studies.product_times import ProductTimes
from benchmarks.studies.sent_bytes import SentBytes
from muonclip.models import MoEConfig
from muonclip.models.parallel import Parallelism, parallelize
from muonclip.models.torch import MoE
from muonclip.selftest import available_cores
from muonclip.torch import MuonClip
from muonclip.torch.distributed import UpdatePlan

FITTED_ON, PREDICTED_FOR = (1, 2, 4), 8
WARM_UP = 2
TIMES = ("compute_ms", "products_ms", "communication_ms", "wall_ms")
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


def measure(out: Path, rounds: int, repeats: int) -> list[Row]:
    """Measure all numbers of processes, one after the other, `repeats` times, and return a row for each rank of each.

    What is measured is kept in `out` until all of it is.
    """
    parts: list[Path] = []
    for repeat, count in itertools.product(range(repeats), (*FITTED_ON, PREDICTED_FOR)):
        part = out / f"ranks-{count}-{repeat}.json"
        parts.append(part)
        process = start("benchmarks.studies.cluster_fit", str(part), str(rounds), ranks=count)
        with tempfile.TemporaryDirectory() as unread:  # one process alone: next to another one, as all others are
            words = "benchmarks.studies.cluster_fit", f"{unread}/rows.json", str(rounds)
            second = start(*words, ranks=1) if count == 1 else None
            status = process.wait() or (second is not None and second.wait())
        if status:
            raise UsageError("cluster", f"{count} processes ended with status {status}; they said why above.")
    rows = [row for part in parts for row in atomic_files.read_record(part, "rows")["rows"]]
    for part in parts:
        part.unlink()
    return rows


def measure_ranks(out: Path, rounds: int, config: MoEConfig = SIZES) -> None:
    """Measure as one of the ranks of torchrun; the first writes all rows to the file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = MoE(config)
    parallelize(model, Parallelism(shards=size))
    optimizer = MuonClip(model, 1e-4, tau=1e-3)  # so low that all heads are clipped
    tokens = torch.randint(config.vocab_size, (1, 33), generator=torch.Generator().manual_seed(rank))
    times: dict[str, list[float]] = {name: [] for name in TIMES}
    counted = SentBytes(size)
    for step in range(WARM_UP + 2 * rounds):
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        if step == WARM_UP - 1:  # before it, ranks compare what they found, once
            with counted:
                optimizer.step()
        elif step >= WARM_UP and step % 2:
            with ProductTimes() as products:
                optimizer.step()
            times["products_ms"].append(1e3 * products.seconds)
        else:
            dist.barrier()
            clocks = time.thread_time(), time.process_time(), time.perf_counter()
            optimizer.step()
            dist.barrier()  # what others are sent by this rank is still part of it
            after = time.thread_time(), time.process_time(), time.perf_counter()
            thread, process, passed = (1e3 * (now - then) for now, then in zip(after, clocks, strict=True))
            if step >= WARM_UP:
                times["compute_ms"].append(thread)
                times["communication_ms"].append(max(0.0, process - thread))
                times["wall_ms"].append(passed)
        optimizer.zero_grad()
    decided = optimizer.plan.update_plan
    assert decided is not None
    row: Row = {"processes": size, "cores": available_cores(), "rank": rank, "flops": flops_by_shape(decided, rank)}
    local = (each.to_local() if isinstance(each, DTensor) else each for each in model.parameters())
    row["elements"] = sum(each.numel() for each in local)
    row |= {"planned_bytes": planned_bytes(config, decided.sent(), size, rank), "counted_bytes": counted.total}
    row |= {"collectives": len(counted.calls)}
    row |= {name: [round(value, 3) for value in values] for name, values in times.items()}
    rows: list[Row | None] = [None] * size
    dist.all_gather_object(rows, row)
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_json(out, {"rows": rows})
    dist.destroy_process_group()


def flops_by_shape(decided: UpdatePlan, rank: int) -> dict[str, int]:
    """Count the operations of the iterations of a rank, by the shape of the matrices."""
    by_shape: dict[str, int] = {}
    for each in decided.rounds:
        shape = f"{each.bucket.m} × {each.bucket.n}"
        by_shape[shape] = by_shape.get(shape, 0) + each.flops().get(rank, 0)
    return by_shape


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
    """Fit on the small numbers of processes; predict each rank of the large one, and say how far that is off.

    Rows of the same rank of as many processes count by the least of their times.
    """
    rows = [row | {"else_ms": row["compute_ms"] - row["products_ms"]} for row in least(rows)]
    few = [row for row in rows if row["processes"] in FITTED_ON]
    many = [row for row in rows if row["processes"] == PREDICTED_FOR]
    shapes = own_rates(few)
    features: dict[str, Callable[[Row], list[float]]] = {
        "products": lambda row: [flops / 1e9 for flops in joined(row["flops"], shapes).values()],
        "else": lambda row: [row["elements"] / 1e6, 1.0],
        "communication": lambda row: [row["counted_bytes"] / 1e6, row["collectives"], 1.0],
    }
    constants: dict[str, list[float]] = {}
    predicted: dict[str, list[float]] = {}
    for part, of in features.items():
        constants[part] = fitted([of(row) for row in few], [row[f"{part}_ms"] for row in few])
        predicted[part] = [float(np.dot(of(row), constants[part])) for row in many]
    predicted["compute"] = [a + b for a, b in zip(predicted["products"], predicted["else"], strict=True)]
    return {part: _compared(many, f"{part}_ms", times) for part, times in predicted.items()} | {
        "least": rows,
        "rates": dict(zip(shapes, constants["products"], strict=True)),
        "else_constants": constants["else"],
        "communication_constants": constants["communication"],
        "bytes_exact": all(row["planned_bytes"] == row["counted_bytes"] for row in rows),
        "bytes": sum(row["counted_bytes"] for row in many),
    }


def repeated(rows: Sequence[Row], repeats: int) -> dict[str, Any]:
    """Predict from all rows, and from those of each repeat alone: how far the error itself is to be trusted."""
    each = len(rows) // repeats
    alone = [prediction(rows[at : at + each]) for at in range(0, len(rows), each)]
    errors = {part: [one[part]["error"] for one in alone] for part in ("compute", "communication")}
    return prediction(rows) | {"errors": errors}


def least(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each rank, with the least of its times: what else the machine does only adds to them."""
    by_rank: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        by_rank.setdefault((row["processes"], row["rank"]), []).append(row)
    return [same[0] | {name: min(min(row[name]) for row in same) for name in TIMES} for same in by_rank.values()]


def own_rates(rows: Sequence[Row]) -> list[str]:
    """Return the shapes that do at least a twentieth of the operations, from the largest."""
    total = Counter[str]()
    for row in rows:
        total.update(row["flops"])
    kept = [shape for shape, flops in total.items() if flops >= total.total() / 20]
    return sorted(kept, key=_size, reverse=True)


def joined(flops: Mapping[str, int], shapes: Sequence[str]) -> dict[str, float]:
    """Count operations by the shape whose rate they have: their own, or the smallest one."""
    counted = dict.fromkeys(shapes, 0.0)
    for shape, each in flops.items():
        counted[shape if shape in counted else shapes[-1]] += each
    return counted


def _size(shape: str) -> int:
    m, n = map(int, shape.split(" × "))
    return m * n


def _compared(rows: Sequence[Row], name: str, predicted: Sequence[float]) -> dict[str, float]:
    measured = [row[name] for row in rows]
    worst = max((p / m - 1 for p, m in zip(predicted, measured, strict=True)), key=abs)
    mean, seen = statistics.fmean(predicted), statistics.fmean(measured)
    return {"predicted_ms": mean, "measured_ms": seen, "error": mean / seen - 1, "worst_error": worst}


if __name__ == "__main__":
    measure_ranks(Path(sys.argv[1]), int(sys.argv[2]))
