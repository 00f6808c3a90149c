"""Facts of an experiment from its numbers alone: how large the logits became, and what the clip changed.

A fact names what speaks against the claim as readily. `logit_rows`, `effect_rows` make tables of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.experiment.arms import Arm
from benchmarks.records.intervals import Interval, difference, interval
from benchmarks.records.summary import Results, bits

HELD = 2.0  # times τ: the last quarter of the steps is called held where its median is up to here
Logits = Literal["not measured", "stayed at or under τ", "held", "not held", "above τ", "passed τ, then under it"]
Clip = Literal[
    "no common seed",
    "other rates",  # what the clip alone does is not measured
    "shows nothing",  # the baseline never passed τ
    "same to the bit",
    "does not repeat",  # no head was clipped, and yet the numbers differ
    "not finite",
    "one seed",
    "not told from zero",
    "helped",
    "cost loss",
]


@dataclass(frozen=True, slots=True)
class ArmFacts:
    """An arm over its finished seeds. Losses in bits."""

    arm: Arm
    losses: dict[int, float]
    logits: Logits
    peak: float
    passed: tuple[int, ...]  # the first step above τ, of each seed that had one
    last_quarter: float  # the median there, in the seed where it is largest
    ever_clipped: tuple[float, ...]  # shares of the heads, by seed
    last_clipped: int | None
    spikes: tuple[int, ...]  # steps, over all seeds
    diverged: dict[int, int]  # seed → step
    entropy: float  # at the end, mean over heads and seeds, in nats

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses.values())


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """An arm against the arm that is the same but for the clip, by seed."""

    arm: Arm
    baseline: Arm
    verdict: Clip
    differences: tuple[float, ...] = ()  # of the final loss, in bits; below 0 the clip helped
    clips: int = 0  # heads, summed over steps
    identical: bool = False  # every loss and logit is the same to the bit

    @property
    def interval(self) -> Interval | None:
        return interval(self.differences) if self.differences else None


def arm_facts(results: Results) -> list[ArmFacts]:
    return [_of_arm(results, arm) for arm in results.finished]


def clip_facts(results: Results) -> list[ClipFacts]:
    """Return the facts of every finished arm whose baseline is finished, too."""
    finished = {arm.name: arm for arm in results.finished}
    return [_of_clip(results, arm, finished[arm.baseline]) for arm in finished.values() if arm.baseline in finished]


def compare(own: Sequence[float], other: Sequence[float]) -> Interval:
    """Return the difference of losses, paired by seed."""
    return interval([a - b for a, b in zip(own, other, strict=True)])


def logit_rows(facts: Sequence[ArmFacts]) -> list[list[str]]:
    """Make rows sorted by loss within each model; losses of different models are not compared."""
    head = (
        "arm|logits|passed τ at step|peak|last quarter ÷ τ|heads ever clipped|last clip|loss spikes|entropy|loss, bits"
    )
    rows = [[*head.split("|"), "from the lowest"]]
    groups = {fact.arm.change: [other for other in facts if other.arm.change == fact.arm.change] for fact in facts}
    for group in groups.values():
        lowest = min((fact.loss for fact in group if math.isfinite(fact.loss)), default=math.nan)
        for fact in sorted(group, key=lambda fact: (not math.isfinite(fact.loss), fact.loss)):
            arm, tau = fact.arm, fact.arm.training.tau
            spikes = f"{len(fact.spikes)}, first at {fact.spikes[0]}" if fact.spikes else "none"
            gap = "lowest" if fact.loss == lowest else difference(fact.loss - lowest)
            cells = {
                "logits": f"{fact.logits} (τ = {tau:g}){', before the cap' * arm.capped}",
                "passed": _span(sorted(fact.passed)) or "never",
                "peak": number(fact.peak),
                "last quarter": f"{fact.last_quarter / tau:.3g}",
                "clipped": _span([f"{share:.0%}" for share in sorted(fact.ever_clipped)]) if arm.clips else "no clip",
                "last clip": str(fact.last_clipped or "none"),
                "spikes": "; ".join([spikes, *(f"seed {s} diverged at step {at}" for s, at in fact.diverged.items())]),
                "entropy": f"{fact.entropy:.2f}" if math.isfinite(fact.entropy) else "",
                "loss": f"{fact.loss:.3f}" if math.isfinite(fact.loss) else "not finite",
                "gap": gap if len(groups) == 1 or len(group) > 1 else "another model",
            }
            rows.append([arm.label, *cells.values()])
    return rows


def effect_rows(facts: Sequence[ClipFacts]) -> list[list[str]]:
    rows = [["with the clip", "without", "verdict", "loss, bits: mean (95% interval)", "seed by seed", "heads clipped"]]
    for fact in facts:
        verdict: str = fact.verdict
        if fact.verdict == "other rates":
            verdict += f" ({fact.arm.lr:g} and {fact.baseline.lr:g})"
        if fact.verdict == "shows nothing":
            verdict += f": {fact.baseline.label} did not pass τ = {fact.arm.training.tau:g}"
            verdict += ", and all is the same to the bit" if fact.identical else ""
        seeds = ", ".join(map(difference, fact.differences)) if len(fact.differences) > 1 else ""
        row = [fact.arm.label, fact.baseline.label, verdict, str(fact.interval or ""), seeds]
        rows.append([*row, str(fact.clips)])
    return rows


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _of_arm(results: Results, arm: Arm) -> ArmFacts:
    runs, records = results.summaries[arm.name], results.records[arm.name]
    training, tau = arm.training, arm.training.tau
    maxima = [of.steps["max_logit"] for of in records.values()]
    passed = tuple(int(logits.index[logits > tau][0]) for logits in maxima if (logits > tau).any())
    peaks = [run["max_logit_peak"] for run in runs.values() if math.isfinite(run["max_logit_peak"])]
    medians = [m for run in runs.values() if math.isfinite(m := run["max_logit_median_last_quarter"])]
    peak, median = max(peaks, default=math.nan), max(medians, default=math.nan)
    if math.isnan(peak):
        logits: Logits = "not measured"
    elif not passed:
        logits = "stayed at or under τ"
    elif arm.clips:
        logits = "held" if median <= HELD * tau else "not held"
    else:
        logits = "above τ" if median > tau else "passed τ, then under it"
    spikes = sorted(
        int(step)
        for of in records.values()
        for step, spiked in of.spikes(training.spike_window, training.spike_threshold).items()
        if spiked and math.isfinite(of.steps["loss"][step])
    )
    last = [step for run in runs.values() if (step := run["last_clipped_step"]) is not None]
    return ArmFacts(
        arm=arm,
        losses={seed: bits(run["final_val_loss"]) for seed, run in runs.items()},
        logits=logits,
        peak=peak,
        passed=passed,
        last_quarter=median,
        ever_clipped=tuple(run["heads_ever_clipped"] for run in runs.values()),
        last_clipped=max(last, default=None),
        spikes=tuple(spikes),
        diverged={seed: step for seed, of in records.items() if (step := of.diverged_at) is not None},
        entropy=statistics.fmean(run["attention_entropy"] for run in runs.values()),
    )


def _of_clip(results: Results, arm: Arm, baseline: Arm) -> ClipFacts:
    own, other = results.summaries[arm.name], results.summaries[baseline.name]
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        return ClipFacts(arm, baseline, "no common seed")
    clips = sum(own[seed]["clipped_head_steps"] for seed in seeds)
    if arm.lr != baseline.lr:
        return ClipFacts(arm, baseline, "other rates", clips=clips)
    differences = tuple(bits(own[seed]["final_val_loss"]) - bits(other[seed]["final_val_loss"]) for seed in seeds)
    records = [(results.records[arm.name][seed], results.records[baseline.name][seed]) for seed in seeds]
    peaks = [run["max_logit_peak"] for run in other.values()]
    found = interval(differences).verdict
    identical = all(one.same_as(two) for one, two in records)
    if max(peaks) <= arm.training.tau:
        verdict: Clip = "shows nothing"
    elif identical:
        verdict = "same to the bit"
    elif found == "not finite":
        verdict = "not finite"
    elif not clips:
        verdict = "does not repeat"
    else:
        verdict = "helped" if found == "lower" else "cost loss" if found == "higher" else found
    return ClipFacts(arm, baseline, verdict, differences, clips, identical)


def _span(values: Sequence[object]) -> str:
    """Write the first and the last of them, once where they are the same."""
    return " to ".join(dict.fromkeys(map(str, (*values[:1], *values[-1:]))))
