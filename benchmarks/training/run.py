"""One run: an arm and a seed, on one process or on all ranks of torchrun. Stopped, it goes on to the same bits.

Nothing carries over from step to step but the model and the optimizer, which a `Learner` keeps: batches are a function
of (seed, step), rates of the step. What many ranks do otherwise is in what they give instead of `Alone` and `Store`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.errors import DamagedFile
from benchmarks.experiment.experiment import Experiment
from benchmarks.records import atomic_files, metrics
from benchmarks.records.folders import CHECKPOINT, METRICS, RESULT
from benchmarks.training.learner import Learner
from benchmarks.training.probe import Probe
from benchmarks.training.torch_learner import TorchLearner, autocast

T = TypeVar("T")
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The times of checkpoints: after so many seconds, or, where `steps` is given, every so many updates."""

    seconds: float = 20.0
    steps: int | None = None

    def due(self, done: int, since_last: float) -> bool:
        return since_last >= self.seconds if self.steps is None else done % self.steps == 0


class Alone:
    """The processes that train a run together: here one. `first` is whether this one writes the records."""

    @property
    def first(self) -> bool:
        return True

    def on_first(self, decide: Callable[[], T]) -> T:
        """Return what `decide` returns on the first process."""
        return decide()

    def on_each(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on this process."""
        return make()

    def any_of(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any process has raised it."""
        return list(flags)


class Store:
    """The checkpoints of a run: here one file. `notes` are added to the run's result."""

    def __init__(self, folder: Path, device: str = "cpu", notes: dict[str, Any] | None = None) -> None:
        self.folder, self.device, self.notes = folder, device, notes or {}

    def find(self) -> State | None:
        """Return the state of the newest checkpoint that is complete."""
        path = self.folder / CHECKPOINT
        state = atomic_files.load(path, self.device)
        kinds = {"done": int, "last": dict, "wall_seconds": float, "train_seconds": float}
        wrong = [] if state is None else [name for name, kind in kinds.items() if type(state.get(name)) is not kind]
        if wrong or (state is not None and state["done"] < 0):
            why = f"its {wrong[0] if wrong else 'done'} is not that of a run"
            raise DamagedFile(path, why, atomic_files.begin_anew(path))
        return state

    def load(self, learner: Learner, found: State) -> None:
        """Put the state into the learner. Raises DamagedFile for the state of another run."""
        path = self.folder / CHECKPOINT
        try:
            learner.restore(found)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = f"it is not of this run: {atomic_files.first_line(error)}"
            raise DamagedFile(path, why, atomic_files.begin_anew(path)) from error

    def begin(self, done: int) -> None:
        """Begin the run at this step: where it is 0, nothing that was found is used."""

    def save(self, learner: Learner, state: State) -> None:
        atomic_files.save(self.folder / CHECKPOINT, state | learner.state())

    def finish(self) -> None:
        """Wait for a save that is under way."""


class Run:
    """A run where its folder left it: at the last checkpoint, or at the start."""

    def __init__(
        self,
        experiment: Experiment,
        corpus: Corpus,
        folder: Path,
        arm: Arm,
        seed: int,
        *,
        learner: Learner | None = None,
        ranks: Alone | None = None,
        store: Store | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.experiment, self.corpus, self.folder, self.arm, self.seed = experiment, corpus, folder, arm, seed
        self.learner = learner or make_learner(experiment, arm, seed)
        self.ranks, self.store = ranks or Alone(), store or Store(folder, experiment.device)
        self.probe = Probe(self._validation_windows(0))
        self.done = self.saved = 0  # updates, and those in the newest checkpoint
        self.wall_seconds = self.train_seconds = 0.0
        self.last: dict[str, Any] = {}  # record of the last step
        self.log = metrics.MetricsLog(folder / METRICS)
        self._resume()

    @property
    def diverged(self) -> bool:
        return bool(self.last) and not math.isfinite(self.last["loss"] + self.last["grad_norm"])

    @property
    def finished(self) -> bool:
        return self.done == self.arm.training.steps or self.diverged

    def train(
        self,
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        stopping: Callable[[], bool] = lambda: False,
        checkpoints: Schedule | None = None,
    ) -> None:
        """Train to the end, or until `stopping()` on any rank, which stops all after the same step.

        Either way the checkpoint holds the state then. `on_step` gets the records; the first rank's clock says when to
        save.
        """
        checkpoints = checkpoints or Schedule()
        started, earlier = time.perf_counter(), self.wall_seconds
        saved, stopped = started, False
        while not (self.finished or stopped):
            self.last = self.step()
            if self.ranks.first:
                self.log.append(self.last)
            on_step(self.last)
            now = time.perf_counter()
            self.wall_seconds = earlier + now - started
            due = self.ranks.first and checkpoints.due(self.done, now - saved)
            stopped, due = self.ranks.any_of(stopping(), due)
            if due:
                self.save()
                saved = now
        if self.saved != self.done:
            self.save()
        self.store.finish()
        if self.finished and self.ranks.first:
            result = {"steps": self.done, "diverged": self.diverged, "final_val_loss": self.last["val_loss"]}
            atomic_files.write_json(self.folder / RESULT, metrics.to_json(result | self._seconds | self.store.notes))

    def step(self) -> dict[str, Any]:
        """Take one update and, where it is due, validate after it; return its record (see `metrics`)."""
        training, length = self.arm.training, self.experiment.model.max_seq_len
        validates = training.validates_after(self.done + 1)
        measures = validates and self.learner.measurable
        before = self.probe.weights(self.learner.reference()) if measures else None
        begun = time.perf_counter()
        rows = self.learner.rows(training.batch_size)
        acting = training.acting(self.done)
        draw = self.corpus.random_batch if acting and acting.random_tokens else self.corpus.batch
        windows = draw(seed=self.seed, step=self.done, batch_size=training.batch_size, length=length, rows=rows)
        lr = self.arm.lr * training.schedule(self.done) * (acting.rate if acting else 1.0)
        record: dict[str, Any] = {"step": self.done + 1, "lr": lr}
        record |= self.learner.step(windows, self.done, lr)
        seconds = time.perf_counter() - begun
        record["tokens_per_second"] = training.batch_size * length / seconds
        self.train_seconds += seconds
        self.done += 1
        if not math.isfinite(record["loss"] + record["grad_norm"]):
            record["val_loss"] = math.nan
            return record
        if training.probe_windows:
            rows = self.learner.rows(training.probe_windows)
            record["probe_loss"] = self.learner.loss(self._validation_windows(0, rows, training.probe_windows))
        if validates:
            record["val_loss"] = self.validate()
        if before is not None:
            with autocast(self.experiment):
                record |= self.probe.measure(self.learner.reference(), before, lr)
        return record

    def validate(self) -> float:
        """Return the mean nats per token of the same validation windows every time."""
        training = self.arm.training
        rows = self.learner.rows(training.validation_batch_size)
        windows = (self._validation_windows(index, rows) for index in range(training.validation_batches))
        return math.fsum(map(self.learner.loss, windows)) / training.validation_batches

    def save(self) -> None:
        if self.ranks.first:
            self.log.sync()
        state = {"done": self.done, "last": metrics.to_json(self.last)}
        self.store.save(self.learner, state | self._seconds)
        self.saved = self.done

    @property
    def _seconds(self) -> dict[str, float]:
        return {"wall_seconds": self.wall_seconds, "train_seconds": self.train_seconds}

    def _resume(self) -> None:
        state = self.store.find()
        whole = self.ranks.on_first(lambda: self.log.begin(state["done"] if state else 0))
        if state is not None and whole:
            self.store.load(self.learner, state)
            self.done = self.saved = state["done"]
            self.last = metrics.from_json(state["last"])
            self.wall_seconds, self.train_seconds = state["wall_seconds"], state["train_seconds"]
        self.store.begin(self.done)

    def _validation_windows(self, index: int, rows: range | None = None, size: int | None = None) -> NDArray[np.int64]:
        size, length = size or self.arm.training.validation_batch_size, self.experiment.model.max_seq_len
        return self.corpus.validation_batch(index=index, batch_size=size, length=length, rows=rows)


def make_learner(experiment: Experiment, arm: Arm, seed: int) -> Learner:
    """Make the learner of the run, in the experiment's framework."""
    if experiment.framework == "jax":
        from benchmarks.training.jax_learner import JaxLearner  # JAX need not be installed for PyTorch's runs

        return JaxLearner(experiment, arm, seed)
    return TorchLearner(experiment, arm, seed)
