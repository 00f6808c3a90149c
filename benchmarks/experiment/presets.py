"""Named settings: which model, and how it is trained. Rates were searched; see the docstrings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.experiment.arms import ARMS
from benchmarks.experiment.settings import Training
from muonclip.core.schedules import WarmupConstantCosine
from muonclip.models import MoEConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """A model and its training under one name.

    `pilot_rates`: tried first, for the pilot's share of the steps; the hot rate is chosen among them.
    """

    model: Callable[..., MoEConfig]  # takes attention=, vocab_size=
    training: Training
    device: str = "cpu"
    seeds: tuple[int, ...] = (0, 1)
    pilot_rates: tuple[float, ...] = ()


def rates(*, adamw: float, muon: float) -> dict[str, float]:
    """Return rates by arm. Those of adamw, muon and muonclip were searched; the other arms take their optimizer's."""
    return {name: adamw if entry.optimizer == "adamw" else muon for name, entry in ARMS.items()}


HOT = Training(steps=800, batch_size=4, lr=rates(adamw=1e-3, muon=3e-2))
"""A rate above Muon's best, constant after the warm-up: the maximum logit grows in minutes as it does over weeks in a
large model. AdamW keeps a rate that suits it."""

OWN_RATE = Training(steps=300, batch_size=16, lr=rates(adamw=1e-3, muon=5e-3), decay_share=0.5, validate_every=50)
"""Each optimizer at the rate that serves it best, and a decay to a tenth, which serves them all. `make evidence` finds
the rates: docs/evidence/sweep.json, of three seeds."""

_LARGE = Training(steps=0, batch_size=0, lr={}, tau=100.0, warmup_steps=100, validation_batches=4)
_SCHEDULE = WarmupConstantCosine.k2()
_K2 = Training(
    steps=0,
    batch_size=16_384,
    lr={},
    warmup_steps=500,
    decay_share=_SCHEDULE.decay / _SCHEDULE.total_steps,
    final_factor=_SCHEDULE.final,
    tau=100.0,
    validate_every=500,
    validation_batches=1,
    validation_batch_size=256,
)

PRESETS = {
    "cpu": Preset(MoEConfig.cpu, HOT),
    "gpu": Preset(
        MoEConfig.gpu,
        Training(steps=1000, batch_size=16, lr=rates(adamw=1e-3, muon=2e-2), tau=100.0, validation_batch_size=16),
        device="cuda",
        seeds=(0,),
        pilot_rates=(1e-2, 2e-2, 4e-2),
    ),
    "node": Preset(
        MoEConfig.node,
        replace(_LARGE, steps=2000, batch_size=8, lr=rates(adamw=3e-4, muon=1e-2), validation_batch_size=8),
        device="cuda",
        seeds=(0,),
        pilot_rates=(5e-3, 1e-2, 2e-2),
    ),
    "cluster": Preset(
        MoEConfig.k2,
        replace(_K2, steps=_SCHEDULE.total_steps, lr=rates(adamw=2e-4, muon=2e-4), warmup_steps=_SCHEDULE.warmup),
        device="cuda",
        seeds=(0,),
    ),
    "cluster-moonlight": Preset(
        MoEConfig.moonlight,
        replace(_K2, steps=20_000, batch_size=2048, lr=rates(adamw=4.2e-4, muon=4.2e-4), validation_batch_size=64),
        device="cuda",
        seeds=(0,),
    ),
}
"""`gpu` is sized for ten minutes on one H200-class card, `node` for as long on eight (torchrun).
`cluster` is Kimi K2 by its report's recipe (67M tokens a step, 15.5T in all), `cluster-moonlight` Moonlight at its peak
rate by the same recipe (17M tokens a step); `benchmarks/launch` starts them. None of these was measured."""
