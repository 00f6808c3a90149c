"""The findings of `make evidence`: facts from its numbers, and the Markdown page that shows them as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from benchmarks.experiment.arms import choices
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.environment import made_with
from benchmarks.records.intervals import Interval
from benchmarks.records.summary import bits
from benchmarks.report.tables import markdown
from benchmarks.report.verdicts import HELD, compare

Json = Mapping[str, Any]
HOT_PAIRS = (
    *(("muonclip", "muon"), ("rescue", "muon"), ("rescue", "muonclip"), ("qk-norm", "muonclip")),
    *((f"muonclip@attention={kind}", f"muon@attention={kind}") for kind in ("gqa", "mha")),
)
SILENT = 0.9  # share of the steps: a last clip before it is called falling silent


class Effect(NamedTuple):
    """The effect of an arm on the loss of another, in bits, paired by seed."""

    arm: str
    against: str
    difference: Interval
    clipped: float | None = None  # share of the heads, mean over seeds


class Share(NamedTuple):
    """The share of AdamW's tokens at which Muon has AdamW's loss, and Moonlight's figure. None: there is none."""

    verdict: Literal["reached with less", "not reached", "not crossed in every seed", "includes", "above", "below"]
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Hot:
    """The hot rate: peaks over all seeds, means over seeds of the last quarter's median."""

    peak: float  # Muon's
    median: float  # MuonClip's
    held: bool
    rescued: float  # the median of the clip that is switched on midway
    ever_clipped: float  # share of the heads under MuonClip
    silent_after: int | None  # the step after which MuonClip clipped nothing; None: it clips up to the end
    not_finite: tuple[str, ...]  # labels


def loud_rates(sweep: Json) -> dict[float, Effect]:
    """Compare MuonClip with Muon at the rates where Muon's logits exceed τ.

    Empty: the sweep shows nothing about the clip.
    """
    muon, clipped = ({rate["lr"]: rate for rate in sweep["arms"][arm]["rates"]} for arm in ("muon", "muonclip"))
    loud = [lr for lr, rate in muon.items() if max(rate["peak_logit"]) > sweep["tau"]]
    return {lr: Effect("MuonClip", "Muon", compare(clipped[lr]["loss"], muon[lr]["loss"])) for lr in loud}


def token_share(efficiency: Json) -> Share:
    share, reference, adamw = efficiency["share"], efficiency["reference"], efficiency["adamw"]["loss"]
    if share is None:
        losses = [budget["loss"] for budget in sorted(efficiency["muon"]["budgets"], key=lambda of: of["share"])]
        reached = [[own <= loss for own, loss in zip(of, adamw, strict=True)] for of in losses]
        none = "not crossed in every seed" if any(map(any, reached)) else "not reached"
        return Share("reached with less" if all(reached[0]) else none, None)
    found = Interval(share["mean"], share["low"], share["high"])
    inside = found.low <= reference <= found.high
    return Share("includes" if inside else "above" if found.mean > reference else "below", found)


def costs(cost: Json) -> list[Effect]:
    return [
        Effect(
            arm["label"],
            cost["baseline"]["label"],
            Interval(*(arm["difference"][key] for key in Interval._fields)),
            statistics.fmean(arm["heads_ever_clipped"]),
        )
        for arm in cost["arms"]
    ]


def hot_effects(hot: Json) -> list[Effect]:
    arms = hot["arms"]
    losses = {name: [bits(run["final_val_loss"]) for run in arms[name].values()] for name in arms}
    return [
        Effect(_label(one), _label(two), compare(losses[one], losses[two]), _mean(arms[one], "heads_ever_clipped"))
        for one, two in HOT_PAIRS
    ]


def hot_facts(hot: Json) -> Hot:
    arms, training = hot["arms"], hot["config"]["training"]
    ends = max(run["last_clipped_step"] or 0 for run in arms["muonclip"].values())
    median = _mean(arms["muonclip"], "max_logit_median_last_quarter")
    return Hot(
        peak=max(run["max_logit_peak"] for run in arms["muon"].values()),
        median=median,
        held=median <= HELD * training["tau"],
        rescued=_mean(arms["rescue"], "max_logit_median_last_quarter"),
        ever_clipped=_mean(arms["muonclip"], "heads_ever_clipped"),
        silent_after=ends if ends < SILENT * training["steps"] else None,
        not_finite=tuple(
            _label(name) for name, runs in arms.items() if not math.isfinite(_mean(runs, "final_val_loss"))
        ),
    )


def read_evidence(figures: Mapping[str, Json]) -> str:
    """Write the page, from the objects that `sweep.json`, `efficiency.json`, `clip-cost.json` and `hot.json` hold."""
    frame, cost = figures["sweep"], figures["clip-cost"]
    at_best = f"At Muon's best rate, {cost['baseline']['lr']:g}, with thresholds so low that they act."
    sections = {
        "The usable range of rates": (_sweep(frame), ["sweep.png"]),
        "Token efficiency": (_efficiency(figures["efficiency"]), ["efficiency.png"]),
        "The cost of clipping where nothing explodes": ([at_best, _effects(costs(cost))], ["clip-cost.png"]),
        "A hot rate": (_hot(figures["hot"]), ["hot.png", "heads.png"]),
    }
    made = f"Made with {made_with(frame['environment'])}."
    model = f"The model is a {Experiment.from_json(frame['config']).subject}. Losses are final validation losses in"
    model += f" {frame['unit']}, means over seeds on held-out files, with 95% intervals."
    parts = ["# What the runs show", made, model]
    for title, (text, pictures) in sections.items():
        parts += [f"## {title}", *text, "\n".join(f"![{title}]({name})" for name in pictures)]
    return "\n\n".join(parts) + "\n"


