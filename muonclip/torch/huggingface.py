"""MuonClip in the Hugging Face Trainer.

    Trainer(model, arguments, …, optimizer_cls_and_kwargs=(MuonClipFactory, dict(lr=5e-3, weight_decay=0.1)),
            callbacks=[QKClipCallback()])

Imported only where transformers is.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from muonclip.core.arguments import check_kind
from muonclip.torch.clip import QKClip, extremes_of
from muonclip.torch.monitor import Monitor, check_options
from muonclip.torch.optimizer import MuonClip

__all__ = ["MonitorCallback", "MuonClipFactory", "QKClipCallback"]


class MuonClipFactory:
    """Makes a `MuonClip` for the Trainer, which calls it with the model:

        Trainer(…, optimizer_cls_and_kwargs=(MuonClipFactory, dict(lr=5e-3, weight_decay=0.1, tau=100.0)))

    It needs transformers 5.2. The options are `MuonClip`'s; `lr` and `weight_decay` have no default here, because those
    of `TrainingArguments` do not reach it. The Trainer's schedule, gradient clipping, accumulation and checkpoints work
    as with its own optimizers.
    """

    def __call__(
        self, model: nn.Module, *, lr: float | None = None, weight_decay: float | None = None, **options: Any
    ) -> MuonClip:
        """Make the optimizer.

        Args:
            model: The model that is trained.
            lr: The rate of both halves, per step; has to be given.
            weight_decay: Decoupled, times the rate; has to be given.
            **options: The other arguments of `MuonClip`.

        Raises:
            TypeError: Where one of them is missing, and for options that there are not.
            ValueError: As from `MuonClip`.
        """
        check_kind("model", model, nn.Module, "the model, as the Trainer does")
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value is None:
                raise TypeError(
                    f"{name!r} is missing, and that of TrainingArguments does not reach the optimizer. Write "
                    "optimizer_cls_and_kwargs=(MuonClipFactory, dict(lr=…, weight_decay=…))."
                )
        unknown = options.keys() - inspect.signature(MuonClip).parameters.keys()
        if unknown:
            raise TypeError(
                f"{min(unknown)!r} is not an option of MuonClip; see its documentation for those there are."
            )
        return MuonClip(model, **dict(options, lr=lr, weight_decay=weight_decay))


class QKClipCallback(TrainerCallback):
    """Adds what QK-Clip saw to the training logs of the Trainer, with the names of `QKClipReport.scalars`.

    `bound`, `max_logit`, `clipped_heads` and `min_gamma` are the extremes over the steps since the last log;
    `last_clipped_step` is of the last step.

    The Trainer writes its `log_history` first, so the values are added there too, and runs the loggers of `report_to`
    before the callbacks that it is given: to reach those, insert this one first,
    `trainer.callback_handler.callbacks.insert(0, QKClipCallback())`.

    A step costs a few small kernels and does not wait for the device; a log waits for it, as the Trainer's own loss
    does.

    Args:
        clip: For optimizers other than `MuonClip`, the QKClip that follows them.
        prefix: Text in front of each name.

    Raises:
        ValueError: At the start of training, where there is no clip.
        RuntimeError: At a log, as from `QKClip.report`.
    """

    def __init__(self, clip: QKClip | None = None, prefix: str = "qk_clip/") -> None:
        if clip is not None:
            check_kind("clip", clip, QKClip, "the QKClip that follows the optimizer, or None")
        check_kind("prefix", prefix, str, "text for the names in the logs")
        self._given, self._prefix = clip, prefix
        self._clip: QKClip | None = None
        self._extremes: Tensor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        inner = _unwrapped(optimizer)
        found = self._given if self._given is not None else getattr(inner, "qk_clip", None)
        self._clip = found if isinstance(found, QKClip) else None
        self._extremes = None
        if self._clip is None:
            raise ValueError(
                f"QKClipCallback found no QK-Clip in the optimizer, {type(inner).__name__}. Use MuonClip with its clip "
                "on, pass the clip that follows another optimizer, QKClipCallback(clip), or leave the callback out."
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._clip is None or getattr(optimizer, "step_was_skipped", False) or not self._clip.last_layers:
            return  # there may be nothing to clip
        extremes = extremes_of(self._clip.last_layers.values())
        self._extremes = extremes if self._extremes is None else torch.maximum(self._extremes, extremes)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._clip is None or self._extremes is None or logs is None or "loss" not in logs:
            return  # of an evaluation, or the summary at the end
        bound, max_logit, clipped_heads, negative_gamma = self._extremes.tolist()
        self._extremes = None
        values = self._clip.report().scalars("")
        values |= {"bound": bound, "clipped_heads": clipped_heads, "min_gamma": -negative_gamma}
        if max_logit > -math.inf:
            values["max_logit"] = max_logit
        _add({self._prefix + name: value for name, value in values.items()}, logs, state)


class MonitorCallback(TrainerCallback):
    """Adds what a `Monitor` saw to the training logs of the Trainer, next to any optimizer; nothing is clipped.

    For the loggers of `report_to` see `QKClipCallback`. A log waits for the device.

    Args:
        prefix: Text in front of each name.
        every: Steps from one look at the matrices to the next.
        logits: Watch the logits.
        matrices: Watch the matrices.
        clip: As for `Monitor`.

    Raises:
        TypeError: For arguments of another kind.
        ValueError: For wrong arguments, and at the start of training as from `Monitor`.
    """

    def __init__(
        self,
        prefix: str = "monitor/",
        *,
        every: int = 1,
        logits: bool = True,
        matrices: bool = True,
        clip: QKClip | None = None,
    ) -> None:
        check_kind("prefix", prefix, str, "text for the names in the logs")
        check_options(every=every, logits=logits, matrices=matrices, clip=clip)
        self._prefix = prefix
        self._options: dict[str, Any] = dict(every=every, logits=logits, matrices=matrices, clip=clip)
        self.monitor: Monitor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.monitor is not None:  # of a training that was interrupted
            self.monitor.remove()
        self.monitor = None
        self.monitor = Monitor(model, _unwrapped(optimizer), **self._options)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.monitor is None or logs is None or "loss" not in logs:
            return  # of an evaluation, or the summary at the end
        _add(self.monitor.scalars(self._prefix), logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.monitor is not None:
            self.monitor.remove()


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside of accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _add(values: dict[str, float], logs: dict[str, Any], state: TrainerState) -> None:
    """Add numbers to what is being logged, and to the history, which the Trainer writes first."""
    logs.update(values)
    state.log_history[-1].update(values)
