"""Clipping the gradients of one half of an optimizer."""

import json
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks
from tiny_attention import TinyModel

from muonclip.torch import MuonClip
from muonclip.torch.distributed import clip_grad_norm_

WORKER = Path(__file__).parents[1] / "support" / "clip_norm_worker.py"


@pytest.mark.parametrize("only", ["adamw", "muon"])
def test_one_half_is_clipped_by_its_own_norm_and_the_other_stays(only):
    torch.manual_seed(0)
    model = TinyModel().double()
    optimizer = MuonClip(model, qk_clip=None)
    model.loss(torch.randint(0, 13, (3, 9))).backward()
    before = {p: p.grad.clone() for p in model.parameters()}
    use = {p: group["use"] for group in optimizer.param_groups for p in group["params"]}
    own = torch.cat([before[p].flatten() for p in before if use[p] == only]).norm()
    norm = clip_grad_norm_(optimizer, 0.01, only=only)
    assert norm == pytest.approx(own.item(), rel=1e-6)
    for p, gradient in before.items():
        expected = gradient * 0.01 / (own + 1e-6) if use[p] == only else gradient
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=0)


def test_an_optimizer_alone_means_all_its_parameters():
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.loss(torch.randint(0, 13, (3, 9))).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert clip_grad_norm_(optimizer, 1e9) == pytest.approx(expected.item(), rel=1e-6)


def test_a_half_without_a_gradient_has_the_norm_zero():
    model = TinyModel()
    assert clip_grad_norm_(MuonClip(model, qk_clip=None), 1.0, only="adamw") == 0


def test_what_does_not_say_its_half_is_refused():
    model = TinyModel()
    with pytest.raises(ValueError, match="only='adamw' chooses among the groups of an optimizer"):
        clip_grad_norm_(model.parameters(), 1.0, only="adamw")
    with pytest.raises(ValueError, match="groups of this SGD do not say whose they are"):
        clip_grad_norm_(torch.optim.SGD(model.parameters(), lr=0.1), 1.0, only="adamw")
    with pytest.raises(ValueError, match="only='adam'; use None, 'adamw', or 'muon'"):
        clip_grad_norm_(MuonClip(model, qk_clip=None), 1.0, only="adam")


def test_shards_are_clipped_as_the_whole(tmp_path):
    run_ranks(2, WORKER, tmp_path)
    for only, found in json.loads((tmp_path / "rank0.json").read_text(encoding="utf-8")).items():
        assert found["norms"][1] == pytest.approx(found["norms"][0], rel=1e-6), only
        assert found["norms"][0] > 0.01
        assert found["apart"] < 1e-7, only
