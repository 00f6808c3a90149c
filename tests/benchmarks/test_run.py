"""One run in this process: what the arms share, and that a stop leaves no trace."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from bench_runs import steps_of, trained, with_arms

from benchmarks.experiment.arms import ARMS
from benchmarks.records import atomic_files, metrics
from benchmarks.records.folders import CHECKPOINT, METRICS, RESULT
from benchmarks.records.run_records import read_run
from benchmarks.training.run import Run
from muonclip.core.adam_defaults import ADAM_EPS


@pytest.fixture
def begin(corpus, tmp_path):
    """A run of one's own."""
    return lambda experiment, arm, seed=0, folder="run": Run(
        experiment, corpus, tmp_path / folder, experiment.arm(arm), seed
    )


@pytest.mark.parametrize("arm", ARMS)
def test_stopped_and_resumed_is_uninterrupted(every_arm, begin, run_of, tmp_path, arm):
    whole = run_of(every_arm, arm)
    trained(begin(every_arm, arm, 3), until=3)
    folder = tmp_path / "run"
    assert not (folder / RESULT).exists()
    with (folder / METRICS).open("a") as stream:  # as kill -9 leaves it: records after the checkpoint, one cut
        stream.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    parts = trained(begin(every_arm, arm, 3))
    assert steps_of(folder) == steps_of(whole.folder)
    assert len(steps_of(folder)) == every_arm.training.steps
    for name, weight in whole.learner.model.state_dict().items():
        torch.testing.assert_close(parts.learner.model.state_dict()[name], weight, rtol=0, atol=0)
    first, second = (json.loads((each / RESULT).read_text()) for each in (whole.folder, folder))
    assert first["final_val_loss"] == second["final_val_loss"]
    assert second["wall_seconds"] > second["train_seconds"] > 0


def test_arms_share_weights_and_batches_and_differ_in_the_clip(experiment, begin):
    first = {arm.name: begin(experiment, arm.name, folder=arm.name).step() for arm in experiment.arms}
    for key in ("loss", "grad_norm", "max_logits"):
        assert first["adamw"][key] == first["muon"][key] == first["muonclip"][key]
    assert first["adamw"]["clipped_heads"] == first["muon"]["clipped_heads"] == 0
    assert first["muonclip"]["clipped_heads"] > 0
    assert begin(experiment, "muon", 3, "seed").step()["loss"] != first["muon"]["loss"]


@pytest.mark.parametrize(("without", "clips"), [("adamw", "adamw-clip"), ("muon", "muonclip")])
def test_a_clip_changes_nothing_but_what_it_clips(every_arm, run_of, without, clips):
    quiet = with_arms(every_arm, without, clips, tau=1e9)
    same = [steps_of(run_of(quiet, arm).folder) for arm in (without, clips)]
    assert same[0] == same[1]
    clipped = steps_of(run_of(every_arm, clips).folder)
    assert clipped[0]["max_logits"] == same[0][0]["max_logits"]
    assert clipped[-1]["max_logits"] != same[0][-1]["max_logits"]


def test_rescue_is_muon_until_it_clips(every_arm, run_of):
    muon, rescue = (steps_of(run_of(every_arm, arm).folder) for arm in ("muon", "rescue"))
    for one, other in zip(muon[:4], rescue[:4], strict=True):
        assert other["max_logits"] == one["max_logits"]
        assert other["clipped_heads"] == 0
    assert rescue[4]["max_logits"] == muon[4]["max_logits"]  # seen before the fifth update
    assert rescue[4]["clipped_heads"] > 0
    assert rescue[5]["max_logits"] != muon[5]["max_logits"]


def test_per_head_orthogonalizes_the_heads_alone(every_arm, run_of):
    names = {f"layers.{i}.attn.{name}.weight" for i in (0, 1) for name in ("q_b_proj", "kv_b_proj")}
    layouts = {
        arm: {row.name: row.layout for row in run_of(every_arm, arm).learner.optimizer.plan.parameters}
        for arm in ("muonclip", "per-head", "per-head-pairs")
    }
    for arm, heads in (("per-head", 4), ("per-head-pairs", 2)):
        assert {name for name, layout in layouts[arm].items() if layout != layouts["muonclip"][name]} == names
        assert {heads} == {count for name in names for count in layouts[arm][name].heads}


def test_torchs_own_muon_updates_each_expert_and_leaves_the_rest_to_adamw(every_arm, begin):
    run = begin(every_arm, "torch-muon", folder="torch-muon")
    learner, training = run.learner, every_arm.training
    before = {name: each.detach().clone() for name, each in learner.model.named_parameters()}
    learner.step(run.corpus.batch(seed=0, step=0, batch_size=2, length=16), 0, 0.01)
    for name, after in learner.model.named_parameters():
        is_muons = after.ndim > 1 and name.startswith("layers.")
        parts = list(zip(before[name], after.grad, after, strict=True)) if after.ndim > 2 else []
        for weight, gradient, updated in parts or [(before[name], after.grad, after)]:
            alone = torch.nn.Parameter(weight.clone())
            alone.grad = gradient.clone()
            decay = training.weight_decay if after.ndim > 1 else 0.0
            if is_muons:
                torch.optim.Muon([alone], 0.01, decay, adjust_lr_fn="match_rms_adamw").step()
            else:
                torch.optim.AdamW([alone], 0.01, training.betas, ADAM_EPS, decay).step()
            assert not torch.equal(alone, weight), name
            assert torch.allclose(alone, updated, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(("arm", "changes"), [("qk-norm", {"qk_norm": True}), ("softcap", {"softcap": 0.02})])
def test_arms_that_change_the_model_share_its_weights(every_arm, begin, arm, changes):
    assert every_arm.arm(arm).changes == changes
    plain, changed = (begin(every_arm, name, 3, name) for name in ("muon", arm))
    assert asdict(changed.learner.model.config) == asdict(plain.learner.model.config) | changes
    weights, shared = changed.learner.model.state_dict(), plain.learner.model.state_dict()
    for name, weight in shared.items():
        assert torch.equal(weights[name], weight)
    assert all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in weights.keys() - shared.keys())
    first, other = changed.step(), plain.step()
    assert first["loss"] != other["loss"]
    assert first["clipped_heads"] == 0  # though all are above τ
    assert max(map(max, first["max_logits"].values())) > every_arm.training.tau


