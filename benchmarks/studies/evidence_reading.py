"""The findings of `make evidence`: facts from its numbers, which the template `evidence.md` shows as a page."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.experiment.arms import choices
from benchmarks.experiment.experiment import Experiment
from benchmarks.records.intervals import Interval
from benchmarks.records.run_records import Frame
from benchmarks.records.summary import bits
from benchmarks.report.verdicts import HELD, compare
from benchmarks.studies.templates import render

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


def swept(sweep: Json) -> Frame:
    """Make a row for each optimizer and rate: its seeds, mean loss, largest logit; whether that is `above_tau`."""
    arms = {name: pd.DataFrame(arm["rates"]).set_index("lr") for name, arm in sweep["arms"].items()}
    rates = pd.concat({name: of.assign(edge=of.index.isin(of.index[[0, -1]])) for name, of in arms.items()})
    rates = rates.assign(mean=rates["loss"].map(fmean), peak=rates["peak_logit"].map(max))
    return rates.assign(above_tau=rates["peak"] > sweep["tau"])


def loud_rates(sweep: Json) -> dict[float, Effect]:
    """Compare MuonClip with Muon at the rates where Muon's logits exceed τ.

    Empty: the sweep shows nothing about the clip.
    """
    muon, clipped = (swept(sweep).loc[arm] for arm in ("muon", "muonclip"))
    return {
        lr: Effect("MuonClip", "Muon", compare(clipped["loss"][lr], muon["loss"][lr]))
        for lr in muon.index[muon["above_tau"]]
    }


def token_share(efficiency: Json) -> Share:
    if efficiency["share"] is None:
        losses = np.array([budget["loss"] for budget in efficiency["muon"]["budgets"]])  # [budgets, seeds]
        reached = losses <= np.array(efficiency["adamw"]["loss"])
        none = "not crossed in every seed" if reached.any() else "not reached"
        return Share("reached with less" if reached[0].all() else none, None)
    share, reference = Interval.from_json(efficiency["share"]), efficiency["reference"]
    inside = share.low <= reference <= share.high
    return Share("includes" if inside else "above" if share.mean > reference else "below", share)


def costs(cost: Json) -> list[Effect]:
    against = cost["baseline"]["label"]
    return [
        Effect(arm["label"], against, Interval.from_json(arm["difference"]), fmean(arm["heads_ever_clipped"]))
        for arm in cost["arms"]
    ]


def hot_effects(hot: Json) -> list[Effect]:
    arms = hot_arms(hot)
    return [
        Effect(arms.label[one], arms.label[two], compare(arms.losses[one], arms.losses[two]), arms.clipped[one])
        for one, two in HOT_PAIRS
    ]


def hot_arms(hot: Json) -> Frame:
    """Make a row per arm, by name: means over seeds, the spread of the loss, the largest logit, all spikes.

    `held`: the last quarter of the steps was near τ. `silent`: no head was clipped near the end.
    """
    training = hot["config"]["training"]
    runs = [{"name": name, **run} for name, seeds in hot["arms"].items() for run in seeds.values()]
    frame = pd.DataFrame(runs)
    frame["loss"] = frame["final_val_loss"].map(bits)
    arms = frame.groupby("name", sort=False).agg(
        losses=("loss", list),
        loss=("loss", fmean),
        spread=("loss", np.ptp),
        peak=("max_logit_peak", "max"),
        last_quarter=("max_logit_median_last_quarter", fmean),
        clipped=("heads_ever_clipped", fmean),
        entropy=("attention_entropy", fmean),
        query_norm=("query_norm", fmean),
        key_norm=("key_norm", fmean),
        update=("update_rms", fmean),
        spikes=("loss_spikes", "sum"),
        last_clip=("last_clipped_step", lambda steps: steps.fillna(0).max()),  # 0: none
    )
    return arms.assign(
        label=[choice.label for choice in choices(*arms.index)],
        diverged=~np.isfinite(arms["loss"]),
        held=arms["last_quarter"] <= HELD * training["tau"],
        silent=arms["last_clip"] < SILENT * training["steps"],
    )


def read_rates(rates: Json) -> str:
    """Write the table of the first rates to try, from the object that `rates.json` holds."""
    return render("rates.md", rates=rates, mean=fmean)


def read_evidence(figures: Mapping[str, Json]) -> str:
    """Write the page, from the objects that `sweep.json`, `efficiency.json`, `clip-cost.json` and `hot.json` hold."""
    sweep, efficiency, cost, hot = (figures[name] for name in ("sweep", "efficiency", "clip-cost", "hot"))
    given = {"sweep": sweep, "efficiency": efficiency, "cost": cost, "hot": hot, "mean": fmean}
    facts = {"swept": swept(sweep), "loud_rates": loud_rates(sweep), "share": token_share(efficiency)}
    facts |= {"costs": costs(cost), "arms": hot_arms(hot), "hot_effects": hot_effects(hot)}
    return render("evidence.md", subject=Experiment.from_json(sweep["config"]).subject, **given, **facts)
