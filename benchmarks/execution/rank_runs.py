"""Runs under torchrun: all ranks on one run, then on the next."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.execution.progress import Progress, news
from benchmarks.execution.ranks import Ranks, Stopped
from benchmarks.execution.sharded_checkpoints import ShardedCheckpoints
from benchmarks.execution.workers import Job
from benchmarks.experiment.arms import Arm
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.folders import CHECKPOINTS, LOG, STARTS
from benchmarks.training.learner import Learner
from benchmarks.training.run import Run, Schedule, State, Store
from benchmarks.training.sharded_learner import Layout, ShardedLearner


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks, and how they divide the work."""

    ranks: Ranks
    layout: Layout
    asynchronous: bool = False  # checkpoints

    def run(self, experiment: Experiment, corpus: Corpus, folder: Path, arm: Arm, seed: int) -> Run:
        """Make a run of which each rank has its part of model and optimizer; the first one writes the records."""
        learner = ShardedLearner(experiment, arm, seed, self.layout)
        store = RankStore(folder, self, f"{arm.name}-{seed}")
        return Run(experiment, corpus, folder, arm, seed, learner=learner, ranks=self.ranks, store=store)


class RankStore(Store):
    """The run's sharded checkpoints. In its folder are also `starts.jsonl`, a line per start with its ranks and the
    step that it went on from, and the same in words."""

    def __init__(self, folder: Path, team: Team, title: str) -> None:
        super().__init__(folder, notes={"world_size": team.ranks.size, "layout": team.layout.to_json()})
        self.ranks, self.title = team.ranks, title
        self.checkpoints = ShardedCheckpoints(folder / CHECKPOINTS, team.ranks, asynchronous=team.asynchronous)
        self.found: Path | None = None
        self.problems: list[str] = []

    def find(self) -> State | None:
        self.found, self.problems = self.checkpoints.find()
        for problem in self.problems:
            self._say(f"damaged: {problem}. The checkpoint before it is taken; this one is kept as ….damaged.")
        return None if self.found is None else self.checkpoints.state(self.found)

    def load(self, learner: Learner, found: State) -> None:
        assert self.found is not None
        assert isinstance(learner, ShardedLearner)
        tensors = learner.empty_state(self.checkpoints.shapes(self.found))
        self.checkpoints.load(self.found, tensors)
        learner.restore(tensors)

    def begin(self, done: int) -> None:
        if done:
            self._say(f"goes on from {self.found}")
        elif self.found is not None:
            self.checkpoints.put_aside()
            self._say(f"starts from the beginning: {self.found} is put aside, for its records are not all there")
        else:
            self._say("starts from the beginning" + (": no checkpoint is left" if self.problems else ""))
        start = {"restart": self.ranks.restarts, "resumed_from": done, **self.notes, "damaged": self.problems}
        self._append(STARTS, json.dumps(start))

    def save(self, learner: Learner, state: State) -> None:
        self.checkpoints.save(state["done"], learner.state(), state | {"layout": self.notes["layout"]})

    def finish(self) -> None:
        self.checkpoints.finish()

    def _say(self, message: str) -> None:
        line = f"{self.title} on {self.ranks.size} ranks, restart {self.ranks.restarts}: {message}"
        if self.ranks.first:
            print(line, file=sys.stderr, flush=True)
        self._append(LOG, line)

    def _append(self, name: str, line: str) -> None:
        if self.ranks.first:
            with (self.folder / name).open("a") as stream:
                stream.write(line + "\n")


def run_together(jobs: Sequence[Job], corpus: Corpus, team: Team, checkpoints: Schedule) -> None:
    """Train what is not finished yet, one run after the other.

    Raises Stopped on every rank once one was told to stop and all have saved.
    """
    ranks, stop = team.ranks, threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun hands both on; the step is finished and saved first
        signal.signal(number, lambda *_: stop.set())
    finished = ranks.on_first(lambda: [job.finished for job in jobs])
    done = sum(job.steps for job, over in zip(jobs, finished, strict=True) if over)
    progress = Progress(total=sum(job.steps for job in jobs), done=done, shown=ranks.first)
    for job in (job for job, over in zip(jobs, finished, strict=True) if not over):
        if job.experiment.device == "cpu":
            torch.set_num_threads(job.experiment.threads)
        run = team.run(job.experiment, corpus, job.run, job.arm, job.seed)
        progress.update(job.title, {"step": run.done})
        run.train(lambda record, title=job.title: progress.update(title, news(record)), stop.is_set, checkpoints)
        if not run.finished:
            raise Stopped
        progress.finish(job.title, job.steps)
    progress.close()
