"""The study of clipping gradients."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.studies import grad_clipping

MADE = {"command": "python -m benchmarks grad-clipping", "date": "2026-11-30T00:00:00", "muonclip": "0.1.0"}


def test_differences_are_of_the_same_seed():
    """Each way is 0.1 above clipping nothing on every seed, far apart as the seeds are."""
    plain = {0: 2.0, 1: 3.0, 2: 7.0}
    rows = [
        {"clipped": only, "max_norm": norm, "seed": seed, "loss": loss + above, "share": 0.5, "times": norm}
        for only, norm, above in (("none", 0.0, 0.0), ("adamw", 1.0, 0.1))
        for seed, loss in plain.items()
    ]
    training = {"steps": 2, "lr": 0.005, "batch_size": 4}
    text = grad_clipping.table({"rows": rows, "training": training, "environment": MADE})
    assert "| AdamW's, by their own norm | 1 | 100% | 4.100 | +0.100 (+0.100 to +0.100) |" in text
    assert "| nothing |  |  | 4.000 |  |" in text
    assert "50% of the squared joint norm" in text


@pytest.mark.slow
def test_each_way_is_trained_from_the_same_weights_and_clips_its_own(tmp_path, capsys):
    main(["grad-clipping", "--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "grad_clipping.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["clipped"], row["max_norm"]) for row in rows] == list(grad_clipping.WAYS)
    assert [row["times"] for row in rows[-2:]] == [1.0, 1.0]
    assert len({round(row["share"], 4) for row in rows}) == 1, "of the first two steps, which are nearly the same"
    assert len({row["loss"] for row in rows}) > 1
    assert (tmp_path / "grad_clipping.md").read_text(encoding="utf-8") in capsys.readouterr().out
