"""Trials: their losses are those of the harness, and a stop loses nothing."""

import json
import math
from dataclasses import replace

import pytest
from bench_runs import trained

from benchmarks.experiment.arms import choices
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.errors import DamagedFile, UsageError
from benchmarks.records.summary import bits
from benchmarks.studies.trials import Trials
from benchmarks.training.run import Run


@pytest.fixture(scope="module")
def text():
    return open_corpus()


@pytest.fixture
def protocol(experiment, text):
    training = replace(experiment.training, lr={}, steps=3)
    return replace(experiment, name="", title="", chosen=(), seeds=(), training=training, data=text.record())


def test_a_trial_ends_as_a_run_of_the_harness_does(protocol, text, tmp_path):
    name = "muonclip@lr=0.02@adamw_lr=0.005"
    losses = Trials(protocol, tmp_path / "trials.jsonl").losses([name], (3,))
    whole = replace(protocol, chosen=choices(name), seeds=(3,))
    run = trained(Run(whole, text, tmp_path / "run", whole.arm(name), 3))
    assert losses == {name: [bits(run.last["val_loss"])]}


def test_what_is_trained_is_not_trained_again_and_a_cut_line_is(protocol, tmp_path):
    path, arms = tmp_path / "trials.jsonl", ["adamw@lr=0.01", "torch-muon@lr=0.01"]
    whole = Trials(protocol, path).losses(arms, (0, 1))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert [(row["arm"], row["seed"]) for row in map(json.loads, lines[1:])] == [(a, s) for s in (0, 1) for a in arms]
    assert len({loss for losses in whole.values() for loss in losses}) == 4
    path.write_text("".join(lines[:3]) + lines[3][:40], encoding="utf-8")  # as kill -9 leaves it
    again = Trials(protocol, path)
    assert len(again.rows) == 2
    again.rows[0]["loss"] = 7.0  # which training anew would not give
    losses = again.losses(arms, (0, 1))
    assert losses == whole | {"adamw@lr=0.01": [7.0, whole["adamw@lr=0.01"][1]]}
    after = path.read_text(encoding="utf-8").splitlines()
    timeless = [[json.loads(line) | {"seconds": 0} for line in of[1:]] for of in (lines, after)]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_two_processes_leave_the_same_rows(protocol, tmp_path):
    arms = ["adamw@lr=0.01", "muonclip@lr=0.01"]
    one, two = (Trials(protocol, tmp_path / str(jobs), jobs).losses(arms, (0, 1)) for jobs in (1, 2))
    assert one == two


def test_a_run_that_diverges_has_an_infinite_loss(protocol, tmp_path):
    trials = Trials(protocol, tmp_path / "trials.jsonl")
    assert trials.losses(["adamw@lr=1e+30"], (0,)) == {"adamw@lr=1e+30": [math.inf]}
    assert Trials(protocol, tmp_path / "trials.jsonl").losses(["adamw@lr=1e+30"], (0,)) == {
        "adamw@lr=1e+30": [math.inf]
    }


def test_rows_of_another_protocol_and_other_files_are_refused(protocol, tmp_path):
    path = tmp_path / "trials.jsonl"
    Trials(protocol, path)
    other = replace(protocol, training=replace(protocol.training, batch_size=5))
    with pytest.raises(UsageError, match=r"another protocol.*\n.*batch_size: recorded 2, asked for 5"):
        Trials(other, path)
    path.write_text('{"arm": "adamw"}\n', encoding="utf-8")
    with pytest.raises(DamagedFile, match="first line"):
        Trials(protocol, path)
