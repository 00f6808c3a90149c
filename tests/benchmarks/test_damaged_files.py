"""A file of a run that was cut or overwritten is named, with what to do, and without a traceback."""

import argparse
import json

import pytest
import torch
from bench_runs import growing, store, trained

from benchmarks.__main__ import main
from benchmarks.execution import worker
from benchmarks.execution.train import _begin
from benchmarks.experiment.errors import DamagedFile, UsageError
from benchmarks.records import metrics
from benchmarks.records.folders import CHECKPOINT, CONFIG, METRICS, RESULT, run_folder
from benchmarks.records.summary import read_folder
from benchmarks.studies import speed
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


OF_ANOTHER_RUN = (
    *(dict(done="2"), dict(done=-1), dict(last=None), dict(wall_seconds="x"), dict(model=None), dict(optimizer=None)),
    *(dict(model={}), dict(optimizer=[1]), dict(model={"w": torch.ones(2)})),
)  # a checkpoint with other values, or without those that are None


def test_a_checkpoint_that_is_not_of_this_run_is_named(experiment, corpus, tmp_path):
    folder, arm = run_folder(tmp_path, "muon", 3), experiment.arm("muon")
    trained(Run(experiment, corpus, folder, arm, 3), until=1)
    right = torch.load(folder / CHECKPOINT, weights_only=True)
    for values in OF_ANOTHER_RUN:
        wrong = {name: value for name, value in (right | values).items() if value is not None}
        torch.save(wrong, folder / CHECKPOINT)
        with pytest.raises(DamagedFile, match=rf"{CHECKPOINT} is damaged \(.+\)\. Restore it, or remove it: .* anew"):
            Run(experiment, corpus, folder, arm, 3)


@pytest.mark.parametrize(
    "wrong",
    [b'{"step": 5}', b'{"step": 5, "loss": "x", "max_logits": {}}', b'{"step": 5, "loss": 1, "max_logits": 3}',
     b'{"step": 5, "loss": 1, "max_logits": {"a": 3}}', b'{"step": 5, "loss": null, "max_logits": {}}',
     b'{"step": 5, "loss": 1, "max_logits": {}, "query_norms": {"a": ["x"]}}'],
)  # fmt: skip
def test_a_record_without_its_measures_is_named(results, wrong):
    path = results / "runs" / "muon-0" / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], wrong + b"\n", *lines[5:]]))
    with pytest.raises(DamagedFile, match=r"line 5, is damaged \(its (loss|max_logits|query_norms) is not a measure\)"):
        read_folder(results)


@pytest.mark.parametrize("value", [{"steps": "8"}, {"diverged": 0}, {"final_val_loss": None}, {"wall_seconds": [1]}])
def test_a_result_with_a_wrong_value_is_named(results, value):
    path = results / "runs" / "muon-0" / RESULT
    path.write_text(json.dumps(json.loads(path.read_text()) | value))
    with pytest.raises(DamagedFile, match=rf"result\.json is damaged \(its {next(iter(value))} is"):
        read_folder(results)


@pytest.mark.parametrize("file", [CONFIG, f"runs/muon-0/{RESULT}"])
def test_a_folder_in_the_place_of_a_file_is_named(results, file):
    (results / file).unlink()
    (results / file).mkdir()
    with pytest.raises((DamagedFile, UsageError), match=file.rpartition("/")[2]):
        read_folder(results)


@pytest.mark.parametrize("text", [b"", b"[3]", b'{"rows": []', b"{}"])
def test_figures_that_a_command_has_measured_are_named_where_they_are_damaged(tmp_path, text):
    (tmp_path / speed.FILE).write_bytes(text)
    page = tmp_path / "page.md"
    page.write_text("")
    with pytest.raises(DamagedFile, match=rf"{speed.FILE} is damaged \(.+\)\. Restore it, or remove it and run"):
        speed.run(argparse.Namespace(out=tmp_path, page=page))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("file", "status", "said"),
    [
        (CONFIG, 2, "is not a configuration that this version wrote"),
        (f"runs/muon-0/{RESULT}", 1, "Restore it, or remove it and start the command again: it goes on from"),
        (f"runs/muon-0/{METRICS}", 1, "Restore it, or remove .*muon-0 and start the command again: it makes that run"),
    ],
)
def test_the_report_names_the_file_that_is_damaged(results, damage, file, status, said, capsys):
    damage(results / file)
    with pytest.raises((DamagedFile, UsageError), match=said):
        read_folder(results)
    try:
        ended = main(["report", str(results)])
    except SystemExit as exit_:
        ended = exit_.code
    assert ended == status
    assert str(results / file) in capsys.readouterr().err


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
