"""A wrong option ends with status 2 and one message that names it."""

import pytest

from benchmarks import __main__ as command_line
from benchmarks.__main__ import main
from benchmarks.arms import ARMS
from benchmarks.presets import HOT, OWN_RATE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "muon,lion"], "argument --arms: unknown arm 'lion'; known: adamw, muon, muonclip"),
        (["--arms", "muon,muon"], "argument --arms: muon,muon names something twice"),
        (["--seeds", "0,x"], "argument --seeds: '0,x' is not a list of integers"),
        (["--seeds=-1"], "argument --seeds: '-1' is not a list of integers"),
        (["--lr", "fast"], "argument --lr: 'fast' is not a positive number"),
        (["--lr", "muon=1e-3,5"], "argument --lr: 'muon=1e-3,5' is neither one rate nor"),
        (["--lr", "lion=1e-3"], "argument --lr: unknown arm 'lion'"),
        (["--lr", "muon=1,muon=2"], "argument --lr: muon has two rates"),
        (["--arms", "muon,adamw", "--lr", "muon=1e-3"], "argument --lr: names no rate for adamw"),
        (["--steps", "-3"], "argument --steps: '-3' is not an integer of at least 1"),
        (["--batch", "1.5"], "argument --batch: '1.5' is not an integer"),
        (["--jobs", "0"], "argument --jobs: '0' is not an integer"),
        (["--tau", "nan"], "argument --tau: 'nan' is not a positive number"),
        (["--attention", "flash"], "argument --attention: invalid choice: 'flash'"),
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


@pytest.mark.parametrize(
    ("options", "arms"),
    [([], ("adamw", "muon", "muonclip")), (["--arms", "softcap,adamw-clip"], ("softcap", "adamw-clip"))],
)
def test_arms_of_explosion(options, arms, monkeypatch, tmp_path):
    panels = []
    monkeypatch.setattr(command_line, "run_panels", lambda given, *_: panels.extend(given) or [])
    assert main(["explosion", "--out", str(tmp_path), *options]) == 0
    assert panels[0].arms == arms
    assert panels[0].training.lr == {arm: HOT.lr[arm] for arm in arms}


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
