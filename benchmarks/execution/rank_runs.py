"""Runs under torchrun: all ranks on one run, then on the next."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.execution.progress import Progress
from benchmarks.execution.ranks import Ranks, Stop, Stopped
from benchmarks.execution.sharded_checkpoints import ShardedCheckpoints
from benchmarks.execution.worker import run_folder
from benchmarks.execution.workers import Job
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.experiment import Panel
from benchmarks.records import atomic_files as checkpoint
from benchmarks.records import metrics
from benchmarks.training.learner import Learner
from benchmarks.training.run import EVERY_20_SECONDS, RESULT, Checkpoints, Run
from benchmarks.training.sharded_learner import Layout, ShardedLearner

STARTS, LOG = "starts.jsonl", "log.txt"


@dataclass(frozen=True, slots=True)
class Nodes:
    """The ranks, and how they divide the work."""

    ranks: Ranks
    layout: Layout
    asynchronous: bool = False  # checkpoints


class NodesRun(Run):
    """`Run` on all ranks: each has its part of model and optimizer; the first one writes the records. In the folder are
    also `starts.jsonl`, a line per start with its ranks and the step that it went on from, and the same in words."""

    learner: ShardedLearner

    def __init__(self, panel: Panel, corpus: Corpus, folder: Path, arm: str, seed: int, nodes: Nodes) -> None:
        self.nodes, self.ranks = nodes, nodes.ranks
        self.checkpoints = ShardedCheckpoints(folder / "checkpoints", self.ranks, asynchronous=nodes.asynchronous)
        self._saved = 0  # updates in the newest checkpoint
        super().__init__(panel, corpus, folder, arm, seed)

    def save(self) -> None:
        """Once per step, and not before the first."""
        if self._saved == self.done:
            return
        if self.ranks.first:
            self.log.sync()
        state = {
            "done": self.done,
            "last": metrics.to_json(self.last),
            "wall_seconds": self.wall_seconds,
            "train_seconds": self.train_seconds,
            "layout": self.nodes.layout.to_json(),
        }
        self.checkpoints.save(self.done, self.learner.state(), state)
        self._saved = self.done

    def train(
        self,
        on_step: Callable[[dict[str, Any]], None],
        stopping: Callable[[], bool] = lambda: False,
        checkpoints: Checkpoints = EVERY_20_SECONDS,
    ) -> None:
        """As `Run.train`; that one rank is to stop stops all, after the same step, and the first rank's clock decides
        when a checkpoint is due."""
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
        self.save()
        self.checkpoints.finish()
        if self.finished and self.ranks.first:
            self.write_result()

    def write_result(self) -> None:
        """As `Run`'s, and how many ranks there were in the last part."""
        super().write_result()
        path = self.folder / RESULT
        ranks = {"world_size": self.ranks.size, "layout": self.nodes.layout.to_json()}
        checkpoint.write_json(path, json.loads(path.read_text()) | ranks)

    def _make_learner(self) -> Learner:
        return ShardedLearner(self.panel, self.arm, self.seed, self.nodes.layout)

    def _resume(self) -> None:
        found, problems = self.checkpoints.find()
        for problem in problems:
            self._say(f"damaged: {problem}. The checkpoint before it is taken; this one is kept as ….damaged.")
        state = None if found is None else self.checkpoints.state(found)
        complete = self.ranks.on_first(lambda: self.log.begin(state["done"] if state else 0))
        if found is not None and state is not None and complete:
            tensors = self.learner.empty_state(self.checkpoints.shapes(found))
            self.checkpoints.load(found, tensors)
            self.learner.restore(tensors)
            self.last = metrics.from_json(state["last"])
            self.done, self._saved = state["done"], state["done"]
            self.wall_seconds, self.train_seconds = state["wall_seconds"], state["train_seconds"]
            self._say(f"goes on from {found}")
        elif found is not None:
            self.checkpoints.put_aside()
            self._say(f"starts from the beginning: {found} is whole, but the records up to it are not; it is put aside")
        else:
            self._say("starts from the beginning" + (": no checkpoint is left" if problems else ""))
        self._record_start(problems)

    def _say(self, message: str) -> None:
        if self.ranks.first:
            line = f"{self.arm}-{self.seed} on {self.ranks.size} ranks, restart {self.ranks.restarts}: {message}"
            print(line, file=sys.stderr, flush=True)
            with (self.folder / LOG).open("a") as stream:
                stream.write(line + "\n")

    def _record_start(self, problems: Sequence[str]) -> None:
        if self.ranks.first:
            start = {
                "restart": self.ranks.restarts,
                "resumed_from": self.done,
                "world_size": self.ranks.size,
                "layout": self.nodes.layout.to_json(),
                "damaged": list(problems),
            }
            with (self.folder / STARTS).open("a") as stream:
                stream.write(json.dumps(start) + "\n")


def run_together(jobs: Sequence[Job], corpus: Corpus, nodes: Nodes, checkpoints: Checkpoints) -> None:
    """What is not finished yet, one after the other. Raises Stopped on every rank once one was told to stop
    and all have saved."""
    ranks, stop = nodes.ranks, Stop()
    finished = ranks.on_first(lambda: [job.finished for job in jobs])
    progress = Progress(
        total=sum(job.steps for job in jobs),
        done=sum(job.steps for job, done in zip(jobs, finished, strict=True) if done),
    ) if ranks.first else None  # fmt: skip
    for job, done in zip(jobs, finished, strict=True):
        if done:
            continue
        if job.panel.device == "cpu":
            torch.set_num_threads(job.panel.threads)
        run = NodesRun(job.panel, corpus, run_folder(job.folder, job.arm, job.seed), job.arm, job.seed, nodes)
        if progress is not None:
            progress.update(job.title, job.steps, {"step": run.done})

        def tell(record: dict[str, Any], job: Job = job) -> None:
            if progress is not None:
                logits = [logit for heads in record["max_logits"].values() for logit in heads]
                news = {"loss": record["loss"], "max_logit": max(logits, default=float("nan"))}
                progress.update(job.title, job.steps, {"step": record["step"], **news})

        run.train(tell, lambda: stop.asked, checkpoints)
        if not run.finished:
            raise Stopped
        if progress is not None:
            progress.finish(job.title, job.steps)
    if progress is not None:
        progress.close()
