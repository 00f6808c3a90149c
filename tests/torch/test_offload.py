"""`offload=True`: the states of the Muon half in host memory. On a processor the same code copies memory to memory.

What differs on CUDA, streams and pinned memory, is in `update/host_copies.py` alone, and was not run here.
"""

import importlib

import pytest
import torch
from tiny_attention import TinyModel
from torch import nn
from variants import CASES, VARIANTS, normal

from muonclip.torch import Muon, MuonClip
from muonclip.torch.update import host_copies

OPTIONS = {
    **VARIANTS,
    "muon": {},
    "unused": {"freeze_unused": True},
    "masters": {"master_weight_bits": 32},
    "masters of 24 bits": {"master_weight_bits": 24, "update": "muown"},
    "momentum in bf16": {"momentum_dtype": torch.bfloat16},
    "momentum in int8": {"momentum_dtype": "int8"},
    "int8 and masters": {"momentum_dtype": "int8", "master_weight_bits": 24, "update": "normuon"},
    "small rounds": {"workspace_bytes": 1},
    "tensor rate": {"lr": torch.tensor(0.05)},
}


def tokens(seed):
    return torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(seed))


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = TinyModel("mla").to(dtype)
    return model, MuonClip(model, **{"lr": 0.05, "tau": 0.5, **options})


def train(model, optimizer, steps):
    for step in steps:
        model.loss(tokens(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def same_states(optimizer, other):
    for p, q in zip(optimizer.state, other.state, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(map(torch.equal, optimizer.state[p].values(), other.state[q].values()))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_is_to_the_bit_what_it_is_without(name):
    options = {"lr": 0.05, **OPTIONS[name]}
    dtype = torch.bfloat16 if "master_weight_bits" in options else torch.float32
    layouts = [layout for _, layout, _ in CASES.values()]
    starts = [torch.tensor(normal(7, shape)).to(dtype) for shape, *_ in CASES.values()]
    both = [[nn.Parameter(each.clone()) for each in starts] for _ in range(2)]
    optimizers = [
        Muon([dict(params=params, layout=layouts)], offload=offload, **options)
        for params, offload in zip(both, (False, True), strict=True)
    ]
    for step in range(4):
        for params, optimizer in zip(both, optimizers, strict=True):
            for index, p in enumerate(params):
                p.grad = (
                    None if (step, index) == (1, 2) else torch.tensor(normal(100 * step + index, p.shape)).to(dtype)
                )
                if p.grad is not None and p.ndim == 3:
                    p.grad[0] = 0
            optimizer.step()
        same_states(*optimizers)


@pytest.mark.parametrize("bits", [None, 24])
def test_the_clip_and_a_resume_find_what_is_in_host_memory(tmp_path, bits):
    dtype = torch.float32 if bits is None else torch.bfloat16
    straight, plain = build(dtype, master_weight_bits=bits)
    train(straight, plain, range(6))
    model, optimizer = build(dtype, master_weight_bits=bits, offload=True)
    train(model, optimizer, range(3))
    assert optimizer.qk_clip.report().clipped_heads
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    for offload in (True, False):
        model, optimizer = build(dtype, master_weight_bits=bits, offload=offload)
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        for target, state in zip((model, optimizer), saved, strict=True):
            target.load_state_dict(state)
        train(model, optimizer, range(3, 6))
        same_states(optimizer, plain)
        assert all(map(torch.equal, model.state_dict().values(), straight.state_dict().values()))
        wide, other = optimizer.fp32_state_dict(model), plain.fp32_state_dict(straight)
        assert all(map(torch.equal, wide.values(), other.values()))


def test_states_are_fetched_a_round_ahead_and_returned_once(monkeypatch):
    """In the order of the work: fetches of a round stand before the computation of the one before it."""
    log = []
    fetch, give_back = host_copies.HostCopies.fetch, host_copies.HostCopies.give_back
    module = importlib.import_module("muonclip.torch.update.execute")
    iterated = module._iterated

    def logged_fetch(self, held):
        working = fetch(self, held)
        assert working.data_ptr() != held.data_ptr()
        log.append(("fetch", held.data_ptr()))
        return working

    def logged_give_back(self, working, held):
        log.append(("return", held.data_ptr()))
        give_back(self, working, held)

    monkeypatch.setattr(host_copies.HostCopies, "fetch", logged_fetch)
    monkeypatch.setattr(host_copies.HostCopies, "give_back", logged_give_back)
    monkeypatch.setattr(module, "_iterated", lambda *a, **k: log.append(("compute", None)) or iterated(*a, **k))
    params = [nn.Parameter(torch.randn(8, 6)) for _ in range(4)]
    optimizer = Muon(params, offload=True, workspace_bytes=1)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert [what for what, _ in log] == [
        *("fetch", "fetch", "compute", "return"),
        *("fetch", "compute", "return"),
        *("fetch", "compute", "return"),
        *("compute", "return"),
    ]
    fetched = [where for what, where in log if what == "fetch"]
    assert fetched == [where for what, where in log if what == "return"]
    assert sorted(fetched) == sorted(optimizer.state[p]["momentum_buffer"].data_ptr() for p in params)


def test_the_plan_says_how_much_is_in_host_memory():
    model, optimizer = build(torch.bfloat16, master_weight_bits=24, offload=True)
    train(model, optimizer, [0])
    muon = [own for own in optimizer.state.values() if "momentum_buffer" in own]
    size = sum(value.nbytes for own in muon for value in own.values())
    assert f"offload: the states of the Muon half, {size / 1024:.4g} KiB, are in host memory" in str(optimizer.plan)
    assert "offload" not in str(build()[1].plan)


def test_states_on_the_host_are_contiguous_whatever_the_parameter_is():
    """So that a part of them is a view, and two parts are returned next to each other."""
    parameter = nn.Parameter(torch.randn(6, 4, 3).permute(2, 0, 1))
    assert not parameter.is_contiguous()
    optimizer = Muon([parameter], offload=True)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["momentum_buffer"].is_contiguous()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(TypeError, match=r"offload='yes' is a str"):
        build(offload="yes")
    with pytest.raises(ValueError, match=r"capturable=True with offload=True"):
        build(capturable=True, offload=True)
