"""The long evidence, `make evidence`: the rate sweep, token efficiency, the cost of clipping, every arm at a hot rate.

    sweep       AdamW, Muon and MuonClip at several rates: the loss and the peak logit of each, the best rate of each
    rates       MuonClip at AdamW's rate and multiples of it, both halves together and each alone
    efficiency  Muon at its best rate and smaller budgets: the share of AdamW's tokens that reaches AdamW's final loss
    clip-cost   MuonClip at the best rate, with thresholds so low that it clips where nothing explodes
    hot         all arms at a rate that explodes: other clips, other models, thresholds, decays, schedules, attentions

Each is an experiment with a folder of its own; `figures` holds what the documentation shows: pictures, small JSON files
and `reading.md`, whose tables are made from the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.execution.train import Execution, train
from benchmarks.experiment.arms import ARMS, Arm, Choice, choices, choose
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.errors import RunFailed
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import HOT, OWN_RATE
from benchmarks.experiment.settings import Training
from benchmarks.records import atomic_files, metrics
from benchmarks.records.intervals import CONFIDENCE, crossing, interval
from benchmarks.records.run_records import Frame
from benchmarks.records.summary import Results, bits
from benchmarks.report import head_maps, page, plots
from benchmarks.studies import evidence_plots
from benchmarks.studies.evidence_reading import read_evidence, read_rates
from muonclip.models import MoEConfig

SEEDS = (0, 1, 2)
ADAMW_RATE, TIMES = OWN_RATE.lr["adamw"], (1, 2, 5, 10)
_MUON_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
RATES = {"adamw": (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2), "muon": _MUON_RATES, "muonclip": _MUON_RATES}
BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8)  # shares of AdamW's steps; 1 is in the sweep
LOW_TAUS = (5.0, 10.0, 15.0)
HOT_STEPS = 400
IN_PICTURE = ("muon", "muonclip", "muonclip@tau=10", "muonclip@tau=100", "rescue", "per-head", "qk-norm", "softcap")
HOT_ARMS = choices(  # the map of heads and the table show all of them
    *IN_PICTURE,
    *("adamw@lr=0.01", "adamw-clip@lr=0.01"),
    *(f"{arm}@{own}" for own in ("weight_decay=0", "decay_share=0.5") for arm in ("muon", "muonclip")),
    *(f"{arm}@attention={kind}" for kind in ("gqa", "mha") for arm in ("muon", "muonclip")),
)
USABLE = 0.05  # bits (per byte) above an optimizer's best: its usable range of rates
MOONLIGHT = 0.52  # arXiv 2502.16982: the share of AdamW's training FLOPs that Muon needs


def evidence(model: MoEConfig, corpus: Corpus, execution: Execution) -> None:
    """Train what is not trained yet, and write `figures`."""

    def experiment(name: str, title: str, chosen: Sequence[Choice], training: Training) -> Experiment:
        own = {"name": name, "title": title, "chosen": chosen, "seeds": SEEDS}
        return Experiment.on(corpus, model=model, training=training, **own)

    swept = [choose(entry, lr=rate) for entry, rates in RATES.items() for rate in rates]
    at_best = replace(OWN_RATE, lr={}, validate_every=100)
    sweep, hot = train(
        [
            experiment("sweep", "Rates", swept, at_best),
            experiment("hot", "A hot rate", HOT_ARMS, replace(HOT, steps=HOT_STEPS)),
        ],
        corpus,
        execution,
    )
    swept_json = sweep_json(sweep)
    best = swept_json["arms"]["muon"]["best_lr"]
    shorter = [choose("muon", lr=best, steps=round(share * OWN_RATE.steps)) for share in BUDGETS]
    low_taus = [choose("muonclip", lr=best, tau=tau) for tau in LOW_TAUS]
    apart = [choose("muonclip", **own) for times in TIMES[1:] for own in _apart(times).values()]
    efficiency, cost, halves = train(
        [
            experiment("efficiency", "Muon on fewer tokens", shorter, at_best),
            experiment("clip-cost", "Clipping where nothing explodes", low_taus, at_best),
            experiment("rates", "The rates of the two halves", apart, at_best),
        ],
        corpus,
        replace(execution, precision=sweep.experiment.precision),  # its runs are compared with those of the sweep
    )
    written = {
        "sweep": swept_json,
        "rates": rates_json(sweep, halves),
        "efficiency": efficiency_json(sweep, efficiency),
        "clip-cost": cost_json(sweep, cost),
        "hot": metrics.from_json(hot.to_json()),
    }
    folder = execution.out / "figures"
    folder.mkdir(exist_ok=True)
    for name, value in written.items():
        atomic_files.write_json(folder / f"{name}.json", metrics.to_json(value))
    for name in evidence_plots.PICTURES:
        evidence_plots.draw(name, written[name], folder / f"{name}.png")
    plots.draw([hot.only(*IN_PICTURE)], folder / "hot.png")
    head_maps.draw([hot], folder / "heads.png")
    for result in (sweep, efficiency, cost, halves, hot):
        page.write([result], execution.out / result.experiment.name / "report.html")
    reading = read_evidence(written)
    atomic_files.write_text(folder / "reading.md", reading)
    atomic_files.write_text(folder / "rates.md", read_rates(written["rates"]))
    print(reading)
    print(f"figures  {folder}", file=sys.stderr)


def sweep_json(sweep: Results) -> dict[str, Any]:
    """Return loss and peak logit by optimizer, rate and seed; the best rate of each, and its usable range."""
    arms: dict[str, Any] = {}
    for entry, runs in _runs(sweep).groupby("entry", sort=False):
        by_rate = runs.groupby("lr", sort=False)
        means = by_rate["loss"].agg(fmean)
        finite = means[np.isfinite(means)]
        if finite.empty:
            raise RunFailed(f"{ARMS[entry].label} diverged at every rate. See {sweep.experiment.name}.")
        columns = {"seed": "seeds", "loss": "loss", "max_logit_peak": "peak_logit"}
        rates = by_rate[[*columns]].agg(list).rename(columns=columns).reset_index().to_dict("records")
        usable = finite.index[finite <= finite.min() + USABLE]
        best = {"best_lr": finite.idxmin(), "usable": [usable.min(), usable.max()]}
        arms[entry] = {"label": ARMS[entry].label, "rates": rates, **best}
    return _frame(sweep) | {"tau": sweep.experiment.training.tau, "usable_margin": USABLE, "arms": arms}


def rates_json(sweep: Results, halves: Results) -> dict[str, Any]:
    """Return final losses by multiple of AdamW's rate and by seed: AdamW's, and MuonClip's with both halves at it, or
    one of them, where the other stays at AdamW's rate.
    """
    rows = []
    for times in TIMES:
        losses = {arm: _losses(sweep, choose(arm, lr=times * ADAMW_RATE)) for arm in ("adamw", "muonclip")}
        if times != 1:
            losses |= {half: _losses(halves, choose("muonclip", **own)) for half, own in _apart(times).items()}
        rows.append({"times": times, "lr": times * ADAMW_RATE, "loss": losses})
    return _frame(halves) | {"adamw_lr": ADAMW_RATE, "rows": rows}


def _apart(times: float) -> dict[str, dict[str, float]]:
    """Return the settings in which one half of MuonClip has a multiple of AdamW's rate and the other AdamW's."""
    rate = times * ADAMW_RATE
    return {"muon half": {"lr": rate, "adamw_lr": ADAMW_RATE}, "adamw half": {"lr": ADAMW_RATE, "adamw_lr": rate}}


def efficiency_json(sweep: Results, efficiency: Results) -> dict[str, Any]:
    """Return Muon's losses by budget, and by seed the share of the tokens that reaches the loss of AdamW's own seed."""
    best = {arm: entry["best_lr"] for arm, entry in sweep_json(sweep)["arms"].items()}
    full = sweep.experiment.training.steps
    adamw, whole = (_losses(sweep, choose(arm, lr=best[arm])) for arm in ("adamw", "muon"))
    losses = {arm.training.steps: _losses(efficiency, arm) for arm in efficiency.finished} | {full: whole}
    budgets = [{"share": steps / full, "steps": steps, "loss": loss} for steps, loss in losses.items()]
    curves = np.array([*losses.values()]).T.tolist()  # by seed
    shares = [crossing([b["share"] for b in budgets], own, target) for own, target in zip(curves, adamw, strict=True)]
    found = [share for share in shares if share is not None]
    return _frame(efficiency) | {
        "adamw": {"lr": best["adamw"], "steps": full, "loss": adamw},
        "muon": {"lr": best["muon"], "budgets": budgets},
        "seeds": list(SEEDS),
        "share": interval(found)._asdict() | {"per_seed": found} if len(found) == len(shares) else None,
        "confidence": CONFIDENCE,
        "reference": MOONLIGHT,
    }


def cost_json(sweep: Results, cost: Results) -> dict[str, Any]:
    """Return, by threshold, the difference in final loss from Muon, seed by seed, at Muon's best rate."""
    best = sweep_json(sweep)["arms"]["muon"]["best_lr"]
    baseline = _losses(sweep, choose("muon", lr=best))
    at_tau = choose("muonclip", lr=best, tau=sweep.experiment.training.tau)  # in the sweep it has no τ in its name
    measured = [(choice, _of(cost, choice)) for choice in cost.experiment.chosen if choice.name in cost.summaries]
    measured.append((at_tau, _of(sweep, choose("muonclip", lr=best))))
    arms = []
    for choice, runs in measured:
        differences = [own - other for own, other in zip(runs["loss"], baseline, strict=True)]
        clips = runs[["heads_ever_clipped", "clipped_head_steps"]].to_dict("list")
        of = {"name": choice.name, "label": choice.label, "loss": runs["loss"].tolist()}
        arms.append(of | {"difference": interval(differences)._asdict() | {"per_seed": differences}} | clips)
    frame = {"baseline": {"label": ARMS["muon"].label, "lr": best, "loss": baseline}, "arms": arms}
    return _frame(cost) | frame | {"confidence": CONFIDENCE}


def _frame(result: Results) -> dict[str, Any]:
    experiment = result.experiment
    return {"config": experiment.to_json(), "environment": result.environment, "unit": experiment.data.unit}


def _runs(results: Results) -> Frame:
    """Make a row per finished run: its arm, seed and summary, and its loss in bits."""
    rows = [
        {"arm": arm.name, "entry": choice.entry, "lr": arm.lr, "seed": seed, **run, "loss": bits(run["final_val_loss"])}
        for arm, choice in zip(results.experiment.arms, results.experiment.chosen, strict=True)
        for seed, run in results.summaries.get(arm.name, {}).items()
    ]
    return pd.DataFrame(rows)


def _of(results: Results, arm: Arm | Choice) -> Frame:
    runs = _runs(results)
    return runs[runs["arm"] == arm.name]


def _losses(results: Results, arm: Arm | Choice) -> list[float]:
    """Return the final validation loss in bits, by seed."""
    return _of(results, arm)["loss"].tolist()
