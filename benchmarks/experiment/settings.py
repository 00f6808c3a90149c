"""The settings that all arms of an experiment share, each with its default: how runs are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from muonclip.core.adam_defaults import ADAM_BETAS
from muonclip.core.schedules import WarmupConstantCosine

Dtype = Literal["float32", "bfloat16"]
Framework = Literal["torch", "jax"]
FRAMEWORKS: dict[Framework, str] = {"torch": "PyTorch", "jax": "JAX"}
DTYPES: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """A change made to a run on purpose, in `steps` updates that follow `after` others."""

    after: int
    steps: int
    rate: float = 1.0  # factor of the rate
    random_tokens: bool = False  # in place of the text's, each as likely as any other

    def acts(self, done: int) -> bool:
        """Tell whether it acts in the update that follows `done` others."""
        return self.after <= done < self.after + self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One run's training. Rates are per step, `lr` by arm; windows are as long as the model's context."""

    steps: int
    batch_size: int  # windows per step
    lr: Mapping[str, float]
    warmup_steps: int = 30
    decay_share: float = 0.0  # the last share of the steps, on a cosine down to `final_factor`
    final_factor: float = 0.1
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    adamw_lr: float | None = None  # peak rate of the AdamW half next to Muon; None: that of the arm
    betas: tuple[float, float] = ADAM_BETAS  # of AdamW, by itself and next to Muon
    grad_clip: float = 1.0  # global norm
    tau: float = 30.0
    rescue_at: float = 0.5  # share of the steps after which the arm `rescue` switches its clip on
    validate_every: int = 50  # steps
    validation_batches: int = 8
    validation_batch_size: int = 32  # windows
    spike_window: int = 50  # steps
    spike_threshold: float = 0.5  # nats above the window's median
    probe_windows: int = 0  # the first of the validation windows, on which the loss is measured after every update
    disturbance: Disturbance | None = None

    @property
    def schedule(self) -> WarmupConstantCosine:
        warmup = min(self.warmup_steps, self.steps)
        decay = min(round(self.decay_share * self.steps), self.steps - warmup)
        return WarmupConstantCosine(warmup, self.steps - warmup - decay, decay, self.final_factor)

    def acting(self, done: int) -> Disturbance | None:
        """Return the disturbance, where there is one and it acts in the update that follows `done` others."""
        return self.disturbance if self.disturbance and self.disturbance.acts(done) else None

    def validates_after(self, step: int) -> bool:
        return step % self.validate_every == 0 or step == self.steps


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtype of the forward and backward pass (autocast), and that of the Newton–Schulz products."""

    autocast: Dtype = "float32"
    ns_dtype: Dtype = "float32"
