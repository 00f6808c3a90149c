"""Optimizers that keep a second copy of the weights: known ones are clipped with them, of others it is said."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from second_copies import HookedLookahead, Lookahead, MadGrad, Masters, ScheduleFree
from tiny_attention import HEAD, WIDTH, TinyAttention, TinyModel, dense_max_logits

from muonclip.torch import MuonClip, QKClip
from muonclip.torch.clip import errors as errors_module
from muonclip.torch.clip import qk_clip as qk_clip_module

SAID = r"QK-Clip scales weight of Linear in attn, and they come back"


def sgd(parameters, lr=1e-4):
    return torch.optim.SGD(parameters, lr)


KNOWN = {
    "schedule-free": lambda p: ScheduleFree(p, 1e-4),
    "schedule-free with squares": lambda p: ScheduleFree(p, 1e-4, squares=0.9),
    "schedule-free, x and y kept": lambda p: ScheduleFree(p, 1e-4, explicit=True),
    "lookahead": lambda p: Lookahead(sgd(p)),
    "lookahead, state of the inner": lambda p: Lookahead(sgd(p), name="lookahead_slow_buff", inner=True),
    "lookahead with hooks": lambda p: HookedLookahead(sgd(p), name="slow_params", hooks=True),
    "masters": lambda p: Masters(p, 1e-4, name="master_param"),
    "fp32 copies": lambda p: Masters(p, 1e-4, name="fp32_param"),
    "apex": lambda p: Masters(p, 1e-4, place="apex"),
    "dual averaging": lambda p: MadGrad(p, 1e-4),
}
UNKNOWN = {
    "state": lambda p: Masters(p, 1e-4, name="shadow"),
    "dict": lambda p: Masters(p, 1e-4, place="dict"),
    "dict by id": lambda p: Masters(p, 1e-4, place="by id"),
    "list": lambda p: Masters(p, 1e-4, place="list"),
    "lookahead": lambda p: Lookahead(sgd(p), k=2, name="shadow"),
    "lookahead, state of the inner": lambda p: Lookahead(sgd(p), k=2, name="shadow", inner=True),
    "lookahead with hooks": lambda p: HookedLookahead(sgd(p), k=2, name="shadow", hooks=True),
}


class Clipped:
    """An attention with a loud head that is trained, and clipped after each step."""

    def __init__(self, make, kind="mha", by_hand=False, dtype=torch.float64, tau=2.0):
        torch.manual_seed(0)
        self.layer, self.x = TinyAttention(kind).to(dtype), torch.randn(2, 8, WIDTH, dtype=dtype)
        with torch.no_grad():
            for rows in (*self.layer.qk_projection().query, *self.layer.qk_projection().query_facing_shared):
                rows.of(*next(rows.parameters()))[1] *= 30
        self.tau, self.by_hand = tau, by_hand
        self.optimizer = make(self.layer.parameters())
        self.clip = QKClip({"attn": self.layer.qk_projection()}, tau, observe="always")
        if not by_hand:
            self.clip.attach(self.optimizer)

    def step(self, steps=1, accumulate=1):
        for _ in range(steps):
            for _ in range(accumulate):
                self.layer(self.x).square().mean().backward()
            self.optimizer.step()
            if self.by_hand:
                self.clip.step()
            self.optimizer.zero_grad()

    def loudest(self, weights=None):
        """The largest logit over τ; of the weights that this function gives for each parameter."""
        layer = self.layer
        if weights is not None:
            values = {name: weights(p).detach() for name, p in self.layer.named_parameters()}
            layer = copy.deepcopy(self.layer)
            layer.load_state_dict(values)
        q, k, _ = layer.qkv_of(self.x)
        return float(dense_max_logits(q.double(), k.double()).max()) / self.tau


@contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize(
    ("name", "by_hand"),
    [(name, by_hand) for name in KNOWN for by_hand in (False, True) if (name, by_hand) != ("lookahead", True)],
)
def test_a_known_copy_is_clipped_with_the_weights(name, by_hand, kind):
    """By hand, what only a wrapper without hooks has is out of reach; see what is said of it below."""
    run = Clipped(KNOWN[name], kind, by_hand)
    assert run.loudest() > 10
    with silence():
        for _ in range(8):
            run.step()
            assert run.loudest() < 1.01


@pytest.mark.parametrize("explicit", [False, True])
def test_schedule_free_s_average_and_its_fast_weights_are_held_too(explicit):
    run = Clipped(lambda p: ScheduleFree(p, 1e-4, explicit=explicit))
    for _ in range(5):
        run.step()
        assert run.loudest(run.optimizer.average_of) < 1.01
        assert run.loudest(lambda p: run.optimizer.state[p]["z"]) < 1.01


def test_a_copy_has_the_factors_of_its_weights_and_keeps_its_precision():
    run = Clipped(lambda p: Masters(p, 1e-4, name="master", dtype=torch.float32), dtype=torch.bfloat16)
    for _ in range(6):
        run.step()
        assert run.loudest() < 1.03
    wide = run.optimizer.state[run.layer.q.weight]["master"]
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.bfloat16(), run.layer.q.weight.detach(), rtol=1e-2, atol=1e-4)
    assert not torch.equal(wide, wide.bfloat16().float())


def test_a_master_that_is_given_and_kept_is_scaled_once():
    run = Clipped(lambda p: Masters(p, 1e-4, name="master"))
    run.clip.master_of = lambda p: run.optimizer.state[p]["master"]
    run.step()
    torch.testing.assert_close(run.optimizer.state[run.layer.q.weight]["master"], run.layer.q.weight.detach())


class Moments(torch.optim.SGD):
    """Keeps what is not a copy: moments, FTRL's z, weights before a perturbation (SAM: the weights themselves)."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.0)
        for group in self.param_groups:
            for p in group["params"]:
                names = "exp_avg", "exp_avg_slow", "slow_momentum", "z", "s", "ema", "ax", "p0"
                self.state[p] = {name: torch.ones_like(p) for name in names} | {"old_p": p.data, "master": p.data}


