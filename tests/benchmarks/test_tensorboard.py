"""The event files hold the records, read back by TensorBoard itself."""

import math
import sys

import numpy as np
import pytest
from bench_runs import results_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.experiment.errors import UsageError
from benchmarks.report import tensorboard

BASE = {"grad_norm": 1.5, "clipped_heads": 2, "tokens_per_second": 100.0}
LOGITS = ({"layers.0.attn": [1.0, 4.0], "layers.1.attn": [-3.0, 2.0]}, {"layers.0.attn": [7.0, 4.0], "layers.1.attn": [9.0, 2.0]})  # fmt: skip  # noqa: E501
FIRST = BASE | {"step": 1, "loss": 2.5, "lr": 0.25, "max_logits": LOGITS[0]}
MEASURED = {
    "val_loss": 3.25,
    "update_rms": 0.5,
    "attention_entropy": {"layers.0.attn": [1.0, 2.0], "layers.1.attn": [3.0, 4.0]},
    "query_norms": {"layers.0.attn": [1.0, 8.0], "layers.1.attn": [2.0, 3.0]},
    "key_norms": {"layers.0.attn": [5.0], "layers.1.attn": [6.0]},
}
SECOND = BASE | MEASURED | {"step": 2, "loss": 2.0, "lr": 0.5, "max_logits": LOGITS[1]}
DIVERGED = BASE | {"step": 3, "loss": math.nan, "lr": 0.5, "max_logits": {}, "val_loss": math.nan}


@pytest.fixture
def result(experiment):
    return results_of(
        experiment, {"muon": {0: [FIRST, SECOND, DIVERGED], 3: [FIRST]}, "muonclip@tau=10": {0: [FIRST, SECOND]}}
    )


def read(folder):
    """Tag → [(step, value)]."""
    events = EventAccumulator(str(folder)).Reload()
    assert all(event.wall_time == 0 for tag in events.Tags()["scalars"] for event in events.Scalars(tag))
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_scalar_comes_back(result, tmp_path):
    tensorboard.write(result, tmp_path)
    assert read(tmp_path / "muonclip@tau=10" / "seed-0") == {
        "loss": [(1, 2.5), (2, 2.0)],
        "val_loss": [(2, 3.25)],
        "lr": [(1, 0.25), (2, 0.5)],
        "grad_norm": [(1, 1.5), (2, 1.5)],
        "clipped_heads": [(1, 2), (2, 2)],
        "tokens_per_second": [(1, 100), (2, 100)],
        "update_rms": [(2, 0.5)],
        "max_logit": [(1, 4.0), (2, 9.0)],
        "max_logit/layers.0.attn": [(1, 4.0), (2, 7.0)],
        "max_logit/layers.1.attn": [(1, 2.0), (2, 9.0)],
        "attention_entropy": [(2, 2.5)],
        "attention_entropy/layers.0.attn": [(2, 1.5)],
        "attention_entropy/layers.1.attn": [(2, 3.5)],
        "query_norm": [(2, 8.0)],
        "query_norm/layers.0.attn": [(2, 8.0)],
        "query_norm/layers.1.attn": [(2, 3.0)],
        "key_norm": [(2, 6.0)],
        "key_norm/layers.0.attn": [(2, 5.0)],
        "key_norm/layers.1.attn": [(2, 6.0)],
    }


def test_a_folder_per_run_and_the_same_records_are_the_same_bytes(result, experiment, tmp_path):
    tensorboard.write(result, tmp_path / "one")
    tensorboard.write(result, tmp_path / "other")
    written = contents(tmp_path / "one")
    assert {path.parent.as_posix() for path in written} == {"muon/seed-0", "muon/seed-3", "muonclip@tau=10/seed-0"}
    assert written == contents(tmp_path / "other")
    tensorboard.write(results_of(experiment, {"muon": {0: [FIRST]}}), tmp_path / "one")
    assert read(tmp_path / "one" / "muon" / "seed-0")["loss"] == [(1, 2.5)]
    assert contents(tmp_path / "one").keys() == written.keys()


def test_a_step_that_is_not_finite_is_written_so(result, tmp_path):
    tensorboard.write(result, tmp_path)
    found = read(tmp_path / "muon" / "seed-0")
    np.testing.assert_array_equal(found["loss"], [(1, 2.5), (2, 2.0), (3, math.nan)])
    assert [step for step, _ in found["max_logit"]] == [1, 2]


def test_without_the_package_it_says_what_to_do(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=r"argument --tensorboard: .* pip install tensorboard"):
        tensorboard.write(result, tmp_path / "events")
    assert not (tmp_path / "events").exists()
