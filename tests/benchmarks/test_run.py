"""One run in this process: what the arms share, and that a stop leaves no trace."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.experiment.arms import ARMS, model_changes
from benchmarks.records import atomic_files as checkpoint
from benchmarks.records import metrics
from benchmarks.records.summary import ever_clipped
from benchmarks.training.run import CHECKPOINT, METRICS, RESULT, Run


def train(run, stop_after=None):
    run.train(lambda record: None, lambda: run.done == stop_after)
    return run


def losses(folder):
    timing = ("tokens_per_second",)
    return [{k: v for k, v in record.items() if k not in timing} for record in metrics.read(folder / METRICS)]


@pytest.mark.parametrize("arm", ARMS)
def test_stopped_and_resumed_is_uninterrupted(every_arm, corpus, tmp_path, arm):
    panel = every_arm
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
    for name, weight in whole.learner.model.state_dict().items():
        torch.testing.assert_close(parts.learner.model.state_dict()[name], weight, rtol=0, atol=0)
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


def test_arms_that_clip_differ_from_those_that_do_not_in_the_clip_alone(every_arm, corpus, tmp_path):
    quiet = replace(every_arm, training=replace(every_arm.training, tau=1e9))
    for without, with_clip in (("adamw", "adamw-clip"), ("muon", "muonclip")):
        same = [losses_of(quiet, corpus, tmp_path / f"quiet-{arm}", arm) for arm in (without, with_clip)]
        assert same[0] == same[1]
        clipped = losses_of(every_arm, corpus, tmp_path / with_clip, with_clip)
        assert clipped[0]["max_logits"] == same[0][0]["max_logits"]
        assert clipped[-1]["max_logits"] != same[0][-1]["max_logits"]


def losses_of(panel, corpus, folder, arm):
    train(Run(panel, corpus, folder, arm, 0))
    return losses(folder)


def test_per_head_orthogonalizes_the_heads_alone(every_arm, corpus, tmp_path):
    layouts = {}
    for arm in ("muonclip", "per-head"):
        run = Run(every_arm, corpus, tmp_path / arm, arm, 0)
        layouts[arm] = {row.name: row.layout for row in run.learner.optimizer.plan.parameters}
    different = {name for name, layout in layouts["per-head"].items() if layout != layouts["muonclip"][name]}
    assert different == {f"layers.{i}.attn.{name}.weight" for i in (0, 1) for name in ("q_b_proj", "kv_b_proj")}


@pytest.mark.parametrize(("arm", "changes"), [("qk-norm", {"qk_norm": True}), ("softcap", {"softcap": 0.02})])
def test_arms_that_change_the_model_share_its_weights(every_arm, corpus, tmp_path, arm, changes):
    assert model_changes(every_arm, arm) == changes
    plain, changed = (Run(every_arm, corpus, tmp_path / name, name, 3) for name in ("muon", arm))
    assert asdict(changed.learner.model.config) == asdict(plain.learner.model.config) | changes
    weights, shared = changed.learner.model.state_dict(), plain.learner.model.state_dict()
    for name, weight in shared.items():
        assert torch.equal(weights[name], weight)
    assert all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in weights.keys() - shared.keys())
    first, other = changed.step(), plain.step()
    assert first["loss"] != other["loss"]
    assert first["clipped_heads"] == 0  # though all are above τ
    assert max(map(max, first["max_logits"].values())) > every_arm.training.tau


def test_the_other_arms_keep_the_model(every_arm):
    assert [arm for arm in every_arm.arms if not model_changes(every_arm, arm)] == [
        "adamw", "muon", "muonclip", "rescue", "per-head", "adamw-clip",
    ]  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_clipped_heads_are_those_above_tau(every_arm, corpus, tmp_path, arm):
    records = losses_of(every_arm, corpus, tmp_path, arm)
    clipped = [record["clipped_heads"] for record in records]
    assert [len(ever_clipped([record], every_arm.training.tau)) for record in records] == clipped
    clips = arm in ("muonclip", "rescue", "per-head", "adamw-clip")
    assert any(0 < heads < 8 for heads in clipped) == clips  # some above τ, some not
    assert any(clipped) == clips


def test_adamw_decays_matrices_and_embeddings_alone(panel, corpus, tmp_path):
    run = Run(panel, corpus, tmp_path, "adamw", 0)
    decays = {id(p): group["weight_decay"] for group in run.learner.optimizer.param_groups for p in group["params"]}
    expected = {name: panel.training.weight_decay * (p.ndim > 1) for name, p in run.learner.model.named_parameters()}
    assert {name: decays[id(p)] for name, p in run.learner.model.named_parameters()} == expected


def test_rates_follow_the_schedule(panel, corpus, tmp_path):
    run = train(Run(panel, corpus, tmp_path, "muonclip", 0))
    assert [record["lr"] for record in metrics.read(tmp_path / METRICS)] == [0.015] + [0.03] * 7
    assert {group["lr"] for group in run.learner.optimizer.param_groups} == {0.03}


def test_a_run_that_diverges_ends_there(panel, corpus, tmp_path):
    run = Run(panel, corpus, tmp_path, "muon", 0)
    train(run, stop_after=2)
    with torch.no_grad():
        run.learner.model.norm.weight.fill_(math.inf)
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
