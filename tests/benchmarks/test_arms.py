"""An arm's name says what it sets otherwise than the experiment; it is resolved once, into all that a run needs."""

import math
from dataclasses import replace

import pytest
from bench_runs import with_arms

from benchmarks.experiment.arms import ARMS, choices, choose


def only(experiment, name):
    return with_arms(experiment, name).arms[0]


def label(name):
    return choices(name)[0].label


def test_settings_replace_those_of_the_experiment(experiment):
    plain = experiment.arm("muonclip")
    assert (plain.training, plain.model, plain.lr) == (experiment.training, experiment.model, 3e-2)
    own = only(experiment, "muonclip@lr=0.5@tau=7@weight_decay=0@steps=5@decay_share=0.5@attention=gqa")
    assert (own.training.tau, own.training.weight_decay, own.training.steps, own.training.decay_share) == (7, 0, 5, 0.5)
    assert (own.model, own.lr) == (replace(experiment.model, attention="gqa"), 0.5)
    assert only(experiment, "muon@attention=mha").changes == {"attention": "mha"}
    assert only(experiment, "softcap@tau=7").changes == {"softcap": 7.0}
    assert [arm for arm in ARMS if not only(experiment, arm).changes] == [
        "adamw", "muon", "muonclip", "rescue", "per-head", "per-head-pairs", "normuon", "hyperball", "muown",
        "cautious", "torch-muon", "bf16", "bf16-stochastic", "int8", "int8-stochastic", "adamw-clip",
    ]  # fmt: skip


def test_the_adamw_half_has_a_rate_of_its_own(experiment):
    assert only(experiment, "muonclip").adamw_share == 1
    arm = only(experiment, "muonclip@lr=0.01@adamw_lr=0.0025")
    assert (arm.lr, arm.adamw_share) == (0.01, 0.25)


def test_the_polynomial_is_an_option_of_muonclip(experiment):
    arm = only(experiment, "hyperball@ns_coefficients=polar_express@ns_steps=6")
    assert arm.options == ARMS["hyperball"].options | {"ns_coefficients": "polar_express", "ns_steps": 6}
    assert arm.training == only(experiment, "hyperball").training
    assert label("muonclip@ns_coefficients=you@ns_steps=3") == "MuonClip, you, 3 steps of the iteration"


def test_thresholds(experiment):
    assert [only(experiment, "rescue").tau(done) for done in (3, 4)] == [math.inf, 0.02]
    assert [only(experiment, arm).tau(0) for arm in ("muon", "muonclip")] == [math.inf, 0.02]


@pytest.mark.parametrize(
    ("arms", "baselines"),
    [
        (("muon", "muonclip", "rescue", "per-head"), (None, "muon", "muon", None)),
        (("adamw", "muonclip", "adamw-clip"), (None, None, "adamw")),
        (("muon", "muonclip@attention=gqa"), (None, None)),
        (("muon@attention=gqa", "muonclip@attention=gqa@tau=7"), (None, "muon@attention=gqa")),
        (("muon@lr=0.5", "muonclip"), (None, "muon@lr=0.5")),
        (("muon@lr=0.5", "muon@lr=2", "muonclip@lr=2"), (None, None, "muon@lr=2")),
    ],
)
def test_a_baseline_has_the_same_settings_and_the_same_rate_where_one_does(experiment, arms, baselines):
    assert tuple(arm.baseline for arm in with_arms(experiment, *arms).arms) == baselines


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lion", "unknown arm 'lion'; known: adamw, muon"),
        ("muon@momentum=0", "unknown setting 'momentum' in 'muon@momentum=0'; known: attention, lr"),
        ("muon@lr", "lr= is not a positive number"),
        ("muon@lr=nan", "lr=nan is not a positive number"),
        ("muon@lr=0", "lr=0 is not a positive number"),
        ("adamw@adamw_lr=1", "'adamw@adamw_lr=1' has one rate: adamw@lr=1"),
        ("muon@tau=-1", "tau=-1 is not a positive number"),
        ("muon@weight_decay=-1", "weight_decay=-1 is not a number from 0"),
        ("muon@steps=2.5", "steps=2.5 is not an integer of at least 1"),
        ("muon@decay_share=2", "decay_share=2 is not a share from 0 to 1"),
        ("muon@attention=flash", "attention=flash is not one of mla, gqa, mha"),
        ("muonclip@ns_coefficients=bjorck", "ns_coefficients=bjorck is not one of jordan, deepseek_v4"),
        ("muonclip@ns_steps=0", "ns_steps=0 is not an integer from 1 to 99"),
        ("torch-muon@ns_steps=6", "ns_steps is of MuonClip's arms; 'torch-muon@ns_steps=6' is another optimizer"),
        ("muon@lr=1@lr=2", "lr is set twice in 'muon@lr=1@lr=2'"),
    ],
)
def test_a_name_that_is_not_understood(name, message):
    with pytest.raises(ValueError, match=message):
        choices(name)


def test_one_name_per_meaning():
    (choice,) = choices("muonclip@tau=1e1@lr=3e-2@attention=gqa")
    assert choice.name == "muonclip@attention=gqa@lr=0.03@tau=10"
    assert choices(choice.name) == (choice,)
    assert choose("muonclip", tau=10.0, attention="gqa", lr=0.03) == choice


def test_labels(experiment):
    assert label("muonclip") == "MuonClip"
    assert label("muonclip@tau=10@attention=gqa") == "MuonClip, GQA, τ = 10"
    assert label("muon@decay_share=0") == "Muon, constant rate"
    assert label("muon@decay_share=0.5@weight_decay=0@steps=40") == "Muon, λ = 0, 40 steps, decay over the last 50%"
    assert only(experiment, "qk-norm").caption == "Muon, QK-norm, rate 0.01 (changes the model)"
    assert only(experiment, "muon@lr=2").caption == "Muon, rate 2"


def test_every_arm_of_an_experiment_looks_different(experiment):
    names = [*ARMS, *(f"muon@lr={rate:g}" for rate in (1, 2, 3, 4)), "muonclip@tau=5"]
    arms = with_arms(experiment, *names).arms
    assert [arm.name for arm in arms] == names
    assert len({arm.label for arm in arms}) == len({arm.colour for arm in arms}) == len(arms)
    assert only(experiment, "muon@lr=1").colour == ARMS["muon"].colour
    assert all(len(arm.colour) == 7 and int(arm.colour[1:], 16) >= 0 for arm in arms)


def test_an_arm_is_one_entry_of_one_table(experiment, monkeypatch):
    """A new entry has a name on the command line, a rate in the presets, a colour, a baseline, a model of its own."""
    from benchmarks.experiment.arms import Entry
    from benchmarks.experiment.presets import rates

    monkeypatch.setitem(ARMS, "half", Entry("Half", "#123456", "muon", clips=True, baseline="muon"))
    assert rates(adamw=1.0, muon=2.0)["half"] == 2.0
    arm = with_arms(experiment, "muon", "half@tau=7", lr=rates(adamw=1.0, muon=2.0)).arms[1]
    assert (arm.label, arm.colour, arm.tau(0), arm.baseline) == ("Half, τ = 7", "#123456", 7.0, "muon")
