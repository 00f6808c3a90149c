"""A step and a load happen wholly or not at all: after an error weights, states and groups are what they were."""

import copy
import functools
import math
import warnings
from collections import Counter

import pytest
import torch
from tiny_attention import TinyModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from unchanged import Unchanged, UnchangedByError, differences

from muonclip.torch import Monitor, Muon, MuonClip, QKClip


def tokens(seed):
    return torch.randint(13, (2, 6), generator=torch.Generator().manual_seed(seed))


def trained(steps=2):
    return copy.deepcopy(trained_once(steps))


@functools.cache
def trained_once(steps):
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = MuonClip(model, lr=0.01, tau=0.5)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model, optimizer, seeds):
    for seed in seeds:
        model.loss(tokens(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return not list(differences(a, b))


def unchanged(model, optimizer, match, error=ValueError):
    """Asserts that what is done inside raises this error, and changes nothing."""
    return UnchangedByError(model, optimizer, match=match, error=error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_after_its_first_step_is_refused_before_anything_moves(dtype):
    model, optimizer = trained()
    model.to(dtype)
    model.loss(tokens(2)).backward()
    with unchanged(model, optimizer, rf"embed.weight is {dtype} .* exp_avg is torch.float32 .*load_state_dict"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # as the error says
    optimizer.zero_grad()
    train(model, optimizer, [2])
    assert {value.dtype for name, value in optimizer.state[model.embed.weight].items() if name != "step"} == {dtype}
    assert optimizer.state[model.layers[0].q.weight]["momentum_buffer"].dtype == dtype


MATRIX = torch.zeros(24, 10)


@pytest.mark.parametrize(
    "value",
    [None, 3, torch.zeros(2), MATRIX.int(), MATRIX.to(torch.float8_e4m3fn), MATRIX.to_sparse(), MATRIX.to("meta")],
)
@pytest.mark.parametrize("part", ["momentum_buffer", "exp_avg", "exp_avg_sq"])
def test_a_state_that_was_replaced_by_hand_is_checked_before_anything_moves(part, value):
    model, optimizer = trained()
    parameter = model.layers[0].q.weight if part == "momentum_buffer" else model.embed.weight
    right = optimizer.state[parameter][part]
    optimizer.state[parameter][part] = value
    model.loss(tokens(2)).backward()
    with unchanged(model, optimizer, rf"weight is torch.float32 .*, but its {part} is .*Nothing was changed"):
        optimizer.step()
    optimizer.state[parameter][part] = right
    optimizer.step()


COUNTS = [None, 3, torch.ones(3), torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(2.0).bfloat16(), 1j]


@pytest.mark.parametrize("value", COUNTS, ids=str)
def test_a_count_of_steps_that_was_replaced_by_hand_is_checked_before_anything_moves(value):
    model, optimizer = trained()
    right = optimizer.state[model.embed.weight]["step"]
    optimizer.state[model.embed.weight]["step"] = value
    model.loss(tokens(2)).backward()
    with unchanged(model, optimizer, "the step of embed.weight is .*, no count; .*Nothing was changed"):
        optimizer.step()
    optimizer.state[model.embed.weight]["step"] = right
    optimizer.step()


@pytest.mark.parametrize("value", [None, [1], torch.ones(2)], ids=str)
def test_a_state_that_is_no_dict_is_named(value):
    model, optimizer = trained()
    right = optimizer.state[model.embed.weight]
    optimizer.state[model.embed.weight] = value
    model.loss(tokens(2)).backward()
    with pytest.raises(ValueError, match=r"embed.weight has a \w+ for its state; .*Nothing was changed"):
        optimizer.step()
    optimizer.state[model.embed.weight] = right
    optimizer.step()


def test_states_in_a_plain_dict_are_taken_and_others_refused():
    model, optimizer = trained()
    other, twin = trained()
    optimizer.state = {}
    twin.state.clear()
    for each in ((model, optimizer), (other, twin)):
        train(*each, [2])
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    optimizer.state = None
    with pytest.raises(TypeError, match=r"optimizer.state=None is a NoneType"):
        optimizer.step()


GROUPS = {  # what somebody has made of the groups, and what is said
    "no params": (lambda o: o.param_groups[0].pop("params"), r"\[0\]\['params'\] holds a NoneType, and 8 were added"),
    "params None": (lambda o: o.param_groups[1].update(params=None), r"\[1\]\['params'\] holds a NoneType"),
    "one more": (lambda o: o.param_groups[0]["params"].append(nn.Parameter(MATRIX)), "holds 9 parameters, and 8 were"),
    "one fewer": (lambda o: o.param_groups[0]["params"].pop(0), "holds 7 parameters, and 8 were added"),
    "no tensor": (lambda o: o.param_groups[0]["params"].__setitem__(1, "w"), r"\['params'\]\[1\]='w' is a str"),
    "no rate": (lambda o: o.param_groups[0].pop("lr"), r"param_groups\[0\] has no 'lr' any more"),
    "no decay": (lambda o: o.param_groups[1].pop("weight_decay"), r"param_groups\[1\] has no 'weight_decay' any more"),
    "no use": (lambda o: o.param_groups[1].pop("use"), r"\[1\]\['use'\]=None is not what it was added for"),
    "another use": (lambda o: o.param_groups[0].update(use="adamw"), r"\[0\]\['use'\]='adamw' is not what it was"),
    "a word of others": (
        lambda o: o.param_groups[1].update(algorithm="sgd"),
        "algorithm='sgd' .*use=",
    ),
    "misspelt": (lambda o: o.param_groups[0].update(momentm=0.5), "momentm=0.5 .*Did you mean 'momentum'"),
    "ascends": (
        lambda o: o.param_groups[0].update(maximize=True),
        "maximize=True .*negate the loss",
    ),
    "AMSGrad": (lambda o: o.param_groups[1].update(amsgrad=True), "amsgrad=True is not an option"),
    "a group fewer": (lambda o: o.param_groups.pop(), "param_groups holds 2 groups, and 3 were added"),
    "a group more": (lambda o: o.param_groups.append({"params": [], "lr": 1.0}), "holds 4 groups, and 3 were added"),
    "no group": (lambda o: o.param_groups.__setitem__(1, None), r"param_groups\[1\]=None is a NoneType, no dict"),
}


@pytest.mark.parametrize("wrong", GROUPS)
def test_groups_that_were_changed_by_hand_are_checked_before_anything_moves(wrong):
    change, said = GROUPS[wrong]
    model, optimizer = trained()
    model.loss(tokens(2)).backward()
    change(optimizer)
    with UnchangedByError(model, match=said, error=(TypeError, ValueError)):
        optimizer.step()


def test_marks_that_hosts_put_into_groups_later_pass():
    model, optimizer = trained()
    for group in optimizer.param_groups:
        group.update(step=3, initial_lr=0.1, wd_mult=1.0, is_decoupled_lr=False, mine=1, maximize=False, foreach=True)
    train(model, optimizer, [2])
    optimizer.load_state_dict(optimizer.state_dict())


OPTIONS = [  # of a group or of a checkpoint: what does not fit, and what is said
    ("muon", "momentum_dtype", "int32", "momentum_dtype='int32' is not a floating dtype"),
    ("muon", "momentum_dtype", "complex64", "momentum_dtype='complex64' is not a floating dtype"),
    ("muon", "momentum_dtype", "float31", "momentum_dtype='float31' is not a floating dtype"),
    ("muon", "ns_dtype", 3, "ns_dtype=3 is not a floating dtype"),
    ("muon", "ns_dtype", "int8", "ns_dtype='int8' is not a floating dtype"),
    ("muon", "adjust_lr_fn", "foo", "adjust_lr_fn='foo'; use"),
    ("muon", "ns_form", "Gram", "ns_form='Gram'; use"),
    ("muon", "ns_steps", -3, ".*ns_steps=-3 must be"),
    ("muon", "ns_coefficients", "foo", "ns_coefficients='foo' is not"),
    ("muon", "products", "fast", "products='fast' is not known"),
    ("muon", "momentum", 2.0, r"momentum=2.0 must be in \[0, 1\)"),
    ("muon", "lr", math.nan, "lr=nan must be"),
    ("muon", "lr", torch.tensor(math.inf), "lr=inf must be"),
    ("adamw", "lr", -1.0, "lr=-1.0 must be"),
    ("adamw", "weight_decay", math.nan, "weight_decay=nan must be"),
    ("adamw", "betas", (2.0, 3.0), r"betas=\(2.0, 3.0\) must be"),
    ("adamw", "eps", math.nan, "eps=nan must be"),
]


@pytest.mark.parametrize(("use", "option", "value", "said"), OPTIONS)
def test_an_option_that_does_not_fit_is_refused_by_the_step_and_by_the_load(use, option, value, said):
    model, optimizer = trained()
    index = next(i for i, group in enumerate(optimizer.param_groups) if group["use"] == use)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][index][option] = value
    with unchanged(model, optimizer, rf"group {index} of the checkpoint: {said}.*Nothing was loaded"):
        optimizer.load_state_dict(state)
    model.loss(tokens(2)).backward()
    right = optimizer.param_groups[index][option]
    optimizer.param_groups[index][option] = value
    with unchanged(model, optimizer, rf"param_groups\[{index}\]: {said}"):
        optimizer.step()
    optimizer.param_groups[index][option] = right
    optimizer.step()


@pytest.mark.parametrize("option", ["momentum_dtype", "ns_dtype"])
@pytest.mark.parametrize("value", [torch.int32, torch.complex64, torch.float8_e4m3fn, 3, "float31", "nn"])
def test_a_dtype_that_holds_no_floating_numbers_is_refused_at_construction(option, value):
    with pytest.raises(ValueError, match=rf"{option}=.* is not a floating dtype"):
        Muon([nn.Parameter(torch.ones(2, 3))], **{option: value})


def of(part, change):
    """Change every state of a checkpoint that has this part."""

    def apply(saved):
        for state in saved["state"].values():
            if part in state:
                change(state)

    return apply


STATES = {  # what is wrong in a checkpoint, and what is said
    "no buffer": (of("momentum_buffer", lambda s: s.clear() or s.update(mom=torch.ones(1))), "has no momentum_buffer"),
    "None": (of("momentum_buffer", lambda s: s.update(momentum_buffer=None)), "has no momentum_buffer"),
    "whole numbers": (of("momentum_buffer", lambda s: s.update(momentum_buffer=s["momentum_buffer"].int())), "int32"),
    "one number": (of("momentum_buffer", lambda s: s.update(momentum_buffer=torch.zeros(()))), r"is \(\(\), 'a plain"),
    "no square": (of("exp_avg", lambda s: s.pop("exp_avg_sq")), "has no exp_avg_sq"),
    "square of one number": (of("exp_avg", lambda s: s.update(exp_avg_sq=torch.zeros(()))), r"exp_avg_sq of .*\(\(\)"),
    "no count": (of("exp_avg", lambda s: s.pop("step")), "has no step"),
    "None for a count": (of("exp_avg", lambda s: s.update(step=None)), "has no step"),
    "negative count": (of("exp_avg", lambda s: s.update(step=torch.tensor(-3.0))), r"step of .* is -3\.0"),
    "count NaN": (of("exp_avg", lambda s: s.update(step=math.nan)), "step of .* is nan"),
    "counts": (of("exp_avg", lambda s: s.update(step=torch.ones(3))), r"step of .* has shape \(3,\)"),
    "AMSGrad": (of("exp_avg", lambda s: s.update(max_exp_avg_sq=s["exp_avg"])), "has 'max_exp_avg_sq'.*AdamW keeps"),
    "no mapping": (lambda saved: saved["state"].update({0: [1]}), "has a list for its state"),
    "no state": (lambda saved: saved.pop("state"), "is not the state of an optimizer: it holds 'param_groups', and"),
    "empty": (lambda saved: saved.clear(), "it holds nothing"),
    "no params": (lambda saved: saved["param_groups"][1].pop("params"), "group 1 of the checkpoint has no list of"),
    "no rate": (lambda saved: saved["param_groups"][0].pop("lr"), "group 0 of the checkpoint has no 'lr'"),
    "no betas": (lambda saved: saved["param_groups"][1].pop("betas"), "group 1 of the checkpoint has no 'betas'"),
    "later": (lambda saved: saved["param_groups"][0].update(format=2), "format 2, of a later release"),
    "format 0": (lambda saved: saved["param_groups"][0].update(format=0), "format 0; formats begin with 1"),
    "format True": (lambda saved: saved["param_groups"][0].update(format=True), "format True, of a later release"),
    "no names": (lambda saved: saved["param_groups"][0].update(param_names=None), "group 0 .* has param_names=None"),
    "few names": (
        lambda saved: saved["param_groups"][1].update(param_names=["a"]),
        r"group 1 .* param_names=\['a'\]",
    ),
    "numbers for names": (
        lambda saved: saved["param_groups"][2].update(param_names=[1, 2, 3]),
        "group 2 .* param_names",
    ),
    "one name twice": (
        lambda saved: saved["param_groups"][0]["param_names"].__setitem__(1, "layers.0.q.weight"),
        "two parameters of the checkpoint are named 'layers.0.q.weight'",
    ),
    "one key twice": (
        lambda saved: saved["param_groups"][1]["params"].__setitem__(0, 0),
        "params name one parameter twice",
    ),
    "a list for a key": (lambda saved: saved["param_groups"][0]["params"].__setitem__(0, [1]), r"params hold \[1\]"),
    "a state of none": (lambda saved: saved["state"].update({999: {}}), "1 states of parameters .* 999 first"),
    "a word of others": (lambda saved: saved["param_groups"][0].update(algorithm="sgd"), "algorithm='sgd' in a param"),
    "misspelt": (lambda saved: saved["param_groups"][0].update(momentm=0.5), "momentm=0.5 .* mean 'momentum'"),
    "ascends": (lambda saved: saved["param_groups"][1].update(maximize=True), "maximize=True is not an option"),
    "eps given, perhaps": (lambda saved: saved["param_groups"][0].update(eps_given="x"), "eps_given='x' is a str"),
    "on meta": (of("momentum_buffer", lambda s: s.update(momentum_buffer=MATRIX.to("meta"))), "is on the meta device"),
    "sparse": (of("exp_avg", lambda s: s.update(exp_avg=s["exp_avg"].to_sparse())), "exp_avg of .* torch.sparse_coo"),
    "complex count": (of("exp_avg", lambda s: s.update(step=torch.tensor(1j))), "step of .* is torch.complex64"),
    "True for a count": (of("exp_avg", lambda s: s.update(step=True)), "step of .* is torch.bool"),
    "negative squares": (
        of("exp_avg", lambda s: s["exp_avg_sq"][:1].fill_(-0.5)),
        "exp_avg_sq of .* holds -0.5, and is a",
    ),
    "squares NaN": (
        of("exp_avg", lambda s: s["exp_avg_sq"][-1:].fill_(math.nan)),
        "exp_avg_sq of .* holds nan: .*diverg",
    ),
    "squares infinite": (of("exp_avg", lambda s: s["exp_avg_sq"][:1].fill_(math.inf)), "exp_avg_sq of .* holds inf"),
    "average NaN": (of("exp_avg", lambda s: s["exp_avg"][:1].fill_(math.nan)), "exp_avg of .* holds nan: .*diverged"),
    "momentum NaN": (of("momentum_buffer", lambda s: s["momentum_buffer"][-1, -1].fill_(math.nan)), "holds nan: .*ear"),
    "momentum −inf": (
        of("momentum_buffer", lambda s: s["momentum_buffer"][0, 0].fill_(-math.inf)),
        "momentum_buffer of 'layers.0.q.weight' in the checkpoint holds -inf: .*Nothing was loaded. Load an earlier",
    ),
    "NaN in float8": (
        of("momentum_buffer", lambda s: s.update(momentum_buffer=(0 * MATRIX / 0).to(torch.float8_e5m2))),
        r"is \(\(24, 10\), 'a plain|holds nan",
    ),
    "cycled NaN": (lambda saved: saved["param_groups"][1].update(momentum=math.nan), "group 1 .*momentum=nan must be"),
    "for CUDA graphs": (
        lambda saved: saved["param_groups"][1].update(capturable=True),
        "group 1 of the checkpoint has capturable=True, .*embed.weight is on the CPU. Nothing was loaded. Set it to",
    ),
    "text for a format": (lambda saved: saved["param_groups"][0].update(format="1"), "format '1', of a later release"),
}


@pytest.mark.parametrize("wrong", STATES)
def test_a_checkpoint_that_is_wrong_is_refused_before_anything_is_replaced(wrong):
    change, said = STATES[wrong]
    model, optimizer = trained()
    saved = copy.deepcopy(trained(steps=1)[1].state_dict())
    change(saved)
    with unchanged(model, optimizer, said):
        optimizer.load_state_dict(saved)
    train(model, optimizer, [2])


def test_the_state_that_is_said_to_be_wrong_may_be_left_out():
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["momentum_buffer"].fill_(math.nan)
    with pytest.raises(ValueError, match=r"holds nan.*take the state of this parameter out of the checkpoint"):
        optimizer.load_state_dict(saved)
    del saved["state"][3]
    with pytest.warns(UserWarning, match="begin anew"):
        optimizer.load_state_dict(saved)


def test_the_numbers_of_a_checkpoint_are_read_once_and_waited_for_together():
    """A float32 state of 1e20 or a float64 one of 1e300 is finite; what counts is each state's own dtype."""
    model = square_layers().double()
    optimizer = of_layers(model, (0, 1, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for part, value in state.items():
            value.add_(1e300 if part == "exp_avg_sq" else 0)

    calls = Counter()

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[func.overloadpacket] += 1
            return func(*args, **(kwargs or {}))

    with Reads():
        optimizer.load_state_dict(saved)
    assert calls[torch.ops.aten.aminmax] == 3 + 2 * 3
    assert same(optimizer.state_dict(), saved)


@pytest.mark.parametrize(
    "value", [None, 3, "x", [], [1], (1, 2), torch.ones(2), object()], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("make", [MuonClip, lambda model: Muon([model.embed.weight])], ids=["MuonClip", "Muon"])
def test_what_is_no_state_at_all_is_named(make, value):
    model = TinyModel()
    optimizer = make(model)
    with unchanged(model, optimizer, "state_dict=.* give what optimizer.state_dict.* Nothing was loaded", TypeError):
        optimizer.load_state_dict(value)


@pytest.mark.parametrize("part", ["momentum_buffer", "exp_avg"])
def test_a_state_that_is_missing_is_said_and_begins_anew(part):
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    key = next(key for key, state in saved["state"].items() if part in state)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    del saved["state"][key]
    with pytest.warns(UserWarning, match=f"no state for {names[key]}: frozen when it was saved, or lost"):
        optimizer.load_state_dict(saved)
    state = optimizer.state_dict()["state"]
    assert not state[key][part].any()
    assert all(same(state[other], saved["state"][other]) for other in saved["state"])
    saved["state"].clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)  # of an optimizer that has made no step, as torch saves it


def test_a_whole_checkpoint_and_a_model_s_state_are_refused():
    model, optimizer = trained()
    with unchanged(model, optimizer, "it holds 'model', 'optimizer', and should hold"):
        optimizer.load_state_dict({"model": {}, "optimizer": optimizer.state_dict()})
    with unchanged(model, optimizer, r"it holds 'embed\.weight', .*, …, and should hold"):
        optimizer.load_state_dict(model.state_dict())


def test_the_hooks_of_others_may_bring_a_state_into_shape_before_it_is_checked():
    _, saved = trained()
    _, optimizer = trained(steps=0)
    wrapped = {"mine": saved.state_dict()}
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["mine"])
    optimizer.load_state_dict(wrapped)
    assert same(optimizer.state_dict()["state"], saved.state_dict()["state"])
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_a_count_of_steps_that_is_a_number_is_loaded_as_torch_once_saved_it():
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    of("exp_avg", lambda s: s.update(step=2))(saved)
    other, resumed = trained(steps=0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for each in ((model, optimizer), (other, resumed)):
        train(*each, [2])
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert same(optimizer.state_dict(), resumed.state_dict())
    assert saved["state"][len(optimizer.param_groups[0]["params"])]["step"] == 2


def square_layers():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))  # all of a shape: by position every state would fit


def of_layers(model, order, prefix=""):
    named = [(prefix + name, parameter) for name, parameter in model.named_parameters()]
    matrices, vectors = ([item for item in named if item[1].ndim == ndim] for ndim in (2, 1))
    groups = [
        dict(params=[matrices[i] for i in order], use="muon"),
        dict(params=[vectors[0]], use="adamw"),
        dict(params=vectors[1:], use="adamw", lr=0.02),
    ]
    return MuonClip([groups[i] for i in (order if len(order) == 3 else (0, 1, 2))], lr=0.01, qk_clip=None)


def advance(model, optimizer, seed):
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.module."])
def test_groups_and_parameters_in_another_order_are_found_by_name(order, wrapped):
    model = square_layers()
    optimizer = of_layers(model, (0, 1, 2), wrapped)
    advance(model, optimizer, 0)
    other = copy.deepcopy(model)
    resumed = of_layers(other, order)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["lr"]: len(group["params"]) for group in resumed.param_groups if group["use"] == "adamw"} == {
        0.01: 1,
        0.02: 2,
    }
    for each in ((model, optimizer), (other, resumed)):
        advance(*each, 1)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_layer_that_only_one_side_has_is_refused_by_name():
    model = square_layers()
    saved = of_layers(model, (0, 1, 2)).state_dict()
    advance(model, of_layers(model, (0, 1, 2)), 0)
    shorter = of_layers(model, (0, 1))
    with unchanged(model, shorter, r"'2\.weight' is in the checkpoint, and not in the optimizer"):
        shorter.load_state_dict(saved)
    longer = of_layers(model, (0, 1, 2))
    with unchanged(model, longer, r"'2\.weight' is in the optimizer, and not in the checkpoint"):
        longer.load_state_dict(of_layers(model, (0, 1)).state_dict())


def test_a_model_that_was_renamed_is_loaded_by_position():
    model = square_layers()
    optimizer = of_layers(model, (0, 1, 2), "old.")
    advance(model, optimizer, 0)
    renamed = of_layers(model, (0, 1, 2), "new.")
    renamed.load_state_dict(optimizer.state_dict())
    assert same(renamed.state_dict()["state"], optimizer.state_dict()["state"])
    assert renamed.param_groups[0]["param_names"][0] == "new.0.weight"


def test_a_renamed_model_with_fewer_groups_is_refused():
    model = square_layers()
    saved = of_layers(model, (0, 1, 2), "old.").state_dict()
    fewer = MuonClip([dict(params=[("0.weight", model[0].weight)], use="muon")], qk_clip=None)
    with unchanged(model, fewer, "different number of parameter groups"):
        fewer.load_state_dict(saved)


def hooked(model):
    """The hooks and observers on a model, by module: as many as before are others after another clip's."""
    return {
        name: (dict(m._forward_hooks), dict(m._forward_pre_hooks), m.__dict__.get("_qk_observer"))
        for name, m in model.named_modules()
    }


CONSTRUCTIONS = {  # what is made, and fails or is interrupted
    "no attention": lambda m: MuonClip(m.lm_head, qk_clip="required"),
    "per head without heads": lambda m: MuonClip(m.lm_head, per_head=True),
    "example inputs": lambda m: QKClip(m.norm, example_inputs=torch.ones(3)),
    "a group": lambda m: MuonClip(m, products="quack"),
    "interrupted": lambda m: MuonClip(m),
    "a role": lambda m: MuonClip(m, qk_clip=None),
    "Monitor": lambda m: Monitor(m, torch.optim.AdamW(m.parameters())),
}


@pytest.mark.filterwarnings("ignore:QK-Clip. nothing to clip")
@pytest.mark.parametrize("before", ["nobody", "a clip"])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_a_construction_that_fails_leaves_the_model_as_it_was(monkeypatch, construction, before):
    """While the error, and with it what was half made, is still there."""
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(inner=TinyModel())).inner
    clip = QKClip(model, tau=0.01, observe="always") if before == "a clip" else None
    if construction in ("interrupted", "a role"):
        monkeypatch.setattr(torch.optim.Optimizer, "__init__", interrupted)
    if construction == "Monitor":
        monkeypatch.setattr(Monitor, "_refresh", interrupted)
    with Unchanged(model):
        was = hooked(model)
        with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)) as caught:
            CONSTRUCTIONS[construction](model)
        assert {name: tuple(map(len, each[:2])) for name, each in hooked(model).items()} == {
            name: tuple(map(len, each[:2])) for name, each in was.items()
        }
        assert clip is not None or hooked(model) == was
    if clip is not None:
        model.loss(tokens(0)).backward()
        clip.step()
        assert clip.report().clipped_heads > 0
    assert caught.tb is not None


def interrupted(*_, **__):
    raise KeyboardInterrupt