def test_moments_and_averages_are_not_scaled():
    run = Clipped(Moments)
    before, gamma = run.layer.q.weight.detach().clone(), None
    run.step()
    gamma = run.clip.report().layers["attn"].gamma
    assert gamma[1] < 0.2
    state = run.optimizer.state[run.layer.q.weight]
    assert all(bool((value == 1).all()) for name, value in state.items() if name not in ("old_p", "master"))
    rows = slice(HEAD, 2 * HEAD)
    torch.testing.assert_close(run.layer.q.weight[rows].detach(), before[rows] * gamma[1].double().sqrt())


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_of_other_copies_it_is_said_once_that_the_weights_came_back(name, by_hand):
    run = Clipped(UNKNOWN[name], by_hand=by_hand)
    with pytest.warns(UserWarning, match=SAID) as said:
        run.step(12)
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["gqa", "fused_interleaved"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_it_is_said_at_the_step_after_the_first_clip(by_hand, kind):
    run = Clipped(lambda p: Masters(p, 1e-4, name="shadow", dtype=torch.float32), kind, by_hand, torch.bfloat16)
    with silence():
        run.step()
    with pytest.warns(UserWarning, match="and they come back"):
        run.step()


def test_masters_of_which_an_engine_knows_alone_are_noticed():
    """The optimizer has the masters; the engine's loop copies them into the model."""
    run = Clipped(lambda p: sgd([q.detach().clone() for q in p]))
    masters = run.optimizer.param_groups[0]["params"]

    def train():
        for _ in range(6):
            run.layer(run.x).square().mean().backward()
            for p, master in zip(run.layer.parameters(), masters, strict=True):
                master.grad = p.grad
            run.optimizer.step()
            with torch.no_grad():
                for p, master in zip(run.layer.parameters(), masters, strict=True):
                    p.copy_(master)
                    p.grad = None

    with pytest.warns(UserWarning, match=SAID) as said:
        train()
    assert len(said) == 1


def test_on_an_accelerator_it_is_said_when_the_flags_have_arrived(monkeypatch):
    arrived = []
    monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: False)
    monkeypatch.setattr(errors_module, "copy_to_host", lambda host, device: arrived.append((host, device.clone())))
    run = Clipped(UNKNOWN["state"])
    with silence():
        run.step(4)

    def train():
        for _ in range(6):
            for host, device in arrived:
                host.copy_(device)
            run.step()

    with pytest.warns(UserWarning, match=SAID):
        train()


