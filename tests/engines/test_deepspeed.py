"""DeepSpeed drives MuonClip on two ranks: stage 0 works, in bfloat16 too; ZeRO, which flattens matrices, is refused."""

import json
from pathlib import Path

import pytest
from forked_ranks import run_ranks

WORKER = Path(__file__).parents[1] / "support" / "deepspeed_worker.py"
pytestmark = pytest.mark.xdist_group("deepspeed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(2, WORKER, folder, timeout=300)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_stage_0_is_ddp(ranks):
    for each in ranks:
        seen = each["stage_0_in_float32"]
        assert seen["clipped"] == seen["expected"]
        assert sum(seen["clipped"]) >= 3
        assert seen["error"] < 1e-6


def test_stage_0_in_bfloat16_clips_the_masters(ranks):
    for each in ranks:
        seen = each["stage_0_in_bfloat16"]
        assert seen["masters"] == ["torch.float32"]
        assert seen["clipped"] == seen["expected"]
        assert sum(seen["clipped"]) >= 3
        assert seen["error"] == 0


def test_a_clip_that_is_attached_to_deepspeed_s_wrapper_clips_the_masters(ranks):
    for each in ranks:
        seen = each["stage_0_in_bfloat16_with_an_attached_clip"]
        assert sum(seen["clipped"]) >= 2
        assert seen["same"]
        assert seen["warned"] == []


@pytest.mark.parametrize("make", ["with_muonclip", "without_a_clip", "by_names", "with_an_attached_clip"])
@pytest.mark.parametrize("stage", ["1", "1, bf16", "2", "3"])
def test_zero_is_refused_before_a_weight_moves(ranks, stage, make):
    for each in ranks:
        seen = each[f"{stage}, {make}"]
        assert not seen["moved"]
        assert "DeepSpeed's ZeRO (stage " in seen["said"], seen["said"]
        assert "'zero_optimization': {'stage': 0}" in seen["said"]
