"""Facts of an experiment from its numbers alone: how large the logits became, and what the clip changed.

A fact names what speaks against the claim as readily. `logit_rows`, `effect_rows` make tables of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from benchmarks.experiment.arms import Arm
from benchmarks.records.intervals import Interval, difference, interval
from benchmarks.records.run_records import Frame
from benchmarks.records.summary import Results, bits
from benchmarks.report.charts import spikes_of
from benchmarks.report.tables import Rows, rows_of

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


def logit_rows(facts: Sequence[ArmFacts]) -> Rows:
    """Make rows sorted by loss within each model; losses of different models are not compared."""
    rows = []
    groups = {fact.arm.change: [other for other in facts if other.arm.change == fact.arm.change] for fact in facts}
    for group in groups.values():
        lowest = min((fact.loss for fact in group if math.isfinite(fact.loss)), default=math.nan)
        for fact in sorted(group, key=lambda fact: (not math.isfinite(fact.loss), fact.loss)):
            arm, tau = fact.arm, fact.arm.training.tau
            spikes = f"{len(fact.spikes)}, first at {fact.spikes[0]}" if fact.spikes else "none"
            gap = "lowest" if fact.loss == lowest else difference(fact.loss - lowest)
            rows.append(
                {
                    "arm": arm.label,
                    "logits": f"{fact.logits} (τ = {tau:g}){', before the cap' * arm.capped}",
                    "passed τ at step": _span(sorted(fact.passed)) or "never",
                    "peak": number(fact.peak),
                    "last quarter ÷ τ": f"{fact.last_quarter / tau:.3g}",
                    "heads ever clipped": (
                        _span([f"{share:.0%}" for share in sorted(fact.ever_clipped)]) if arm.clips else "no clip"
                    ),
                    "last clip": str(fact.last_clipped or "none"),
                    "loss spikes": "; ".join(
                        [spikes, *(f"seed {seed} diverged at step {at}" for seed, at in fact.diverged.items())]
                    ),
                    "entropy": f"{fact.entropy:.2f}" if math.isfinite(fact.entropy) else "",
                    "loss, bits": f"{fact.loss:.3f}" if math.isfinite(fact.loss) else "not finite",
                    "from the lowest": gap if len(groups) == 1 or len(group) > 1 else "another model",
                }
            )
    return rows_of(rows)


def effect_rows(facts: Sequence[ClipFacts]) -> Rows:
    """Make a row for each; a verdict that says what it could not measure says why."""
    rows = []
    for fact in facts:
        why = {
            "other rates": f" ({fact.arm.lr:g} and {fact.baseline.lr:g})",
            "shows nothing": f": {fact.baseline.label} did not pass τ = {fact.arm.training.tau:g}"
            + ", and all is the same to the bit" * fact.identical,
        }
        rows.append(
            {
                "with the clip": fact.arm.label,
                "without": fact.baseline.label,
                "verdict": fact.verdict + why.get(fact.verdict, ""),
                "loss, bits: mean (95% interval)": str(fact.interval or ""),
                "seed by seed": ", ".join(map(difference, fact.differences)) if len(fact.differences) > 1 else "",
                "heads clipped": str(fact.clips),
            }
        )
    return rows_of(rows)


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _of_arm(results: Results, arm: Arm) -> ArmFacts:
    tau, records = arm.training.tau, results.records[arm.name]
    runs: Frame = pd.DataFrame(results.summaries[arm.name].values(), index=[*records])
    peak, median = runs[["max_logit_peak", "max_logit_median_last_quarter"]].replace(math.inf, math.nan).max()
    above = [of.steps["max_logit"] > tau for of in records.values()]
    passed = tuple(int(at.idxmax()) for at in above if at.any())
    late: Logits = "above τ" if median > tau else "passed τ, then under it"
    held: Logits = "held" if median <= HELD * tau else "not held"
    logits: Logits = held if arm.clips else late
    if not passed:
        logits = "not measured" if math.isnan(peak) else "stayed at or under τ"
    return ArmFacts(
        arm=arm,
        losses=bits(runs["final_val_loss"]).to_dict(),
        logits=logits,
        peak=peak,
        passed=passed,
        last_quarter=median,
        ever_clipped=tuple(runs["heads_ever_clipped"]),
        last_clipped=max(runs["last_clipped_step"].dropna().astype(int), default=None),
        spikes=tuple(sorted(int(step) for of in records.values() for step in spikes_of(arm, of).index)),
        diverged={seed: step for seed, of in records.items() if (step := of.diverged_at) is not None},
        entropy=runs["attention_entropy"].mean(skipna=False),
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
    identical = all(results.records[arm.name][seed].same_as(results.records[baseline.name][seed]) for seed in seeds)
    found = interval(differences).verdict
    verdict: Clip = "helped" if found == "lower" else "cost loss" if found == "higher" else found
    if max(run["max_logit_peak"] for run in other.values()) <= arm.training.tau:
        verdict = "shows nothing"
    elif identical:
        verdict = "same to the bit"
    elif found != "not finite" and not clips:
        verdict = "does not repeat"
    return ClipFacts(arm, baseline, verdict, differences, clips, identical)


def _span(values: Sequence[object]) -> str:
    """Write the first and the last of them, once where they are the same."""
    return " to ".join(dict.fromkeys(map(str, (*values[:1], *values[-1:]))))
