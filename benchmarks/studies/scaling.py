"""Training steps on more and more ranks: `python -m benchmarks scaling`, which starts torchrun for each number.

    weak     the same windows per rank: the step should take as long
    strong   the same windows per step, as many as the largest number of ranks has in the weak case: N ranks should take
             1/N of the time

Times are medians over steps of the slowest rank's, in milliseconds: of the whole step (forward, backward, clipping of
the gradient's norm, update), and of the optimizer's step with the clip and the balancing of experts. For the latter
`benchmarks.collective_times` says what compute, communication and overlap are.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.execution.ranks import Ranks
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Panel, Precision, Training
from benchmarks.experiment.presets import PRESETS
from benchmarks.records import atomic_files as checkpoint
from benchmarks.records.environment import available_cores, environment
from benchmarks.studies.collective_times import collective_times
from benchmarks.training.sharded_learner import Layout, ShardedLearner
from muonclip.models.parallel import Parallelism

WARM_UP = 3
MOST = "MUONCLIP_SCALING_MOST"  # environment: the largest number of processes, which the strong case needs

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    arms: tuple[str, ...]
    preset: str
    batch_size: int  # windows per rank
    rounds: int


def scaling(plan: Plan, processes: Sequence[int], data: Path | None, device: str | None, out: Path) -> str:
    """Start torchrun for each number, write `out`/scaling.json and scaling.md, return the table."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for count in processes:
        options = ["--arms", ",".join(plan.arms), "--preset", plan.preset, "--batch", str(plan.batch_size)]
        options += ["--rounds", str(plan.rounds), "--out", str(out)]
        options += [] if data is None else ["--data", str(data)]
        options += [] if device is None else ["--device", device]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        variables = os.environ | {"OMP_NUM_THREADS": "1", MOST: str(max(processes)), "PYTHONPATH": path}
        done = subprocess.run([*torchrun, "-m", "benchmarks", "scaling", *options], env=variables, check=False)
        if done.returncode:
            raise UsageError("--processes", f"{count} ended with status {done.returncode}; it said why above.")
        part = out / f"ranks-{count}.json"
        rows += json.loads(part.read_text())["rows"]
        part.unlink()
    used = device or PRESETS[plan.preset].device
    result = {"environment": environment(used), "notes": notes(processes, used), "rows": with_efficiency(rows)}
    checkpoint.write_json(out / "scaling.json", result)
    text = table(result)
    (out / "scaling.md").write_text(text + "\n")
    return text


def measure_ranks(plan: Plan, ranks: Ranks, data: Path | None, device: str | None, out: Path) -> None:
    """Under torchrun: both cases at this number of ranks, into `out`/ranks-N.json."""
    corpus = open_corpus(data)
    if (device or PRESETS[plan.preset].device) == "cpu":
        torch.set_num_threads(1)
    total = plan.batch_size * max(int(os.environ.get(MOST, "0")), ranks.size)
    rows: list[Row] = []
    for arm in plan.arms:
        for case, windows in {"weak": plan.batch_size * ranks.size, "strong": total}.items():
            rows.append(_measure(_panel(plan, arm, windows, corpus, device), arm, case, corpus, ranks, plan.rounds))
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        used = device or PRESETS[plan.preset].device
        result = {"environment": environment(used), "notes": notes([ranks.size], used), "rows": rows}
        checkpoint.write_json(out / f"ranks-{ranks.size}.json", result)
        if MOST not in os.environ:
            print(table(result))


def _panel(plan: Plan, arm: str, windows: int, corpus: Corpus, device: str | None) -> Panel:
    preset = PRESETS[plan.preset]
    device = device or preset.device
    model = preset.model(vocab_size=corpus.vocab_size)
    corpus.require(model.max_seq_len)
    lr = {name: rate for name, rate in preset.training.lr.items() if name == arm.partition("@")[0]}
    training = Training(steps=10**6, batch_size=windows, lr=lr, tau=preset.training.tau, warmup_steps=100)
    narrow = Precision("bfloat16", "bfloat16") if device == "cuda" else Precision()
    return Panel(
        name="", title="Scaling", arms=(arm,), seeds=(0,), model=model, training=training, data=corpus.record(),
        precision=narrow, device=device,
    )  # fmt: skip


