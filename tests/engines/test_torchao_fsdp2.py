"""MuonClip under FSDP2 on two ranks, with torchao's float8 linears whose weights are gathered in float8."""

import json
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks

WORKER = Path(__file__).parents[1] / "support" / "float8_fsdp2_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float8")
    run_ranks(2, WORKER, folder, timeout=240)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("how", ["shards", "gathered", "precomputed"])
def test_the_shards_of_the_master_weights_are_scaled_by_the_joint_gamma(ranks, how):
    for one, other in zip(*(each[how] for each in ranks), strict=True):
        assert one["gammas"] == other["gammas"]
        assert one["wanted"] == other["wanted"]
        torch.testing.assert_close(torch.tensor(one["gammas"]), torch.tensor(one["wanted"]), rtol=1e-5, atol=0)
        assert one["furthest"] < 1e-6  # every row of a head is the updated one times the root of its factor
        assert one["untouched"]
    assert min(gamma for each in ranks[0][how] for layer in each["gammas"] for gamma in layer) < 0.8


def test_gathering_in_float8_changes_nothing_of_the_first_forward(ranks):
    """A linear rounds its weight by one scale, whether before or behind the gathering."""
    for each in ranks:
        assert each["gathered"] == each["precomputed"]
        assert each["gathered"][0]["loss"] == each["shards"][0]["loss"]


def test_a_scale_that_was_kept_from_before_the_clip_is_dropped(ranks):
    for rank in ranks:
        kept = rank["kept"]
        assert kept["dropped"]
        assert kept["others"]
        assert kept["fresh"] > 1.2 * kept["kept"]  # the largest weight was in a head that was clipped
        as_left, computed_anew = kept["losses"]
        assert as_left == computed_anew