def _sweep(sweep: Json) -> list[str]:
    passes = f"logits pass τ = {sweep['tau']:g} from the rate"
    near = f"rates within {sweep['usable_margin']:g} of it"
    rows = [["optimizer", "best rate", "loss there", near, "peak logit there", passes]]
    for entry in sweep["arms"].values():
        rates = {rate["lr"]: rate for rate in entry["rates"]}
        best = rates[entry["best_lr"]]
        edge = "" if min(rates) < best["lr"] < max(rates) else " (the edge of what was tried)"
        loud = [lr for lr, rate in rates.items() if max(rate["peak_logit"]) > sweep["tau"]]
        row = [entry["label"], f"{best['lr']:g}{edge}", f"{statistics.fmean(best['loss']):.3f}"]
        usable = "{:g} to {:g}".format(*entry["usable"])
        rows.append([*row, usable, f"{max(best['peak_logit']):.0f}", f"{min(loud):g}" if loud else "none"])
    effects = loud_rates(sweep)
    if not effects:
        return [markdown(rows), "No rate made Muon's logits pass τ: this sweep shows nothing about the clip."]
    head, *found = _effect_rows(list(effects.values()))
    return [
        markdown(rows),
        markdown([["rate", *head], *([f"{lr:g}", *row] for lr, row in zip(effects, found, strict=True))]),
    ]


def _efficiency(efficiency: Json) -> list[str]:
    adamw, muon, share = efficiency["adamw"], efficiency["muon"], token_share(efficiency)
    runs = [("AdamW", adamw["lr"], 1.0, adamw["steps"], adamw["loss"])]
    runs += [("Muon", muon["lr"], budget["share"], budget["steps"], budget["loss"]) for budget in muon["budgets"]]
    rows = [["optimizer", "rate", "share of the tokens", "steps", "loss"]]
    rows += [[name, f"{lr:g}", f"{of:.0%}", str(n), f"{statistics.fmean(loss):.3f}"] for name, lr, of, n, loss in runs]
    found = f"No share of the tokens can be given: AdamW's loss is {share.verdict}."
    if share.interval is not None:
        mean, low, high = share.interval
        found = f"**{mean:.2f}** of the tokens reach AdamW's loss. The interval, {low:.2f} to {high:.2f}, "
        found += share.verdict if share.verdict == "includes" else f"is {share.verdict}"
        found += f" Moonlight's {efficiency['reference']:g} of the training FLOPs at far larger sizes."
    return [markdown(rows), f"{found} The rate was not tuned again for the shorter runs, which favours AdamW."]


def _hot(hot: Json) -> list[str]:
    facts, training = hot_facts(hot), hot["config"]["training"]
    held = "held" if facts.held else "not held"
    silent = "up to the end" if facts.silent_after is None else f"none after step {facts.silent_after}"
    rows = [
        ["hot rate", "value"],
        ["largest logit under Muon", f"{facts.peak:.0f}"],
        [f"last quarter under MuonClip, τ = {training['tau']:g}", f"{facts.median:.0f}, {held}"],
        ["last quarter where the clip is switched on midway", f"{facts.rescued:.0f}"],
        ["heads clipped at some step (K2: 12.7%, none after 30% of the steps)", f"{facts.ever_clipped:.0%}, {silent}"],
        ["losses that are not finite", ", ".join(facts.not_finite) or "none"],
    ]
    said = f"The rate is {training['lr']['muon']:g} where the name says no other, constant after the warm-up, for "
    said += f"{training['steps']} steps. `benchmarks/records/metrics.py` defines what is measured. QK-norm is "
    said += "another model, and not one that MLA's inference allows."
    return [said, markdown(rows), _effects(hot_effects(hot)), markdown(hot_rows(hot))]


def hot_rows(hot: Json) -> list[list[str]]:
    """Make rows of means over seeds; the spread is that of the loss over seeds."""
    columns = {"max_logit_median_last_quarter": ".0f", "heads_ever_clipped": ".0%", "attention_entropy": ".2f"}
    columns |= {"query_norm": ".1f", "key_norm": ".1f", "update_rms": ".2f"}
    rows = [
        [
            "arm",
            "loss, bits",
            "spread",
            "peak logit",
            "last quarter",
            "clipped",
            "entropy",
            "W_q",
            "W_k",
            "update",
            "spikes",
        ]
    ]
    for name, runs in hot["arms"].items():
        loss = [bits(run["final_val_loss"]) for run in runs.values()]
        peak = max(run["max_logit_peak"] for run in runs.values())
        row = [_label(name), f"{statistics.fmean(loss):.3f}", f"{max(loss) - min(loss):.3f}", f"{peak:.0f}"]
        row += [format(_mean(runs, column), form) for column, form in columns.items()]
        rows.append([*row, str(sum(run["loss_spikes"] for run in runs.values()))])
    return rows


def _effects(effects: Sequence[Effect]) -> str:
    return markdown(_effect_rows(effects))


def _effect_rows(effects: Sequence[Effect]) -> list[list[str]]:
    rows = [["arm", "against", "difference in loss", "verdict", "heads clipped"]]
    for arm, against, difference, clipped in effects:
        rows.append([arm, against, str(difference), difference.verdict, f"{clipped or 0:.0%}"])
    return rows if effects[0].clipped is not None else [row[:-1] for row in rows]


def _mean(runs: Mapping[str, Json], column: str) -> float:
    return statistics.fmean(run[column] for run in runs.values())


def _label(name: str) -> str:
    return choices(name)[0].label