@pytest.mark.parametrize("arm", ARMS)
def test_clipped_heads_are_those_above_tau(every_arm, run_of, arm):
    records = read_run(run_of(every_arm, arm).folder)
    clipped = records.steps["clipped_heads"].tolist()
    assert records.clipped(every_arm.training.tau).sum(axis=1).tolist() == clipped
    clips = ARMS[arm].clips
    assert any(0 < heads < 8 for heads in clipped) == clips  # some above τ, some not
    assert any(clipped) == clips


def test_adamw_decays_matrices_and_embeddings_alone(experiment, begin):
    learner = begin(experiment, "adamw").learner
    decays = {id(p): group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
    expected = {name: experiment.training.weight_decay * (p.ndim > 1) for name, p in learner.model.named_parameters()}
    assert {name: decays[id(p)] for name, p in learner.model.named_parameters()} == expected


def test_rates_follow_the_schedule(experiment, run_of):
    run = run_of(experiment, "muonclip")
    assert [record["lr"] for record in steps_of(run.folder)] == [0.015] + [0.03] * 7
    assert {group["lr"] for group in run.learner.optimizer.param_groups} == {0.03}


def test_the_adamw_half_follows_a_rate_of_its_own(experiment, begin):
    name = "muonclip@lr=0.02@adamw_lr=0.005@steps=4"
    run = trained(begin(with_arms(experiment, name), name))
    assert {(group["use"], group["lr"]) for group in run.learner.optimizer.param_groups} == {
        ("muon", 0.02),
        ("adamw", 0.005),
    }


def test_a_run_follows_the_settings_of_its_arm(experiment, begin):
    name = "muon@attention=gqa@lr=0.5@weight_decay=0@steps=4"
    run = trained(begin(with_arms(experiment, name), name))
    assert run.finished
    assert [record["lr"] for record in steps_of(run.folder)] == [0.25, 0.5, 0.5, 0.5]
    assert run.learner.model.config.attention == "gqa"
    assert {group["weight_decay"] for group in run.learner.optimizer.param_groups} == {0.0}


def test_a_threshold_of_its_own(experiment, begin):
    names = ("muonclip@tau=0.02", "muonclip@tau=1e+09")
    clipped = [begin(with_arms(experiment, name), name, folder=name).step()["clipped_heads"] for name in names]
    assert clipped[0] > 0 == clipped[1]


def test_a_run_that_diverges_ends_there(experiment, begin, tmp_path):
    run = trained(begin(experiment, "muon"), until=2)
    with torch.no_grad():
        run.learner.model.norm.weight.fill_(math.inf)
    run.save()
    trained(begin(experiment, "muon"))
    assert begin(experiment, "muon").finished
    assert len(steps_of(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / RESULT).read_text()) | {"wall_seconds": 0, "train_seconds": 0} == {
        "steps": 3, "diverged": True, "final_val_loss": "nan", "wall_seconds": 0, "train_seconds": 0,
    }  # fmt: skip


def test_a_checkpoint_is_replaced_whole(tmp_path):
    path = tmp_path / CHECKPOINT
    atomic_files.save(path, {"done": 1, "model": {"w": torch.ones(3)}})

    class Unsaveable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_files.save(path, {"done": 2, "model": Unsaveable()})
    state = atomic_files.load(path, "cpu")
    assert state is not None
    assert state["done"] == 1


def test_bfloat16_is_used_where_it_is_decided(experiment, begin):
    narrow = replace(experiment, precision=replace(experiment.precision, autocast="bfloat16"))
    wide = begin(experiment, "adamw").step()["loss"]
    rounded = begin(narrow, "adamw", folder="narrow").step()["loss"]
    assert wide != rounded
    assert rounded == pytest.approx(wide, rel=0.02)


def test_measuring_changes_nothing(experiment, run_of):
    weights = {}
    for every in (1, 8):
        often = with_arms(experiment, "muonclip", validate_every=every)
        weights[every] = run_of(often, "muonclip").learner.model.state_dict()
    for name, weight in weights[1].items():
        assert torch.equal(weights[8][name], weight)


def test_records_hold_measurements_where_validation_is_due(experiment, run_of):
    plain = with_arms(experiment, "muon", weight_decay=0.0)
    records = metrics.read(run_of(plain, "muon").folder / METRICS)
    assert [record["step"] for record in records if "update_rms" in record] == [4, 8]
    assert [record["step"] for record in records if "val_loss" in record] == [4, 8]
    for field in ("attention_entropy", "query_norms", "key_norms"):
        heads = {name: len(values) for name, values in records[3][field].items()}
        assert heads == {"layers.0.attn": 4, "layers.1.attn": 4}
    assert 0.1 < records[3]["update_rms"] < 0.25  # Muon's update has the RMS of AdamW's, 0.2 and less where rank lacks
    even = sum(math.log(n) for n in range(1, experiment.model.max_seq_len + 1)) / experiment.model.max_seq_len
    assert all(0 < value <= even for heads in records[3]["attention_entropy"].values() for value in heads)
