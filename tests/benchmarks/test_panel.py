"""A panel is recognised by its JSON, and what differs is named."""

import json
from dataclasses import replace

import pytest

from benchmarks.experiment.experiment import Panel, Training, differences


def test_json_gives_the_panel_back(panel):
    text = json.dumps(panel.to_json())
    assert Panel.from_json(json.loads(text)) == panel
    assert differences(json.loads(text), panel.to_json()) == []


def test_differences_are_named(panel):
    other = replace(panel, seeds=(0,), training=replace(panel.training, tau=5.0, lr={"muon": 0.1}))
    assert differences(panel.to_json(), other.to_json()) == [
        "seeds: recorded [0, 3], asked for [0]",
        "training.lr.adamw: recorded 0.001, asked for nothing",
        "training.lr.muon: recorded 0.03, asked for 0.1",
        "training.lr.muonclip: recorded 0.03, asked for nothing",
        "training.tau: recorded 0.02, asked for 5.0",
    ]


@pytest.mark.parametrize(
    ("steps", "warmup", "share", "factors"),
    [
        (4, 2, 0.0, [0.5, 1, 1, 1]),
        (4, 0, 0.5, [1, 1, 1, 0.55]),
        (2, 30, 1.0, [0.5, 1]),
    ],
)
def test_schedule_fits_the_steps(steps, warmup, share, factors):
    training = Training(steps=steps, batch_size=1, lr={}, warmup_steps=warmup, decay_share=share, final_factor=0.1)
    assert [training.schedule(step) for step in range(steps)] == pytest.approx(factors)


def test_the_last_step_is_always_validated():
    training = Training(steps=7, batch_size=1, lr={}, validate_every=3)
    assert [step for step in range(1, 8) if training.validates_after(step)] == [3, 6, 7]
