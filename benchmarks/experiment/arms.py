"""The arms: how each one updates a model, and for some which model. Everything else about a run is shared.

`ARMS` is the one table; a new arm is a new entry. On the command line an arm may carry settings of its own, as in
`muonclip@tau=10` or `muon@attention=gqa@weight_decay=0` (`SETTINGS`). `Choice` is such a word understood, and `resolve`
makes an `Arm` of it, in which nothing is left to look up. An arm that changes the model starts from the same weights
wherever the shapes agree. The maximum logits are measured in every arm, by a clip that never acts where the arm has
none, so that the measurement costs every arm the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from benchmarks.experiment.settings import Training
from muonclip.core import COEFFICIENT_SETS
from muonclip.core.head_parts import PerHead
from muonclip.models import MoEConfig
from muonclip.models.config import Attention

Optimizer = Literal["adamw", "muon", "torch-muon"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table. Pictures show `label` and `colour` (Okabe–Ito, colour-blind safe)."""

    label: str
    colour: str
    optimizer: Optimizer
    clips: bool = False
    baseline: str | None = None  # the entry that is the same but for the clip
    late: bool = False  # whether the clip waits for `Training.rescue_at`
    per_head: PerHead = False  # whether each head's rows, or those of so many heads, are a matrix of their own
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of MuonClip
    model: Callable[[MoEConfig, Training], MoEConfig] = lambda config, training: config


ARMS: dict[str, Entry] = {
    "adamw": Entry("AdamW", "#0072B2", "adamw"),
    "muon": Entry("Muon", "#D55E00", "muon"),
    "muonclip": Entry("MuonClip", "#009E73", "muon", clips=True, baseline="muon"),
    "rescue": Entry("Muon, clip switched on midway", "#8C6BB1", "muon", clips=True, baseline="muon", late=True),
    "per-head": Entry("MuonClip per head", "#CC79A7", "muon", clips=True, per_head=True),
    "per-head-pairs": Entry("MuonClip per two heads", "#DDCC77", "muon", clips=True, per_head="pairs"),
    "normuon": Entry("MuonClip, NorMuon", "#117733", "muon", clips=True, options={"update": "normuon"}),
    "hyperball": Entry(
        "MuonClip, hyperball", "#332288", "muon", clips=True, options={"update": "hyperball", "weight_decay": 0.0}
    ),
    "muown": Entry("MuonClip, Muown", "#882255", "muon", clips=True, options={"update": "muown"}),
    "cautious": Entry("MuonClip, cautious decay", "#AA4499", "muon", clips=True, options={"cautious_decay": True}),
    "torch-muon": Entry("torch.optim.Muon + AdamW", "#661100", "torch-muon"),
    **{
        name: Entry(f"MuonClip, momentum {words}", colour, "muon", clips=True, options={"momentum_dtype": dtype})
        for name, words, colour, dtype in (
            ("bf16", "bf16", "#44AA99", "bfloat16"),
            ("bf16-stochastic", "bf16, stochastic", "#999933", "bfloat16_stochastic"),
            ("int8", "int8", "#888888", "int8"),
            ("int8-stochastic", "int8, stochastic", "#6699CC", "int8_stochastic"),
        )
    },
    "int4-experts": Entry(
        "MuonClip, experts in INT4",
        "#661177",
        "muon",
        clips=True,
        model=lambda config, _: replace(config, expert_weight_bits=4),
    ),
    "adamw-clip": Entry("AdamW + QK-Clip", "#56B4E9", "adamw", clips=True, baseline="adamw"),
    "qk-norm": Entry("Muon, QK-norm", "#E69F00", "muon", model=lambda config, _: replace(config, qk_norm=True)),
    "softcap": Entry("Muon, soft cap", "#000000", "muon", model=lambda config, own: replace(config, softcap=own.tau)),
}
DEFAULT_ARMS = ("adamw", "muon", "muonclip")  # the claim itself; the others are what it is compared with


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm of an experiment, resolved: what one run does, its settings included."""

    name: str
    label: str
    colour: str
    optimizer: Optimizer
    clips: bool
    clips_from: int  # updates that are done before the clip may act
    per_head: PerHead
    options: Mapping[str, Any]
    model: MoEConfig
    training: Training
    lr: float
    states_rate: bool  # whether the label says the rate
    baseline: str | None  # the arm that is the same but for the clip; of another rate where none has this one
    changes: Mapping[str, Any]  # the fields that its model has otherwise than the experiment's, with its values

    @property
    def adamw_share(self) -> float:
        """The rate of AdamW's half next to Muon, over the arm's."""
        return 1.0 if self.training.adamw_lr is None else self.training.adamw_lr / self.lr

    def tau(self, done: int) -> float:
        """Return the threshold in the update that follows `done` others; infinity measures without clipping."""
        return self.training.tau if self.clips and done >= self.clips_from else math.inf

    @property
    def caption(self) -> str:
        """The arm with its rate, for titles and legends: "Muon, QK-norm, rate 0.03 (changes the model)"."""
        rate = "" if self.states_rate else f", rate {self.lr:g}"
        return f"{self.label}{rate}{' (changes the model)' if self.changes else ''}"

    @property
    def capped(self) -> bool:
        """True where its logits pass through a soft cap; they are measured before it."""
        return "softcap" in self.changes

    @property
    def change(self) -> str:
        """The change that it makes to the model, in words: "softcap = 30"."""
        return ", ".join(f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in self.changes.items())


@dataclass(frozen=True, slots=True)
class Choice:
    """An arm as it is asked for: an entry of the table, and settings in the order of `SETTINGS`."""

    entry: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`muonclip@tau=10`, the same however the settings were ordered or written."""
        written = (f"{k}={v if isinstance(v, str) else format(v, 'g')}" for k, v in self.settings.items())
        return "@".join([self.entry, *written])

    @property
    def label(self) -> str:
        """`muonclip@tau=10` → "MuonClip, τ = 10"."""
        return ", ".join([ARMS[self.entry].label, *(SETTINGS[k].words(v) for k, v in self.settings.items())])


