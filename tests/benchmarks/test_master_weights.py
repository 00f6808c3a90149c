"""The study of master weights."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.studies import master_weights

MADE = {"command": "python -m benchmarks master-weights", "date": "2026-11-30T00:00:00", "muonclip": "0.1.0"}


def test_differences_are_of_the_same_seed():
    """Bf16 is 0.1 above float32 on every seed, far apart as the seeds are."""
    rows = [
        {"way": way, "seed": seed, "loss": loss + above, "bytes": 8.0}
        for way, above in (("float32", 0.0), ("bf16", 0.1))
        for seed, loss in {0: 2.0, 1: 3.0, 2: 7.0}.items()
    ]
    figures = {"rows": rows, "training": {"steps": 2, "lr": 0.005, "batch_size": 4}, "environment": MADE}
    text = master_weights.table(figures)
    assert "| bf16, no masters | 8.00 | 4.100 | +0.100 (+0.100 to +0.100) |" in text
    assert "autocast | 8.00 | 4.000 |  |" in text


@pytest.mark.slow
def test_each_way_is_trained_and_keeps_its_bytes(tmp_path, capsys):
    main(["master-weights", "--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "master_weights.json").read_text(encoding="utf-8"))["rows"]
    assert [row["way"] for row in rows] == list(master_weights.WAYS)
    kept = {row["way"]: row["bytes"] for row in rows}
    assert kept["float32"] == kept["32"] == pytest.approx(kept["24"] + 1) == pytest.approx(2 * kept["bf16"])
    assert len({row["loss"] for row in rows}) > 1
    assert (tmp_path / "master_weights.md").read_text(encoding="utf-8") in capsys.readouterr().out
