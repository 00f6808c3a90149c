"""τ for each attention, and over time: two attentions in one model, steps, checkpoints."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import run_ranks
from tiny_attention import TinyModel, UndeclaredAttention, dense_max_logits
from torch import nn

from muonclip.torch import MuonClip, QKClip

LOW, HIGH = 0.05, 0.2
TOKENS = torch.randint(0, 13, (3, 9), generator=torch.Generator().manual_seed(3))


def model_of(kind="mha"):
    torch.manual_seed(0)
    return TinyModel(kind).double()


def maxima(model):
    """[attentions][heads], by NumPy."""
    found, hooks = {}, []
    for index, layer in enumerate(model.layers):

        def look(layer, args, index=index):
            found[index] = dense_max_logits(*layer.qkv_of(args[0])[:2])

        hooks.append(layer.register_forward_pre_hook(look))
    with torch.no_grad():
        model(TOKENS[:, :-1])
    for hook in hooks:
        hook.remove()
    return [np.array(found[index]) for index in sorted(found)]


def clipped(model, clip):
    """The maxima before and after one step of the clip alone."""
    before = maxima(model)
    model.loss(TOKENS).backward()
    clip.step()
    model.zero_grad()
    return before, maxima(model)


@pytest.mark.parametrize("observe", ["needed", "always"])
def test_each_attention_ends_at_its_own_tau(observe):
    model = model_of()
    clip = QKClip(model, {"layers.0": LOW, "layers.*": HIGH}, observe=observe)
    before, after = clipped(model, clip)
    assert min(before[0].max(), before[1].max()) > HIGH
    np.testing.assert_allclose(after[0], np.minimum(before[0], LOW), rtol=1e-5)
    expected = clip.report()
    assert expected.tau == {"layers.0": LOW, "layers.1": HIGH}
    assert "layers.0, tau = 0.05" in str(expected)
    # the second attention sees other inputs now; its own factors say to which tau it went
    gamma = expected.layers["layers.1"].gamma.numpy()
    np.testing.assert_allclose(gamma * np.maximum(before[1], HIGH), np.full_like(gamma, HIGH), rtol=1e-5)


def test_the_same_number_for_all_is_the_number_to_the_bit():
    ends = []
    for tau in (LOW, {"*": LOW}, {"layers.0": LOW, "layers.1": LOW}, lambda step: LOW):
        model = model_of("mla")
        optimizer = MuonClip(model, lr=0.01, tau=tau)
        for _ in range(3):
            model.loss(TOKENS).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ends[0], other, strict=True))


def test_a_function_gets_the_number_of_the_step_and_forwards_are_observed_for_it():
    model = model_of()
    taus = [0.3, 0.1, 0.2, 0.05, 0.04]
    clip = QKClip(model, lambda step: taus[step])
    for tau in taus[:4]:
        assert clip.tau_of("layers.0") == tau
        before, after = clipped(model, clip)
        np.testing.assert_allclose(after[0], np.minimum(before[0], tau), rtol=1e-5)
        assert clip.report().tau == {"layers.0": tau, "layers.1": tau}


def test_what_a_function_gives_is_checked_before_a_weight_moves():
    model = model_of()
    optimizer = MuonClip(model, lr=0.01, tau=lambda step: [LOW, LOW, -1.0][step])
    model.loss(TOKENS).backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    model.loss(TOKENS).backward()
    with pytest.raises(ValueError, match=r"tau, a function, at step 2: tau=-1\.0 must be positive"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tau_may_be_set_between_steps_to_any_form():
    model = model_of()
    clip = QKClip(model, HIGH)
    for tau, own in ((LOW, LOW), ({"layers.0": 0.03, "*": HIGH}, 0.03), (lambda step: 0.02 + step / 1000, 0.022)):
        clip.tau = tau
        before, after = clipped(model, clip)
        np.testing.assert_allclose(after[0], np.minimum(before[0], own), rtol=1e-5)
    with pytest.raises(ValueError, match="fits no attention"):
        clip.tau = {"vision": LOW, "*": HIGH}
    with pytest.raises(ValueError, match=r"nothing of the attention 'layers\.1'"):
        clip.tau = {"layers.0": LOW}
    assert clip.tau_of("layers.0") == pytest.approx(0.023)


def test_a_tau_that_is_lowered_after_the_forward_is_an_error_of_its_attention_alone():
    model = model_of()
    clip = QKClip(model, {"layers.0": 1e3, "*": 1e3})
    model.loss(TOKENS).backward()
    clip.tau = {"layers.0": LOW, "*": 1e3}
    with pytest.raises(RuntimeError, match=r"tau was lowered after .* some maxima of layers\.0 between"):
        clip.step()


def trained(tau, steps, start=None):
    model = model_of()
    optimizer = MuonClip(model, lr=0.01, tau=tau)
    if start is not None:
        model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
    for _ in range(steps):
        model.loss(TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def ramp(step):
    return 0.3 / (1 + step)


def test_a_resumed_run_goes_on_at_its_step(tmp_path):
    whole, _ = trained(ramp, 4)
    model, optimizer = trained(ramp, 2)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    resumed, after = trained(ramp, 2, torch.load(tmp_path / "saved.pt", weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert after.param_groups[0]["clip_step"] == 4
    assert "clip_step" not in trained(LOW, 1)[1].param_groups[0]


def test_a_checkpoint_without_the_step_is_said_to_be_one():
    model, optimizer = trained(LOW, 2)
    with pytest.warns(UserWarning, match="does not say at which the clip was: it goes on at 0"):
        trained(ramp, 0, (model.state_dict(), optimizer.state_dict()))
    saved = trained(ramp, 1)[1].state_dict()
    saved["param_groups"][0]["clip_step"] = -1
    other = MuonClip(model_of(), tau=ramp)
    with pytest.raises(ValueError, match="clip_step=-1 must be a whole number of at least 0"):
        other.load_state_dict(saved)
    assert other.qk_clip.state_dict() == {"step": 0}


def test_a_clip_alone_keeps_its_step():
    model = model_of()
    clip = QKClip(model, ramp)
    for _ in range(3):
        clipped(model, clip)
    other = QKClip(model, ramp)
    other.load_state_dict(clip.state_dict())
    assert other.tau_of("layers.0") == clip.tau_of("layers.0") == ramp(3)
    with pytest.raises(TypeError, match="step=None"):
        other.load_state_dict({})


class TwoTowers(nn.Module):
    """Attentions of two kinds of names that nobody declares."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 10)
        self.vision, self.text = nn.ModuleList([UndeclaredAttention()]), nn.ModuleList([UndeclaredAttention()])
        self.head = nn.Linear(10, 13)

    def loss(self, tokens):
        x = self.embed(tokens[:, :-1])
        for layer in (*self.vision, *self.text):
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x).mT, tokens[:, 1:])


