"""The check for a GPU, run without one: every part finds what it is asked for, and none stops the next."""

import json
import warnings

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.studies import gpu_check, gpu_parts
from muonclip.selftest import run
from muonclip.selftest.outcomes import Part


@pytest.fixture
def records_of(tmp_path):
    def run(part):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is not installed, and of the compiler
            gpu_parts.main(part, tmp_path, True)
        made = json.loads((tmp_path / f"{part}.json").read_text())
        assert made["environment"]["torch"] == torch.__version__
        assert made["dry_run"]
        return made["records"]

    return run


def test_a_step_is_compared_in_both_dtypes_while_the_clip_acts(records_of):
    records = records_of("step")
    assert all(record["ok"] for record in records)
    assert {(record["what"], record["dtype"]) for record in records} == {
        (what, dtype)
        for what in ("no host synchronisation", "replay of a CUDA graph")
        for dtype in ("float32", "bfloat16")
    }
    replays = [record for record in records if "equal" in record]
    assert all(record["equal"] and min(record["clipped"]) > 0 for record in replays)


def test_the_self_test_of_the_library_comes_first(records_of, monkeypatch):
    monkeypatch.setattr(run, "OF_TORCH", (run.OF_TORCH[0], Part("broken", lambda device: iter([1 / 0]))))
    monkeypatch.setattr(run, "OF_JAX", ())
    monkeypatch.setattr(run, "LAST", ())
    records = records_of("check")
    assert [record["ok"] for record in records] == [*[True] * 6, False]
    assert {record["what"] for record in records} >= {"iteration, gram form, bfloat16", "broken"}
    assert records[-1]["trace"][-1] == "ZeroDivisionError: division by zero"
    assert next(iter(gpu_check.PARTS)) == next(iter(gpu_parts._PARTS)) == "check"


@pytest.mark.parametrize(
    ("part", "peers"), [("sets", {"muonclip, Gram form", "torch"}), ("sets-compiled", {"torch, compiled"})]
)
def test_sets_are_timed_next_to_each_peer_that_runs(records_of, part, peers):
    """The others are named with the reason."""
    for record in records_of(part):
        ours = {"muonclip", "muonclip, again"}
        assert ours | peers <= record["ms"].keys()
        assert record["ms"].keys() | record["absent"].keys() <= ours | peers | {
            "dion",
            "gram-newton-schulz",
            "muonclip, Gram form, quack",
        }
        assert record["over_ours"]["muonclip"] == 1.0
        assert all(len(samples) == 3 for samples in record["samples"].values())


def test_the_clip_and_the_explosion(records_of, tmp_path):
    regimes = [record["regime"] for record in records_of("clip-cost")]
    assert sorted(regimes) == ["above τ", "always, diffuse heads", "far below τ"]
    records = records_of("explosion")
    assert [(record["arm"], record["steps"], len(record["curve"])) for record in records] == [
        ("muon", 3, 3),
        ("muonclip", 3, 3),
    ]
    assert all(record["highest_logit"] == max(point[2] for point in record["curve"]) for record in records)
    assert not list((tmp_path / "explosion").rglob("*.pt"))


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_check, "PARTS", {"unknown": 60.0, "explosion": 0.5, "kernels": 120.0})
    assert main(["gpu-check", "--dry-run", "--out", str(tmp_path)]) == 1
    assert "unknown, explosion: see" in capsys.readouterr().err
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    ended = {name: part["ended"] for name, part in report["parts"].items()}
    assert ended == {"unknown": "failed", "explosion": "out of time", "kernels": "passed"}
    assert "KeyError: 'unknown'" in (tmp_path / "unknown.log").read_text()
    records = json.loads((tmp_path / "kernels.json").read_text())["records"]
    assert {(record["kernel"], record["dtype"]) for record in records} == {
        (kernel, dtype) for kernel in ("head_maxima", "mask_levels") for dtype in ("float32", "float16")
    }
    assert all(0 <= record["error"] <= 1e-3 for record in records)


def test_a_clip_that_does_nothing_is_no_proof(records_of, monkeypatch):
    """Its replay is equal, and says nothing of the clip."""
    from muonclip.selftest import steps

    monkeypatch.setattr(steps, "_TAU", 1e9)  # so that the clip does nothing
    assert [record["ok"] for record in records_of("step") if "equal" in record] == [False, False]


def test_what_is_not_finite_is_written_and_kept_from_passing(records_of, monkeypatch):
    found = [{"ok": True, "error": 0.5}, {"ok": False, "error": float("inf"), "curve": [(1, float("nan"), 2.0)]}]
    monkeypatch.setitem(gpu_parts._PARTS, "kernels", lambda *_: iter(found))
    assert records_of("kernels") == [found[0], {"ok": False, "error": "inf", "curve": [[1, "nan", 2.0]]}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_asks_for_a_dry_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["gpu-check", "--out", str(tmp_path / "out")])
    assert "--dry-run runs without one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
