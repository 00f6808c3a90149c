"""A variant with a state for each row, as the docs add it: against NumPy, over ranks, through checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import run_ranks
from row_state import NorMuon, NorMuonClip, normuon_step
from tiny_attention import TinyModel
from torch import nn

from muonclip.core import MatrixLayout, update_scale
from muonclip.core.matrix_state import MatrixState, per_row
from muonclip.core.update_rule import MuonRule
from muonclip.torch import Muon, MuonClip, QKClip

WORKER = Path(__file__).parents[1] / "support" / "row_state_worker.py"
CASES = {  # shape, layout, the blocks of the parameter that are matrices, the same of a state per row
    "matrix": ((8, 6), MatrixLayout(), [np.s_[:, :]]),
    "wide": ((5, 9), MatrixLayout(), [np.s_[:, :]]),
    "experts": ((3, 4, 6), MatrixLayout(batch_ndim=1), [np.s_[e] for e in range(3)]),
    "fused": ((12, 6), MatrixLayout(blocks=(6, 3, 3)), [np.s_[0:6], np.s_[6:9], np.s_[9:12]]),
    "heads": ((12, 6), MatrixLayout(heads=(3,)), [np.s_[4 * h : 4 * h + 4] for h in range(3)]),
    "interleaved": ((12, 6), MatrixLayout(blocks=(2, 4), repeats=2), [[0, 1, 6, 7], [2, 3, 4, 5, 8, 9, 10, 11]]),
}


def gradient(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_numpy_s(name):
    shape, layout, blocks = CASES[name]
    parameter = nn.Parameter(gradient(shape, 100))
    optimizer = NorMuon([dict(params=[parameter], layout=layout)], lr=0.1, weight_decay=0.3)
    weight = parameter.detach().numpy().copy()
    momentum, squares = np.zeros(shape), np.zeros((*shape[:-1], 1))
    for step in range(4):
        parameter.grad = gradient(shape, step)
        optimizer.step()
        for block in blocks:
            scale = update_scale(*weight[block].shape, None)
            weight[block], momentum[block], squares[block] = normuon_step(
                weight[block], momentum[block], squares[block], parameter.grad.numpy()[block],
                lr=0.1, weight_decay=0.3, scale=scale,
            )  # fmt: skip
        np.testing.assert_allclose(parameter.detach(), weight, atol=1e-10)
        np.testing.assert_allclose(optimizer.state[parameter]["row_squares"], squares, atol=1e-12)


def test_a_transposed_convolution_has_its_rows_where_its_outputs_are():
    parameter = nn.Parameter(gradient((4, 6, 3), 0))
    optimizer = NorMuon([dict(params=[parameter], layout=MatrixLayout(transposed=True))], lr=0.1, weight_decay=0.0)
    parameter.grad = gradient((4, 6, 3), 1)
    before = parameter.detach().clone()
    optimizer.step()
    assert optimizer.state[parameter]["row_squares"].shape == (1, 6, 3)
    rows = (before - parameter.detach()).square().mean(0)
    torch.testing.assert_close(rows, rows.mean().expand(6, 3)), "the first step gives all rows one size"


def test_unused_experts_keep_the_state_of_their_rows():
    parameter = nn.Parameter(gradient((2, 8, 6), 0))
    optimizer = NorMuon([parameter], lr=0.1, freeze_unused=True)
    parameter.grad = gradient((2, 8, 6), 1)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    parameter.grad[1] = 0
    optimizer.step()
    after = optimizer.state[parameter]
    for name in ("row_squares", "momentum_buffer"):
        assert torch.equal(after[name][1], before[name][1])
        assert not torch.equal(after[name][0], before[name][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_to_the_bit_in_its_own_precision(dtype):
    def make():
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((8, 6), (5, 9))]
        return parameters, NorMuon(parameters, lr=0.1)

    def run(parameters, optimizer, steps):
        for step in steps:
            for parameter in parameters:
                parameter.grad = gradient(parameter.shape, step).to(dtype)
            optimizer.step()

    straight, optimizer = make()
    run(straight, optimizer, range(4))
    resumed, optimizer = make()
    run(resumed, optimizer, range(2))
    again, loaded = make()
    with torch.no_grad():
        for new, old in zip(again, resumed, strict=True):
            new.copy_(old)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state[again[0]]["row_squares"].dtype == torch.float32
    run(again, loaded, range(2, 4))
    assert all(map(torch.equal, again, straight))


def test_states_of_muon_and_of_the_variant_load_into_each_other():
    (p, q) = nn.Parameter(gradient((8, 6), 0)), nn.Parameter(gradient((8, 6), 0))
    muon, variant = Muon([p]), NorMuon([q])
    for optimizer, parameter in ((muon, p), (variant, q)):
        parameter.grad = gradient((8, 6), 1)
        optimizer.step()
    muon.load_state_dict(variant.state_dict())
    variant.load_state_dict(Muon([p]).state_dict())
    variant.step()
    assert variant.state[q]["row_squares"].shape == (8, 1)


def test_a_state_of_another_shape_is_refused_before_anything_is_loaded():
    (p, q) = nn.Parameter(gradient((8, 6), 0)), nn.Parameter(gradient((8, 6), 0))
    saved = NorMuon([p]).state_dict()
    saved["state"][0]["row_squares"] = torch.zeros(6, 1)
    optimizer = NorMuon([("w", q)], lr=0.5)
    with pytest.raises(ValueError, match=r"row_squares of w in the checkpoint is \(\(6, 1\).*it would be \(\(8, 1\)"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_a_declared_shape_that_does_not_follow_the_rows_is_refused():
    with pytest.raises(ValueError, match=r"'blocks' of a 5×7 matrix has shape \(1, 7\)"):
        MatrixState("blocks", lambda rows, columns: (1, columns))


class NormsRule(MuonRule):
    """Keeps the norm of each row of the weight, by what the clip says it has done to it."""

    states = (*MuonRule.states, MatrixState("norms", per_row, dtype="wide"))

    def rescale(self, state, factors):
        return {**state, "norms": state["norms"] * factors}


class Norms(MuonClip):
    rule = NormsRule()


@pytest.mark.parametrize("kind", ["mha", "gqa", "mla", "fused_interleaved", "transposed"])
def test_the_clip_tells_a_state_which_rows_it_has_scaled(kind):
    torch.manual_seed(0)
    model = TinyModel(kind)
    optimizer = Norms(model, lr=0.0, qk_clip=QKClip(model, tau=0.05))
    optimizer.state_dict()  # makes the state
    tokens = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(0))
    named = dict(model.named_parameters())
    axes = {
        named[line.name]: line.layout.axes(len(line.shape)).fan_in for line in optimizer.plan.parameters if line.layout
    }
    for parameter, fan_in in axes.items():
        optimizer.state[parameter]["norms"].copy_(parameter.detach().norm(dim=fan_in, keepdim=True))
    before = {parameter: parameter.detach().clone() for parameter in axes}
    for _ in range(3):
        model.loss(tokens).backward()
        optimizer.step()
    assert optimizer.qk_clip.report().last_clipped_step
    moved = [parameter for parameter in axes if not torch.equal(parameter, before[parameter])]
    assert moved
    for parameter, fan_in in axes.items():
        norms = optimizer.state[parameter]["norms"]
        torch.testing.assert_close(norms, parameter.detach().norm(dim=fan_in, keepdim=True))


def test_the_whole_optimizer_trains_with_it():
    torch.manual_seed(0)
    model = TinyModel("mla")
    optimizer = NorMuonClip(model, lr=0.02, tau=0.5)
    tokens = torch.randint(0, 13, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Four ranks save, two load and save, four load; what each found, in this order."""
    folder = tmp_path_factory.mktemp("ranks")
    found = []
    for number, world in enumerate((4, 2, 4)):
        run_ranks(world, WORKER, number, folder)
        found.append([json.loads((folder / f"{number}-{rank}.json").read_text()) for rank in range(world)])
    return found


@pytest.mark.slow
def test_sharded_equals_whole_and_every_row_is_kept_by_those_who_have_it(ranks):
    for run in ranks[:2]:
        for name in run[0]["errors"]:
            assert max(rank["errors"][name] for rank in run) <= 1e-12, name
            assert all(rank["held"].get(name, True) for rank in run), name
        assert len(run[0]["held"]) >= 32


@pytest.mark.slow
def test_a_checkpoint_goes_on_at_another_number_of_ranks(ranks):
    for run in ranks[1:]:
        assert all(rank["loaded"] for rank in run)
        assert max(rank["resumed"] for rank in run) <= 1e-12
