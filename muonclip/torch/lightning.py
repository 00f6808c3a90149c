"""A `Monitor` in Lightning's Trainer.

    Trainer(…, callbacks=[MonitorCallback()])

Imported only where lightning is.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from muonclip.core.arguments import check_kind
from muonclip.torch.clip import QKClip
from muonclip.torch.monitor import Monitor, check_options

__all__ = ["MonitorCallback"]


class MonitorCallback(Callback):
    """Logs what a `Monitor` sees by `log_dict`, next to any optimizer, every `log_every_n_steps`; nothing is clipped.

    `monitor` is the Monitor while a training runs. A log waits for the device.

    Args:
        prefix: Text in front of each name.
        every: Steps from one look at the matrices to the next.
        logits: Watch the logits.
        matrices: Watch the matrices.
        clip: As for `Monitor`.

    Raises:
        TypeError: For arguments of another kind.
        ValueError: For wrong arguments, and at the start of training for several optimizers and as from `Monitor`.
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
        self._logged = -1
        self.monitor: Monitor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()  # of a training that was interrupted
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"MonitorCallback watches one optimizer, and there are {len(trainer.optimizers)}. Make a Monitor for "
                "each in configure_optimizers, and log them in training_step."
            )
        self.monitor, self._logged = Monitor(pl_module, trainer.optimizers[0], **self._options), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self.monitor is None or step == self._logged or every == 0 or step % every:
            return  # of a micro-batch, or of a step that is not logged
        self._logged = step
        pl_module.log_dict(self.monitor.scalars(self._prefix))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self.monitor is not None:
            self.monitor.remove()
