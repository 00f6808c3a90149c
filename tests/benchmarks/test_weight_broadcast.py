"""New weights for ranks that infer: boxes that fit, and four real ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from benchmarks.__main__ import main
from benchmarks.execution.weight_broadcast import ALIGNED, boxes, packed

WORKER = Path(__file__).parents[1] / "support" / "weight_broadcast_worker.py"


@pytest.mark.parametrize("size", [(), (7,), (5, 3), (1, 40, 30), (4, 9, 8), (0, 5)])
@pytest.mark.parametrize("most", [1, 4, 10, 64, 5000])
def test_boxes_cover_each_entry_once_and_fit(size, most):
    seen = torch.zeros(size)
    for begins, part in boxes((0,) * len(size), size, most):
        assert math.prod(part) <= most
        seen[tuple(slice(begin, begin + length) for begin, length in zip(begins, part, strict=True))] += 1
    assert torch.equal(seen, torch.ones(size))


@pytest.mark.parametrize("chunk_bytes", [16, 100, 512, 10_000])
def test_pieces_of_chunks_make_the_weights_again(chunk_bytes):
    """Entries of bfloat16, odd in number, come before those of float32, which must begin where these can be read."""
    weights = {"half": torch.randn(3, 7).bfloat16(), "scalar": torch.tensor(2.5), "whole": torch.randn(4, 5, 6)}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(weights)
    chunks = list(
        packed(planner.create_local_plan(), {name: each.dtype for name, each in weights.items()}, chunk_bytes)
    )
    arrived = {name: torch.full_like(each, torch.nan) for name, each in weights.items()}
    for pieces in chunks:
        buffer = torch.empty(chunk_bytes, dtype=torch.uint8)
        for piece in pieces:
            assert piece.at % ALIGNED == 0
            piece.of_chunk(buffer).copy_(piece.of_part(weights[piece.item.index.fqn]))
        for piece in pieces:
            piece.of_whole(arrived[piece.item.index.fqn]).copy_(piece.of_chunk(buffer))
    for name, weight in weights.items():
        assert torch.equal(arrived[name], weight), name
    assert len(chunks) >= sum(each.nbytes for each in weights.values()) / chunk_bytes
    assert len(chunks) == 1 or chunk_bytes < 10_000


def test_weights_arrive_to_the_bit_in_chunks_and_answer_the_same_logits():
    run_ranks(4, WORKER, timeout=300)


@pytest.mark.slow
def test_the_command_times_all_sizes(tmp_path):
    assert main(["weight-broadcast", "--rounds", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "weight_broadcast.json").read_text(encoding="utf-8"))
    counts = [row["chunks"] for row in result["rows"]]
    assert counts[-1] is None
    assert counts[:-1] == sorted(counts[:-1], reverse=True)
    assert counts[0] >= result["bytes"] / 2**16
    assert "64 KiB" in (tmp_path / "weight_broadcast.md").read_text(encoding="utf-8")