def test_attentions_that_are_found_have_their_own_tau_in_the_plan_and_in_the_step():
    model = TwoTowers()
    optimizer = MuonClip(model, lr=0.01, tau={"vision.*": LOW, "*": 1e3})
    for _ in range(2):
        model.loss(TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = optimizer.qk_clip.report().layers
    assert (layers["vision.0"].gamma < 1).any()
    assert (layers["text.0"].gamma == 1).all()
    text = str(optimizer.plan)
    assert "above tau = 0.05" in text
    assert "above tau = 1000" in text
    assert "tau = {'vision.*': 0.05, '*': 1000.0}" in text


def test_an_attention_that_is_found_and_has_no_tau_is_refused_by_name():
    model = TwoTowers()
    optimizer = MuonClip(model, lr=0.01, tau={"vision.*": LOW})
    with pytest.raises(ValueError, match=r"says nothing of the attention 'text\.0'"):
        model.loss(TOKENS)
    optimizer.qk_clip.tau = {"vision.*": LOW, "*": HIGH}
    model.loss(TOKENS).backward()
    optimizer.step()


def test_a_graph_does_not_call_a_function():
    with pytest.raises(ValueError, match="capturable=True with a tau that is a function"):
        MuonClip(model_of(), tau=ramp, capturable=True)


def test_a_copy_of_the_optimizer_has_the_step_and_the_function():
    model, optimizer = trained(ramp, 2)
    other, copied = copy.deepcopy((model, optimizer))
    for each, its in ((model, optimizer), (other, copied)):
        each.loss(TOKENS).backward()
        its.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_ranks_that_shard_a_model_clip_as_one(tmp_path):
    run_ranks(2, Path(__file__).parents[1] / "support" / "tau_worker.py", tmp_path)
    found = json.loads((tmp_path / "rank0.json").read_text(encoding="utf-8"))
    assert found["apart"] < 1e-6
    assert all(ours == theirs > 0 for ours, theirs in found["clipped"])
