"""One run: an arm and a seed. Stopped anywhere, it goes on from its checkpoint to the same bits.

Nothing carries over from step to step but the model and the optimizer, which a `Learner` keeps: batches are a function
of (seed, step), rates of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiment.arms import Setup, setup
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.experiment import Panel
from benchmarks.records import atomic_files as checkpoint
from benchmarks.records import metrics
from benchmarks.training.learner import Learner
from benchmarks.training.probe import Probe
from benchmarks.training.torch_learner import TorchLearner, autocast

CHECKPOINT, METRICS, RESULT = "checkpoint.pt", "metrics.jsonl", "result.json"


class Result(TypedDict):
    """What a finished run leaves beside its records. Seconds are summed over the parts of an interrupted run."""

    steps: int
    diverged: bool  # ended early by a loss or gradient that is not finite
    final_val_loss: float  # mean nats per token
    wall_seconds: float
    train_seconds: float  # the steps alone, without validation and checkpoints


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """When the next one is due: after so many seconds, or, where `steps` is given, after every so many updates."""

    seconds: float = 20.0
    steps: int | None = None

    def due(self, done: int, since_last: float) -> bool:
        return since_last >= self.seconds if self.steps is None else done % self.steps == 0


EVERY_20_SECONDS = Checkpoints()


class Run:
    """A run where its folder left it: at the last checkpoint, or at the start."""

    def __init__(self, panel: Panel, corpus: Corpus, folder: Path, arm: str, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.panel, self.corpus, self.folder, self.arm, self.seed = panel, corpus, folder, arm, seed
        self.setup: Setup = setup(panel, arm)
        self.learner = self._make_learner()
        self.probe = Probe(self._validation_windows(0))
        self.done = 0  # updates
        self.wall_seconds = self.train_seconds = 0.0
        self.last: dict[str, Any] = {}  # record of the last step
        self.log = metrics.MetricsLog(folder / METRICS)
        self._resume()

    @property
    def diverged(self) -> bool:
        return bool(self.last) and not math.isfinite(self.last["loss"] + self.last["grad_norm"])

    @property
    def finished(self) -> bool:
        return self.done == self.setup.training.steps or self.diverged

    def train(
        self,
        on_step: Callable[[dict[str, Any]], None],
        stopping: Callable[[], bool] = lambda: False,
        checkpoints: Checkpoints = EVERY_20_SECONDS,
    ) -> None:
        """To the end, or until `stopping()`; either way the checkpoint holds the state then. `on_step` gets records."""
        started, earlier = time.perf_counter(), self.wall_seconds
        saved = started
        while not (self.finished or stopping()):
            self.last = self.step()
            self.log.append(self.last)
            on_step(self.last)
            now = time.perf_counter()
            self.wall_seconds = earlier + now - started
            if checkpoints.due(self.done, now - saved):
                self.save()
                saved = now
        self.save()
        if self.finished:
            self.write_result()

    def write_result(self) -> None:
        result = Result(
            steps=self.done,
            diverged=self.diverged,
            final_val_loss=self.last["val_loss"],
            wall_seconds=self.wall_seconds,
            train_seconds=self.train_seconds,
        )
        checkpoint.write_json(self.folder / RESULT, metrics.to_json(result))

    def step(self) -> dict[str, Any]:
        """One update and, where it is due, the validation after it; its record (see `metrics`)."""
        training = self.setup.training
        validates = training.validates_after(self.done + 1)
        measures = validates and self.learner.measurable
        before = self.probe.weights(self.learner.reference()) if measures else None
        begun = time.perf_counter()
        windows = self.corpus.batch(
            seed=self.seed,
            step=self.done,
            batch_size=training.batch_size,
            length=self.panel.model.max_seq_len,
            rows=self.learner.rows(training.batch_size),
        )
        lr = self.setup.lr * training.schedule(self.done)
        record: dict[str, Any] = {"step": self.done + 1, "lr": lr}
        record |= self.learner.step(windows, self.done, lr)
        seconds = time.perf_counter() - begun
        record["tokens_per_second"] = training.batch_size * self.panel.model.max_seq_len / seconds
        self.train_seconds += seconds
        self.done += 1
        if not math.isfinite(record["loss"] + record["grad_norm"]):
            record["val_loss"] = math.nan
            return record
        if validates:
            record["val_loss"] = self.validate()
        if before is not None:
            with autocast(self.panel):
                record |= self.probe.measure(self.learner.reference(), before, lr)
        return record

    def validate(self) -> float:
        """Mean nats per token of the same validation windows every time."""
        count = self.setup.training.validation_batches
        rows = self.learner.rows(self.setup.training.validation_batch_size)
        losses = [self.learner.loss(self._validation_windows(index, rows)) for index in range(count)]
        return math.fsum(losses) / len(losses)

    def _validation_windows(self, index: int, rows: range | None = None) -> NDArray[np.int64]:
        size, length = self.setup.training.validation_batch_size, self.panel.model.max_seq_len
        return self.corpus.validation_batch(index=index, batch_size=size, length=length, rows=rows)

    def save(self) -> None:
        self.log.sync()
        state = {
            "done": self.done,
            **self.learner.state(),
            "last": metrics.to_json(self.last),
            "wall_seconds": self.wall_seconds,
            "train_seconds": self.train_seconds,
        }
        checkpoint.save(self.folder / CHECKPOINT, state)

    def _make_learner(self) -> Learner:
        return learner(self.panel, self.arm, self.seed)

    def _resume(self) -> None:
        state = checkpoint.load(self.folder / CHECKPOINT, self.panel.device)
        if self.log.begin(state["done"] if state else 0) and state:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.learner.restore(state)
        self.last = metrics.from_json(state["last"])
        self.done, self.wall_seconds, self.train_seconds = state["done"], state["wall_seconds"], state["train_seconds"]


def learner(panel: Panel, arm: str, seed: int) -> Learner:
    """What trains that run, in the panel's framework."""
    if panel.framework == "jax":
        from benchmarks.training.jax_learner import JaxLearner  # JAX need not be installed for PyTorch's runs

        return JaxLearner(panel, arm, seed)
    return TorchLearner(panel, arm, seed)
