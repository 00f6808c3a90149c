"""The hot rate of a model not tried before: short runs at a few rates, and the lowest at which logits explode.

A panel like any other: recorded, resumable, in the folder `pilot` beside the results.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.experiment.arms import setup, with_settings
from benchmarks.experiment.experiment import Panel
from benchmarks.records.summary import PanelResult

SHARE = 0.15  # of the steps: logits that need longer to pass the limit leave too little to see
LIMIT = 100.0  # logit


def pilot_panel(panel: Panel, rates: tuple[float, ...]) -> Panel:
    """Muon at each of the rates, first seed, for the pilot's share of the steps, as the panel itself would begin."""
    steps = max(1, round(SHARE * panel.training.steps))
    arms = tuple(with_settings("muon", lr=rate) for rate in sorted(rates))
    training = replace(panel.training, steps=steps, lr={})
    return replace(
        panel,
        name="pilot",
        title=f"Pilot: {SHARE:.0%} of the steps",
        arms=arms,
        seeds=panel.seeds[:1],
        training=training,
    )


def choose_rate(result: PanelResult) -> tuple[float, str]:
    """The rate, and a sentence that says why."""
    peaks = {
        setup(result.panel, arm).lr: run["max_logit_peak"]
        for arm, runs in result.summaries.items()
        for run in runs.values()
    }
    seen = ", ".join(f"{rate:g}: {peak:.0f}" for rate, peak in peaks.items())
    exploding = [rate for rate, peak in peaks.items() if peak > LIMIT]
    if exploding:
        rate = min(exploding)
        return rate, f"Rate {rate:g}: the lowest whose logits passed {LIMIT:g} in the pilot (peaks {seen})."
    rate = max(peaks)
    return (
        rate,
        f"Rate {rate:g}: no pilot passed {LIMIT:g} (peaks {seen}), so the highest is taken. Try higher: --pilot.",
    )
