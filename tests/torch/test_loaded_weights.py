"""An observation belongs to the weights it was made with: a load forgets it, weights that come back keep it."""

import copy
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from tiny_attention import HEAD, WIDTH, TinyAttention, TinyModel
from torch import nn
from torch.distributed.checkpoint import load, save, state_dict_loader

from muonclip.torch import MuonClip, QKClip


def batch(seed=0):
    return torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(seed))


def loudest(model):
    return max(float(layer.max_logits.bound.max()) for layer in model.layers)


def trained(**options):
    """A model whose heads are quiet, after one step, and its optimizer, which does not move the weights."""
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, tau=50.0, **options)
    model.loss(batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def spike(model, factor):
    """Head 0 of the first layer explodes; the loss is bad, so that no step follows."""
    with torch.no_grad():
        model.layers[0].q.weight[:HEAD] *= factor
    model.loss(batch()).backward()
    model.zero_grad()


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def step_leaves(model, optimizer, weights):
    """A step leaves the weights as they are: every head is quiet."""
    model.loss(batch()).backward()
    optimizer.step()
    return all(map(torch.equal, model.parameters(), weights))


@contextmanager
def checkpoint_of(model, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", category=FutureWarning)
        save(model.state_dict(), checkpoint_id=path)
        yield


@pytest.mark.parametrize("factor", [1e4, math.nan])
@pytest.mark.parametrize("assign", [False, True])
def test_after_a_spike_the_last_good_weights_train_on(factor, assign):
    model, optimizer = trained()
    good, weights = copy.deepcopy(model.state_dict()), weights_of(model)
    spike(model, factor)
    model.load_state_dict(good, assign=assign)
    assert step_leaves(model, optimizer, weights)


@pytest.mark.parametrize("attached", [False, True])
def test_the_optimizer_s_load_is_enough(attached):
    model, optimizer = trained()
    if attached:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        clip = QKClip(model, tau=50.0)
        attachment = clip.attach(optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), weights_of(model)
    spike(model, 1e4)
    with torch.no_grad():
        model.layers[0].q.weight[:HEAD] /= 1e4
    optimizer.load_state_dict(saved)
    torch.testing.assert_close(weights_of(model), weights, rtol=1e-6, atol=0)
    assert step_leaves(model, optimizer, weights_of(model))
    if attached:
        model.loss(batch())
        attachment.remove()
        optimizer.load_state_dict(saved)
        assert model.layers[0].max_logits.observed == 1


def test_a_load_of_a_part_is_forgotten_by_its_attentions_alone():
    model, _ = trained()
    model.loss(batch())
    model.layers[0].load_state_dict(model.layers[0].state_dict())
    assert [float(layer.max_logits.observed) for layer in model.layers] == [0, 1]
    model.layers[1].k.load_state_dict(model.layers[1].k.state_dict())
    assert model.layers[1].max_logits.observed == 0
    model.loss(batch())
    model.lm_head.load_state_dict(model.lm_head.state_dict())
    assert model.layers[0].max_logits.observed == 1


def test_a_checkpoint_loaded_in_place_is_a_load(tmp_path):
    model, optimizer = trained()
    weights = weights_of(model)
    with checkpoint_of(model, tmp_path):
        spike(model, 1e4)
        load(model.state_dict(), checkpoint_id=tmp_path)  # and no load_state_dict of the model
    assert step_leaves(model, optimizer, weights)


def test_a_checkpoint_of_another_model_is_none(tmp_path):
    model, _ = trained()
    other = copy.deepcopy(model)
    with checkpoint_of(model, tmp_path):
        model.loss(batch())
        load(other.state_dict(), checkpoint_id=tmp_path)
        other.load_state_dict(model.state_dict())
        save(model.state_dict(), checkpoint_id=tmp_path / "again")
    assert loudest(model) > 0


def test_given_projections_forget_as_well(tmp_path):
    torch.manual_seed(0)
    layer, x = TinyAttention(), torch.randn(1, 5, WIDTH)
    clip = QKClip({"attn": layer.qk_projection()})
    layer(x)
    layer.load_state_dict(layer.state_dict())
    assert layer.max_logits.observed == 0
    with checkpoint_of(layer, tmp_path):
        layer(x)
        load(layer.state_dict(), checkpoint_id=tmp_path)
    assert layer.max_logits.observed == 0
    clip.remove()
    layer(x)
    layer.load_state_dict(layer.state_dict())
    assert layer.max_logits.observed == 1


def test_weights_that_come_back_keep_their_observation():
    """An average swapped in for an evaluation and out again, and SAM's perturbation."""
    model, optimizer = trained()
    model.loss(batch()).backward()
    seen = loudest(model)
    backup = weights_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        model.loss(batch(1))
        for parameter, weight in zip(model.parameters(), backup, strict=True):
            parameter.copy_(weight)
    assert loudest(model) == seen > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.grad)
    optimizer.zero_grad()
    model.loss(batch()).backward()
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), backup, strict=True):
            parameter.copy_(weight)
    assert loudest(model) >= seen
    optimizer.step()


def test_a_load_before_the_first_step_changes_nothing():
    models = []
    for loads in (False, True):
        torch.manual_seed(0)
        model = TinyModel()
        optimizer = MuonClip(model, lr=1e-2, tau=0.1)
        if loads:
            model.load_state_dict(model.state_dict())
            optimizer.load_state_dict(optimizer.state_dict())
        for seed in range(2):
            model.loss(batch(seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_gradients_of_weights_that_were_replaced_need_a_new_forward():
    model, optimizer = trained()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    model.loss(batch()).backward()
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="since the last step or load_state_dict"):
        optimizer.step()


def test_without_a_clip_nothing_is_left_behind():
    model, _ = trained()
    clip = QKClip(model)
    model.loss(batch())
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert model.layers[0].max_logits.observed == 1
    clip.remove()
    assert not any(module._load_state_dict_post_hooks for module in model.modules())


def test_the_host_s_own_load_is_back_when_nobody_watches(no_other_loads):
    host = state_dict_loader._load_state_dict
    clip = QKClip({"attn": TinyAttention().qk_projection()})
    assert state_dict_loader._load_state_dict is not host
    clip.remove()
    assert state_dict_loader._load_state_dict is host
    layer = TinyAttention()
    clip = QKClip(nn.ModuleList([layer]), declare={"0": layer.qk_projection()})
    assert state_dict_loader._load_state_dict is not host
    del clip
    assert state_dict_loader._load_state_dict is host
