"""Recipes in PyTorch: the same bits as their arguments by hand, and the trajectory of NumPy in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from svd_oracle import muon_step
from tiny_attention import HEADS, NOPE, ROPE, VALUE, TinyModel, dense_max_logits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from muonclip.core import RECIPES, resolve_coefficients
from muonclip.torch import MuonClip

JORDAN = dict(ns_coefficients="jordan", adjust_lr_fn="match_rms_adamw", momentum=0.95, weight_decay=0.1)
BY_HAND = {
    "moonlight": dict(JORDAN, qk_clip=None),
    "k2": dict(JORDAN, tau=100.0),
    "kimi_k3": dict(JORDAN, tau=100.0, per_head=True),
    "glm5": dict(JORDAN, ns_steps=5, qk_clip=None, per_head=True),
    "deepseek_v4": dict(JORDAN, ns_coefficients="deepseek_v4", adjust_lr_fn=("match_rms_adamw", 0.18), qk_clip=None),
    "nvidia": dict(
        JORDAN, momentum=0.9, ns_coefficients="polar_express", ns_steps=16, adjust_lr_fn="match_rms_adamw_closed_form",
        qk_clip=None,
    ),
}  # fmt: skip
RMS = {"deepseek_v4": 0.18, "nvidia": (0.1 / 1.9) ** 0.5}
SETS = {"deepseek_v4": ("deepseek_v4", 10), "nvidia": ("polar_express", 16)}
RATE = 0.02
PER_HEAD = {"q_up": [NOPE + ROPE] * HEADS, "kv_up": [NOPE, VALUE] * HEADS}


def loud_model():
    """In float64, with logits above 100 in some heads."""
    torch.manual_seed(0)
    model = TinyModel("mla").double()
    with torch.no_grad():
        for layer in model.layers:
            layer.q_up.weight[: NOPE + ROPE] *= 150
    return model


def trained(steps=4, **options):
    model = loud_model()
    optimizer = MuonClip(model, lr=RATE, **options)
    for tokens in batches(steps):
        model.loss(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def batches(steps):
    return torch.randint(0, 13, (steps, 3, 9), generator=torch.Generator().manual_seed(1))


def test_the_table_has_every_recipe():
    assert BY_HAND.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_arguments_to_the_bit(name):
    (model, ours), (other, by_hand) = trained(recipe=name), trained(**BY_HAND[name])
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert (ours.qk_clip is None) == (by_hand.qk_clip is None)
    assert ours._layouts == by_hand._layouts


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_the_way_of_numpy(name):
    """Head by head, from the published numbers; gradients are the model's."""
    model = loud_model()
    optimizer = MuonClip(model, lr=RATE, recipe=name)
    seen, clipped = {}, 0
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(
            lambda layer, args, index=index: seen.update({index: layer.qkv_of(args[0])[:2]})
        )
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers")}
    momenta = {n: np.zeros(p.shape) for n, p in matrices.items()}
    for tokens in batches(3):
        model.loss(tokens).backward()
        expected = {}
        for key, p in matrices.items():
            by_head = PER_HEAD.get(key.split(".")[-2], []) if name in ("kimi_k3", "glm5") else []
            edges = np.cumsum(by_head)[:-1]
            blocks = [np.split(x, edges) for x in (p.detach().numpy().copy(), momenta[key], p.grad.numpy())]
            stepped = [
                muon_step(
                    *block, lr=RATE, weight_decay=0.1, mu=0.9 if name == "nvidia" else 0.95, nesterov=True,
                    coefficients=resolve_coefficients(*SETS.get(name, ("jordan", 5))),
                    scale=RMS.get(name, 0.2) * max(block[0].shape) ** 0.5,
                )
                for block in zip(*blocks, strict=True)
            ]  # fmt: skip
            expected[key], momenta[key] = (np.concatenate(parts) for parts in zip(*stepped, strict=True))
        if name in ("k2", "kimi_k3"):
            for index, (q, k) in seen.items():
                for head, maximum in enumerate(dense_max_logits(q, k)):
                    if maximum > 100:
                        clipped += 1
                        scale_head(expected, f"layers.{index}", head, 100 / maximum)
        optimizer.step()
        optimizer.zero_grad()
        for key, p in matrices.items():
            np.testing.assert_allclose(p.detach(), expected[key], rtol=1e-6, atol=1e-7, err_msg=key)
    assert (clipped > 0) == (name in ("k2", "kimi_k3"))


