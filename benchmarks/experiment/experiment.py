"""A panel: runs on the same model, data, batches and initial weights that differ in the arm and the seed alone.

Some arms change the model; `benchmarks.arms.model_changes` says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.experiment.data import DataRecord
from muonclip.core.schedules import WarmupConstantCosine
from muonclip.models import MoEConfig

Dtype = Literal["float32", "bfloat16"]
Framework = Literal["torch", "jax"]
FRAMEWORKS: dict[Framework, str] = {"torch": "PyTorch", "jax": "JAX"}
DTYPES: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How every run of a panel trains, but for what an arm sets itself (`benchmarks.arms`). Rates are per step, `lr` by
    arm; windows are as long as the model's context."""

    steps: int
    batch_size: int  # windows per step
    lr: Mapping[str, float]
    warmup_steps: int = 30
    decay_share: float = 0.0  # the last share of the steps, on a cosine down to `final_factor`
    final_factor: float = 0.1
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW, alone and beside Muon
    grad_clip: float = 1.0  # global norm
    tau: float = 30.0
    rescue_at: float = 0.5  # share of the steps after which the arm `rescue` switches its clip on
    validate_every: int = 50  # steps
    validation_batches: int = 8
    validation_batch_size: int = 32  # windows
    spike_window: int = 50  # steps
    spike_threshold: float = 0.5  # nats above the window's median

    @property
    def schedule(self) -> WarmupConstantCosine:
        warmup = min(self.warmup_steps, self.steps)
        decay = min(round(self.decay_share * self.steps), self.steps - warmup)
        return WarmupConstantCosine(warmup, self.steps - warmup - decay, decay, self.final_factor)

    def validates_after(self, step: int) -> bool:
        return step % self.validate_every == 0 or step == self.steps


@dataclass(frozen=True, slots=True)
class Precision:
    """Of the forward and backward pass (autocast), and of the Newton–Schulz products."""

    autocast: Dtype = "float32"
    ns_dtype: Dtype = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """All that decides the numbers of its runs; what the folder of results is recognised by."""

    name: str  # of its folder; "" for a panel that is alone
    title: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    model: MoEConfig
    training: Training
    data: DataRecord
    framework: Framework = "torch"
    precision: Precision = Precision()
    device: str = "cpu"
    threads: int = 1  # per run

    @property
    def subject(self) -> str:
        """Model and data, for titles."""
        model = self.model
        return (
            f"{_count(model.num_parameters())}-parameter MoE, {model.attention.upper()}, width {model.hidden_size}, "
            f"{model.num_layers} layers, {model.num_heads} heads · {self.data.title}"
        )

    @property
    def heading(self) -> str:
        """What sets it apart, for titles."""
        return f"{self.title} · {self.training.batch_size} × {self.model.max_seq_len} tokens a step"

    def runs(self) -> list[tuple[str, int]]:
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def to_json(self) -> dict[str, Any]:
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> Panel:
        values = dict(recorded)
        training = dict(values["training"])
        training["betas"] = tuple(training["betas"])
        return cls(
            **values
            | {
                "arms": tuple(values["arms"]),
                "seeds": tuple(values["seeds"]),
                "model": MoEConfig(**values["model"]),
                "training": Training(**training),
                "data": DataRecord(**values["data"]),
                "precision": Precision(**values["precision"]),
            }
        )


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One line for each value of two JSON configurations that is not the same, by its dotted name."""
    old, new = flat({"framework": "torch"} | dict(recorded)), flat(asked)  # what was recorded when there was no other
    return [
        f"{name}: recorded {old.get(name, 'nothing')}, asked for {new.get(name, 'nothing')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    names: dict[str, Any] = {}
    for key, item in value.items():
        names |= flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {prefix + key: item}
    return names


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
