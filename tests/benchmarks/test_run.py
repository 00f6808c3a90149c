"""One run in this process: what the arms share, and that a stop leaves no trace."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import checkpoint, metrics
from benchmarks.train import CHECKPOINT, METRICS, RESULT, Run


def train(run, stop_after=None):
    run.train(lambda record: None, lambda: run.done == stop_after)
    return run


def losses(folder):
    timing = ("tokens_per_second",)
    return [{k: v for k, v in record.items() if k not in timing} for record in metrics.read(folder / METRICS)]


@pytest.mark.parametrize("arm", ["adamw", "muon", "muonclip"])
def test_stopped_and_resumed_is_uninterrupted(panel, corpus, tmp_path, arm):
    whole = train(Run(panel, corpus, tmp_path / "whole", arm, 3))
    train(Run(panel, corpus, tmp_path / "parts", arm, 3), stop_after=3)
    assert not (tmp_path / "parts" / RESULT).exists()
    with (tmp_path / "parts" / METRICS).open(
        "a"
    ) as stream:  # as kill -9 leaves it: records after the checkpoint, one cut
        stream.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    parts = train(Run(panel, corpus, tmp_path / "parts", arm, 3))

    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == panel.training.steps
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], weight, rtol=0, atol=0)
    first, second = (json.loads((tmp_path / name / RESULT).read_text()) for name in ("whole", "parts"))
    assert first["final_val_loss"] == second["final_val_loss"]
    assert second["wall_seconds"] > second["train_seconds"] > 0


def test_arms_share_weights_and_batches_and_differ_in_the_clip(panel, corpus, tmp_path):
    runs = {arm: Run(panel, corpus, tmp_path / arm, arm, 0) for arm in panel.arms}
    first = {arm: run.step() for arm, run in runs.items()}
    for key in ("loss", "grad_norm", "max_logits"):
        assert first["adamw"][key] == first["muon"][key] == first["muonclip"][key]
    assert first["adamw"]["clipped_heads"] == first["muon"]["clipped_heads"] == 0
    assert first["muonclip"]["clipped_heads"] > 0
    assert Run(panel, corpus, tmp_path / "seed", "muon", 3).step()["loss"] != first["muon"]["loss"]


def test_adamw_decays_matrices_and_embeddings_alone(panel, corpus, tmp_path):
    run = Run(panel, corpus, tmp_path, "adamw", 0)
    decays = {id(p): group["weight_decay"] for group in run.update.optimizer.param_groups for p in group["params"]}
    expected = {name: panel.training.weight_decay * (p.ndim > 1) for name, p in run.model.named_parameters()}
    assert {name: decays[id(p)] for name, p in run.model.named_parameters()} == expected


def test_rates_follow_the_schedule(panel, corpus, tmp_path):
    run = train(Run(panel, corpus, tmp_path, "muonclip", 0))
    assert [record["lr"] for record in metrics.read(tmp_path / METRICS)] == [0.015] + [0.03] * 7
    assert {group["lr"] for group in run.update.optimizer.param_groups} == {0.03}


def test_a_run_that_diverges_ends_there(panel, corpus, tmp_path):
    run = Run(panel, corpus, tmp_path, "muon", 0)
    train(run, stop_after=2)
    with torch.no_grad():
        run.model.norm.weight.fill_(math.inf)
    run.save()
    train(Run(panel, corpus, tmp_path, "muon", 0))
    again = Run(panel, corpus, tmp_path, "muon", 0)
    assert again.finished
    assert len(losses(tmp_path)) == 3
    assert json.loads((tmp_path / RESULT).read_text()) | {"wall_seconds": 0, "train_seconds": 0} == {
        "steps": 3, "diverged": True, "final_val_loss": "nan", "wall_seconds": 0, "train_seconds": 0,
    }  # fmt: skip


def test_a_checkpoint_is_replaced_whole(tmp_path):
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, {"done": 1, "model": {"w": torch.ones(3)}})

    class Unsaveable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"done": 2, "model": Unsaveable()})
    state = checkpoint.load(path, "cpu")
    assert state is not None
    assert state["done"] == 1


def test_bfloat16_is_used_where_it_is_decided(panel, corpus, tmp_path):
    narrow = replace(panel, precision=replace(panel.precision, autocast="bfloat16"))
    wide = Run(panel, corpus, tmp_path / "wide", "adamw", 0).step()["loss"]
    rounded = Run(narrow, corpus, tmp_path / "narrow", "adamw", 0).step()["loss"]
    assert wide != rounded
    assert rounded == pytest.approx(wide, rel=0.02)
