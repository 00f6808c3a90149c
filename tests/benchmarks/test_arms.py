"""An arm's name says what it sets otherwise than the panel, and the run does so."""

import math
from dataclasses import replace

import pytest

from benchmarks.experiment.arms import ARMS, appearance, label, model_changes, parse, setup, with_settings
from benchmarks.records import metrics
from benchmarks.training.run import METRICS, Run


def named(panel, *arms):
    return replace(panel, arms=arms)


def test_settings_replace_those_of_the_panel(panel, every_arm):
    plain = setup(panel, "muonclip")
    assert (plain.training, plain.model, plain.lr) == (panel.training, panel.model, 3e-2)
    own = setup(panel, "muonclip@lr=0.5@tau=7@weight_decay=0@steps=5@decay_share=0.5@attention=gqa")
    expected = replace(panel.training, tau=7.0, weight_decay=0.0, steps=5, decay_share=0.5)
    assert (own.training, own.model, own.lr) == (expected, replace(panel.model, attention="gqa"), 0.5)
    assert model_changes(panel, "muon@attention=mha") == {"attention": "mha"}
    assert model_changes(every_arm, "softcap@tau=7") == {"softcap": 7.0}


def test_a_run_follows_its_settings(panel, corpus, tmp_path):
    name = "muon@lr=0.5@weight_decay=0@steps=4@attention=gqa"
    run = Run(panel, corpus, tmp_path, name, 0)
    run.train(lambda record: None)
    assert run.finished
    records = metrics.read(tmp_path / METRICS)
    assert [record["lr"] for record in records] == [0.25, 0.5, 0.5, 0.5]
    assert run.learner.model.config.attention == "gqa"
    assert {group["weight_decay"] for group in run.learner.optimizer.param_groups} == {0.0}


def test_a_threshold_of_its_own(panel, corpus, tmp_path):
    clipped = {}
    for tau in (0.02, 1e9):
        run = Run(panel, corpus, tmp_path / str(tau), f"muonclip@tau={tau}", 0)
        clipped[tau] = run.step()["clipped_heads"]
    assert clipped[0.02] > 0 == clipped[1e9]


def test_rescue_is_muon_until_it_clips(every_arm, corpus, tmp_path):
    records = {}
    for arm in ("muon", "rescue"):
        Run(every_arm, corpus, tmp_path / arm, arm, 0).train(lambda record: None)
        records[arm] = metrics.read(tmp_path / arm / METRICS)
    for muon, rescue in zip(records["muon"][:4], records["rescue"][:4], strict=True):
        assert rescue["max_logits"] == muon["max_logits"]
        assert rescue["clipped_heads"] == 0
    assert records["rescue"][4]["max_logits"] == records["muon"][4]["max_logits"]  # seen before the fifth update
    assert records["rescue"][4]["clipped_heads"] > 0
    assert records["rescue"][5]["max_logits"] != records["muon"][5]["max_logits"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lion", "unknown arm 'lion'; known: adamw, muon"),
        ("muon@momentum=0", "unknown setting 'momentum' in 'muon@momentum=0'; known: attention, lr"),
        ("muon@lr", "lr= is not a positive number"),
        ("muon@lr=nan", "lr=nan is not a positive number"),
        ("muon@lr=0", "lr=0 is not a positive number"),
        ("muon@tau=-1", "tau=-1 is not a positive number"),
        ("muon@weight_decay=-1", "weight_decay=-1 is not a number from 0"),
        ("muon@steps=2.5", "steps=2.5 is not an integer of at least 1"),
        ("muon@decay_share=2", "decay_share=2 is not a share from 0 to 1"),
        ("muon@attention=flash", "attention=flash is none of mla, gqa, mha"),
        ("muon@lr=1@lr=2", "lr is set twice in 'muon@lr=1@lr=2'"),
    ],
)
def test_a_name_that_is_not_understood(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_one_name_per_meaning():
    base, settings = parse("muonclip@tau=1e1@lr=3e-2@attention=gqa")
    assert with_settings(base, **settings) == "muonclip@attention=gqa@lr=0.03@tau=10"
    assert parse(with_settings(base, **settings)) == (base, settings)


def test_labels():
    assert label("muonclip") == "MuonClip"
    assert label("muonclip@tau=10@attention=gqa") == "MuonClip, GQA, τ = 10"
    assert label("muon@decay_share=0") == "Muon, constant rate"
    assert label("muon@decay_share=0.5@weight_decay=0@steps=40") == "Muon, λ = 0, 40 steps, decay over the last 50%"


def test_every_arm_of_a_panel_looks_different(panel):
    arms = [*ARMS, *(f"muon@lr={rate:g}" for rate in (1, 2, 3, 4)), "muonclip@tau=5"]
    looks = appearance(named(panel, *arms))
    assert list(looks) == arms
    assert len({look.label for look in looks.values()}) == len({look.colour for look in looks.values()}) == len(arms)
    assert appearance(named(panel, "muon@lr=1"))["muon@lr=1"].colour == ARMS["muon"].colour
    assert all(len(look.colour) == 7 and not math.isnan(int(look.colour[1:], 16)) for look in looks.values())
