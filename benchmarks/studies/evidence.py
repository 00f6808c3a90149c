"""`make evidence`: the rate sweep, token efficiency, the cost of clipping, and every arm at a hot rate.

    sweep       AdamW, Muon and MuonClip at several rates: the loss and the peak logit of each, the best rate of each
    efficiency  Muon at its best rate and smaller budgets: the share of AdamW's tokens that reaches AdamW's final loss
    clip-cost   MuonClip at the best rate, with thresholds so low that it clips where nothing explodes
    hot         all arms at a rate that explodes: other clips, other models, thresholds, decays, schedules, attentions

Each is a panel or more with a folder of its own; `figures` holds what the documentation shows: pictures, small JSON
files and `reading.md`, whose sentences are made from the numbers.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.execution.train import Execution, train_panels
from benchmarks.execution.workers import RunFailed
from benchmarks.experiment.arms import base_of, label, setup, with_settings
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.experiment import Panel, Training
from benchmarks.experiment.presets import HOT, OWN_RATE
from benchmarks.records import atomic_files as checkpoint
from benchmarks.records import metrics, summary
from benchmarks.records.intervals import CONFIDENCE, crossing, interval
from benchmarks.records.summary import PanelResult
from benchmarks.report import head_maps as heads
from benchmarks.report import page as report
from benchmarks.report import plots as plot
from benchmarks.studies import evidence_plots as figures
from benchmarks.studies.evidence_reading import read_evidence
from muonclip.models import MoEConfig

SEEDS = (0, 1, 2)
RATES = {
    "adamw": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "muon": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    "muonclip": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
}
BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8)  # shares of AdamW's steps; 1 is in the sweep
LOW_TAUS = (5.0, 10.0, 15.0)
HOT_STEPS = 400
HOT_ARMS = (
    "muon",
    "muonclip",
    "muonclip@tau=10",
    "muonclip@tau=100",
    "rescue",
    "per-head",
    "qk-norm",
    "softcap",
    "adamw@lr=0.01",
    "adamw-clip@lr=0.01",
    "muon@weight_decay=0",
    "muonclip@weight_decay=0",
    "muon@decay_share=0.5",
    "muonclip@decay_share=0.5",
    "muon@attention=gqa",
    "muonclip@attention=gqa",
    "muon@attention=mha",
    "muonclip@attention=mha",
)
IN_PICTURE = HOT_ARMS[:8]  # of the curves; the map of heads and the table show all
USABLE = 0.05  # bits (per byte) above an optimizer's best: its usable range of rates
MOONLIGHT = 0.52  # arXiv 2502.16982: the share of AdamW's training FLOPs that Muon needs


def evidence(model: MoEConfig, corpus: Corpus, execution: Execution) -> None:
    """Train what is not trained yet, and write `figures`."""

    def panel(name: str, title: str, arms: Sequence[str], training: Training) -> Panel:
        lr = {base: rate for base, rate in training.lr.items() if base in map(base_of, arms)}
        return Panel(
            name=name,
            title=title,
            arms=tuple(arms),
            seeds=SEEDS,
            model=model,
            training=replace(training, lr=lr),
            data=corpus.record(),
        )

    swept = [with_settings(arm, lr=rate) for arm, rates in RATES.items() for rate in rates]
    sweep, hot = train_panels(
        [
            panel("sweep", "Rates", swept, replace(OWN_RATE, lr={}, validate_every=100)),
            panel("hot", "A hot rate", HOT_ARMS, replace(HOT, steps=HOT_STEPS)),
        ],
        corpus,
        execution,
    )
    swept_json = sweep_json(sweep)
    best = swept_json["arms"]["muon"]["best_lr"]
    shorter = [with_settings("muon", lr=best, steps=round(share * OWN_RATE.steps)) for share in BUDGETS]
    low_taus = [with_settings("muonclip", lr=best, tau=tau) for tau in LOW_TAUS]
    at_best = replace(OWN_RATE, lr={}, validate_every=100)
    efficiency, cost = train_panels(
        [
            panel("efficiency", "Muon on fewer tokens", shorter, at_best),
            panel("clip-cost", "Clipping where nothing explodes", low_taus, at_best),
        ],
        corpus,
        replace(execution, precision=sweep.panel.precision),  # its runs are compared with those of the sweep
    )
    results = [sweep, efficiency, cost, hot]
    written = {
        "sweep": swept_json,
        "efficiency": efficiency_json(sweep, efficiency),
        "clip-cost": cost_json(sweep, cost),
        "hot": metrics.from_json(summary.to_json(hot)),
    }
    folder = execution.out / "figures"
    folder.mkdir(exist_ok=True)
    for name, value in written.items():
        checkpoint.write_json(folder / f"{name}.json", metrics.to_json(value))
    figures.draw_sweep(written["sweep"], folder / "sweep.png")
    figures.draw_efficiency(written["efficiency"], folder / "efficiency.png")
    figures.draw_clip_cost(written["clip-cost"], folder / "clip-cost.png")
    plot.draw([_only(hot, IN_PICTURE)], folder / "hot.png")
    heads.draw([hot], folder / "heads.png")
    for result in results:
        report.write([result], execution.out / result.panel.name / "report.html")
    reading = read_evidence(written)
    with checkpoint.replacing(folder / "reading.md") as stream:
        stream.write(reading.encode())
    print(reading)
    print(f"figures  {folder}", file=sys.stderr)


def sweep_json(sweep: PanelResult) -> dict[str, Any]:
    """Loss and peak logit by optimizer, rate and seed; the best rate of each, and the range within USABLE of it."""
    arms: dict[str, Any] = {}
    for name, runs in sweep.summaries.items():
        entry = arms.setdefault(base_of(name), {"label": label(base_of(name)), "rates": []})
        entry["rates"].append(
            {
                "lr": setup(sweep.panel, name).lr,
                "seeds": list(runs),
                "loss": _bits(runs),
                "peak_logit": [run["max_logit_peak"] for run in runs.values()],
            }
        )
    for entry in arms.values():
        means = {rate["lr"]: statistics.fmean(rate["loss"]) for rate in entry["rates"]}
        finite = {lr: mean for lr, mean in means.items() if math.isfinite(mean)}
        if not finite:
            raise RunFailed(f"{entry['label']} diverged at every rate: there is no best one. See {sweep.panel.name}.")
        entry["best_lr"] = min(finite, key=finite.__getitem__)
        usable = [lr for lr, mean in finite.items() if mean <= finite[entry["best_lr"]] + USABLE]
        entry["usable"] = [min(usable), max(usable)]
    return _frame(sweep) | {"tau": sweep.panel.training.tau, "usable_margin": USABLE, "arms": arms}


def efficiency_json(sweep: PanelResult, efficiency: PanelResult) -> dict[str, Any]:
    """Muon's losses by budget, and by seed the share of the tokens that reaches the loss of AdamW's own seed."""
    best = {arm: entry["best_lr"] for arm, entry in sweep_json(sweep)["arms"].items()}
    adamw = _bits(sweep.summaries[with_settings("adamw", lr=best["adamw"])])
    full = sweep.panel.training.steps
    budgets = [
        {"share": steps / full, "steps": steps, "loss": _bits(runs)}
        for name, runs in efficiency.summaries.items()
        for steps in [setup(efficiency.panel, name).training.steps]
    ]
    whole = sweep.summaries[with_settings("muon", lr=best["muon"])]
    budgets.append({"share": 1.0, "steps": full, "loss": _bits(whole)})
    shares = [
        crossing([budget["share"] for budget in budgets], [budget["loss"][index] for budget in budgets], target)
        for index, target in enumerate(adamw)
    ]
    found = [share for share in shares if share is not None]
    share: dict[str, Any] | None = None
    if len(found) == len(shares):
        share = dict(interval(found)._asdict()) | {"per_seed": found}
    return _frame(efficiency) | {
        "adamw": {"lr": best["adamw"], "steps": full, "loss": adamw},
        "muon": {"lr": best["muon"], "budgets": budgets},
        "seeds": list(SEEDS),
        "share": share,
        "confidence": CONFIDENCE,
        "reference": MOONLIGHT,
    }


def cost_json(sweep: PanelResult, cost: PanelResult) -> dict[str, Any]:
    """By threshold the difference in final loss from Muon without a clip, seed by seed, at Muon's best rate."""
    best = sweep_json(sweep)["arms"]["muon"]["best_lr"]
    baseline = _bits(sweep.summaries[with_settings("muon", lr=best)])
    named = {
        with_settings("muonclip", lr=best, tau=sweep.panel.training.tau): sweep.summaries[
            with_settings("muonclip", lr=best)
        ]
    }
    arms = []
    for name, runs in (dict(cost.summaries) | named).items():
        loss = _bits(runs)
        differences = [own - other for own, other in zip(loss, baseline, strict=True)]
        arms.append(
            {
                "name": name,
                "label": label(name),
                "loss": loss,
                "difference": dict(interval(differences)._asdict()) | {"per_seed": differences},
                "heads_ever_clipped": [run["heads_ever_clipped"] for run in runs.values()],
                "clipped_head_steps": [run["clipped_head_steps"] for run in runs.values()],
            }
        )
    frame = {"baseline": {"label": label("muon"), "lr": best, "loss": baseline}, "arms": arms}
    return _frame(cost) | frame | {"confidence": CONFIDENCE}


def _only(result: PanelResult, arms: Sequence[str]) -> PanelResult:
    return PanelResult(
        replace(result.panel, arms=tuple(arms)),
        {arm: result.records[arm] for arm in arms},
        {arm: result.summaries[arm] for arm in arms},
        result.environment,
    )


def _frame(result: PanelResult) -> dict[str, Any]:
    unit = "bits per byte" if result.panel.data.kind == "bytes" else "bits per token"
    return {"config": result.panel.to_json(), "environment": result.environment, "unit": unit}


def _bits(runs: Mapping[int, summary.RunSummary]) -> list[float]:
    """Final validation loss by seed."""
    return [run["final_val_loss"] / math.log(2) for run in runs.values()]
