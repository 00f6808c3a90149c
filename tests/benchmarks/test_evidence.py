"""From runs to figures and sentences: the sentences change where the numbers do."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.execution.workers import RunFailed
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.records import metrics
from benchmarks.records.summary import PanelResult
from benchmarks.studies import evidence
from benchmarks.studies.evidence_reading import read_cost, read_efficiency, read_evidence, read_hot, read_sweep

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


def result(panel, summaries, **training):
    """`summaries`: by arm, one per seed."""
    panel = replace(panel, arms=tuple(summaries), seeds=SEEDS, training=replace(panel.training, **training))
    return PanelResult(panel, {}, {arm: dict(zip(SEEDS, runs, strict=True)) for arm, runs in summaries.items()}, {})


@pytest.fixture
def sweep(panel):
    losses = {"adamw": {1e-3: 2.5, 2e-3: 2.4, 4e-3: 2.6}, "muon": {5e-3: 2.23, 1e-2: 2.2, 2e-2: 2.5}}
    losses["muonclip"] = losses["muon"]
    peaks = {5e-3: 15.0, 1e-2: 25.0, 2e-2: 400.0}
    summaries = {
        f"{arm}@lr={lr:g}": [run(bits + 0.01 * seed, peaks.get(lr, 9.0)) for seed in SEEDS]
        for arm, rates in losses.items()
        for lr, bits in rates.items()
    }
    return result(panel, summaries, steps=100, tau=30.0)


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


def test_reading_of_the_sweep(sweep):
    text = "\n".join(read_sweep(evidence.sweep_json(sweep)))
    assert "**Muon** is best at 0.01 with 2.210 bits per byte." in text
    assert "the rates 0.005 to 0.01, a factor of 2" in text
    assert "pass τ = 30 from the rate 0.02 on, with a peak of 400 at 0.02; at its best rate they do not" in text
    assert "- At 0.02 MuonClip's loss is +0.000 from Muon's, the same to the bit." in text
    assert "edge" not in text
    assert "The usable range, as defined above, is the same with the clip." in text
    for seed in SEEDS:
        sweep.summaries["muon@lr=0.01"][seed]["max_logit_peak"] = 31.0
        sweep.summaries["muonclip@lr=0.02"][seed]["final_val_loss"] = (2.2 + 0.01 * seed) * math.log(2)
        sweep.summaries["adamw@lr=0.001"][seed]["final_val_loss"] = 1.0
    text = "\n".join(read_sweep(evidence.sweep_json(sweep)))
    assert "at its best rate too (31)" in text
    assert "This is the edge of what was tried." in text
    assert "better beyond the spread of the seeds" in text
    assert "With the clip the usable range ends at 0.02 instead of 0.01." in text
    for runs in sweep.summaries.values():
        for seed in SEEDS:
            runs[seed]["max_logit_peak"] = 3.0
    assert "this sweep shows nothing about the clip" in "\n".join(read_sweep(evidence.sweep_json(sweep)))


def shorter(panel, *bits, lr="0.01"):
    arms = {
        f"muon@lr={lr}@steps={steps}": [run(loss + 0.01 * seed) for seed in SEEDS]
        for steps, loss in zip((40, 60), bits, strict=True)
    }
    return result(panel, arms, steps=100)


def test_share_of_the_tokens(panel, sweep):
    found = evidence.efficiency_json(sweep, shorter(panel, 2.6, 2.4))
    assert found["adamw"]["loss"] == pytest.approx([2.4, 2.41, 2.42])
    assert [budget["share"] for budget in found["muon"]["budgets"]] == [0.4, 0.6, 1.0]
    assert found["share"]["per_seed"] == pytest.approx([0.6] * 3)
    assert found["share"]["mean"] == pytest.approx(0.6)
    text = "\n".join(read_efficiency(found))
    assert "with **0.60** of the tokens" in text
    assert "That is more than Moonlight's 0.52" in text
    halfway = read_efficiency(evidence.efficiency_json(sweep, shorter(panel, 2.5, 2.3)))
    assert f"with **{math.sqrt(0.4 * 0.6):.2f}** of the tokens" in "\n".join(halfway)
    assert "That is less than Moonlight's 0.52" in "\n".join(halfway)


def test_no_share_outside_the_budgets(panel, sweep):
    early = evidence.efficiency_json(sweep, shorter(panel, 2.3, 2.25))
    assert early["share"] is None
    assert "the smallest of these budgets already reaches AdamW's loss" in "\n".join(read_efficiency(early))
    for seed in SEEDS:
        sweep.summaries["muon@lr=0.01"][seed]["final_val_loss"] = 2.45 * math.log(2)
        sweep.summaries["muon@lr=0.005"][seed]["final_val_loss"] = 2.9 * math.log(2)
    never = evidence.efficiency_json(sweep, shorter(panel, 2.9, 2.8))
    assert never["share"] is None
    assert "Muon does not reach AdamW's loss" in "\n".join(read_efficiency(never))


def test_cost_is_paired_by_seed(panel, sweep):
    worse = [run(2.2 + 0.01 * seed + 0.1, clipped_head_steps=9, heads_ever_clipped=0.5) for seed in SEEDS]
    unclear = [
        run(2.2 + 0.01 * seed + shift, clipped_head_steps=1) for seed, shift in zip(SEEDS, (-1, 0, 1), strict=True)
    ]
    arms = {"muonclip@lr=0.01@tau=5": worse, "muonclip@lr=0.01@tau=10": unclear}
    found = evidence.cost_json(sweep, result(panel, arms))
    assert found["baseline"]["loss"] == pytest.approx([2.2, 2.21, 2.22])
    assert [arm["name"] for arm in found["arms"]] == [*arms, "muonclip@lr=0.01@tau=30"]
    assert found["arms"][0]["difference"]["per_seed"] == pytest.approx([0.1] * 3)
    assert found["arms"][2]["difference"]["per_seed"] == [0.0] * 3
    lines = read_cost(found)[-3:]
    assert "+0.100" in lines[0]
    assert "worse beyond the spread of the seeds; 50% of the heads" in lines[0]
    assert "which the seeds do not tell from zero" in lines[1]
    assert "no head was clipped; the losses are the same to the bit" in lines[2]


@pytest.fixture
def hot(panel):
    loud, held = (3.8, 900.0), (3.0, 40.0)
    runs = {name: loud if name.startswith("muon@") or name == "muon" else held for name in evidence.HOT_ARMS}
    arms = {name: {str(seed): run(bits + 0.01 * seed, peak) for seed in SEEDS} for name, (bits, peak) in runs.items()}
    config = {"training": {"tau": 30.0, "steps": 100, "lr": {"muon": 0.03}}, "arms": list(arms), "seeds": list(SEEDS)}
    for seed, step in zip(SEEDS, (100, 40, 50), strict=True):
        arms["muonclip"][str(seed)] |= {"last_clipped_step": step, "heads_ever_clipped": 0.75}
    return {"config": config, "environment": {}, "arms": arms}


def test_reading_of_the_hot_rate(hot):
    text = "\n".join(read_hot(hot))
    assert "Muon's largest logit reaches 900. MuonClip's median over the last quarter is 40 at τ = 30: held" in text
    assert "MuonClip ends -0.800 (-0.800 to -0.800) bits from Muon, better beyond the spread" in text
    assert "75% of the heads were clipped at some step, up to the end" in text
    assert "No loss became infinite or NaN." in text
    other = copy.deepcopy(hot)
    for seed in map(str, SEEDS):
        other["arms"]["muonclip"][seed] |= {
            "final_val_loss": 4.0, "max_logit_median_last_quarter": 90.0, "last_clipped_step": 30,
        }  # fmt: skip
    other["arms"]["adamw@lr=0.01"]["1"]["final_val_loss"] = math.nan
    text = "\n".join(read_hot(other))
    assert ": not held" in text
    assert "MuonClip ends +1.9" in text
    assert "worse beyond the spread" in text
    assert "none after step 30: the clip falls silent, as in K2" in text
    assert "Losses that are not finite: AdamW, rate 0.01." in text


def test_the_committed_figures_are_those_of_the_text():
    folder = ROOT / "docs" / "evidence"
    written = {
        name: metrics.from_json(json.loads((folder / f"{name}.json").read_text()))
        for name in ("sweep", "efficiency", "clip-cost", "hot")
    }
    assert (folder / "reading.md").read_text() == read_evidence(written)
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
    monkeypatch.setattr(evidence, "BUDGETS", (0.5,))
    monkeypatch.setattr(evidence, "LOW_TAUS", (0.5,))
    monkeypatch.setattr(evidence, "HOT_STEPS", 10)
    monkeypatch.setattr(evidence, "OWN_RATE", replace(OWN_RATE, steps=10, warmup_steps=3, batch_size=2))
    attentions = [f"{arm}@attention={kind}" for arm in ("muon", "muonclip") for kind in ("gqa", "mha")]
    monkeypatch.setattr(evidence, "IN_PICTURE", ("muon", "muonclip"))
    monkeypatch.setattr(evidence, "HOT_ARMS", ("muon", "muonclip", "rescue", "qk-norm", *attentions))
    (tmp_path / "text").write_text(" ".join(map(str, range(4000))))
    arguments = ["evidence", "--data", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--precision", "fp32"]
    assert main(arguments) == 0
    figures = tmp_path / "out" / "figures"
    assert {path.name for path in figures.iterdir()} == {
        *(f"{name}.json" for name in ("sweep", "efficiency", "clip-cost", "hot")),
        *(f"{name}.png" for name in ("sweep", "efficiency", "clip-cost", "hot", "heads")),
        "reading.md",
    }
    reading = (figures / "reading.md").read_text()
    assert reading in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(before) == 2 * (6 + 1 + 1 + 8)
    assert main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert (figures / "reading.md").read_text() == reading
    for name in ("sweep", "efficiency", "clip-cost", "hot"):
        assert (tmp_path / "out" / name / "report.html").stat().st_size > 100_000
