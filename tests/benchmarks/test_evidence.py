"""From runs to figures and facts: the facts change where the numbers do."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from bench_runs import with_arms

from benchmarks.__main__ import main
from benchmarks.experiment.arms import choices
from benchmarks.experiment.errors import RunFailed
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.records import metrics
from benchmarks.records.summary import Results
from benchmarks.studies import evidence
from benchmarks.studies.evidence_reading import (
    costs,
    hot_arms,
    hot_effects,
    loud_rates,
    read_evidence,
    read_rates,
    token_share,
)

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)


def run(bits, peak=20.0, **fields):
    return {
        "final_val_loss": bits * math.log(2),
        "max_logit_peak": peak,
        "max_logit_median_last_quarter": peak,
        "heads_ever_clipped": 0.0,
        "clipped_head_steps": 0,
        "last_clipped_step": None,
        "loss_spikes": 0,
        "attention_entropy": 1.0,
        "query_norm": 2.0,
        "key_norm": 2.0,
        "update_rms": 0.2,
    } | fields


def result(experiment, summaries, **training):
    """`summaries`: by arm, one per seed."""
    experiment = replace(with_arms(experiment, *summaries, **training), seeds=SEEDS)
    return Results(experiment, {}, {arm: dict(zip(SEEDS, runs, strict=True)) for arm, runs in summaries.items()}, {})


@pytest.fixture
def sweep(experiment):
    losses = {"adamw": {1e-3: 2.5, 2e-3: 2.4, 4e-3: 2.6}, "muon": {5e-3: 2.23, 1e-2: 2.2, 2e-2: 2.5}}
    losses["muonclip"] = losses["muon"]
    peaks = {5e-3: 15.0, 1e-2: 25.0, 2e-2: 400.0}
    summaries = {
        f"{arm}@lr={lr:g}": [run(bits + 0.01 * seed, peaks.get(lr, 9.0)) for seed in SEEDS]
        for arm, rates in losses.items()
        for lr, bits in rates.items()
    }
    return result(experiment, summaries, steps=100, tau=30.0)


def test_best_rates_and_usable_ranges(sweep):
    arms = evidence.sweep_json(sweep)["arms"]
    assert {arm: entry["best_lr"] for arm, entry in arms.items()} == {"adamw": 2e-3, "muon": 1e-2, "muonclip": 1e-2}
    assert arms["muon"]["usable"] == [5e-3, 1e-2]
    assert arms["adamw"]["usable"] == [2e-3, 2e-3]
    assert arms["muon"]["rates"][2]["peak_logit"] == [400.0] * 3
    assert arms["adamw"]["rates"][0]["loss"] == pytest.approx([2.5, 2.51, 2.52])


def test_a_rate_that_diverges_is_never_the_best(sweep):
    sweep.summaries["muon@lr=0.01"][1]["final_val_loss"] = math.nan
    assert evidence.sweep_json(sweep)["arms"]["muon"]["best_lr"] == 5e-3
    for rate in ("0.005", "0.02"):
        sweep.summaries[f"muon@lr={rate}"][2]["final_val_loss"] = math.inf
    with pytest.raises(RunFailed, match="Muon diverged at every rate"):
        evidence.sweep_json(sweep)


def test_the_clip_is_judged_at_the_rates_that_explode(sweep):
    found = loud_rates(evidence.sweep_json(sweep))
    assert {lr: effect.difference.verdict for lr, effect in found.items()} == {2e-2: "same to the bit"}
    for seed in SEEDS:
        sweep.summaries["muon@lr=0.01"][seed]["max_logit_peak"] = 31.0
        sweep.summaries["muonclip@lr=0.02"][seed] = run(2.2 + 0.01 * seed)
    found = loud_rates(evidence.sweep_json(sweep))
    assert {lr: effect.difference.verdict for lr, effect in found.items()} == {1e-2: "same to the bit", 2e-2: "lower"}
    for runs in sweep.summaries.values():
        for seed in SEEDS:
            runs[seed]["max_logit_peak"] = 3.0
    assert loud_rates(evidence.sweep_json(sweep)) == {}


def test_rates_of_the_halves_are_told_apart(experiment, sweep, monkeypatch):
    monkeypatch.setattr(evidence, "ADAMW_RATE", 5e-3)
    monkeypatch.setattr(evidence, "TIMES", (1, 2))
    for lr in ("0.005", "0.01"):
        sweep.summaries[f"adamw@lr={lr}"] = sweep.summaries["adamw@lr=0.002"]
    apart = {
        "muonclip@lr=0.01@adamw_lr=0.005": [run(2.1 + 0.01 * seed) for seed in SEEDS],
        "muonclip@lr=0.005@adamw_lr=0.01": [run(2.3 + 0.01 * seed) for seed in SEEDS],
    }
    sweep = result(experiment, {arm: list(runs.values()) for arm, runs in sweep.summaries.items()})
    first, second = evidence.rates_json(sweep, result(experiment, apart))["rows"]
    assert (first["lr"], first["loss"].keys()) == (5e-3, {"adamw", "muonclip"})
    assert second["loss"]["muonclip"] == pytest.approx([2.2, 2.21, 2.22])
    assert second["loss"]["muon half"] == pytest.approx([2.1, 2.11, 2.12])
    assert second["loss"]["adamw half"] == pytest.approx([2.3, 2.31, 2.32])
    rows = read_rates({"rows": [first, second]}).splitlines()
    assert rows[2:4] == [
        "| AdamW's, 0.005 | 2.410 | 2.240 | – | – |",
        "| × 2: 0.01 | 2.410 | 2.210 | 2.110 | 2.310 |",
    ]


def shorter(experiment, *bits, lr="0.01"):
    arms = {
        f"muon@lr={lr}@steps={steps}": [run(loss + 0.01 * seed) for seed in SEEDS]
        for steps, loss in zip((40, 60), bits, strict=True)
    }
    return result(experiment, arms, steps=100)


def test_share_of_the_tokens(experiment, sweep):
    found = evidence.efficiency_json(sweep, shorter(experiment, 2.6, 2.4))
    assert found["adamw"]["loss"] == pytest.approx([2.4, 2.41, 2.42])
    assert [budget["share"] for budget in found["muon"]["budgets"]] == [0.4, 0.6, 1.0]
    assert found["share"]["per_seed"] == pytest.approx([0.6] * 3)
    share = token_share(found)
    assert (share.verdict, share.interval.mean) == ("above", pytest.approx(0.6))
    share = token_share(evidence.efficiency_json(sweep, shorter(experiment, 2.5, 2.3)))
    assert (share.verdict, share.interval.mean) == ("below", pytest.approx(math.sqrt(0.4 * 0.6)))
    assert token_share(found | {"reference": 0.6}).verdict == "includes"


def test_no_share_outside_the_budgets(experiment, sweep):
    early = evidence.efficiency_json(sweep, shorter(experiment, 2.3, 2.25))
    assert early["share"] is None
    assert token_share(early) == ("reached with less", None)
    for seed in SEEDS:
        sweep.summaries["muon@lr=0.01"][seed]["final_val_loss"] = 2.45 * math.log(2)
        sweep.summaries["muon@lr=0.005"][seed]["final_val_loss"] = 2.9 * math.log(2)
    never = evidence.efficiency_json(sweep, shorter(experiment, 2.9, 2.8))
    assert never["share"] is None
    assert token_share(never) == ("not reached", None)


def test_cost_is_paired_by_seed(experiment, sweep):
    worse = [run(2.2 + 0.01 * seed + 0.1, clipped_head_steps=9, heads_ever_clipped=0.5) for seed in SEEDS]
    unclear = [
        run(2.2 + 0.01 * seed + shift, clipped_head_steps=1) for seed, shift in zip(SEEDS, (-1, 0, 1), strict=True)
    ]
    arms = {"muonclip@lr=0.01@tau=5": worse, "muonclip@lr=0.01@tau=10": unclear}
    found = evidence.cost_json(sweep, result(experiment, arms))
    assert found["baseline"]["loss"] == pytest.approx([2.2, 2.21, 2.22])
    assert [arm["name"] for arm in found["arms"]] == [*arms, "muonclip@lr=0.01@tau=30"]
    assert found["arms"][0]["difference"]["per_seed"] == pytest.approx([0.1] * 3)
    assert found["arms"][2]["difference"]["per_seed"] == [0.0] * 3
    effects = costs(found)
    assert [effect.difference.verdict for effect in effects] == ["higher", "not told from zero", "same to the bit"]
    assert [effect.clipped for effect in effects] == [0.5, 0.0, 0.0]
    assert {effect.against for effect in effects} == {"Muon"}


@pytest.fixture
def hot():
    loud, held = (3.8, 900.0), (3.0, 40.0)
    runs = {
        name: loud if name.startswith("muon@") or name == "muon" else held
        for name in [choice.name for choice in evidence.HOT_ARMS]
    }
    arms = {name: {str(seed): run(bits + 0.01 * seed, peak) for seed in SEEDS} for name, (bits, peak) in runs.items()}
    config = {"training": {"tau": 30.0, "steps": 100, "lr": {"muon": 0.03}}, "arms": list(arms), "seeds": list(SEEDS)}
    for seed, step in zip(SEEDS, (100, 40, 50), strict=True):
        arms["muonclip"][str(seed)] |= {"last_clipped_step": step, "heads_ever_clipped": 0.75}
    return {"config": config, "environment": {}, "arms": arms}


def test_facts_of_the_hot_rate(hot):
    arms = hot_arms(hot)
    assert list(arms.label) == [choice.label for choice in evidence.HOT_ARMS]
    muon, clip = arms.loc["muon"], arms.loc["muonclip"]
    assert (muon.loss, muon.spread, muon.peak) == (pytest.approx(3.81), pytest.approx(0.02), 900.0)
    assert (clip.last_quarter, clip.held, arms.last_quarter["rescue"]) == (40.0, True, 40.0)
    assert (clip.clipped, clip.silent, any(arms.diverged)) == (0.75, False, False)
    first, *_, gqa, mha = hot_effects(hot)
    assert (first.arm, first.against, first.clipped, first.difference.verdict) == ("MuonClip", "Muon", 0.75, "lower")
    assert first.difference.mean == pytest.approx(-0.8)
    assert (gqa.arm, mha.against) == ("MuonClip, GQA", "Muon, MHA")
    other = copy.deepcopy(hot)
    for seed in map(str, SEEDS):
        own = {"final_val_loss": 4.0, "max_logit_median_last_quarter": 90.0, "last_clipped_step": 30}
        other["arms"]["muonclip"][seed] |= own
    other["arms"]["adamw@lr=0.01"]["1"]["final_val_loss"] = math.nan
    arms = hot_arms(other)
    clip = arms.loc["muonclip"]
    assert (clip.held, clip.silent, clip.last_clip) == (False, True, 30)
    assert list(arms.label[arms.diverged]) == ["AdamW, rate 0.01"]
    assert hot_effects(other)[0].difference.verdict == "higher"


def test_the_committed_figures_are_those_of_the_text():
    folder = ROOT / "docs" / "evidence"
    written = {
        name: metrics.from_json(json.loads((folder / f"{name}.json").read_text()))
        for name in ("sweep", "rates", "efficiency", "clip-cost", "hot")
    }
    assert (folder / "reading.md").read_text() == read_evidence(written)
    assert (folder / "rates.md").read_text() == read_rates(written["rates"])
    for entry in written.values():
        assert entry["environment"]["command"].startswith("python -m benchmarks evidence")
        assert len(entry["config"]["seeds"]) >= 3


def test_own_rates_are_the_best_of_the_committed_sweep():
    arms = json.loads((ROOT / "docs" / "evidence" / "sweep.json").read_text())["arms"]
    assert {arm: OWN_RATE.lr[arm] for arm in arms} == {arm: entry["best_lr"] for arm, entry in arms.items()}
    assert all(len(entry["rates"]) >= 5 for entry in arms.values())


@pytest.mark.slow
def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """In small: fewer rates and steps, one seed fewer; every stage for real, and again without training."""
    monkeypatch.setattr(evidence, "SEEDS", (0, 1))
    monkeypatch.setattr(evidence, "RATES", dict.fromkeys(evidence.RATES, (5e-3, 1e-2)))
    monkeypatch.setattr(evidence, "ADAMW_RATE", 5e-3)
    monkeypatch.setattr(evidence, "TIMES", (1, 2))
    monkeypatch.setattr(evidence, "BUDGETS", (0.5,))
    monkeypatch.setattr(evidence, "LOW_TAUS", (0.5,))
    monkeypatch.setattr(evidence, "HOT_STEPS", 10)
    monkeypatch.setattr(evidence, "OWN_RATE", replace(OWN_RATE, steps=10, warmup_steps=3, batch_size=2))
    attentions = [f"{arm}@attention={kind}" for arm in ("muon", "muonclip") for kind in ("gqa", "mha")]
    monkeypatch.setattr(evidence, "IN_PICTURE", ("muon", "muonclip"))
    monkeypatch.setattr(evidence, "HOT_ARMS", choices("muon", "muonclip", "rescue", "qk-norm", *attentions))
    (tmp_path / "text").write_text(" ".join(map(str, range(4000))))
    arguments = ["evidence", "--data", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--precision", "fp32"]
    assert main(arguments) == 0
    figures = tmp_path / "out" / "figures"
    assert {path.name for path in figures.iterdir()} == {
        *(f"{name}.json" for name in ("sweep", "rates", "efficiency", "clip-cost", "hot")),
        *(f"{name}.png" for name in ("sweep", "efficiency", "clip-cost", "hot", "heads")),
        "reading.md",
        "rates.md",
    }
    reading = (figures / "reading.md").read_text()
    assert reading in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(before) == 2 * (6 + 2 + 1 + 1 + 8)
    assert main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert (figures / "reading.md").read_text() == reading
    for name in ("sweep", "efficiency", "clip-cost", "hot"):
        assert (tmp_path / "out" / name / "report.html").stat().st_size > 100_000
