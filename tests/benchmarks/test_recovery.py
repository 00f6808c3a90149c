"""What a run under torchrun survives: damaged checkpoints, other numbers of ranks, kill -9, a rank that hangs."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
from bench_runs import steps_of

from benchmarks.execution import ranks, sharded_checkpoints
from benchmarks.execution.processes import kill_session
from benchmarks.execution.rank_runs import Team
from benchmarks.execution.ranks import PIDS, Ranks
from benchmarks.execution.sharded_checkpoints import MANIFEST, STATE, ShardedCheckpoints
from benchmarks.experiment.errors import UsageError
from benchmarks.records.folders import CHECKPOINTS, LOG, METRICS, RESULT, STARTS, run_folder
from benchmarks.studies import kill_trials
from benchmarks.training import sharded_learner
from benchmarks.training.run import Schedule
from benchmarks.training.sharded_learner import Layout

# Of torch.distributed.checkpoint and DTensor themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support"),
]


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 60.0)
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def tensors(value):
    return {"model.w": torch.full((3, 2), float(value)), "optimizer.w.step": torch.tensor(float(value))}


def loaded(checkpoints):
    found, problems = checkpoints.find()
    if found is None:
        return None, problems
    into = tensors(0)
    checkpoints.load(found, into)
    assert torch.equal(into["model.w"], tensors(checkpoints.state(found)["done"])["model.w"])
    return checkpoints.state(found)["done"], problems


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, tensors(step), {"done": step})
    checkpoints.finish()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_two_are_kept(alone, folder, asynchronous):
    checkpoints = ShardedCheckpoints(folder, alone, asynchronous=asynchronous)
    assert loaded(checkpoints) == (None, [])
    save(checkpoints, 2, 4, 6)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000004", "step-000000006"]
    assert loaded(checkpoints) == (6, [])
    files = json.loads((folder / "step-000000006" / MANIFEST).read_text())["files"]
    assert set(files) | {MANIFEST} == {path.name for path in (folder / "step-000000006").iterdir()}


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", STATE])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "bytes, .* were written"),
        (flip, "has SHA-256 .*, written was"),
        (remove, "cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_and_named(alone, folder, file, harm, words):
    checkpoints = ShardedCheckpoints(folder, alone)
    save(checkpoints, 2, 4)
    harm(folder / "step-000000004" / file)
    step, (problem,) = loaded(checkpoints)
    assert step == 2
    assert problem.startswith(str(folder / "step-000000004" / file))
    assert re.search(words, problem)
    assert (folder / "step-000000004.damaged").exists()
    save(checkpoints, 4)
    assert loaded(checkpoints) == (4, [])


@pytest.mark.parametrize(("harm", "said"), [(cut, 1), (remove, 0)])  # without a manifest it is none
def test_a_damaged_manifest(alone, folder, harm, said):
    checkpoints = ShardedCheckpoints(folder, alone)
    save(checkpoints, 2, 4)
    harm(folder / "step-000000004" / MANIFEST)
    step, problems = loaded(checkpoints)
    assert step == 2
    assert ["manifest.json cannot be read" in problem for problem in problems] == [True] * said


def test_an_asynchronous_save_that_fails_ends_the_rank(alone, folder, monkeypatch):
    ended = []
    monkeypatch.setattr(sharded_checkpoints, "end", ended.append)
    checkpoints = ShardedCheckpoints(folder, alone, asynchronous=True)
    save(checkpoints, 2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    save(checkpoints, 4)
    assert "No space left on device" in ended[0]
    assert loaded(checkpoints) == (2, [])


def test_what_was_left_half_written_is_no_checkpoint(alone, folder):
    checkpoints = ShardedCheckpoints(folder, alone)
    save(checkpoints, 2)
    shutil.copytree(folder / "step-000000002", folder / "step-000000004.tmp")
    assert loaded(checkpoints) == (2, [])
    save(checkpoints, 6)
    assert not (folder / "step-000000004.tmp").exists()


def train(experiment, corpus, folder, arm, ranks, until=None, asynchronous=False):
    run = Team(ranks, Layout(), asynchronous).run(experiment, corpus, folder, experiment.arm(arm), 3)
    run.train(stopping=lambda: run.done == until, checkpoints=Schedule(steps=2))
    return run


@pytest.mark.parametrize("arm", ["adamw", "muonclip"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_resumed_is_uninterrupted(alone, experiment, corpus, tmp_path, arm, asynchronous):
    train(experiment, corpus, tmp_path / "whole", arm, alone)
    parts = tmp_path / "parts"
    train(experiment, corpus, parts, arm, alone, until=5, asynchronous=asynchronous)
    assert not (parts / RESULT).exists()
    flip(parts / "checkpoints" / "step-000000005" / "__0_0.distcp")
    train(experiment, corpus, parts, arm, alone, asynchronous=asynchronous)
    assert steps_of(parts) == steps_of(tmp_path / "whole")
    starts = [json.loads(line) for line in (parts / STARTS).read_text().splitlines()]
    assert [start["resumed_from"] for start in starts] == [0, 4]
    assert "step-000000005/__0_0.distcp has SHA-256" in starts[1]["damaged"][0]
    log = (parts / LOG).read_text()
    assert "damaged: " in log
    assert f"goes on from {parts}/checkpoints/step-000000004" in log


def test_without_a_whole_checkpoint_it_starts_again_and_says_so(alone, experiment, corpus, tmp_path, capsys):
    train(experiment, corpus, tmp_path, "adamw", alone, until=4)
    whole = steps_of(tmp_path)
    for file in tmp_path.glob("checkpoints/step-*/__0_0.distcp"):
        cut(file)
    train(experiment, corpus, tmp_path, "adamw", alone, until=4)
    assert steps_of(tmp_path) == whole
    assert "starts from the beginning: no checkpoint is left" in capsys.readouterr().err


def test_without_its_records_a_checkpoint_is_put_aside(alone, experiment, corpus, tmp_path, capsys):
    train(experiment, corpus, tmp_path, "adamw", alone, until=4)
    whole = steps_of(tmp_path)
    (tmp_path / METRICS).write_text("")
    train(experiment, corpus, tmp_path, "adamw", alone, until=2)
    assert "is put aside" in capsys.readouterr().err
    train(experiment, corpus, tmp_path, "adamw", alone, until=4)
    assert steps_of(tmp_path) == whole
    starts = [json.loads(line)["resumed_from"] for line in (tmp_path / STARTS).read_text().splitlines()]
    assert starts == [0, 0, 2]


def test_one_rank_trains_as_one_process(alone, experiment, corpus, run_of, tmp_path):
    train(experiment, corpus, tmp_path, "muonclip", alone)
    for one, other in zip(steps_of(tmp_path), steps_of(run_of(experiment, "muonclip").folder), strict=True):
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["clipped_heads"] == other["clipped_heads"]
    result = json.loads((tmp_path / RESULT).read_text())
    assert (result["world_size"], result["layout"]) == (1, Layout().to_json())


def test_large_models_are_not_gathered(alone, experiment, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_learner, "LARGEST_MEASURED", 0)
    monkeypatch.setattr(sharded_learner, "LARGEST_COPIED", 0)
    run = train(experiment, corpus, tmp_path, "muonclip", alone)
    monkeypatch.setattr(run.learner, "reference", pytest.fail)
    last = steps_of(tmp_path)[-1]
    assert "val_loss" in last
    assert "update_rms" not in last
    assert last["loss"] < steps_of(tmp_path)[0]["loss"]


def test_what_is_wrong_on_one_rank_is_told_on_all(alone, monkeypatch):
    def missing():
        raise UsageError("--data", "tokens.u32 does not exist.")

    assert alone.on_each(lambda: 3) == 3
    with pytest.raises(UsageError, match=r"does not exist\. \(rank 0\)"):
        alone.on_each(missing)
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value, UsageError("--data", "no such file.")])
    with pytest.raises(UsageError, match=r"no such file\. \(rank 1\)"):
        alone.on_each(lambda: 3)


def test_messages_of_lost_ranks():
    third = Ranks(3, 8, 10.0)
    late = ranks.lost_message(RuntimeError("[gloo] Timed out waiting 10000ms for recv operation"), third)
    assert late is not None
    assert late.startswith("rank 3 of 8")
    assert "a collective timed out after 10 s: one of the ranks hangs or died" in late
    assert "torchrun ends the others and, with --max-restarts, starts all of them again from the newest" in late
    gone = ranks.lost_message(RuntimeError("Connection closed by peer [127.0.0.1]:1"), third)
    assert gone is not None
    assert "lost its peer" in gone
    assert ranks.lost_message(RuntimeError("size mismatch"), third) is None
    assert ranks.lost_message(ValueError("timed out"), third) is None


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--async-checkpoints", "--experts", "2")], ids=["", "asynchronous, experts 2"])
def test_kill_trials(tmp_path, more):
    lines = list(kill_trials.lines(tmp_path, 3, 2, "muonclip", 1, *more, all_ranks=bool(more)))
    for line in lines:
        assert line["equal"], line
        assert line["restarts"] == 1
    assert {line["what"] for line in lines} == {"after step", "during save"}
    assert {len(line["ranks"]) for line in lines} == ({1, 2} if more else {1})


def test_the_state_of_a_run_is_told_apart_by_a_bit(alone, tmp_path):
    def digest(value):
        out = tmp_path / str(value)
        kept = ShardedCheckpoints(run_folder(out, "muonclip", 0) / CHECKPOINTS, alone)
        kept.save(3, {"model.w": torch.zeros(2)}, {})
        kept.save(6, {"model.w": torch.tensor([1.0, value])}, {})
        return kill_trials.state(out, "muonclip")

    assert kill_trials.state(tmp_path / "nothing", "muonclip") is None
    assert digest(1.0) != digest(1.0 + 2**-23)
    assert digest(1.0) == digest(1.0)


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_and_the_run_goes_on(tmp_path):
    out = tmp_path / "out"
    process = kill_trials.start(tmp_path, out, 2, "adamw", "--collective-timeout", "10", "--steps", "40")
    try:
        deadline = time.monotonic() + kill_trials.PATIENCE
        while not (folder := out / "runs" / "adamw-0" / METRICS).exists() or folder.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(json.loads((out / PIDS / "1.json").read_text())["pid"], signal.SIGSTOP)
        kill_trials.finish(process)
    finally:
        kill_session(process)
    said = out.with_suffix(".log").read_text()
    assert "rank 0 of 2" in said
    assert "a collective timed out after 10 s: one of the ranks hangs or died" in said
    starts = [json.loads(line) for line in (out / "runs" / "adamw-0" / STARTS).read_text().splitlines()]
    assert starts[-1]["restart"] >= 1
    assert starts[-1]["resumed_from"] >= 3
    assert len(kill_trials.records(out, "adamw")) == 40


@pytest.mark.slow
def test_on_other_numbers_of_ranks(tmp_path):
    """4 → 2 → 8 ranks: within 1e-4 of the loss of 4 ranks throughout."""
    kill_trials.finish(kill_trials.start(tmp_path, tmp_path / "whole", 4, "muonclip", "--batch", "8"))
    out, told = tmp_path / "out", []
    for processes, until in ((4, 4), (2, 8), (8, None)):
        process = kill_trials.start(tmp_path, out, processes, "muonclip", "--batch", "8")
        try:
            while until and kill_trials.recorded(out, "muonclip") < until:
                assert process.poll() is None
                time.sleep(0.002)
            if until:
                process.send_signal(signal.SIGTERM)
                process.wait(kill_trials.PATIENCE)
            else:
                kill_trials.finish(process)
        finally:
            kill_session(process)
    told = [json.loads(line) for line in (out / "runs" / "muonclip-0" / STARTS).read_text().splitlines()]
    assert [start["world_size"] for start in told] == [4, 2, 8]
    assert 0 < told[1]["resumed_from"] < told[2]["resumed_from"]
    whole, parts = (kill_trials.records(folder, "muonclip") for folder in (tmp_path / "whole", out))
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_oldest_is_removed_so_that_a_cut_leaves_no_ruin(alone, folder, monkeypatch):
    checkpoints = ShardedCheckpoints(folder, alone)
    save(checkpoints, 2, 4)
    monkeypatch.setattr(sharded_checkpoints.shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed there
    save(checkpoints, 6)
    assert not (folder / "step-000000002" / MANIFEST).exists()
    assert loaded(checkpoints) == (6, [])