def choose(entry: str, **settings: Any) -> Choice:
    return Choice(entry, {key: settings[key] for key in SETTINGS if key in settings})


def choices(*names: str) -> tuple[Choice, ...]:
    """Read the names of arms. Raises ValueError, saying what is known, for a name that is not understood."""
    return tuple(map(_parse, names))


def resolve(chosen: Sequence[Choice], model: MoEConfig, training: Training) -> tuple[Arm, ...]:
    """Make the arms of these choices on the model and the training. Arms of one entry are shades of its colour."""
    rates = {choice.name: choice.settings.get("lr") or training.lr[choice.entry] for choice in chosen}
    arms: list[Arm] = []
    for choice in chosen:
        entry, settings, lr = ARMS[choice.entry], dict(choice.settings), rates[choice.name]
        settings.pop("lr", None)
        options = dict(entry.options) | {key: settings.pop(key) for key in _POLYNOMIAL if key in settings}
        attention = settings.pop("attention", model.attention)
        own = replace(training, **settings)
        config = entry.model(replace(model, attention=attention), own)
        before = asdict(model)
        shades = [other.name for other in chosen if other.entry == choice.entry]
        others = [other.name for other in chosen if other.entry == entry.baseline and _rest(other) == _rest(choice)]
        arms.append(
            Arm(
                name=choice.name,
                label=choice.label,
                colour=_shade(entry.colour, shades.index(choice.name), len(shades)),
                optimizer=entry.optimizer,
                clips=entry.clips,
                clips_from=round(own.rescue_at * own.steps) if entry.late else 0,
                per_head=entry.per_head,
                options=options,
                model=config,
                training=own,
                lr=lr,
                states_rate="lr" in choice.settings,
                baseline=min(others, key=lambda name, lr=lr: rates[name] != lr, default=None),
                changes={key: value for key, value in asdict(config).items() if value != before[key]},
            )
        )
    return tuple(arms)


def number(kind: Callable[[str], float], low: float, high: float = 1e300) -> Callable[[str], Any]:
    """Return what reads a number between these, and raises ValueError for anything else."""

    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return read


def _parse(name: str) -> Choice:
    entry, *parts = name.split("@")
    if entry not in ARMS:
        raise ValueError(f"unknown arm {entry!r}; known: {', '.join(ARMS)}")
    settings: dict[str, Any] = {}
    for part in parts:
        key, _, written = part.partition("=")
        if key not in SETTINGS:
            raise ValueError(f"unknown setting {key!r} in {name!r}; known: {', '.join(SETTINGS)}")
        if key in settings:
            raise ValueError(f"{key} is set twice in {name!r}")
        if key == "adamw_lr" and ARMS[entry].optimizer == "adamw":
            raise ValueError(f"{name!r} has one rate: {entry}@lr={written}")
        if key in _POLYNOMIAL and ARMS[entry].optimizer != "muon":
            raise ValueError(f"{key} is of MuonClip's arms; {name!r} is another optimizer")
        try:
            settings[key] = SETTINGS[key].read(written)
        except ValueError:
            raise ValueError(f"{key}={written} is not {SETTINGS[key].meaning}") from None
    return choose(entry, **settings)


def _rest(choice: Choice) -> dict[str, Any]:
    """Return the settings in which an arm and its baseline must agree."""
    return {key: value for key, value in choice.settings.items() if key not in ("tau", "lr")}


def _shade(colour: str, position: int, count: int) -> str:
    """Return the colour itself for a single arm; else one from a dark to a light shade of it."""
    if count == 1:
        return colour
    mix = -0.45 + 1.0 * position / (count - 1)  # below 0 towards black, above 0 towards white
    parts = bytes.fromhex(colour.removeprefix("#"))
    mixed = bytes(round(part + mix * (255 - part) if mix > 0 else part * (1 + mix)) for part in parts)
    return f"#{mixed.hex().upper()}"


class Setting(NamedTuple):
    read: Callable[[str], Any]  # raises ValueError for what it is not
    meaning: str
    words: Callable[[Any], str]


_ATTENTIONS = get_args(Attention)
_SETS = (*COEFFICIENT_SETS,)
_POLYNOMIAL = ("ns_coefficients", "ns_steps")  # arguments of MuonClip
SETTINGS: dict[str, Setting] = {
    "attention": Setting(
        lambda text: _ATTENTIONS[_ATTENTIONS.index(text)], f"one of {', '.join(_ATTENTIONS)}", str.upper
    ),
    "lr": Setting(number(float, 1e-300), "a positive number", "rate {:g}".format),
    "adamw_lr": Setting(number(float, 1e-300), "a positive number", "rate of the AdamW half {:g}".format),
    "ns_coefficients": Setting(lambda text: _SETS[_SETS.index(text)], f"one of {', '.join(COEFFICIENT_SETS)}", str),
    "ns_steps": Setting(number(int, 1, 99), "an integer from 1 to 99", "{} steps of the iteration".format),
    "tau": Setting(number(float, 1e-300), "a positive number", "τ = {:g}".format),
    "weight_decay": Setting(number(float, 0), "a number from 0", "λ = {:g}".format),
    "steps": Setting(number(int, 1), "an integer of at least 1", "{} steps".format),
    "decay_share": Setting(
        number(float, 0, 1),
        "a share from 0 to 1",
        lambda share: f"decay over the last {share:.0%}" if share else "constant rate",
    ),
}
