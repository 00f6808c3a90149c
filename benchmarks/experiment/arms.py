"""The arms: how each one updates a model, and for some which model. Everything else about a run is shared.

An arm's name may carry settings of its own: `muonclip@tau=10`, `muon@attention=gqa@weight_decay=0`. `SETTINGS` lists
them. An arm that changes the model starts from the same weights wherever the shapes agree.
The maximum logits are measured in every arm, by a clip that never acts where the arm has none, so all pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from benchmarks.experiment.experiment import Panel, Training
from muonclip.models import MoEConfig
from muonclip.models.config import Attention


@dataclass(frozen=True, slots=True)
class Arm:
    """How an arm updates the model that `model(config, training)` gives the sizes of, in every framework.

    Pictures show `label` and `colour` (Okabe–Ito, colour-blind safe).
    """

    label: str
    colour: str
    optimizer: Literal["adamw", "muon"]
    clips: bool = False
    late: bool = False  # whether the clip waits for `Training.rescue_at`
    per_head: bool = False  # whether each head's rows are a matrix of their own
    model: Callable[[MoEConfig, Training], MoEConfig] = lambda config, training: config


class Setup(NamedTuple):
    """What one arm of a panel really does, its settings included."""

    arm: Arm
    model: MoEConfig
    training: Training
    lr: float

    def tau(self, done: int) -> float:
        """The threshold in the update that follows `done` others; infinity measures without clipping."""
        begin = round(self.training.rescue_at * self.training.steps) if self.arm.late else 0
        return self.training.tau if self.arm.clips and done >= begin else math.inf


class Appearance(NamedTuple):
    """An arm in pictures and tables."""

    label: str
    colour: str


def setup(panel: Panel, name: str) -> Setup:
    """The arm of that name in the panel."""
    base, settings = parse(name)
    lr = settings.pop("lr", None) or panel.training.lr[base]
    attention = settings.pop("attention", panel.model.attention)
    training = replace(panel.training, **settings)
    model = ARMS[base].model(replace(panel.model, attention=attention), training)
    return Setup(ARMS[base], model, training, lr)


def model_changes(panel: Panel, name: str) -> dict[str, Any]:
    """The fields that the arm's model has otherwise than the panel's, with its values."""
    own, shared = asdict(setup(panel, name).model), asdict(panel.model)
    return {field: value for field, value in own.items() if value != shared[field]}


def appearance(panel: Panel) -> dict[str, Appearance]:
    """Labels and colours by arm, all different: arms that differ in their settings are shades of one colour."""
    looks: dict[str, Appearance] = {}
    for name in panel.arms:
        base = base_of(name)
        alike = [other for other in panel.arms if base_of(other) == base]
        looks[name] = Appearance(label(name), _shade(ARMS[base].colour, alike.index(name), len(alike)))
    return looks


def label(name: str) -> str:
    """`muonclip@tau=10` → "MuonClip, τ = 10"."""
    base, settings = parse(name)
    return ", ".join([ARMS[base].label, *(SETTINGS[key].words(value) for key, value in settings.items())])


def base_of(name: str) -> str:
    """The arm without its settings."""
    return name.partition("@")[0]


def with_settings(base: str, **settings: Any) -> str:
    """The name of an arm with these settings, the same however they are ordered or written."""
    written = (
        f"{key}={settings[key]:g}" if key != "attention" else f"{key}={settings[key]}"
        for key in SETTINGS
        if key in settings
    )
    return "@".join([base, *written])


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """The arm and its settings. Raises ValueError, saying what is known, for a name that is not understood."""
    base, *parts = name.split("@")
    if base not in ARMS:
        raise ValueError(f"unknown arm {base!r}; known: {', '.join(ARMS)}")
    settings: dict[str, Any] = {}
    for part in parts:
        key, _, written = part.partition("=")
        if key not in SETTINGS:
            raise ValueError(f"unknown setting {key!r} in {name!r}; known: {', '.join(SETTINGS)}")
        if key in settings:
            raise ValueError(f"{key} is set twice in {name!r}")
        settings[key] = SETTINGS[key].read(key, written)
    return base, {key: settings[key] for key in SETTINGS if key in settings}


class Setting(NamedTuple):
    read: Callable[[str, str], Any]  # name and text → value; raises ValueError
    words: Callable[[Any], str]


def _number(kind: Callable[[str], float], low: float, high: float, meaning: str) -> Callable[[str, str], float]:
    def read(key: str, written: str) -> float:
        try:
            value = kind(written)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"{key}={written} is not {meaning}")
        return value

    return read


def _attention(key: str, written: str) -> str:
    if written not in get_args(Attention):
        raise ValueError(f"{key}={written} is none of {', '.join(get_args(Attention))}")
    return written


_LEAST, _MOST = 1e-300, 1e300
SETTINGS: dict[str, Setting] = {
    "attention": Setting(_attention, str.upper),
    "lr": Setting(_number(float, _LEAST, _MOST, "a positive number"), lambda lr: f"rate {lr:g}"),
    "tau": Setting(_number(float, _LEAST, _MOST, "a positive number"), lambda tau: f"τ = {tau:g}"),
    "weight_decay": Setting(_number(float, 0, _MOST, "a number from 0"), lambda decay: f"λ = {decay:g}"),
    "steps": Setting(_number(int, 1, 10**12, "an integer of at least 1"), lambda steps: f"{steps} steps"),
    "decay_share": Setting(
        _number(float, 0, 1, "a share from 0 to 1"),
        lambda share: f"decay over the last {share:.0%}" if share else "constant rate",
    ),
}


def _shade(colour: str, position: int, count: int) -> str:
    """The colour itself for one alone; else from a dark to a light shade of it."""
    if count == 1:
        return colour
    mix = -0.45 + 1.0 * position / (count - 1)  # below 0 towards black, above 0 towards white
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(part + mix * (255 - part)) if mix > 0 else round(part * (1 + mix)) for part in parts]
    return "#" + "".join(f"{part:02X}" for part in mixed)


ARMS: dict[str, Arm] = {
    "adamw": Arm("AdamW", "#0072B2", "adamw"),
    "muon": Arm("Muon", "#D55E00", "muon"),
    "muonclip": Arm("MuonClip", "#009E73", "muon", clips=True),
    "rescue": Arm("Muon, clip switched on midway", "#8C6BB1", "muon", clips=True, late=True),
    "per-head": Arm("MuonClip per head", "#CC79A7", "muon", clips=True, per_head=True),
    "adamw-clip": Arm("AdamW + QK-Clip", "#56B4E9", "adamw", clips=True),
    "qk-norm": Arm("Muon, QK-norm", "#E69F00", "muon", model=lambda config, _: replace(config, qk_norm=True)),
    "softcap": Arm("Muon, soft cap", "#000000", "muon", model=lambda config, own: replace(config, softcap=own.tau)),
}
DEFAULT_ARMS = ("adamw", "muon", "muonclip")  # the claim itself; the others are what it is compared with
