"""A file of a run that was cut or overwritten is named, with what to do, and without a traceback."""

import json
import subprocess
import sys

import pytest
import torch
from bench_runs import growing, store, trained

from benchmarks.execution import worker
from benchmarks.execution.train import _begin
from benchmarks.experiment.errors import DamagedFile, UsageError
from benchmarks.records import metrics
from benchmarks.records.folders import CHECKPOINT, CONFIG, METRICS, RESULT, run_folder
from benchmarks.records.summary import read_folder
from benchmarks.training.run import Run, Schedule


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path):
    path.write_bytes(b"\x00\xff garbage")


def emptied(path):
    path.write_bytes(b"")


def another(path):
    if path.name == CHECKPOINT:
        torch.save([1, 2], path)
    else:
        path.write_text("[3]\n")


DAMAGES = [cut, garbage, emptied, another]


@pytest.fixture
def results(experiment, tmp_path):
    store(tmp_path / "out", experiment, {"muon": {0: growing(8, 5.0)}})
    return tmp_path / "out"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_begins_anew(
    experiment, corpus, tmp_path, damage, capsys, monkeypatch
):
    arm = experiment.arm("muon")
    folder = run_folder(tmp_path, "muon", 3)
    run = trained(Run(experiment, corpus, folder, arm, 3), until=2)
    run.save()
    damage(folder / CHECKPOINT)
    records = (folder / METRICS).read_bytes()
    with pytest.raises(DamagedFile, match=rf"{CHECKPOINT} is damaged \(.+\)\. Restore it, or remove it: .*begins anew"):
        Run(experiment, corpus, folder, arm, 3)
    assert (folder / METRICS).read_bytes() == records  # with which a restored one goes on

    (tmp_path / CONFIG).write_text(json.dumps({"config": experiment.to_json()}))
    monkeypatch.setattr(worker, "_leave_with_parent", lambda: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    assert worker.main(tmp_path, "muon", 3, Schedule()) == 2
    said = capsys.readouterr().err
    assert f"{folder / CHECKPOINT} is damaged" in said
    assert "Traceback" not in said
    (folder / CHECKPOINT).unlink()
    assert Run(experiment, corpus, folder, arm, 3).done == 0


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("file", "status", "said"),
    [
        (CONFIG, 2, "is not a configuration that this version wrote"),
        (f"runs/muon-0/{RESULT}", 1, "Restore it, or remove it and start the command again: it goes on from"),
        (f"runs/muon-0/{METRICS}", 1, "Restore it, or remove .*muon-0 and start the command again: it makes that run"),
    ],
)
def test_the_report_names_the_file_that_is_damaged(results, damage, file, status, said):
    damage(results / file)
    with pytest.raises((DamagedFile, UsageError), match=said):
        read_folder(results)
    ended = (
        subprocess.run(
            [sys.executable, "-m", "benchmarks", "report", str(results)], capture_output=True, text=True, check=False
        )
        if damage is garbage
        else None
    )
    if ended is not None:
        assert (ended.returncode, "Traceback" in ended.stderr) == (status, False)
        assert str(results / file) in ended.stderr


def test_a_corrupt_line_among_the_metrics_is_named_by_its_number(results):
    path = results / "runs" / "muon-0" / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in (b"{\n", b"3\n", b'{"step": 9}\n', b'{"loss": 1}\n', b"\xff\n"):
        path.write_bytes(b"".join([*lines[:4], wrong, *lines[5:]]))
        with pytest.raises(DamagedFile, match=r"metrics\.jsonl, line 5, is damaged \(it is not the record of step 5\)"):
            metrics.read(path)
        assert metrics.MetricsLog(path).begin(4)
        assert path.read_bytes() == b"".join(lines[:4])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_command_that_goes_on_names_a_damaged_configuration(experiment, corpus, results, damage):
    damage(results / CONFIG)
    with pytest.raises(UsageError, match=r"argument --out: .*config\.json is damaged, or of another version .*Restore"):
        _begin(experiment, corpus, results, None)
