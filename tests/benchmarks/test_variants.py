"""The study of variants and polynomials."""

import json
from statistics import fmean

import pytest

from benchmarks.__main__ import main
from benchmarks.studies import variants

MADE = {"command": "python -m benchmarks variants", "date": "2026-11-30T00:00:00", "muonclip": "0.1.0"}


def arm(entry, losses, best, polynomial=None, ns_steps=None):
    rates = [{"lr": lr, "loss": 3.0} for lr in (0.005, 0.007, 0.01)]
    return {
        "entry": entry, "polynomial": polynomial, "ns_steps": ns_steps, "rates": rates, "best": best, "loss": losses,
    }  # fmt: skip


def test_differences_are_of_the_same_seed_and_times_of_the_same_round():
    plain = [2.0, 3.0, 7.0]  # far apart as the seeds are
    figures = {
        "environment": MADE,
        "training": {"steps": 150, "batch_size": 16, "adamw_lr": 0.005},
        "seeds": {"search": [100], "differences": [0, 1, 2]},
        "products": "bfloat16",
        "arms": [
            arm("muonclip", plain, 0.007),
            arm("normuon", [loss - 0.1 for loss in plain], 0.01),
            arm("muonclip", [2.1, 3.2, 7.3], 0.005, "cans", 5),
        ],
        "milliseconds": {"reference MoE": {"jordan × 5": [1.0, 2.0, 4.0], "cans × 5": [3.0, 6.0, 12.0]}},
    }
    lines = variants.table(figures).splitlines()
    assert "| MuonClip | 0.007 | 4.000 |  |  |" in lines
    assert "| NorMuon | 0.01, the highest | 3.900 | −0.100 (−0.100 to −0.100) | lower |" in lines
    assert "| `jordan` × 5 | 0.007 | 4.000 |  |  | 2.0 ms |" in lines
    assert lines[-5].startswith("| `cans` × 5 | 0.005, the lowest | 4.200 | +0.200 (−0.048 to +0.448) | not told")
    assert lines[-5].endswith("| not told from zero | 6.0 ms, 3.00 |")


def test_every_arm_has_the_same_number_of_rates():
    assert {len(variants.rates_of(each)) for each in variants.ARMS} == {3}
    names = [variants.named(each, lr) for each in variants.ARMS for lr in variants.rates_of(each)]
    assert len(set(names)) == 3 * len(variants.ARMS)
    assert not set(variants.SEARCH_SEEDS) & set(variants.SEEDS)


@pytest.mark.slow
def test_the_best_rate_of_each_is_trained_on_other_seeds(tmp_path, capsys):
    main(["variants", "--quick", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "variants.json").read_text(encoding="utf-8"))
    losses = {(row["arm"], row["seed"]): row["loss"] for row in figures["rows"]}
    assert len(losses) == len(figures["rows"]) == 5 * len(variants.ARMS)
    for of, found in zip(variants.ARMS, figures["arms"], strict=True):
        searched = {lr: losses[variants.named(of, lr), 100] for lr in variants.rates_of(of)}
        assert searched[found["best"]] == min(searched.values())
        assert found["loss"] == [losses[variants.named(of, found["best"]), seed] for seed in (100, 0, 1)]
    assert len({fmean(each["loss"]) for each in figures["arms"]}) == len(variants.ARMS)
    assert (tmp_path / "variants.md").read_text(encoding="utf-8") in capsys.readouterr().out
