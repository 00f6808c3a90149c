"""Training steps on more and more ranks: `python -m benchmarks scaling`, which starts torchrun for each number.

    weak     the same windows per rank: the step should take as long
    strong   the same windows per step, as many as the largest number of ranks has in the weak case: N ranks should take
             1/N of the time

Times are medians over steps of the slowest rank's, in milliseconds: of the whole step (forward, backward, clipping of
the gradient's norm, update), and of the optimizer's step with the clip and the balancing of experts. For the latter
`benchmarks.studies.collective_times` says what compute, communication and overlap are.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.execution.processes import start
from benchmarks.execution.ranks import Ranks
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import PRESETS
from benchmarks.experiment.settings import Precision, Training
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.studies.collective_times import collective_times
from benchmarks.studies.templates import render
from benchmarks.training.sharded_learner import Layout, ShardedLearner
from benchmarks.training.timing import seconds, wall_clock
from muonclip.models.parallel import Parallelism
from muonclip.selftest import available_cores

WARM_UP = 3
MOST = "MUONCLIP_SCALING_MOST"  # environment: the largest number of processes, which the strong case needs

Row = dict[str, Any]


def run(options: argparse.Namespace) -> None:
    """Start torchrun for each number and write scaling.json and scaling.md; or measure as one of its ranks."""
    device = options.device or PRESETS[options.preset].device
    if options.ranks is not None:
        _measure_ranks(options, device, options.ranks)
        return
    out, arms = options.out, ",".join(choice.name for choice in options.arms)
    words = ["--arms", arms, "--preset", options.preset, "--batch", options.batch_size, "--rounds", options.rounds]
    words += ["--device", device, "--out", out, *([] if options.data is None else ["--data", options.data])]
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for count in options.processes:
        most = {MOST: str(max(options.processes))}
        status = start("benchmarks", "scaling", *map(str, words), ranks=count, variables=most).wait()
        if status:
            raise UsageError("--processes", f"{count} ended with status {status}; it said why above.")
        part = out / f"ranks-{count}.json"
        rows += atomic_files.read_record(part, "rows")["rows"]
        part.unlink()
    result = {"environment": environment(device), "notes": notes(options.processes, device)}
    result["rows"] = with_efficiency(rows)
    atomic_files.write_json(out / "scaling.json", result)
    atomic_files.write_text(out / "scaling.md", text := table(result))
    print(text)


def _measure_ranks(options: argparse.Namespace, device: str, ranks: Ranks) -> None:
    """Measure both cases at this number of ranks, into ranks-N.json."""
    corpus = open_corpus(options.data)
    if device == "cpu":
        torch.set_num_threads(1)
    least, most = options.batch_size * ranks.size, options.batch_size * max(int(os.environ.get(MOST, "0")), ranks.size)
    rows: list[Row] = []
    for choice, (case, windows) in itertools.product(options.arms, {"weak": least, "strong": most}.items()):
        preset = PRESETS[options.preset]
        model, shared = preset.model(vocab_size=corpus.vocab_size), preset.training
        training = Training(steps=10**6, batch_size=windows, lr=shared.lr, tau=shared.tau, warmup_steps=100)
        narrow = Precision("bfloat16", "bfloat16") if device == "cuda" else Precision()
        own = {"name": "", "title": "Scaling", "chosen": (choice,), "seeds": (0,), "device": device}
        experiment = Experiment.on(corpus, model=model, training=training, precision=narrow, **own)
        measured = _measure(experiment, corpus, ranks, options.rounds)
        rows.append({"arm": choice.name, "case": case, "processes": ranks.size, "windows": windows} | measured)
    if ranks.first:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"environment": environment(device), "notes": notes([ranks.size], device), "rows": rows}
        atomic_files.write_json(options.out / f"ranks-{ranks.size}.json", result)
        if MOST not in os.environ:
            print(table(result))


def _measure(experiment: Experiment, corpus: Corpus, ranks: Ranks, rounds: int) -> Row:
    (arm,), size, length = experiment.arms, experiment.training.batch_size, experiment.model.max_seq_len
    if size % ranks.size:
        raise UsageError("--batch", f"{size} windows cannot be divided over {ranks.size} ranks.")
    learner = ShardedLearner(experiment, arm, 0, Layout(Parallelism(shards=ranks.size)))
    optimizer_step, optimizer_times = learner.optimizer.step, []

    def timed() -> None:  # hooks included
        with collective_times() as times:
            took = seconds(optimizer_step)
        optimizer_times.append((took, times.blocked, times.in_flight))

    setattr(learner.optimizer, "step", timed)  # noqa: B010
    now, steps = partial(wall_clock, experiment.device), []
    for step in range(WARM_UP + rounds):
        windows = corpus.batch(seed=0, step=step, batch_size=size, length=length, rows=learner.rows(size))
        ranks.any_of(False)  # all begin together
        whole = seconds(partial(learner.step, windows, step, arm.training.schedule(step) * arm.lr), now)
        of_ranks = ranks.gathered((whole, *optimizer_times[-1]))
        slowest = max(of_ranks, key=lambda times: times[1])
        steps.append((max(times[0] for times in of_ranks), *slowest[1:]))
    whole, update, blocked, in_flight = np.median(steps[WARM_UP:], axis=0).tolist()
    row: Row = {"step_ms": round(1e3 * whole, 3), "tokens_per_second": round(size * length / whole, 1)}
    if experiment.device == "cuda":
        return row
    return row | {
        "optimizer_ms": round(1e3 * update, 3),
        "compute_share": round(1 - blocked / update, 4),
        "communication_share": round(blocked / update, 4),
        "overlap_share": round(max(0.0, 1 - blocked / in_flight), 4) if in_flight else None,
    }


def with_efficiency(rows: Sequence[Row]) -> list[Row]:
    """Add the efficiency against the smallest number of processes of the same arm and case: 1 is perfect."""
    frame = pd.DataFrame(rows)
    frame["each"] = frame["tokens_per_second"] / frame["processes"]
    least = frame.sort_values("processes").groupby(["arm", "case"])["each"].transform("first")
    return [row | {"efficiency": round(share, 4)} for row, share in zip(rows, frame["each"] / least, strict=True)]


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
    """Write the table in Markdown."""
    return render("scaling.md", **result)
