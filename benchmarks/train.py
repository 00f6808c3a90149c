"""One run: an arm and a seed. Stopped anywhere, it goes on from its checkpoint to the same bits.

Nothing carries over from step to step but the model and the optimizer: batches are a function of (seed, step), rates of
the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from benchmarks import checkpoint, metrics
from benchmarks.arms import Setup, Update, setup
from benchmarks.data import Corpus
from benchmarks.measure import Probe
from benchmarks.panel import Panel
from muonclip.models.torch import MoE

CHECKPOINT, METRICS, RESULT = "checkpoint.pt", "metrics.jsonl", "result.json"


class Result(TypedDict):
    """What a finished run leaves beside its records. Seconds are summed over the parts of an interrupted run."""

    steps: int
    diverged: bool  # ended early by a loss or gradient that is not finite
    final_val_loss: float  # mean nats per token
    wall_seconds: float
    train_seconds: float  # the steps alone, without validation and checkpoints


class Run:
    """A run where its folder left it: at the last checkpoint, or at the start."""

    def __init__(self, panel: Panel, corpus: Corpus, folder: Path, arm: str, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.panel, self.corpus, self.folder, self.arm, self.seed = panel, corpus, folder, arm, seed
        self.setup: Setup = setup(panel, arm)
        self.model, self.update = build(panel, arm, seed)
        self.probe = Probe(self.model, self._validation_windows(0))
        self.rates = [group["lr"] for group in self.update.optimizer.param_groups]
        self.done = 0  # updates
        self.wall_seconds = self.train_seconds = 0.0
        self.last: dict[str, Any] = {}  # record of the last step
        self.log = metrics.MetricsLog(folder / METRICS)
        state = checkpoint.load(folder / CHECKPOINT, panel.device)
        if self.log.begin(state["done"] if state else 0) and state:
            self._restore(state)

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
        checkpoint_seconds: float = 20.0,
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
            if now - saved >= checkpoint_seconds:
                self.save()
                saved = now
        self.save()
        if self.finished:
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
        measures = training.validates_after(self.done + 1)
        before = self.probe.weights() if measures else None
        begun = time.perf_counter()
        factor = training.schedule(self.done)
        for group, rate in zip(self.update.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        record: dict[str, Any] = {"step": self.done + 1, "lr": self.setup.lr * factor}
        record |= self._update()
        seconds = time.perf_counter() - begun
        record["tokens_per_second"] = training.batch_size * self.panel.model.max_seq_len / seconds
        self.train_seconds += seconds
        self.done += 1
        if not math.isfinite(record["loss"] + record["grad_norm"]):
            record["val_loss"] = math.nan
        elif before is not None:
            record["val_loss"] = self.validate()
            with autocast(self.panel):
                record |= self.probe.measure(before, record["lr"])
        return record

    def _update(self) -> dict[str, Any]:
        training = self.setup.training
        windows = self.corpus.batch(
            seed=self.seed, step=self.done, batch_size=training.batch_size, length=self.panel.model.max_seq_len
        )
        loss = self._loss(torch.from_numpy(windows))
        self.update.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip)
        measured = {"loss": loss.item(), "grad_norm": norm.item()}
        if not math.isfinite(measured["loss"] + measured["grad_norm"]):
            return measured | {"max_logits": {}, "clipped_heads": 0}
        self.update.step(self.done)
        report = self.update.qk_clip.report()
        return measured | {
            "max_logits": {name: layer.max_logits.tolist() for name, layer in report.layers.items()},
            "clipped_heads": report.clipped_heads,
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Mean nats per token of the same validation windows every time."""
        self.model.eval()
        count = self.setup.training.validation_batches
        losses = [self._loss(self._validation_windows(index)).item() for index in range(count)]
        self.model.train()
        return math.fsum(losses) / len(losses)

    def _validation_windows(self, index: int) -> Tensor:
        size, length = self.setup.training.validation_batch_size, self.panel.model.max_seq_len
        return torch.from_numpy(self.corpus.validation_batch(index=index, batch_size=size, length=length))

    def _loss(self, windows: Tensor) -> Tensor:
        windows = windows.to(self.panel.device)
        with autocast(self.panel):
            return self.model.loss(windows[:, :-1], windows[:, 1:])

    def save(self) -> None:
        self.log.sync()
        state = {
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.update.optimizer.state_dict(),
            "last": metrics.to_json(self.last),
            "wall_seconds": self.wall_seconds,
            "train_seconds": self.train_seconds,
        }
        checkpoint.save(self.folder / CHECKPOINT, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.update.optimizer.load_state_dict(state["optimizer"])
        self.last = metrics.from_json(state["last"])
        self.done, self.wall_seconds, self.train_seconds = state["done"], state["wall_seconds"], state["train_seconds"]


def build(panel: Panel, arm: str, seed: int) -> tuple[MoE, Update]:
    """The model, the same for all arms of a seed but for what an arm changes, and what updates it."""
    torch.manual_seed(seed)
    own = setup(panel, arm)
    model = MoE(own.model).to(panel.device)
    update = own.arm.build(model, own.training, own.lr, panel.precision)
    update.optimizer.register_step_post_hook(model.step_hook)
    return model, update


def autocast(panel: Panel) -> torch.autocast:
    narrow = panel.precision.autocast == "bfloat16"
    return torch.autocast(panel.device, dtype=torch.bfloat16, enabled=narrow)
