"""What a panel shows, in sentences made from its numbers alone.

Every sentence has a branch for the numbers that speak against the claim, and says so as readily.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.experiment.arms import appearance, base_of, model_changes, parse, setup
from benchmarks.experiment.experiment import Panel, Training
from benchmarks.records.summary import PanelResult, Record, RunSummary, max_logit, spikes

HELD = 2.0  # times τ: a last quarter whose median is up to here is called near τ; the ratio stands beside the word
WITHOUT_CLIP = {"muonclip": "muon", "rescue": "muon", "adamw-clip": "adamw"}  # the same arm but for the clip
CLIPPING = (*WITHOUT_CLIP, "per-head")


@dataclass(frozen=True, slots=True)
class FinishedArm:
    """An arm with its finished runs, by seed; at least one."""

    name: str
    label: str
    training: Training
    lr: float
    changes: dict[str, Any]  # in the model
    runs: Mapping[int, RunSummary]
    records: Mapping[int, Sequence[Record]]

    @property
    def losses(self) -> dict[int, float]:
        """Final validation loss in bits, by seed."""
        return {seed: run["final_val_loss"] / math.log(2) for seed, run in self.runs.items()}

    @property
    def mean_loss(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def peak(self) -> float:
        """The largest logit of all seeds; NaN where none was measured."""
        peaks = (run["max_logit_peak"] for run in self.runs.values())
        return max((peak for peak in peaks if math.isfinite(peak)), default=math.nan)

    @property
    def passed(self) -> list[int]:
        """The first step above τ of each seed that had one."""
        maxima = [[(record["step"], max_logit(record)) for record in records] for records in self.records.values()]
        firsts = [[step for step, logit in run if logit is not None and logit > self.training.tau] for run in maxima]
        return [steps[0] for steps in firsts if steps]

    def trajectory(self, seeds: Iterable[int]) -> list[tuple[Any, ...]]:
        """Losses and logits of every step, to tell whether two arms are the same to the bit."""
        fields = ("loss", "val_loss", "max_logits")
        return [tuple(map(record.get, fields)) for seed in seeds for record in self.records[seed]]


def finished_arms(result: PanelResult) -> list[FinishedArm]:
    panel, looks = result.panel, appearance(result.panel)
    return [
        FinishedArm(name, looks[name].label, own.training, own.lr, model_changes(panel, name), runs, records)
        for name in panel.arms
        if (runs := result.summaries.get(name)) and (records := result.records[name])
        for own in [setup(panel, name)]
    ]


def read(result: PanelResult) -> list[str]:
    """The sentences of one panel. Arms without a finished run are left out."""
    arms = finished_arms(result)
    if not arms:
        return ["No run is finished: there is nothing to read."]
    unit = unit_of(result.panel)
    pairs = [(arm, other) for arm in arms for other in arms if _differ_in_the_clip(arm, other)]
    return [
        *(_logits(arm) for arm in arms),
        *_nothing_to_hold(pairs),
        *(_cost(arm, other, unit) for arm, other in pairs if arm.lr == other.lr),
        *_unequal_rates(pairs),
        *_losses(arms, unit),
        *_clipped_heads(arms),
        *_spikes(arms),
        *_entropy(arms, result.panel),
    ]


def diverged_at(records: Sequence[Record]) -> int | None:
    """The step at which a run ended because its loss or gradient was not finite."""
    return records[-1]["step"] if max_logit(records[-1]) is None else None


def against_spread(gap: float, arms: Iterable[FinishedArm]) -> str:
    """What a difference between means comes to beside the spread of the seeds within an arm."""
    losses = [list(arm.losses.values()) for arm in arms]
    if all(len(of) == 1 for of in losses):
        return "One seed each: no spread is known."
    spread = max(max(of) - min(of) for of in losses)
    relation = "smaller" if gap < spread else "larger"
    return f"The difference is {relation} than the spread between seeds ({difference(spread)[1:]})."


def unit_of(panel: Panel) -> str:
    return "bits per byte" if panel.data.kind == "bytes" else "bits per token"


def describe(changes: Mapping[str, Any]) -> str:
    """`{"softcap": 30.0}` → "softcap = 30"."""
    return ", ".join(f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in changes.items())


def listing(words: Sequence[str]) -> str:
    comma = "; " if any("," in word for word in words) else ", "  # labels have commas of their own
    return words[0] if len(words) == 1 else f"{comma.join(words[:-1])} and {words[-1]}"


def logit(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def difference(value: float) -> str:
    """Signed, with three decimals, or as a power of ten where those would be zeros."""
    return (f"{value:+.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:+.0e}").replace("-", "−")


def _differ_in_the_clip(arm: FinishedArm, other: FinishedArm) -> bool:
    """And perhaps in the rate."""

    def rest(name: str) -> dict[str, Any]:
        return {key: value for key, value in parse(name)[1].items() if key not in ("tau", "lr")}

    return WITHOUT_CLIP.get(base_of(arm.name)) == base_of(other.name) and rest(arm.name) == rest(other.name)


def _logits(arm: FinishedArm) -> str:
    tau, passed = arm.training.tau, arm.passed
    if math.isnan(arm.peak):
        return f"{arm.label}: no logit was measured."
    before_cap = " (measured before the soft cap)" if "softcap" in arm.changes else ""
    if not passed:
        return f"{arm.label}: logits{before_cap} stayed at or under τ = {tau:g}; the largest was {logit(arm.peak)}."
    some = "" if len(passed) == len(arm.runs) else f" in {len(passed)} of {len(arm.runs)} seeds"
    told = (
        f"{arm.label}: logits{before_cap} passed τ = {tau:g}{some} at {_steps(passed)} of {arm.training.steps} and "
        f"peaked at {logit(arm.peak)}."
    )
    median = max(m for run in arm.runs.values() if math.isfinite(m := run["max_logit_median_last_quarter"]))
    if base_of(arm.name) == "rescue":
        told += f" Its clip acts from step {round(arm.training.rescue_at * arm.training.steps) + 1} on."
    if base_of(arm.name) in CLIPPING:
        were = "held near τ" if median <= HELD * tau else "not held near τ"
    else:
        were = "mostly above it" if median > tau else "mostly not above it"
    largest = " in the seed where it is largest" if len(arm.runs) > 1 else ""
    ratio = f"{median / tau:.1f}" if median < 100 * tau else f"{median / tau:.0f}"
    return (
        f"{told} In the last quarter of the steps they were {were}: the median there is {logit(median)}{largest}, "
        f"{ratio} times τ."
    )


def _nothing_to_hold(pairs: Sequence[tuple[FinishedArm, FinishedArm]]) -> list[str]:
    return [
        f"{other.label} did not pass τ = {arm.training.tau:g} here: this panel shows nothing about the clip of "
        f"{arm.label}."
        for arm, other in pairs
        if arm.lr == other.lr and other.peak <= arm.training.tau
    ]


def _cost(arm: FinishedArm, other: FinishedArm, unit: str) -> str:
    """What the clip did to the final validation loss, seed by seed."""
    seeds = [seed for seed in arm.runs if seed in other.runs]
    if not seeds:
        return f"{arm.label} and {other.label} have no finished seed in common: what the clip costs is not measured."
    clips = sum(arm.runs[seed]["clipped_head_steps"] for seed in seeds)
    if arm.trajectory(seeds) == other.trajectory(seeds):
        did = "though heads were clipped," if clips else "no head was clipped, and"
        return f"{arm.label} is {other.label} to the bit: {did} every loss and logit is the same."
    lost = [f"{a.label}{_of(bad, seeds)}" for a in (other, arm) if (bad := _without_loss(a, seeds))]
    if lost:
        finite = [a.label for a in (other, arm) if not _without_loss(a, seeds)]
        kept = f"; the loss of {finite[0]} is finite" if finite else ""
        ends = "ends" if len(lost) == 1 else "end"
        return f"What the clip costs cannot be said: {listing(lost)} {ends} without a finite loss{kept}."
    differences = [arm.losses[seed] - other.losses[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    seedwise = f" (seed by seed {', '.join(map(difference, differences))})" if len(seeds) > 1 else ""
    changes = f"from {other.label} to {arm.label} the final loss changes by {difference(mean)} {unit}{seedwise}"
    if not clips:
        return f"{arm.label} clipped no head, yet {changes}: these runs do not repeat to the bit."
    if min(differences) <= 0 <= max(differences):
        return f"Neither cost nor gain of the clip is shown: {changes}."
    effect, which = ("helped", "lower") if mean < 0 else ("cost loss", "higher")
    told = f"The clip {effect} here: {arm.label} ends with the {which} loss; {changes}."
    return f"{told} {against_spread(abs(mean), (arm, other))}"


def _unequal_rates(pairs: Sequence[tuple[FinishedArm, FinishedArm]]) -> list[str]:
    """Of arms that have no partner at their own rate."""
    matched = {arm.name for arm, other in pairs if arm.lr == other.lr}
    return [
        f"{arm.label} and {other.label} have different rates ({arm.lr:g} and {other.lr:g}): what the clip alone does "
        "to the loss is not measured."
        for arm, other in pairs
        if arm.name not in matched
    ]


def _losses(arms: Sequence[FinishedArm], unit: str) -> list[str]:
    """The order by final validation loss, among arms of one model."""
    groups: dict[str, list[FinishedArm]] = {}
    for arm in arms:
        groups.setdefault(describe(arm.changes), []).append(arm)
    told: list[str] = []
    for changes, group in groups.items():
        if finite := sorted((a for a in group if math.isfinite(a.mean_loss)), key=lambda a: a.mean_loss):
            other = f"Another model ({changes}), whose losses stand apart: " if changes else ""
            told.append(other + _order(finite, unit))
        told += [
            f"{arm.label}{_of(bad, list(arm.runs))} has no finite final loss and is not ranked."
            for arm in group
            if (bad := _without_loss(arm, list(arm.runs)))
        ]
    return told


def _order(arms: Sequence[FinishedArm], unit: str) -> str:
    best = [arm for arm in arms if arm.mean_loss == arms[0].mean_loss]
    others = arms[len(best) :]
    mean = ", mean of the seeds" if any(len(arm.runs) > 1 for arm in arms) else ""
    loss, names = f"{best[0].mean_loss:.3f} {unit}{mean}", listing([arm.label for arm in best])
    budgets = sorted({arm.training.steps for arm in arms})
    unequal = f" They were not trained equally long: {budgets[0]} to {budgets[-1]} steps." if len(budgets) > 1 else ""
    if len(arms) == 1:
        return f"{names} ends with a validation loss of {loss}."
    if not others:
        return f"{names} end with the same validation loss, {loss}.{unequal}"
    gap = others[0].mean_loss - best[0].mean_loss
    last = others[-1]
    told = f"{names} {'end' if len(best) > 1 else 'ends'} with the lowest validation loss, {loss}; next is "
    told += f"{others[0].label}, {difference(gap)}. {against_spread(gap, (best[0], others[0]))}"
    if len(others) > 1:
        told += f" The highest is {last.label}, {difference(last.mean_loss - best[0].mean_loss)}."
    return told + unequal


def _clipped_heads(arms: Sequence[FinishedArm]) -> list[str]:
    told: list[str] = []
    idle: list[str] = []
    for arm in arms:
        last = [step for run in arm.runs.values() if (step := run["last_clipped_step"]) is not None]
        if not last:
            idle += [arm.label] if base_of(arm.name) in CLIPPING else []
            continue
        shares = sorted(run["heads_ever_clipped"] for run in arm.runs.values())
        share = " to ".join(dict.fromkeys((f"{shares[0]:.0%}", f"{shares[-1]:.0%}")))
        end = max(records[-1]["step"] for records in arm.records.values())
        until = "up to the last step" if max(last) == end else f"and none after step {max(last)} of {end}"
        told.append(f"{arm.label} clipped {share} of the heads at some step, {until}.")
    return told + ([f"{listing(idle)} clipped no head."] if idle else [])


def _spikes(arms: Sequence[FinishedArm]) -> list[str]:
    jumped: list[str] = []
    ended: list[str] = []
    for arm in arms:
        at: list[int] = []
        for seed, records in arm.records.items():
            losses = [record["loss"] for record in records]
            found = spikes(losses, arm.training.spike_window, arm.training.spike_threshold)
            at += [records[i]["step"] for i in found if math.isfinite(losses[i])]
            if step := diverged_at(records):
                ended.append(
                    f"{arm.label} diverged: seed {seed} ended at step {step} of {arm.training.steps}, where its loss "
                    "or gradient was not finite."
                )
        if at:
            count = f"{len(at)} step{'s' if len(at) > 1 else ''}{' over all seeds' if len(arm.runs) > 1 else ''}"
            jumped.append(f"{arm.label} at {count}, first at {min(at)}")
    if not jumped:
        return ended or ["No train loss spiked, and all stayed finite."]
    training = arms[0].training
    spike = f"more than {training.spike_threshold:g} nats above the median of the {training.spike_window} steps before"
    return [f"Train losses spiked ({spike}): {'; '.join(jumped)}.", *ended]


def _entropy(arms: Sequence[FinishedArm], panel: Panel) -> list[str]:
    """Where it was measured."""
    means = {
        arm.label: statistics.fmean(run.get("attention_entropy", math.nan) for run in arm.runs.values()) for arm in arms
    }
    told = "; ".join(f"{label}: {mean:.2f}" for label, mean in means.items() if math.isfinite(mean))
    if not told:
        return []
    length = panel.model.max_seq_len
    even = math.lgamma(length + 1) / length  # mean of ln t over t = 1 … length, the keys that each query may see
    return [
        f"Attention entropy at the end, mean over heads, in nats. {told}. Spread evenly over all keys, attention would "
        f"have {even:.2f}; looking at one key alone, 0."
    ]


def _without_loss(arm: FinishedArm, seeds: Sequence[int]) -> list[int]:
    return [seed for seed in seeds if not math.isfinite(arm.losses[seed])]


def _of(some: Sequence[int], seeds: Sequence[int]) -> str:
    """Which seeds, where there is more than one."""
    return f" (seed{'s' if len(some) > 1 else ''} {listing(list(map(str, some)))})" if len(seeds) > 1 else ""


def _steps(steps: Sequence[int]) -> str:
    low, high = min(steps), max(steps)
    return f"step {low}" if low == high else f"steps {low} to {high}"
