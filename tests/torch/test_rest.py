"""Another optimizer for what Muon does not take: one step, one state, one list of groups, with the clip."""

import copy
import functools
import inspect
import io
import pickle
import warnings

import pytest
import rest_worker
import torch
from forked_ranks import run_ranks
from rest_worker import CLASSES, Lion
from tiny_attention import TinyModel
from torch import nn
from torch.optim import NAdam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from unchanged import Unchanged, UnchangedByError, differences

from muonclip.torch import MuonClip, QKClip
from muonclip.torch.distributed import clip_grad_norm_

partial = functools.partial


def tokens(seed):
    return torch.randint(13, (2, 6), generator=torch.Generator().manual_seed(seed))


def made(rest, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = TinyModel().to(dtype)
    return model, MuonClip(model, **{"lr": 0.01, "tau": 0.5, "rest": rest, **options})


def train(model, optimizer, seeds):
    for seed in seeds:
        model.loss(tokens(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


def alike(a, b):
    assert all(map(torch.equal, a.parameters(), b.parameters()))


def others_of(model):
    return [(name, p) for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name or "head" in name]


@pytest.mark.parametrize("name", CLASSES)
def test_each_half_is_what_its_optimizer_does_alone_and_the_clip_is_exact(name):
    """The other optimizers begin each step where this one does; the rest has no decay on vectors."""
    make = CLASSES[name]
    options = getattr(make, "keywords", {})
    model, optimizer = made(make)
    alone, (plain, with_adamw) = copy.deepcopy(model), made(None)
    named = dict(others_of(alone))
    decayed = [p for p in named.values() if p.ndim == 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    own = make([{"params": decayed}, {"params": vectors, "weight_decay": 0.0}], **{"lr": 0.01, **options})
    QKClip(alone, tau=0.5).attach(own)  # which scales biases of queries and keys, too
    for step in range(4):
        for each in (alone, plain):
            each.load_state_dict(model.state_dict())
        for each, steps in ((model, optimizer), (alone, own), (plain, with_adamw)):
            each.loss(tokens(step)).backward()
            steps.step()
            each.zero_grad()
        for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, named.get(key, q)), key
        assert optimizer.qk_clip.report().clipped_heads > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", ["saved", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_run_that_is_saved_or_copied_goes_on_to_the_bit(name, copied, dtype):
    model, optimizer = made(CLASSES[name], dtype)
    train(model, optimizer, range(3))
    if copied == "saved":
        other = copy.deepcopy(model)
        resumed = MuonClip(other, lr=0.3, tau=0.5, rest=CLASSES[name])  # the options come with the state
        saved = copy.deepcopy(optimizer.state_dict())
        torch.save(saved, buffer := io.BytesIO())
        buffer.seek(0)
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
    elif copied == "deepcopy":
        other, resumed = copy.deepcopy((model, optimizer))
    else:
        other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    assert vars(resumed.rest).keys() == vars(optimizer.rest).keys()
    assert resumed.rest.state is resumed.state
    for each in ((model, optimizer), (other, resumed)):
        train(*each, range(3, 6))
    alike(model, other)
    assert not list(differences(optimizer.state_dict(), resumed.state_dict()))


def test_the_rate_is_ours_or_the_partial_s_and_the_decay_the_class_s():
    _, optimizer = made(NAdam, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01] * 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0, 0]
    _, optimizer = made(partial(NAdam, lr=0.002, weight_decay=0.3, betas=(0.8, 0.9)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.002, 0.002]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.3, 0]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.95, 0.8, 0.8]
    printed = str(optimizer.plan)
    assert "rest = torch NAdam(lr=0.002, betas=(0.8, 0.9)" in printed
    assert "embed.weight" in printed.split("NAdam")[0].splitlines()[-1]
    assert "adamw" not in printed.replace("match_rms_adamw", "")


def test_a_scheduler_moves_the_rates_and_betas_of_both_halves():
    model, optimizer = made(Lion)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, [0])
    scheduler.step()
    assert [group["lr"] for group in optimizer.rest.param_groups] == [0.005, 0.005]
    optimizer = MuonClip(model, lr=0.01, qk_clip=None, rest=Lion)
    OneCycleLR(optimizer, max_lr=0.02, total_steps=10, base_momentum=0.8, max_momentum=0.9)
    for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [group["betas"][0] for group in optimizer.rest.param_groups] == [0.9, 0.9]
    assert optimizer.rest.param_groups[0] is optimizer.param_groups[1]


