"""The hot rate of a model not tried before: short runs at a few rates, and the lowest at which logits explode.

An experiment like any other: recorded, resumable, in the folder `pilot` next to the results.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.experiment.arms import choose
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.summary import Results

SHARE = 0.15  # of the steps: logits that need longer to pass the limit leave too little to see
LIMIT = 100.0  # logit


def pilot_experiment(experiment: Experiment, rates: tuple[float, ...]) -> Experiment:
    """Make the pilot: Muon at each of the rates, first seed, for the pilot's share of the steps."""
    steps = max(1, round(SHARE * experiment.training.steps))
    return replace(
        experiment,
        name="pilot",
        title=f"Pilot: {SHARE:.0%} of the steps",
        chosen=tuple(choose("muon", lr=rate) for rate in sorted(rates)),
        seeds=experiment.seeds[:1],
        training=replace(experiment.training, steps=steps, lr={}),
    )


def choose_rate(result: Results) -> tuple[float, str]:
    """Choose the rate, and write a sentence that says why."""
    peaks = {arm.lr: run["max_logit_peak"] for arm in result.finished for run in result.summaries[arm.name].values()}
    seen = ", ".join(f"{rate:g}: {peak:.0f}" for rate, peak in peaks.items())
    exploding = [rate for rate, peak in peaks.items() if peak > LIMIT]
    if exploding:
        rate = min(exploding)
        return rate, f"Rate {rate:g}: the lowest whose logits passed {LIMIT:g} in the pilot (peaks {seen})."
    highest = f"no pilot passed {LIMIT:g} (peaks {seen}), so the highest is taken. Try higher: --pilot."
    return max(peaks), f"Rate {max(peaks):g}: {highest}"
