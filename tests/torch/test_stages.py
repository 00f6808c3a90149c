"""A run goes through its stages without a start from nothing, and goes on after a step that was interrupted."""

import copy
import importlib
import math

import numpy as np
import pytest
import stages_worker as stages
import torch
from forked_ranks import run_ranks
from stages_worker import TAU, Model, batch, largest_logits, step
from tiny_attention import UndeclaredAttention

from muonclip.torch import MuonClip
from muonclip.torch.clip import rescaling

execute_module = importlib.import_module("muonclip.torch.update.execute")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def take_by_name(optimizer, saved):
    """As docs/stages.md has it."""
    by_name = {}
    for group in saved["param_groups"]:
        by_name |= {
            name: saved["state"].get(key) for name, key in zip(group["param_names"], group["params"], strict=True)
        }
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for name, key in zip(group["param_names"], group["params"], strict=True):
            if by_name.get(name):
                state["state"][key] = by_name[name]
    optimizer.load_state_dict(state)


@pytest.mark.slow
def test_a_run_goes_through_all_stages(tmp_path):
    model = Model(2)
    optimizer = MuonClip(model, lr=0.01, tau=TAU)
    step(model, optimizer, 0)

    first = model.layers[0]
    first.requires_grad_(False)
    frozen = copy.deepcopy(first)
    momentum = optimizer.state[first.q.weight]["momentum_buffer"].clone()
    step(model, optimizer, 1)
    assert all(map(torch.equal, first.parameters(), frozen.parameters()))
    assert torch.equal(optimizer.state[first.q.weight]["momentum_buffer"], momentum)
    first.requires_grad_(True)
    step(model, optimizer, 2)
    assert not torch.equal(first.q.weight, frozen.q.weight)

    added = UndeclaredAttention()
    model.layers.append(added)
    optimizer.add_param_group(dict(params=[(f"layers.2.{name}", p) for name, p in added.named_parameters()]))
    with torch.no_grad():
        added.q.weight.mul_(9)
    before = added.q.weight.clone()
    step(model, optimizer, 3)
    assert optimizer.qk_clip.report().layers["layers.2"].gamma.min() < 1
    assert not torch.equal(added.q.weight, before)
    added_state = copy.deepcopy(optimizer.state[added.v.weight])

    del model.layers[1]  # the last one takes its name
    step(model, optimizer, 4)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    names = [name for group in saved["optimizer"]["param_groups"] for name in group["param_names"]]
    assert {"layers.1.q.weight", "layers.2.q.weight"} <= set(names)

    model = Model(2)
    model.load_state_dict(saved["model"])
    renamed = copy.deepcopy(saved["optimizer"])
    for group in renamed["param_groups"]:
        group["param_names"] = [
            name.replace("layers.1.", "gone.").replace("layers.2.", "layers.1.") for name in group["param_names"]
        ]
    optimizer = MuonClip(model, lr=0.003, tau=0.04, ns_coefficients="polar_express", weight_decay=0.0)
    with pytest.raises(ValueError, match=r"'gone\.\w\.weight' is in the checkpoint, and not in the optimizer"):
        optimizer.load_state_dict(renamed)
    take_by_name(optimizer, renamed)
    held = optimizer.state[model.layers[1].v.weight]["momentum_buffer"]
    assert torch.equal(held, saved_state(saved["optimizer"], "layers.2.v.weight")["momentum_buffer"])
    assert not torch.equal(held, added_state["momentum_buffer"])
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.003, 0.0)}
    before = model.layers[0].v.weight.clone()
    step(model, optimizer, 5)
    moved = (model.layers[0].v.weight - before).norm() / math.sqrt(before.numel())
    assert 0.1 < moved / (0.003 * 0.2) < 1.5  # the new rate, which is the update's root mean square over 0.2
    assert optimizer.qk_clip.tau == 0.04

    optimizer.qk_clip.tau = TAU
    for group in optimizer.param_groups:
        group["lr"] = 0.002
    stages.save(tmp_path / "before", model, optimizer)
    alone, single = Model(2), None
    single = MuonClip(alone, lr=0.5, tau=TAU)
    stages.load(tmp_path / "before", alone, single)
    for seed in (10, 11):
        step(alone, single, seed)
    run_ranks(2, stages.__file__, tmp_path)
    back = Model(2)
    optimizer = MuonClip(back, lr=0.5, tau=TAU)
    stages.load(tmp_path / "after", back, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.002
    for (name, one), other in zip(alone.named_parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    step(back, optimizer, 12)


def saved_state(saved, wanted):
    for group in saved["param_groups"]:
        for name, key in zip(group["param_names"], group["params"], strict=True):
            if name == wanted:
                return saved["state"][key]
    raise KeyError(wanted)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_clip_that_is_interrupted_gives_no_head_its_factor_twice(monkeypatch, at):
    model = Model(2)
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, tau=TAU)
    x = batch(0)
    maxima = largest_logits(model, x)
    assert (maxima > TAU).all()
    scale_heads, calls = rescaling.scale_heads, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        scale_heads(*arguments)

    monkeypatch.setattr(rescaling, "scale_heads", interrupted)
    model(x).square().mean().backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    between = largest_logits(model, x)
    optimizer.zero_grad()
    step(model, optimizer, 0)
    assert optimizer.qk_clip.report().max_logit == pytest.approx(between.max(), rel=1e-5)  # measured anew
    np.testing.assert_allclose(largest_logits(model, x)[0], np.minimum(between[0], TAU), rtol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_update_that_is_interrupted_leaves_what_the_page_says_and_goes_on(monkeypatch, error):
    model = Model(2)
    optimizer = MuonClip(model, lr=0.01, tau=TAU, workspace_bytes=4000)
    step(model, optimizer, 0)
    iterate, calls = execute_module.iterate, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return iterate(*arguments, **options)

    monkeypatch.setattr(execute_module, "iterate", interrupted)
    before = copy.deepcopy(model)
    model(batch(1)).square().mean().backward()
    with pytest.raises(error):
        optimizer.step()
    monkeypatch.undo()
    moved = {
        name for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True) if not p.equal(old)
    }
    uses = {line.name: line.use for line in optimizer.plan.parameters}
    assert {name for name in uses if uses[name] == "adamw"} - {"layers.0.k.bias", "layers.1.k.bias"} <= moved
    assert any(uses[name] == "muon" for name in moved)
    assert any(uses[name] == "muon" for name in uses.keys() - moved)
    counts = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert counts == {2.0}
    optimizer.zero_grad()
    step(model, optimizer, 2)
    assert all(p.isfinite().all() for p in model.parameters())
    assert largest_logits(model, batch(2)).max() < 2 * TAU


def test_what_is_wrong_with_a_step_that_measures_leaves_its_states_as_zeros(monkeypatch):
    model = Model(2)
    optimizer = MuonClip(model, lr=0.01, tau=TAU)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.layers[0].q.weight.fill_(math.nan)
    model(batch(0)).square().mean().backward()
    with pytest.raises(RuntimeError, match="finite"):
        optimizer.step()
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values() if "momentum_buffer" in state)
    assert torch.equal(model.head.weight, before.head.weight)