def test_one_step_runs_hooks_once_and_evaluates_a_closure_once():
    model, optimizer = made(NAdam)
    stepped, called = [], []
    hook = register_optimizer_step_post_hook(lambda each, *_: stepped.append(type(each).__name__))

    def closure():
        called.append(1)
        optimizer.zero_grad()
        loss = model.loss(tokens(0))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    hook.remove()
    assert (stepped, len(called)) == (["MuonClip"], 1)
    assert loss > 0


def test_groups_may_be_given_and_added_and_are_taken_back_by_an_error():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(3)]
    groups = [
        dict(params=[("0.weight", layers[0].weight)], use="muon"),
        dict(params=[("0.bias", layers[0].bias)], use="rest", momentum_decay=0.1, lr=0.5),
        dict(params=[("1.weight", layers[1].weight), ("1.bias", layers[1].bias)], lr=0.25, weight_decay=0.1),
    ]
    optimizer = MuonClip(groups, qk_clip=None, rest=NAdam)
    assert [group["use"] for group in optimizer.param_groups] == ["muon", "rest", "muon", "rest"]
    assert [group["lr"] for group in optimizer.rest.param_groups] == [0.5, 0.25]
    assert [group["momentum_decay"] for group in optimizer.rest.param_groups] == [0.1, 4e-3]
    optimizer.add_param_group(dict(params=[("2.bias", layers[2].bias)], use="rest", betas=(0.5, 0.6)))
    assert len(optimizer.rest.param_groups) == 3
    again = dict(params=[("other", layers[2].weight), ("2.bias", layers[2].bias)])
    with UnchangedByError(optimizer, match="more than one parameter group"):
        optimizer.add_param_group(again)
    assert [*map(id, optimizer.rest.param_groups)] == [id(g) for g in optimizer.param_groups if g["use"] == "rest"]
    with UnchangedByError(optimizer, match="momentm_decay=1 in a parameter group with use='rest' is not an .*NAdam"):
        optimizer.add_param_group(dict(params=[("2.weight", layers[2].weight)], use="rest", momentm_decay=1))
    assert len(optimizer.rest.param_groups) == 3
    layers[2](torch.ones(2, 6)).square().sum().backward()
    before = layers[2].bias.clone()
    optimizer.step()
    assert not torch.equal(layers[2].bias, before)
    with pytest.raises(ValueError, match="use='adamw' in a parameter group; it is one of 'muon', 'rest'"):
        MuonClip([dict(params=[layers[0].bias], use="adamw")], qk_clip=None, rest=NAdam)
    with pytest.raises(ValueError, match="use='rest' in a parameter group; it is one of 'muon', 'adamw'"):
        MuonClip([dict(params=[layers[0].bias], use="rest")], qk_clip=None)


def test_a_model_without_a_rest_has_none():
    optimizer = MuonClip([dict(params=[("w", nn.Linear(4, 4).weight)], use="muon")], qk_clip=None, rest=NAdam)
    assert optimizer.rest is None
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    optimizer.step()
    bias = nn.Parameter(torch.ones(4))
    optimizer.add_param_group(dict(params=[("b", bias)], use="rest"))
    bias.grad = torch.ones(4)
    optimizer.step()
    assert (bias < 1).all()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_clip_grad_norm_takes_the_rest_for_the_half_that_is_not_muon_s():
    model, optimizer = made(NAdam)
    model.loss(tokens(0)).backward()
    others = [p.grad for _, p in others_of(model)]
    expected = torch.nn.utils.get_total_norm(others)
    assert torch.allclose(clip_grad_norm_(optimizer, 1e9, only="adamw"), expected)
    assert not torch.allclose(clip_grad_norm_(optimizer, 1e9, only="muon"), expected)