def scale_head(weights, layer, head, gamma):
    q, kv = weights[f"{layer}.q_up.weight"], weights[f"{layer}.kv_up.weight"]
    start = head * (NOPE + ROPE)
    q[start : start + NOPE] *= gamma**0.5
    q[start + NOPE : start + NOPE + ROPE] *= gamma
    kv[head * (NOPE + VALUE) :][:NOPE] *= gamma**0.5


def test_the_plan_says_what_came_from_where():
    text = str(MuonClip(TinyModel(), lr=2e-3, recipe="k2", ns_coefficients="you").plan)
    for line in (
        "recipe k2 (arXiv 2507.20534): Moonlight's Muon with QK-Clip: MuonClip.",
        "momentum = 0.95 (recipe k2)",
        "ns_coefficients = you (given)",
        "lr = 0.002 (given)",
        "tau = 100.0 (recipe k2)",
        "eps = None (default)",
    ):
        assert line in text.splitlines()
    assert "lr = 0.001 (default; k2 published 0.0002" in str(MuonClip(TinyModel(), recipe="k2").plan)
    assert "(default" not in str(MuonClip(TinyModel()).plan)


@pytest.mark.parametrize("made_with", [{"recipe": "nvidia"}, {"recipe": "k2", "momentum": 0.3}, {}])
def test_recipe_and_given_values_survive_a_checkpoint(made_with):
    _, optimizer = trained(recipe="nvidia", momentum=0.8)
    saved = copy.deepcopy(optimizer.state_dict())
    other = MuonClip(loud_model(), **made_with)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["momentum"], group["ns_coefficients"], group["ns_steps"]) == (0.8, "polar_express", 16)
    assert other.plan.recipe.name == "nvidia"
    lines = str(other.plan).splitlines()
    assert "momentum = 0.8 (given)" in lines
    assert "ns_steps = 16 (recipe nvidia)" in lines
    assert other.state_dict()["param_groups"][0]["recipe"] == ("nvidia", "lr", "momentum")
    plain = trained()[1]
    other.load_state_dict(plain.state_dict())
    assert other.plan.recipe is None
    assert "momentum = 0.95" in str(other.plan).splitlines()


def test_a_resumed_run_goes_on_to_the_bit(tmp_path):
    model, optimizer = trained(2, recipe="nvidia", momentum=0.8)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    other = loud_model()
    other.load_state_dict(weights)
    resumed = MuonClip(other, recipe="nvidia")
    resumed.load_state_dict(state)
    for each, its in ((model, optimizer), (other, resumed)):
        each.loss(batches(3)[2]).backward()
        its.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_wrong_recipes_are_refused():
    model = TinyModel()
    with pytest.raises(ValueError, match="known are moonlight, k2, kimi_k3, glm5, deepseek_v4, nvidia"):
        MuonClip(model, recipe="kimi")
    group = dict(params=[nn.Parameter(torch.ones(2, 3))], use="muon", recipe="k2")
    with pytest.raises(ValueError, match=r"recipe, of the optimizer and not of a group"):
        MuonClip([group], qk_clip=None)
    with pytest.raises(ValueError, match=r"tau=math\.inf finds and never clips"):
        MuonClip(nn.Sequential(nn.Linear(3, 4)), recipe="glm5")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_torch_s_distributed_checkpoints_keep_recipe_and_step(tmp_path):
    model, optimizer = trained(2, recipe="k2", momentum=0.8, tau=lambda step: 100.0 - step)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path, no_dist=True)
    other = loud_model()
    resumed = MuonClip(other, recipe="k2", tau=lambda step: 100.0 - step)
    weights, moments = get_state_dict(other, resumed)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert resumed.plan.recipe.given == {"lr", "momentum", "tau"}
    assert resumed.qk_clip.tau_of("layers.0") == 98.0
    for each, its in ((model, optimizer), (other, resumed)):
        each.loss(batches(3)[2]).backward()
        its.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
