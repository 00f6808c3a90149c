"""Sequences divided between ranks that divide the heads while they attend, by DeepSpeed's Ulysses."""

import json
from pathlib import Path

import pytest
from forked_ranks import run_ranks

WORKER = Path(__file__).parents[1] / "support" / "ulysses_worker.py"


@pytest.mark.parametrize(
    ("ranks", "groups", "engine", "observe"),
    [(2, 2, "fsdp", "needed"), (2, 1, "ddp", "always")],
    ids=["fsdp, a key head for each", "ddp, a key head that both share"],
)
def test_each_head_is_clipped_by_the_rank_that_attends_with_it(ranks, groups, engine, observe, tmp_path):
    run_ranks(ranks, WORKER, tmp_path, 2, groups, engine, observe, timeout=300)
    for rank in range(ranks):
        run = json.loads((tmp_path / f"{rank}.json").read_text())
        for ours, expected in run["seen"]:
            assert ours == pytest.approx(expected, rel=1e-5)
        assert sum(gamma < 1 for ours, _ in run["seen"] for gamma in ours) >= 8
        assert run["error"] < 2e-6  # the softmax of the other one is in float32