def test_sparse_gradients_are_the_class_s_affair():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4))
    optimizer = MuonClip(model, qk_clip=None, lr=0.1, rest=torch.optim.SGD)
    before = model[0].weight.detach().clone()
    model(torch.tensor([3])).sum().backward()
    optimizer.step()
    assert (model[0].weight != before).any(1).nonzero().flatten().tolist() == [3]


class Failing(NAdam):
    """Raises in its step, before or after it has updated its parameters."""

    def __init__(self, params, lr, *, late):
        super().__init__(params, lr)
        self.late, self.fails = late, False

    @torch.no_grad()
    def step(self, closure=None):
        if self.late or not self.fails:
            super().step(closure)
        if self.fails:
            raise RuntimeError("no more")


@pytest.mark.parametrize("late", [False, True])
def test_a_rest_that_raises_leaves_muon_s_half_and_says_so(late):
    model, optimizer = made(partial(Failing, late=late))
    train(model, optimizer, range(2))
    other, same = copy.deepcopy((model, optimizer))
    assert (same.rest.late, same.rest.fails) == (late, False)
    optimizer.rest.fails = True
    model.loss(tokens(2)).backward()
    muons = list(optimizer.param_groups[0]["params"])
    states = [optimizer.state[p]["momentum_buffer"] for p in muons]
    theirs = [p for _, p in others_of(model)]
    with Unchanged(*muons, *states, *(() if late else theirs)), pytest.raises(RuntimeError, match="no more") as caught:
        optimizer.step()
    assert "no matrix of Muon's has moved and nothing was clipped" in caught.value.__notes__[0]
    optimizer.rest.fails = False
    optimizer.zero_grad()
    train(model, optimizer, range(3, 5))
    assert all(p.isfinite().all() for p in model.parameters())
    assert same.rest is not optimizer.rest
    train(other, same, [2])


class NeedsMore(NAdam):
    def __init__(self, params, lr, secret):
        super().__init__(params, lr)


class Divides(NAdam):
    def __init__(self, params, lr):
        super().__init__([{"params": [p]} for group in params for p in group["params"]], lr)


class NoRate(Optimizer):
    def __init__(self, params):
        super().__init__(params, {"speed": 1.0})


