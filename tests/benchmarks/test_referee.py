"""The referee: its rule, what it finds of optimizers whose curves are known, and a dry run of real ones."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.experiment.arms import choices
from benchmarks.studies import referee
from benchmarks.studies.referee import RULES

RECORDED = Path(__file__).parents[2] / "docs" / "referee"
MADE = {"command": "python -m benchmarks referee", "date": "2026-11-30T00:00:00", "muonclip": "0.1.0"}
BEST = {"adamw": {"lr": 1e-3}, "muon": {"lr": 1e-2, "weight_decay": 0.3, "adamw_lr": 5e-3}, "muonclip": {"lr": 1e-2}}
NEEDS = {"adamw": 250, "muon": 130, "muonclip": 130}  # steps at the best settings, of the mean seed
SLOPE, SEEDS = 0.6, (-0.03, 0.01, 0.04, -0.02)  # in log steps, and by seed


class Curves:
    """Losses that are a straight line in log steps, and grow with the distance from the best settings."""

    def __init__(self):
        self.asked = {}

    def losses(self, arms, seeds):
        for name in arms:
            self.asked.setdefault(name, []).extend(seeds)
        return {name: [self.loss(name) + (0 if seed == 100 else SEEDS[seed]) for seed in seeds] for name in arms}

    def loss(self, name):
        (choice,) = choices(name)
        settings = dict(choice.settings)
        own = {"weight_decay": 0.1, "adamw_lr": settings["lr"]} | settings
        best = {"weight_decay": 0.1, "adamw_lr": BEST[choice.entry]["lr"]} | BEST[choice.entry]
        weights = {"lr": 2, "weight_decay": 1, "adamw_lr": 1}
        away = sum(weight * abs(math.log(own[key] / best[key])) for key, weight in weights.items())
        return RULES.target + SLOPE * math.log(NEEDS[choice.entry] / own["steps"]) + 0.1 * away


@pytest.fixture(scope="module")
def judged():
    curves = Curves()
    return curves, referee.judge(curves, choices("adamw", "muon", "muonclip"), RULES)


def test_the_rule_asks_more_of_fewer_seeds():
    assert RULES.met_by([2.66] * 4)  # 0.04 · 2 ≥ 1.645 · 0.035 = 0.0576
    assert not RULES.met_by([2.66])
    assert RULES.met_by([2.671] * 4)
    assert not RULES.met_by([2.672] * 4)
    assert not RULES.met_by([2.0, math.inf])


def test_each_is_tuned_by_the_same_number_of_runs_on_a_seed_of_its_own(judged):
    curves, found = judged
    for arm in found["arms"]:
        entry = arm["name"]
        assert arm["tuned"] == BEST[entry]
        assert len(arm["tried"]) == referee.TUNING == 9
        asked = [name for name, seeds in curves.asked.items() if name.split("@")[0] == entry and 100 in seeds]
        assert len(asked) == referee.TUNING
        assert all("@steps=200" in name for name in asked)


def test_a_stop_is_the_first_budget_at_which_the_rule_is_met(judged):
    curves, found = judged
    for arm in found["arms"]:
        first = next(
            steps
            for steps in RULES.budgets
            if RULES.met_by(
                curves.losses([f"{arm['name']}@{written(arm['tuned'])}steps={steps}"], range(4)).popitem()[1]
            )
        )
        assert arm["steps"] == first
        assert len(arm["budgets"]) <= 4, "halving"
        assert NEEDS[arm["name"]] < first < 1.2 * NEEDS[arm["name"]]


def written(settings):
    return "".join(f"{key}={value:g}@" for key, value in settings.items())


def test_two_are_compared_at_the_earlier_stop_and_by_the_steps_of_each_seed(judged):
    _, found = judged
    pairs = {(pair["one"], pair["other"]): pair for pair in found["pairs"]}
    assert [*pairs] == [("adamw", "muon"), ("adamw", "muonclip"), ("muon", "muonclip")]
    pair = pairs["adamw", "muon"]
    assert pair["at"] == found["arms"][1]["steps"]
    lead = SLOPE * math.log(130 / 250)
    assert pair["ahead"] == pytest.approx([lead] * 4)
    assert pair["score"] == pytest.approx(2 * lead / (math.sqrt(2) * 0.035))
    assert pair["ratios"] == pytest.approx([250 / 130] * 4)
    text = referee.tables(found | FRAME)
    (row,) = (line for line in text.splitlines() if line.startswith("| AdamW | Muon |"))
    assert row.startswith("| AdamW | Muon | 1.92 (1.92 to 1.92) | −0.392")
    assert row.endswith("| 141 | −15.9 | needs more |")
    assert text.count("not told from zero") == 1


FRAME = {
    "environment": MADE,
    "rules": {"target": 2.7, "z": 1.645, "sigma": 0.035, "seeds": [0, 1, 2, 3], "tuning_steps": 200,
              "budgets": list(RULES.budgets)},
    "protocol": {"training": {"weight_decay": 0.1}},
}  # fmt: skip


def test_what_no_budget_is_enough_for_is_said(judged):
    found = referee.judge(Curves(), choices("adamw", "muon"), replace(RULES, budgets=(100, 120, 150)))
    assert [arm["steps"] for arm in found["arms"]] == [None, 150]
    assert found["pairs"][0]["at"] == 150
    assert found["pairs"][0]["ratios"] == pytest.approx([250 / 130] * 4)
    frame = FRAME | {"rules": FRAME["rules"] | {"budgets": [100, 120, 150]}}
    assert "| AdamW | 0.001 | 0.1 |  | more than 150 |  |" in referee.tables(found | frame)


def test_a_dry_run_of_real_optimizers_goes_on_where_it_was_stopped(tmp_path, capsys):
    command = ["referee", "--quick", "--jobs", "1", "--arms", "adamw,torch-muon", "--out", str(tmp_path)]
    assert main(command) == 0
    figures = json.loads((tmp_path / "referee.json").read_text(encoding="utf-8"))
    assert (tmp_path / "referee.md").read_text(encoding="utf-8") in capsys.readouterr().out
    losses = {(row["arm"], row["seed"]): row["loss"] for row in figures["rows"]}
    for arm in figures["arms"]:
        tried = {each["arm"]: each["loss"] for each in arm["tried"]}
        assert len(tried) == referee.TUNING
        assert tried == {name: losses[name, 100] for name in tried}
        assert {each["steps"] for each in arm["budgets"]} <= {1, 2, 4}
    assert len({arm["budgets"][0]["loss"][0] for arm in figures["arms"]}) == 2
    rows = tmp_path / "referee.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:-5]), encoding="utf-8")
    assert main(command) == 0
    again = json.loads((tmp_path / "referee.json").read_text(encoding="utf-8"))
    assert again["arms"] == figures["arms"]
    assert again["pairs"] == figures["pairs"]
    assert rows.read_text(encoding="utf-8").splitlines(keepends=True)[:-5] == lines[:-5]


def test_the_committed_tables_are_what_the_rules_make_of_the_raw_rows():
    figures = json.loads((RECORDED / "referee.json").read_text(encoding="utf-8"))
    losses = {(row["arm"], row["seed"]): row["loss"] for row in figures["rows"]}

    class Recorded:
        def losses(self, arms, seeds):
            return {arm: [losses[arm, seed] for seed in seeds] for arm in arms}

    compared = choices(*(arm["name"] for arm in figures["arms"]))
    found = json.loads(json.dumps(referee.judge(Recorded(), compared, RULES)))
    assert (RECORDED / "referee.md").read_text(encoding="utf-8") == referee.tables(figures | found)
    # The page says so, also where σ is that of these runs.
    for sigma in (RULES.sigma, found["sigma_of_runs"]):
        found = referee.judge(Recorded(), compared, replace(RULES, sigma=sigma))
        assert [arm["steps"] for arm in found["arms"]] == [281, 119, 119]
        assert [abs(pair["score"]) >= RULES.z for pair in found["pairs"]] == [True, True, False]
