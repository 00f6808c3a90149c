"""FSDP1 flattens matrices: whatever comes first, it or the optimizer, both ranks are told so before a weight moves."""

import json
from pathlib import Path

import pytest
from forked_ranks import run_ranks

WORKER = Path(__file__).parents[1] / "support" / "fsdp1_worker.py"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fsdp1")]
ORDERS = [
    "muonclip_of_the_wrapper",
    "muonclip_of_a_model_with_a_wrapped_part",
    "muonclip_before_the_wrapper",
    "muonclip_without_a_clip_before_the_wrapper",
    "muon_of_matrices",
    "clip_of_the_wrapper",
    "clip_of_what_is_inside",
    "clip_before_the_wrapper",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp1")
    run_ranks(2, WORKER, folder, timeout=120)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_flattened_matrices_are_refused_before_a_weight_moves(ranks, order, use_orig_params):
    for each in ranks:
        seen = each[f"{order}, {use_orig_params}"]
        assert not seen["moved"]
        if order == "muon_of_matrices":
            assert "Muon needs a matrix" in seen["said"]
        else:
            assert "FullyShardedDataParallel (FSDP1)" in seen["said"], seen["said"]
            assert "fully_shard(model)" in seen["said"]


def test_every_order_is_asked_for(ranks):
    assert {name.partition(",")[0] for name in ranks[0]} == set(ORDERS)