WRONG = {
    "an instance": (
        lambda model: NAdam(model.parameters()),
        TypeError,
        r"rest=NAdam\(…\) is an optimizer that was made",
    ),
    "a function": (lambda _: lambda params: NAdam(params), TypeError, "rest=<function .* is a function. Give a class"),
    "a string": (lambda _: "nadam", TypeError, "rest='nadam' is a str. Give a class of optimizers"),
    "another class": (lambda _: nn.Linear, TypeError, "is a type. Give a class of optimizers"),
    "a dict": (lambda _: {"lr": 1}, TypeError, r"rest=\{'lr': 1\} is a dict"),
    "a partial of no class": (lambda _: partial(print), TypeError, "is a builtin_function_or_method. Give a class"),
    "by position": (lambda _: partial(NAdam, [1]), TypeError, "by position; give options by name"),
    "a closure": (lambda _: torch.optim.LBFGS, TypeError, "rest=LBFGS needs a closure in each step"),
    "unknown arguments": (lambda _: partial(NAdam, rho=1), TypeError, r"rest=NAdam could not be made .*rho=1.* 'rho'"),
    "arguments that are needed": (lambda _: NeedsMore, TypeError, "rest=NeedsMore could not .*'secret' .*partial"),
    "a wrong value": (
        lambda _: partial(NAdam, lr=-1.0),
        ValueError,
        "rest=NAdam could not .*Invalid learning rate: -1",
    ),
    "Muon": (lambda _: torch.optim.Muon, ValueError, "rest=Muon could not .*only supports 2D parameters"),
    "its own groups": (lambda _: Divides, ValueError, "rest=Divides divides its parameter groups otherwise"),
    "no rate": (lambda _: NoRate, ValueError, "rest=NoRate has no lr in its parameter groups"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_class_of_optimizers_is_refused_and_leaves_the_model_alone(wrong):
    make, error, said = WRONG[wrong]
    model = TinyModel()
    with Unchanged(model), pytest.raises(error, match=said):
        MuonClip(model, rest=make(model))


def test_two_optimizers_for_one_half_are_refused():
    model = TinyModel()
    with pytest.raises(ValueError, match=r"adamw=\{'lr': 1\} and rest=.*NAdam.* are two optimizers for one half"):
        MuonClip(model, adamw={"lr": 1}, rest=NAdam)
    with pytest.raises(ValueError, match="capturable=True with rest=: give it to the class"):
        MuonClip(model, rest=NAdam, capturable=True)


@pytest.mark.parametrize("value", [-1.0, float("nan"), True])
def test_a_rate_that_is_none_is_refused_before_anything_moves(value):
    model, optimizer = made(NAdam)
    model.loss(tokens(0)).backward()
    optimizer.param_groups[1]["lr"] = value
    if value is True:
        optimizer.step()  # the class's own affair
        return
    with UnchangedByError(model, optimizer, match=r"param_groups\[1\]: lr="):
        optimizer.step()


def test_a_checkpoint_of_another_class_or_of_adamw_is_refused():
    model, optimizer = made(NAdam)
    train(model, optimizer, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    other, lion = made(Lion)
    with UnchangedByError(other, lion, match="saved with rest='NAdam', and this optimizer has rest=Lion"):
        lion.load_state_dict(saved)
    other, adamw = made(None)
    with UnchangedByError(other, adamw, match="group 1 of the checkpoint is for 'rest', of the optimizer for 'adamw'"):
        adamw.load_state_dict(saved)
    with UnchangedByError(model, optimizer, match="group 1 of the checkpoint is for 'adamw', of the optimizer for 're"):
        optimizer.load_state_dict(adamw.state_dict())


def test_a_load_that_the_class_refuses_changes_nothing():
    class Refusing(NAdam):
        def load_state_dict(self, state_dict):
            raise ValueError("not this one")

    model, optimizer = made(Refusing)
    train(model, optimizer, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, [1])
    with UnchangedByError(model, optimizer, match="not this one"):
        optimizer.load_state_dict(saved)


def test_states_of_a_class_that_keeps_none_are_not_missed():
    model, optimizer = made(partial(torch.optim.SGD, momentum=0.0))
    train(model, optimizer, [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


class Averaging(NAdam):
    """Has the two methods of schedule-free optimizers."""

    is_training = True

    def train(self):
        self.is_training = True

    def eval(self):
        self.is_training = False


def test_train_and_eval_reach_a_class_that_has_them():
    _, optimizer = made(Averaging)
    optimizer.eval()
    assert not optimizer.rest.is_training
    optimizer.train()
    assert optimizer.rest.is_training
    for other in (made(NAdam)[1], made(None)[1]):
        assert not hasattr(other, "train")
        with pytest.raises(AttributeError, match="'MuonClip' object has no attribute 'evil'"):
            _ = other.evil


def test_a_second_copy_that_the_rest_keeps_is_clipped_with_its_weight():
    """Queries and keys that a group gives to the rest are scaled, and so is what a schedule-free class keeps."""

    class Free(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            for group in self.param_groups:
                group["weight_sum"] = 0.0

        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("z", p.detach().clone()).copy_(p)

    torch.manual_seed(0)
    model = TinyModel()
    clip = QKClip(model, tau=0.1)
    optimizer = MuonClip([dict(params=[*model.named_parameters()], use="rest")], lr=0.01, qk_clip=clip, rest=Free)
    train(model, optimizer, range(2))
    assert clip.report().clipped_heads > 0
    for parameter, state in optimizer.state.items():
        assert torch.equal(state["z"], parameter)


def test_the_signature_says_that_there_is_no_rest_by_default():
    assert inspect.signature(MuonClip).parameters["rest"].default is None


@pytest.mark.slow
def test_two_ranks_are_one_process_and_a_checkpoint_of_two_goes_on_with_one(tmp_path):
    run_ranks(2, rest_worker.__file__, tmp_path, timeout=300)
    rest_worker.resume_alone(tmp_path)
