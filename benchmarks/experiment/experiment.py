"""An experiment: runs on the same model, data, batches and initial weights that differ in the arm and the seed alone.

Some arms change the model; `Arm.changes` says how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from benchmarks.experiment.arms import Arm, Choice, choices, resolve
from benchmarks.experiment.data import Corpus, DataRecord
from benchmarks.experiment.settings import Disturbance, Framework, Precision, Training
from muonclip.models import MoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """The values that decide the numbers of its runs; a folder of results is recognised by them."""

    name: str  # of its folder; "" for an experiment that is the only one
    title: str
    chosen: tuple[Choice, ...]
    seeds: tuple[int, ...]
    model: MoEConfig
    training: Training
    data: DataRecord
    framework: Framework = "torch"
    precision: Precision = field(default_factory=Precision)
    device: str = "cpu"
    threads: int = 1  # per run
    arms: tuple[Arm, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", resolve(self.chosen, self.model, self.training))

    @classmethod
    def on(
        cls, corpus: Corpus, *, chosen: Sequence[Choice], model: MoEConfig, training: Training, **own: Any
    ) -> Experiment:
        """Make one of this text, with the rates of its own arms alone. Raises UsageError for too short a text."""
        corpus.require(model.max_seq_len)
        lr = {choice.entry: training.lr[choice.entry] for choice in chosen if choice.entry in training.lr}
        training, data = replace(training, lr=lr), corpus.record()
        return cls(chosen=tuple(chosen), model=model, training=training, data=data, **own)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def steps(self) -> int:
        """The number of steps of its longest run."""
        return max(arm.training.steps for arm in self.arms)

    @property
    def subject(self) -> str:
        """Model and data, for titles."""
        model, size = self.model, self.model.num_parameters()
        count = f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.1f}M"
        return (
            f"{count}-parameter MoE, {model.attention.upper()}, width {model.hidden_size}, "
            f"{model.num_layers} layers, {model.num_heads} heads · {self.data.title}"
        )

    @property
    def heading(self) -> str:
        """The settings that distinguish it from others, for titles."""
        return f"{self.title} · {self.training.batch_size} × {self.model.max_seq_len} tokens a step"

    def runs(self) -> list[tuple[Arm, int]]:
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON gives them back; of the arms, their names."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        own = {"arms" if name == "chosen" else name: value for name, value in own.items()}
        return json.loads(json.dumps(own, default=lambda of: of.name if isinstance(of, Choice) else asdict(of)))

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> Experiment:
        values = dict(recorded)
        training = values["training"] | {"betas": tuple(values["training"]["betas"])}
        if disturbance := training.get("disturbance"):
            training["disturbance"] = Disturbance(**disturbance)
        made = {"chosen": choices(*values.pop("arms")), "seeds": tuple(values["seeds"])}
        made |= {"training": Training(**training), "model": MoEConfig(**values["model"])}
        made |= {"data": DataRecord(**values["data"]), "precision": Precision(**values["precision"])}
        return cls(**values | made)


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Write one line for each value of two JSON configurations that is not the same, by its dotted name."""
    old, new = flat({"framework": "torch"} | dict(recorded)), flat(asked)  # what was recorded when there was no other
    return [
        f"{name}: recorded {old.get(name, 'nothing')}, asked for {new.get(name, 'nothing')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to their dotted names."""
    names: dict[str, Any] = {}
    for key, item in value.items():
        names |= flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {prefix + key: item}
    return names
