"""Trials: short runs, each from its first step to its last at once, of which a line is kept: the loss at its end.

A study asks for the losses of arms on seeds; those that its file does not hold yet are trained and added to it, so that
a stop loses no more than the runs under way. The first line of the file holds what all of them share.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.experiment.arms import choices, resolve
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.errors import DamagedFile, UsageError
from benchmarks.experiment.experiment import Experiment, differences
from benchmarks.records.environment import environment
from benchmarks.records.summary import bits
from benchmarks.training.timing import torch_threads
from benchmarks.training.torch_learner import TorchLearner

Row = dict[str, Any]

TINY = {"hidden_size": 32, "num_layers": 2, "max_seq_len": 16, "q_lora_rank": 24, "kv_lora_rank": 16}
"""Changes that make the model of `MoEConfig.cpu` one for dry runs."""


class Trials:
    """The trials of a protocol: an experiment without arms, whose model, data and training all runs share.

    Args:
        protocol: Its data must be the default text, which every process opens for itself.
        path: The file of their lines.
        jobs: Processes, of one thread each.

    Raises:
        UsageError: Where the file holds runs of another protocol.
    """

    def __init__(self, protocol: Experiment, path: Path, jobs: int = 1) -> None:
        self.protocol, self.path, self.jobs = protocol, path, jobs
        self.rows: list[Row] = []
        if not path.exists():
            self._add({"environment": environment() | {"threads": 1}, "protocol": protocol.to_json()})
        lines = _whole_lines(path)
        self.environment: dict[str, Any] = lines[0]["environment"]
        if changed := differences(lines[0]["protocol"], protocol.to_json()):
            message = f"{path} holds runs of another protocol; choose another folder, or remove it to start again:"
            raise UsageError("--out", "\n  ".join([message, *changed]))
        self.rows = lines[1:]

    def losses(self, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, list[float]]:
        """Return by arm the validation loss of each seed in bits; infinity where a run diverged.

        Seed after seed, so that after a stop all arms have about as many.
        """
        asked = [(arm, seed) for seed in seeds for arm in dict.fromkeys(arms)]
        have = {(row["arm"], row["seed"]) for row in self.rows}
        for row in self._train([each for each in asked if each not in have]):
            self.rows.append(row)
            self._add(row)
            print(row, file=sys.stderr, flush=True)
        found = {(row["arm"], row["seed"]): row["loss"] for row in self.rows}
        return {
            arm: [math.inf if found[arm, seed] is None else found[arm, seed] for seed in seeds]
            for arm in dict.fromkeys(arms)
        }

    def _train(self, missing: Sequence[tuple[str, int]]) -> Iterator[Row]:
        if self.jobs == 1 or len(missing) < 2:
            yield from (trial(self.protocol, *each) for each in missing)
            return
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(trial, self.protocol, *each) for each in missing]
            try:
                for each in running:
                    yield each.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _add(self, line: Row) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")


def trial(protocol: Experiment, name: str, seed: int) -> Row:
    """Train one arm on one seed. `seconds`: those of the CPU, of its steps alone."""
    corpus, (arm,) = _corpus(), resolve(choices(name), protocol.model, protocol.training)
    training, length = arm.training, arm.model.max_seq_len
    with torch_threads(1):
        learner = TorchLearner(protocol, arm, seed)
        begun, peak, finite = time.process_time(), 0.0, True
        for done in range(training.steps):
            windows = corpus.batch(seed=seed, step=done, batch_size=training.batch_size, length=length)
            record = learner.step(windows, done, arm.lr * training.schedule(done))
            finite = math.isfinite(record["loss"] + record["grad_norm"])
            if not finite:
                break
            peak = max(peak, *(max(heads) for heads in record["max_logits"].values()))
        seconds = time.process_time() - begun
        loss = bits(fmean(_validation_losses(learner, corpus, training, length))) if finite else None
    row = {"arm": name, "seed": seed, "steps": training.steps, "lr": arm.lr, "loss": loss, "peak_logit": peak}
    return row | {"seconds": round(seconds, 2)}


def _validation_losses(learner: TorchLearner, corpus: Corpus, training: Any, length: int) -> Iterable[float]:
    for index in range(training.validation_batches):
        yield learner.loss(
            corpus.validation_batch(index=index, batch_size=training.validation_batch_size, length=length)
        )


@cache
def _corpus() -> Corpus:
    return open_corpus()


def _whole_lines(path: Path) -> list[Row]:
    """Return the lines of a file; one that a kill has cut short at its end is taken away."""
    *whole, cut = path.read_text(encoding="utf-8").split("\n")
    if cut:
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    try:
        lines = [json.loads(line) for line in whole]
        if not {"environment", "protocol"} <= lines[0].keys():
            raise ValueError("its first line is not that of trials")
    except (ValueError, IndexError) as error:
        raise DamagedFile(path, str(error), "Restore it, or remove it and start the command again.") from error
    return lines
