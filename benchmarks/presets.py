"""The settings that have a name: which model, and how it is trained. Rates were searched; see the docstrings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.panel import Training
from muonclip.models import MoEConfig


@dataclass(frozen=True, slots=True)
class Preset:
    model: Callable[..., MoEConfig]  # takes attention=, vocab_size=
    training: Training


def _rates(*, adamw: float, muon: float) -> dict[str, float]:
    """By arm. Only those of adamw, muon and muonclip were searched; the other arms take their optimizer's."""
    return {"adamw": adamw, "adamw-clip": adamw} | dict.fromkeys(
        ("muon", "muonclip", "per-head", "qk-norm", "softcap"), muon
    )


HOT = Training(steps=800, batch_size=4, lr=_rates(adamw=1e-3, muon=3e-2))
"""A rate above Muon's best, constant after the warm-up: the maximum logit grows in minutes as it does over weeks in a
large model. AdamW keeps a rate that suits it."""

OWN_RATE = Training(
    steps=400,
    batch_size=16,
    lr=_rates(adamw=1e-3, muon=5e-3),
    decay_share=0.5,
    validate_every=40,
)
"""Each optimizer at the rate that serves it best, and a decay, which serves them all. Bits per byte, one seed each:
AdamW at {0.5, 1, 2, 4, 8}e-3: 2.61, 2.43, 2.49, 2.56, 2.91; Muon at {2.5, 5, 10}e-3: 2.20, 2.18, 2.22. Without the
decay: AdamW at 1e-3 2.45, Muon at 5e-3 2.34."""

PRESETS = {"cpu": Preset(MoEConfig.cpu, HOT)}
