"""A wrong option ends with status 2 and one message that names it."""

import pytest
import torch

from benchmarks import commands
from benchmarks.__main__ import main
from benchmarks.experiment.arms import ARMS, DEFAULT_ARMS
from benchmarks.experiment.presets import HOT, OWN_RATE
from benchmarks.records.summary import Results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "muon,lion"], "argument --arms: unknown arm 'lion'; known: adamw, muon, muonclip"),
        (["--arms", "muon,muon"], "argument --arms: muon,muon names something twice"),
        (["--seeds", "0,x"], "argument --seeds: 'x' is not an integer of at least 0"),
        (["--seeds=-1"], "argument --seeds: '-1' is not an integer of at least 0"),
        (["--lr", "fast"], "argument --lr: 'fast' is not a positive number"),
        (["--lr", "muon=1e-3,5"], "argument --lr: unknown arm '5'; known: adamw"),
        (["--lr", "lion=1e-3"], "argument --lr: unknown arm 'lion'"),
        (["--lr", "muon=1,muon=2"], "argument --lr: muon=1,muon=2 gives an arm two rates"),
        (["--arms", "muon,adamw", "--lr", "muon=1e-3"], "argument --lr: names no rate for adamw"),
        (["--steps", "-3"], "argument --steps: '-3' is not an integer of at least 1"),
        (["--batch", "1.5"], "argument --batch: '1.5' is not an integer"),
        (["--jobs", "0"], "argument --jobs: '0' is not an integer"),
        (["--tau", "nan"], "argument --tau: 'nan' is not a positive number"),
        (["--attention", "flash"], "argument --attention: invalid choice: 'flash'"),
        (["--arms", "muon@lr=0"], "argument --arms: lr=0 is not a positive number"),
        (
            ["--arms", "muonclip@tau=10,muonclip@tau=1e1"],
            "argument --arms: muonclip@tau=10,muonclip@tau=1e1 names something",
        ),
        (["--pilot", "1e-2,1e-2"], "argument --pilot: 1e-2,1e-2 names something twice"),
        (["--pilot", "1e-2,fast"], "argument --pilot: 'fast' is not a positive number"),
        (["--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
        (["--data", "/nowhere"], "argument --data: /nowhere does not exist"),
    ],
)
def test_wrong_options(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["explosion", "--out", str(tmp_path / "out"), *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def trained(monkeypatch):
    """The experiments that a command would train."""
    experiments = []
    monkeypatch.setattr(commands, "train", lambda given, *_: experiments.extend(given) or [])
    return experiments


@pytest.mark.parametrize(
    ("options", "arms"),
    [([], ("adamw", "muon", "muonclip")), (["--arms", "softcap,adamw-clip"], ("softcap", "adamw-clip"))],
)
def test_arms_of_explosion(options, arms, trained, tmp_path):
    assert main(["explosion", "--out", str(tmp_path), *options]) == 0
    assert tuple(arm.name for arm in trained[0].arms) == arms
    assert trained[0].training.lr == {arm: HOT.lr[arm] for arm in arms}


def test_settings_of_arms(trained, tmp_path):
    options = ["--arms", "muonclip@tau=1e2,muon@lr=2e-2,rescue", "--out", str(tmp_path)]
    assert main(["explosion", *options]) == 0
    assert tuple(arm.name for arm in trained[0].arms) == ("muonclip@tau=100", "muon@lr=0.02", "rescue")
    assert trained[0].training.lr == {"muonclip": 3e-2, "rescue": 3e-2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("options", [["--device", "cuda"], ["--preset", "gpu"], ["--preset", "node"]])
def test_no_gpu(options, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["explosion", "--out", str(tmp_path / "out"), *options])
    assert "sees no CUDA device. --preset cpu is made for this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "piloted"), [([], True), (["--lr", "1e-2"], False)])
def test_large_presets_choose_their_rate_by_a_pilot(options, piloted, tmp_path, monkeypatch, capsys):
    """As on a GPU, but for the training."""
    experiments, pilots = [], []

    def train(given, *_):
        if given[0].name != "pilot":
            return experiments.extend(given) or []
        pilots.extend(given)
        peaks = zip(given[0].arms, (20.0, 300.0, 900.0), strict=True)
        return [Results(given[0], {}, {arm.name: {0: {"max_logit_peak": peak}} for arm, peak in peaks})]

    monkeypatch.setattr(commands, "train", train)
    assert main(["explosion", "--preset", "gpu", "--device", "cpu", "--out", str(tmp_path), *options]) == 0
    assert [pilot.training.steps for pilot in pilots] == [150] * piloted
    expected = {"adamw": 1e-3, "muon": 2e-2, "muonclip": 2e-2} if piloted else dict.fromkeys(DEFAULT_ARMS, 1e-2)
    assert experiments[0].training.lr == expected
    assert experiments[0].seeds == (0,)
    assert experiments[0].training.tau == 100.0
    assert ("Rate 0.02" in capsys.readouterr().err) == piloted


@pytest.mark.parametrize("training", [HOT, OWN_RATE])
def test_every_arm_has_a_rate(training):
    assert training.lr == {arm: training.lr["adamw" if arm.startswith("adamw") else "muon"] for arm in ARMS}


def test_text_that_is_too_short(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("word " * 20)
    with pytest.raises(SystemExit):
        main(["reproduce", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "short.txt")])
    assert "argument --data:" in (error := capsys.readouterr().err)
    assert "leaves 10 tokens for validation; a window needs 65" in error


def test_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["explosion", "--out", str(tmp_path / "file")])
    assert f"argument --out: {tmp_path / 'file'} cannot be made a folder" in capsys.readouterr().err
