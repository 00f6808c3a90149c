"""The study of how the momentum is stored."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.studies import momentum_dtype

MADE = {"command": "python -m benchmarks momentum-dtype", "date": "2026-11-30T00:00:00", "muonclip": "0.1.0"}


def test_differences_and_ratios_are_of_the_same_seed_and_round():
    arms = {
        "muonclip": {"loss": [2.0, 3.0, 7.0], "state_bytes": 4096},
        "int8": {"loss": [2.1, 3.1, 7.1], "state_bytes": 1024},
    }
    times = {"2 × 1024²": {"muonclip": [1.0, 10.0] * 8, "int8": [2.0, 20.0] * 8}}
    training = {"steps": 2, "lr": 0.005, "batch_size": 4}
    figures = {"arms": arms, "training": training, "environment": MADE, "milliseconds": times, "products": "float32"}
    text = momentum_dtype.table(figures)
    assert "| float32, as the weights are | 4 KiB, 100% | 4.000 |  |  | 5.5 ms |" in text
    assert '| `momentum_dtype="int8"` | 1 KiB, 25% | 4.100 | +0.100 (+0.100 to +0.100) | ' in text
    assert text.splitlines()[3].endswith("| 11.0 ms, 2.00 (2.00 to 2.00) |")


@pytest.mark.slow
def test_each_form_is_trained_from_the_same_weights_and_timed(tmp_path, capsys):
    main(["momentum-dtype", "--quick", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "momentum_dtype.json").read_text(encoding="utf-8"))
    assert list(figures["arms"]) == list(momentum_dtype.FORMS)
    assert len({loss for arm in figures["arms"].values() for loss in arm["loss"]}) == 10, "of two seeds"
    sizes = [arm["state_bytes"] for arm in figures["arms"].values()]
    assert sizes[0] == 2 * sizes[1] == 2 * sizes[2] > 3.8 * sizes[3] == 3.8 * sizes[4]
    assert list(figures["milliseconds"]) == list(momentum_dtype.TIMED)
    assert (tmp_path / "momentum_dtype.md").read_text(encoding="utf-8") in capsys.readouterr().out