HOT = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
    "schedule-free": lambda model: ScheduleFree(model.parameters(), lr=0.05, squares=0.9),
    "muon": lambda model: MuonClip(model, lr=0.1, tau=0.05),
}


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", HOT)
def test_an_explosion_is_not_taken_for_a_copy(name, by_hand):
    """Heads that are clipped at each step grow back along their weights, which are the sum of their updates."""
    torch.manual_seed(0)
    model, tokens = TinyModel(), torch.randint(0, 13, (2, 9))
    optimizer = HOT[name](model)
    clip = getattr(optimizer, "qk_clip", None) or QKClip(model, tau=0.05)
    if not by_hand and clip is not getattr(optimizer, "qk_clip", None):
        clip.attach(optimizer)
    with silence():
        for _ in range(30):
            model.loss(tokens).backward()
            optimizer.step()
            if by_hand and clip is not getattr(optimizer, "qk_clip", None):
                clip.step()
            optimizer.zero_grad()
    assert clip._returned._moves_within, "which alone would look like a copy"


def test_swapped_weights_perturbations_and_accumulation_are_silent():
    run = Clipped(lambda p: torch.optim.AdamW(p, lr=1e-2), tau=0.3)
    average = copy.deepcopy(run.layer)
    with silence():
        for _ in range(6):
            run.step(accumulate=2)
            with torch.no_grad():  # an evaluation with an average, which is louder than the weights
                kept = [p.clone() for p in run.layer.parameters()]
                for p, mean in zip(run.layer.parameters(), average.parameters(), strict=True):
                    mean.lerp_(p, 0.1)
                    p.copy_(mean)
                run.layer(run.x)
                for p, own in zip(run.layer.parameters(), kept, strict=True):
                    p.copy_(own)
            run.layer(run.x).square().mean().backward()
            with torch.no_grad():  # SAM: gradients at W + ε, then W again
                kept = [p.clone() for p in run.layer.parameters()]
                for p in run.layer.parameters():
                    p.add_(p.grad, alpha=0.1)
            run.optimizer.zero_grad()
            run.layer(run.x).square().mean().backward()
            with torch.no_grad():
                for p, own in zip(run.layer.parameters(), kept, strict=True):
                    p.copy_(own)
            run.optimizer.step()
            run.optimizer.zero_grad()


def test_weights_that_are_loaded_or_copied_back_once_are_silent():
    run = Clipped(sgd)
    good = copy.deepcopy(run.layer.state_dict())
    with silence():
        for _ in range(3):  # each time the head is as loud as before the first clip
            run.step()
            run.step()
            run.layer.load_state_dict(good)
        run.step()
        with torch.no_grad():
            for name, p in run.layer.named_parameters():
                p.copy_(good[name])
        run.step()


class Accelerated(torch.optim.Optimizer):
    """Wraps an optimizer as accelerate does, without `Optimizer.__init__`."""

    def __init__(self, optimizer):
        self.optimizer, self.defaults = optimizer, optimizer.defaults

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_attached_to_a_wrapper_it_clips_in_the_steps_that_run_hooks():
    run = Clipped(lambda p: Accelerated(sgd(p)))
    run.step()
    assert run.loudest() < 1.01


def test_what_runs_no_hooks_is_refused():
    class Own:
        def step(self):
            pass

    clip = QKClip({"attn": TinyAttention().qk_projection()})
    with pytest.raises(ValueError, match=r"a Own, and not a torch.optim.Optimizer whose steps run hooks.*clip\.step"):
        clip.attach(Own())
    with pytest.raises(ValueError, match="clips by itself"):
        clip.attach(Accelerated(MuonClip(TinyModel())))
