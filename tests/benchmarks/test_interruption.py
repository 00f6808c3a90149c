"""The whole command on real text: killed or interrupted midway, it ends bit for bit where it would have ended."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_runs import steps_of

from benchmarks import commands
from benchmarks.__main__ import main
from benchmarks.execution.workers import locked
from benchmarks.experiment.errors import UsageError
from benchmarks.records import atomic_files
from benchmarks.records.folders import CHECKPOINT, METRICS
from benchmarks.records.summary import RunSummary

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("muon", "muonclip")
STEPS = 120
PATIENCE = 900.0  # seconds: more than ten times what anything here takes, XLA's compilation included


@pytest.fixture(scope="module", autouse=True)
def _commands_hear_ctrl_c():
    """A shell starts its background jobs, and so these tests, with SIGINT ignored, which commands would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """JAX's commands find what the first one has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module", params=["torch", "jax"])
def framework(request):
    return request.param


def start(out, framework, *more):
    options = (
        f"--seeds 0 --steps {STEPS} --batch 2 --tau 0.5 --jobs 2 --precision fp32 --checkpoint-seconds 0.3".split()
    )
    command = [sys.executable, "-m", "benchmarks", "explosion", "--framework", framework, "--arms", ",".join(ARMS)]
    return subprocess.Popen(
        [*command, *options, "--out", out, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output


def wait_for_the_middle(out, process):
    def in_the_middle(folder):
        return (folder / CHECKPOINT).exists() and (folder / METRICS).read_text().count("\n") >= 20

    deadline = time.monotonic() + PATIENCE
    while not all(in_the_middle(out / "runs" / f"{arm}-0") for arm in ARMS):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def numbers(out, arm):
    return steps_of(out / "runs" / f"{arm}-0")


def assert_same_bits(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_bits(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_bits(one, other)
    else:
        assert first == second


@pytest.fixture(scope="module")
def uninterrupted(framework, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(start(out, framework))
    return out


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


def interrupt(process):
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130
    assert "The same command goes on from here." in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("stop", [kill, interrupt])
def test_stopped_in_the_middle_and_started_again(stop, framework, uninterrupted, tmp_path):
    process = start(tmp_path, framework)
    wait_for_the_middle(tmp_path, process)
    stop(process)
    with locked(tmp_path):  # free only when no worker is left
        done = {arm: len(numbers(tmp_path, arm)) for arm in ARMS} if stop is interrupt else {}
    reached = []
    for arm in ARMS:
        state = atomic_files.load(tmp_path / "runs" / f"{arm}-0" / CHECKPOINT, "cpu")
        assert state is not None
        reached.append(state["done"])
        assert state["done"] == done.get(arm, state["done"]), "Ctrl-C saves before it leaves"
    assert min(reached) > 0
    assert min(reached) < STEPS

    finish(start(tmp_path, framework))
    for arm in ARMS:
        assert numbers(tmp_path, arm) == numbers(uninterrupted, arm)
        states = [atomic_files.load(out / "runs" / f"{arm}-0" / CHECKPOINT, "cpu") for out in (tmp_path, uninterrupted)]
        first, second = ({key: state[key] for key in ("done", "model", "optimizer")} for state in states if state)
        assert_same_bits(first, second)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_summary(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert set(summary) == {"config", "environment", "arms"}
    assert summary["config"]["model_changes"] == {}
    assert summary["config"]["training"]["spike_threshold"] == 0.5
    assert len(summary["config"]["data"]["sha256"]) == 64
    assert {"python", "torch", "muonclip", "cpu", "platform", "git_commit", "date", "command"} <= set(
        summary["environment"]
    )
    assert set(summary["arms"]) == set(ARMS)
    for arm in ARMS:
        assert set(summary["arms"][arm]) == {"0"}
        assert set(summary["arms"][arm]["0"]) == set(RunSummary.__annotations__)
        assert 2 < summary["arms"][arm]["0"]["final_val_loss"] < 5
    assert summary["arms"]["muon"]["0"]["clipped_head_steps"] == 0
    assert summary["arms"]["muon"]["0"]["heads_ever_clipped"] == 0
    assert summary["arms"]["muon"]["0"]["last_clipped_step"] is None
    assert summary["arms"]["muonclip"]["0"]["clipped_head_steps"] > 0
    assert 0 < summary["arms"]["muonclip"]["0"]["heads_ever_clipped"] <= 1
    assert 1 <= summary["arms"]["muonclip"]["0"]["last_clipped_step"] <= STEPS


@pytest.mark.slow
def test_a_finished_command_only_draws_again_and_another_one_is_refused(framework, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "runs").rglob("*") if path.is_file()}
    assert "MuonClip" in finish(start(uninterrupted, framework))
    assert before == {path: path.stat().st_mtime_ns for path in (uninterrupted / "runs").rglob("*") if path.is_file()}

    process = start(uninterrupted, framework, "--tau", "7")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "argument --out:" in errors
    assert "training.tau: recorded 0.5, asked for 7.0" in errors


@pytest.mark.slow
def test_reproduce_in_small(monkeypatch, tmp_path, capsys):
    few = {"steps": 4, "validate_every": 2, "validation_batches": 1}
    monkeypatch.setattr(commands, "HOT", replace(commands.HOT, **few))
    monkeypatch.setattr(commands, "OWN_RATE", replace(commands.OWN_RATE, **few))
    assert main(["reproduce", "--out", str(tmp_path)]) == 0
    hot, own = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("hot", "own-rate"))
    assert {arm: set(runs) for arm, runs in hot["arms"].items()} == {"muon": {"0", "1"}, "muonclip": {"0", "1"}}
    assert {arm: set(runs) for arm, runs in own["arms"].items()} == {"adamw": {"0"}, "muon": {"0"}, "muonclip": {"0"}}
    printed = capsys.readouterr().out
    assert printed.count("MuonClip") == 3
    assert str(tmp_path / "curves.png") in printed
    assert (tmp_path / "curves.png").exists()


def test_one_command_at_a_time(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(UsageError, match="another command is writing"),
        locked(tmp_path, patience=0.1),
    ):
        pass
    with locked(tmp_path, patience=0.1):
        pass
