"""The long evidence, `make evidence`: the rate sweep, token efficiency, the cost of clipping, every arm at a hot rate.

    sweep       AdamW, Muon and MuonClip at several rates: the loss and the peak logit of each, the best rate of each
    efficiency  Muon at its best rate and smaller budgets: the share of AdamW's tokens that reaches AdamW's final loss
    clip-cost   MuonClip at the best rate, with thresholds so low that it clips where nothing explodes
    hot         all arms at a rate that explodes: other clips, other models, thresholds, decays, schedules, attentions

Each is an experiment with a folder of its own; `figures` holds what the documentation shows: pictures, small JSON files
and `reading.md`, whose tables are made from the numbers.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.execution.train import Execution, train
from benchmarks.experiment.arms import ARMS, Choice, choices, choose
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.errors import RunFailed
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import HOT, OWN_RATE
from benchmarks.experiment.settings import Training
from benchmarks.records import atomic_files, metrics
from benchmarks.records.intervals import CONFIDENCE, crossing, interval
from benchmarks.records.summary import Results, RunSummary, bits
from benchmarks.report import head_maps, page, plots
from benchmarks.studies import evidence_plots
from benchmarks.studies.evidence_reading import read_evidence
from muonclip.models import MoEConfig

SEEDS = (0, 1, 2)
_MUON_RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
RATES = {"adamw": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), "muon": _MUON_RATES, "muonclip": _MUON_RATES}
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
        lr = {entry: rate for entry, rate in training.lr.items() if entry in {choice.entry for choice in chosen}}
        return Experiment(
            name=name,
            title=title,
            chosen=tuple(chosen),
            seeds=SEEDS,
            model=model,
            training=replace(training, lr=lr),
            data=corpus.record(),
        )

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
    efficiency, cost = train(
        [
            experiment("efficiency", "Muon on fewer tokens", shorter, at_best),
            experiment("clip-cost", "Clipping where nothing explodes", low_taus, at_best),
        ],
        corpus,
        replace(execution, precision=sweep.experiment.precision),  # its runs are compared with those of the sweep
    )
    written = {
        "sweep": swept_json,
        "efficiency": efficiency_json(sweep, efficiency),
        "clip-cost": cost_json(sweep, cost),
        "hot": metrics.from_json(hot.to_json()),
    }
    folder = execution.out / "figures"
    folder.mkdir(exist_ok=True)
    for name, value in written.items():
        atomic_files.write_json(folder / f"{name}.json", metrics.to_json(value))
    for name, draw in evidence_plots.PICTURES.items():
        draw(written[name], folder / f"{name}.png")
    plots.draw([hot.only(*IN_PICTURE)], folder / "hot.png")
    head_maps.draw([hot], folder / "heads.png")
    for result in (sweep, efficiency, cost, hot):
        page.write([result], execution.out / result.experiment.name / "report.html")
    reading = read_evidence(written)
    atomic_files.write_text(folder / "reading.md", reading)
    print(reading)
    print(f"figures  {folder}", file=sys.stderr)


def sweep_json(sweep: Results) -> dict[str, Any]:
    """Return loss and peak logit by optimizer, rate and seed; the best rate of each, and its usable range."""
    arms: dict[str, Any] = {}
    for choice in sweep.experiment.chosen:
        if runs := sweep.summaries.get(choice.name):
            entry = arms.setdefault(choice.entry, {"label": ARMS[choice.entry].label, "rates": []})
            peaks = [run["max_logit_peak"] for run in runs.values()]
            rate = {"lr": choice.settings["lr"], "seeds": list(runs), "loss": _losses(runs), "peak_logit": peaks}
            entry["rates"].append(rate)
    for entry in arms.values():
        means = {rate["lr"]: statistics.fmean(rate["loss"]) for rate in entry["rates"]}
        finite = {lr: mean for lr, mean in means.items() if math.isfinite(mean)}
        if not finite:
            raise RunFailed(
                f"{entry['label']} diverged at every rate: there is no best one. See {sweep.experiment.name}."
            )
        entry["best_lr"] = min(finite, key=finite.__getitem__)
        usable = [lr for lr, mean in finite.items() if mean <= finite[entry["best_lr"]] + USABLE]
        entry["usable"] = [min(usable), max(usable)]
    return _frame(sweep) | {"tau": sweep.experiment.training.tau, "usable_margin": USABLE, "arms": arms}


def efficiency_json(sweep: Results, efficiency: Results) -> dict[str, Any]:
    """Return Muon's losses by budget, and by seed the share of the tokens that reaches the loss of AdamW's own seed."""
    best = {arm: entry["best_lr"] for arm, entry in sweep_json(sweep)["arms"].items()}
    adamw = _losses(sweep.summaries[choose("adamw", lr=best["adamw"]).name])
    full = sweep.experiment.training.steps
    budgets = [
        {
            "share": arm.training.steps / full,
            "steps": arm.training.steps,
            "loss": _losses(efficiency.summaries[arm.name]),
        }
        for arm in efficiency.finished
    ]
    whole = sweep.summaries[choose("muon", lr=best["muon"]).name]
    budgets.append({"share": 1.0, "steps": full, "loss": _losses(whole)})
    shares = [
        crossing([budget["share"] for budget in budgets], [budget["loss"][index] for budget in budgets], target)
        for index, target in enumerate(adamw)
    ]
    found = [share for share in shares if share is not None]
    complete = len(found) == len(shares)
    return _frame(efficiency) | {
        "adamw": {"lr": best["adamw"], "steps": full, "loss": adamw},
        "muon": {"lr": best["muon"], "budgets": budgets},
        "seeds": list(SEEDS),
        "share": interval(found)._asdict() | {"per_seed": found} if complete else None,
        "confidence": CONFIDENCE,
        "reference": MOONLIGHT,
    }


def cost_json(sweep: Results, cost: Results) -> dict[str, Any]:
    """Return, by threshold, the difference in final loss from Muon, seed by seed, at Muon's best rate."""
    best = sweep_json(sweep)["arms"]["muon"]["best_lr"]
    baseline = _losses(sweep.summaries[choose("muon", lr=best).name])
    at_tau = choose("muonclip", lr=best, tau=sweep.experiment.training.tau)
    measured = [(choice, cost.summaries.get(choice.name)) for choice in cost.experiment.chosen]
    measured.append((at_tau, sweep.summaries[choose("muonclip", lr=best).name]))
    arms = []
    for choice, runs in measured:
        if runs:
            loss = _losses(runs)
            differences = [own - other for own, other in zip(loss, baseline, strict=True)]
            arms.append(
                {
                    "name": choice.name,
                    "label": choice.label,
                    "loss": loss,
                    "difference": interval(differences)._asdict() | {"per_seed": differences},
                    "heads_ever_clipped": [run["heads_ever_clipped"] for run in runs.values()],
                    "clipped_head_steps": [run["clipped_head_steps"] for run in runs.values()],
                }
            )
    frame = {"baseline": {"label": ARMS["muon"].label, "lr": best, "loss": baseline}, "arms": arms}
    return _frame(cost) | frame | {"confidence": CONFIDENCE}


def _frame(result: Results) -> dict[str, Any]:
    experiment = result.experiment
    return {"config": experiment.to_json(), "environment": result.environment, "unit": experiment.data.unit}


def _losses(runs: Mapping[int, RunSummary]) -> list[float]:
    """Return the final validation loss in bits, by seed."""
    return [bits(run["final_val_loss"]) for run in runs.values()]
