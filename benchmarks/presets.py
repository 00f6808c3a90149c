"""The settings that have a name: which model, and how it is trained. Rates were searched; see the docstrings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.panel import Training
from muonclip.models import MoEConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """`pilot_rates`: tried first, for the pilot's share of the steps; the hot rate is chosen among them."""

    model: Callable[..., MoEConfig]  # takes attention=, vocab_size=
    training: Training
    device: str = "cpu"
    seeds: tuple[int, ...] = (0, 1)
    pilot_rates: tuple[float, ...] = ()


def rates(*, adamw: float, muon: float) -> dict[str, float]:
    """By arm. Only those of adamw, muon and muonclip were searched; the other arms take their optimizer's."""
    return {"adamw": adamw, "adamw-clip": adamw} | dict.fromkeys(
        ("muon", "muonclip", "rescue", "per-head", "qk-norm", "softcap"), muon
    )


HOT = Training(steps=800, batch_size=4, lr=rates(adamw=1e-3, muon=3e-2))
"""A rate above Muon's best, constant after the warm-up: the maximum logit grows in minutes as it does over weeks in a
large model. AdamW keeps a rate that suits it."""

OWN_RATE = Training(
    steps=300,
    batch_size=16,
    lr=rates(adamw=1e-3, muon=5e-3),
    decay_share=0.5,
    validate_every=50,
)
"""Each optimizer at the rate that serves it best, and a decay to a tenth, which serves them all. `make evidence` finds
the rates: docs/evidence/sweep.json, of three seeds."""

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
        Training(
            steps=2000,
            batch_size=8,
            lr=rates(adamw=3e-4, muon=1e-2),
            tau=100.0,
            warmup_steps=100,
            validation_batches=4,
            validation_batch_size=8,
        ),
        device="cuda",
        seeds=(0,),
        pilot_rates=(5e-3, 1e-2, 2e-2),
    ),
}
"""`gpu` is sized for ten minutes on one H200-class card, `node` for eight; neither was measured. `node` runs on one
card until the harness runs under torchrun."""