def _measure(panel: Panel, arm: str, case: str, corpus: Corpus, ranks: Ranks, rounds: int) -> Row:
    if panel.training.batch_size % ranks.size:
        raise UsageError("--batch", f"{panel.training.batch_size} windows cannot be divided over {ranks.size} ranks.")
    learner = ShardedLearner(panel, arm, 0, Layout(Parallelism(shards=ranks.size)))
    optimizer, host = _OptimizerTimer(learner.optimizer), panel.device == "cpu"
    steps: list[tuple[float, ...]] = []
    for step in range(WARM_UP + rounds):
        size = panel.training.batch_size
        windows = corpus.batch(
            seed=0, step=step, batch_size=size, length=panel.model.max_seq_len, rows=learner.rows(size)
        )
        ranks.any_of(False)  # all begin together
        _settle(panel.device)
        begun = time.perf_counter()
        with collective_times() as times:
            optimizer.forget(times)
            learner.step(windows, step, panel.training.schedule(step) * next(iter(panel.training.lr.values())))
        _settle(panel.device)
        took = time.perf_counter() - begun
        everyone = ranks.gathered((took, optimizer.seconds, optimizer.blocked, optimizer.in_flight))
        slowest = max(everyone, key=lambda times: times[1])
        steps.append((max(times[0] for times in everyone), *slowest[1:]))
    whole, update, blocked, in_flight = (statistics.median(column) for column in zip(*steps[WARM_UP:], strict=True))
    row = {
        "arm": arm,
        "case": case,
        "processes": ranks.size,
        "windows": panel.training.batch_size,
        "step_ms": round(1e3 * whole, 3),
        "tokens_per_second": round(panel.training.batch_size * panel.model.max_seq_len / whole, 1),
    }
    return row | ({
        "optimizer_ms": round(1e3 * update, 3),
        "compute_share": round(1 - blocked / update, 4),
        "communication_share": round(blocked / update, 4),
        "overlap_share": round(max(0.0, 1 - blocked / in_flight), 4) if in_flight else None,
    } if host else {})  # fmt: skip


class _OptimizerTimer:
    """The seconds of the last `step` of an optimizer, hooks included, and of the collectives inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seconds = self.blocked = self.in_flight = 0.0
        self._times: Any = None
        step = optimizer.step

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._times.blocked, before = 0.0, time.perf_counter()
            self._times.intervals.clear()
            result = step(*args, **kwargs)
            self.seconds = time.perf_counter() - before
            self.blocked, self.in_flight = self._times.blocked, self._times.in_flight
            return result

        setattr(optimizer, "step", timed)  # noqa: B010

    def forget(self, times: Any) -> None:
        self._times = times


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def with_efficiency(rows: Sequence[Row]) -> list[Row]:
    """Beside the smallest number of processes of the same arm and case: 1 is perfect."""
    done: list[Row] = []
    for row in rows:
        alike = [other for other in rows if (other["arm"], other["case"]) == (row["arm"], row["case"])]
        least = min(alike, key=lambda other: other["processes"])
        speedup = row["tokens_per_second"] / least["tokens_per_second"]
        done.append(row | {"efficiency": round(speedup * least["processes"] / row["processes"], 4)})
    return done


def notes(processes: Sequence[int], device: str) -> list[str]:
    cores = available_cores()
    if device == "cuda":
        return ["Times of whole steps alone: on a GPU the host does not wait for collectives."]
    said = ["gloo over the loopback of one machine, one thread per process."]
    if crowded := [count for count in processes if count > cores]:
        said.append(
            f"Oversubscribed: {', '.join(map(str, crowded))} processes share {cores} cores, so these rows show what "
            "the program does, and no scaling."
        )
    return said


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    head = ["arm", "case", "processes", "windows", "step ms", "optimizer ms", "compute", "communication", "overlap"]
    lines = ["| " + " | ".join([*head, "efficiency"]) + " |", "|" + "---|" * (len(head) + 1)]
    for row in result["rows"]:
        shares = [row.get(f"{name}_share") for name in ("compute", "communication", "overlap")]
        cells = [row["arm"], row["case"], row["processes"], row["windows"], f"{row['step_ms']:.1f}"]
        cells.append(f"{row['optimizer_ms']:.1f}" if "optimizer_ms" in row else "–")
        cells += ["–" if share is None else f"{share:.0%}" for share in shares]
        cells.append(f"{row['efficiency']:.0%}" if "efficiency" in row else "–")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    made = result["environment"]
    where = f"{made['cores']} cores of {made['cpu']}, PyTorch {made['torch']}, {made['date'][:10]}."
    return "\n".join([*lines, "", *result["notes"], where])
