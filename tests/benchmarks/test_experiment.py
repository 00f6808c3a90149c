"""An experiment is recognised by its JSON, and what differs is named."""

import json
from dataclasses import replace

import pytest

from benchmarks.experiment.experiment import Experiment, differences
from benchmarks.experiment.settings import Training


def test_json_gives_the_experiment_back(experiment):
    text = json.dumps(experiment.to_json())
    assert Experiment.from_json(json.loads(text)) == experiment
    assert differences(json.loads(text), experiment.to_json()) == []


def test_differences_are_named(experiment):
    training = replace(experiment.training, tau=5.0, lr={"muon": 0.1})
    other = replace(experiment, chosen=experiment.chosen[1:2], seeds=(0,), training=training)
    assert differences(experiment.to_json(), other.to_json()) == [
        "arms: recorded ['adamw', 'muon', 'muonclip'], asked for ['muon']",
        "seeds: recorded [0, 3], asked for [0]",
        "training.lr.adamw: recorded 0.001, asked for nothing",
        "training.lr.muon: recorded 0.03, asked for 0.1",
        "training.lr.muonclip: recorded 0.03, asked for nothing",
        "training.tau: recorded 0.02, asked for 5.0",
    ]


def test_the_framework_is_recorded_and_recognised(experiment):
    in_jax = replace(experiment, framework="jax")
    assert in_jax.to_json()["framework"] == "jax"
    assert Experiment.from_json(json.loads(json.dumps(in_jax.to_json()))) == in_jax
    assert differences(experiment.to_json(), in_jax.to_json()) == ["framework: recorded torch, asked for jax"]
    old = {name: value for name, value in experiment.to_json().items() if name != "framework"}
    assert Experiment.from_json(old) == experiment
    assert differences(old, experiment.to_json()) == []
    assert differences(old, in_jax.to_json()) == ["framework: recorded torch, asked for jax"]


@pytest.mark.parametrize(
    ("steps", "warmup", "share", "factors"),
    [(4, 2, 0.0, [0.5, 1, 1, 1]), (4, 0, 0.5, [1, 1, 1, 0.55]), (2, 30, 1.0, [0.5, 1])],
)
def test_schedule_fits_the_steps(steps, warmup, share, factors):
    training = Training(steps=steps, batch_size=1, lr={}, warmup_steps=warmup, decay_share=share, final_factor=0.1)
    assert [training.schedule(step) for step in range(steps)] == pytest.approx(factors)


def test_the_last_step_is_always_validated():
    training = Training(steps=7, batch_size=1, lr={}, validate_every=3)
    assert [step for step in range(1, 8) if training.validates_after(step)] == [3, 6, 7]
