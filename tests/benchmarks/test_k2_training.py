"""The study of training as Kimi K2 and K2 Thinking were."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.experiment.arms import choices
from benchmarks.experiment.experiment import Experiment
from benchmarks.studies import k2_training
from muonclip.models.int4 import round_to_int4

MADE = {"command": "python -m benchmarks k2-training", "date": "2026-12-01T00:00:00", "muonclip": "0.1.0"}


@pytest.fixture
def protocol(corpus, experiment):
    own = {"chosen": choices("muonclip", "int4-experts"), "model": experiment.model}
    lr = {"muonclip": 1e-2, "int4-experts": 1e-2}
    return Experiment.on(corpus, name="", title="", seeds=(3,), training=replace(experiment.training, lr=lr), **own)


def test_ways_share_weights_and_batches_and_rounding_late_goes_on_from_the_state(protocol, corpus, monkeypatch):
    def what_is_judged(learner, corpus):
        return learner.model.config.expert_weight_bits, copy.deepcopy(learner.model.state_dict())

    monkeypatch.setattr(k2_training, "validation_loss", what_is_judged)
    found = k2_training.losses(protocol, corpus, 3)
    assert found.keys() == k2_training.WAYS.keys()
    assert {way: bits for way, (bits, _) in found.items() if bits} == {"int4": 4, "int4-late": 4, "rounded": 4}

    def trained(*stages):
        """A stage goes on from the state of the one before it, after a save and a load."""
        learner, done = None, 0
        for arm, stop in stages:
            before, learner = learner, k2_training.begin(protocol, arm, 3)
            if before is not None:
                learner.restore(copy.deepcopy(before.state()))
            k2_training.train(learner, corpus, 3, range(done, stop))
            done = stop
        return learner.model.state_dict()

    expected = {
        "plain": trained(("muonclip", 8)),  # undisturbed by what goes on from it
        "int4": trained(("int4-experts", 8)),
        "int4-late": trained(("muonclip", 6), ("int4-experts", 8)),  # 80 %, rounded
    }
    for way, weights in (expected | {"rounded": expected["plain"]}).items():
        assert all(torch.equal(weight, found[way][1][name]) for name, weight in weights.items()), way


def test_the_loss_of_a_way_that_rounds_is_that_of_rounded_weights(protocol, corpus):
    learner = k2_training.begin(protocol, "int4-experts", 3)
    plain = k2_training.begin(protocol, "muonclip", 3)
    with torch.no_grad():
        for name, weight in plain.model.named_parameters():
            if ".mlp.experts." in name:
                weight.copy_(round_to_int4(weight, torch))
    assert k2_training.validation_loss(learner, corpus) == k2_training.validation_loss(plain, corpus)


def test_differences_are_of_the_same_seed():
    rows = [
        {"way": way, "seed": seed, "loss": loss + above}
        for way, above in (("plain", 0.0), ("int4", 0.1))
        for seed, loss in {0: 2.0, 1: 3.0, 2: 7.0}.items()
    ]
    figures = {"rows": rows, "training": {"steps": 2, "lr": 0.005, "batch_size": 4}, "environment": MADE}
    text = k2_training.table(figures | {"memory": {"nothing computed again": 4 * 2**20, "other": 2**20}})
    assert "| `expert_weight_bits=4` | 4.100 | +0.100 (+0.100 to +0.100) | higher |" in text
    assert "| other | 1 MiB | 25% |" in text


@pytest.mark.slow
def test_each_way_is_trained_and_its_bytes_counted(tmp_path, capsys):
    main(["k2-training", "--quick", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "k2_training.json").read_text(encoding="utf-8"))
    assert [row["way"] for row in figures["rows"]] == [*k2_training.WAYS] * 2
    assert len({row["loss"] for row in figures["rows"]}) == len(figures["rows"])
    whole, again, float8 = figures["memory"].values()
    assert again < float8 < whole
    assert (tmp_path / "k2_training.md").read_text(encoding="utf-8") in capsys.readouterr().out
