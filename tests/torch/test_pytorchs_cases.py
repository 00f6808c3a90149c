"""PyTorch's own optimizer cases, `torch.testing._internal.common_optimizers`, on `Muon` and `MuonClip`.

The cases and the errors are PyTorch's, for its Muon, and for its AdamW on MuonClip's AdamW half. What is asked of every
case follows `test/test_optim.py`, which is not installed with PyTorch.
"""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    optim_db,
    optim_error_inputs_func_adamw,
    optim_error_inputs_func_muon,
    optim_inputs_func_adamw,
    optim_inputs_func_muon,
)

from muonclip.torch import Muon, MuonClip

SGD = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)


class MuonClipOfParameters(MuonClip):
    """Takes the parameters that the cases are made with: matrices for Muon, vectors for AdamW."""

    def __init__(self, params, *args, **options):
        if isinstance(params, list) and all(isinstance(p, torch.Tensor) for p in params):
            uses = (("muon", [p for p in params if p.ndim == 2]), ("adamw", [p for p in params if p.ndim != 2]))
            params = [dict(params=some, use=use) for use, some in uses if some]
        super().__init__(params, *args, qk_clip=None, **options)


OWN_WORDS = {  # where they say more than torch's
    "only support `original` and `match_rms_adamw`": "adjust_lr_fn='arbitrary'",
    "does not support complex parameters": "complex",
}
NEEDS_NAMES = {  # MuonClip tells a hidden matrix from an embedding by its name
    "invalid param type",
    "duplicate parameters should not occur across param groups either",
    "all optimizer params should be with/without names",
    "all optimizer param groups should be with/without names.",
}


def errors_of_muon(device, dtype):
    """Those of torch, but for a stack of matrices, which is allowed here."""
    for case in optim_error_inputs_func_muon(device, dtype):
        given = case.optimizer_error_input
        if given.desc in OWN_WORDS:
            case = ErrorOptimizerInput(given, error_type=ValueError, error_regex=OWN_WORDS[given.desc])
        if given.desc != "only support 2D parameters":
            yield case


def errors_of_muonclip(device, dtype):
    for case in errors_of_muon(device, dtype):
        given = case.optimizer_error_input
        if given.desc in NEEDS_NAMES:
            case = ErrorOptimizerInput(given, error_type=ValueError, error_regex="parameters without names")
        yield case


INFOS = [
    OptimizerInfo(
        optimizer,
        optim_inputs_func=optim_inputs_func_muon,
        optim_error_inputs_func=errors,
        scheduler_inputs=SGD.scheduler_inputs,
        supported_impls=(),
        not_og_supported_flags=(),
        supports_complex=False,
    )
    for optimizer, errors in ((Muon, errors_of_muon), (MuonClipOfParameters, errors_of_muonclip))
]
CASES = [
    pytest.param(info, case.kwargs, id=f"{info.name}, {case.desc}")
    for info in INFOS
    for case in info.optim_inputs_func("cpu", torch.float32)
]
every_case = pytest.mark.parametrize(("info", "options"), CASES)
every_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def parameters(info, seed=0):
    """Two matrices and, where the optimizer takes one, a vector."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(10, 5), (4, 10)] + [(10,)] * (info.optim_cls is not Muon)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def make(info, params, options):
    return info.optim_cls(params, **copy.deepcopy(options))


def loss_of(params, seed=0):
    """A regression that every parameter takes part in."""
    x, y = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(seed)).unbind()
    hidden = x @ params[0].T + (params[2] if len(params) > 2 else 0)
    return (hidden @ params[1].T - y[:, :4]).square().mean()


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(params, step).backward()
        optimizer.step()


def through_a_file(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def assert_equal(params, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@every_info
def test_what_torch_refuses_is_refused(info):
    raised = 0
    for case in info.optim_error_inputs_func("cpu", torch.float32):
        given = case.optimizer_error_input
        params = parameters(info) if given.params is None else given.params
        if case.error_type is UserWarning:
            with pytest.warns(UserWarning, match=case.error_regex):
                info.optim_cls(params, **given.kwargs)
        elif case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                info.optim_cls(params, **given.kwargs)
        else:
            optimizer = info.optim_cls(params, **given.kwargs)
            with pytest.raises(case.error_type, match=case.error_regex):
                optimizer.step()
        raised += 1
    assert raised >= 8


@every_case
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_loss_falls_under_every_schedule(info, options, contiguous):
    schedules = [()] if not contiguous else [(), *info.scheduler_inputs]
    for schedule in schedules:
        params = parameters(info)
        if not contiguous:
            params = [nn.Parameter(p.detach().T.contiguous().T) for p in params if p.ndim == 2] + params[2:]
            assert not params[0].is_contiguous()
        optimizer = make(info, params, options)
        schedulers = [make_scheduler(optimizer) for make_scheduler in schedule]
        before = loss_of(params).item()
        for _ in range(20):
            optimizer.zero_grad()
            loss = loss_of(params)
            loss.backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(*[loss.detach()] * isinstance(scheduler, ReduceLROnPlateau))
        assert loss_of(params).item() < before


@every_case
def test_a_closure_is_called_once_and_its_loss_returned(info, options):
    params = parameters(info)
    optimizer, losses = make(info, params, options), []

    def closure():
        optimizer.zero_grad()
        losses.append(loss_of(params))
        losses[-1].backward()
        return losses[-1]

    assert all(optimizer.step(closure) is losses[-1] for _ in range(3))
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@every_case
def test_a_rate_that_is_a_tensor_is_the_same_rate(info, options):
    by_tensor, by_number = parameters(info), parameters(info)
    rate = float(options.get("lr", 1e-3))
    train(make(info, by_tensor, options | {"lr": torch.tensor(rate)}), by_tensor, 3)
    train(make(info, by_number, options | {"lr": rate}), by_number, 3)
    for p, q in zip(by_tensor, by_number, strict=True):
        torch.testing.assert_close(p, q)


@every_info
def test_groups_have_their_own_rate_and_decay(info):
    first, second = parameters(info)[:2]
    uses = {} if info.optim_cls is Muon else {"use": "muon"}
    groups = [dict(params=[first], lr=0.0, **uses), dict(params=[second], lr=0.5, weight_decay=1.0, **uses)]
    optimizer = info.optim_cls(groups, lr=0.1)
    still, moved = first.detach().clone(), second.detach().clone()
    for p in (first, second):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(first, still)
    torch.testing.assert_close(second.detach(), moved * 0.5)


@every_case
def test_parameters_without_a_gradient_stay(info, options):
    params, still = parameters(info), parameters(info)
    make(info, params, options).step()
    assert_equal(params, still)


@every_case
def test_zero_gradients_leave_the_decay_alone(info, options):
    params, still = parameters(info), parameters(info)
    for p in params:
        p.grad = torch.zeros_like(p)
    make(info, params, options | {"weight_decay": 0.0}).step()
    assert_equal(params, still)


@every_case
def test_what_is_saved_and_loaded_goes_on_to_the_bit(info, options):
    params = parameters(info)
    optimizer = make(info, params, options)
    train(optimizer, params, 2)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(info, others, options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    saved, loaded = optimizer.state_dict(), other.state_dict()
    assert loaded["param_groups"] == saved["param_groups"]
    assert loaded["state"].keys() == saved["state"].keys() == set(range(len(params)))
    assert all(values.keys() == saved["state"][index].keys() for index, values in loaded["state"].items())
    train(optimizer, params, 2, first=2)
    train(other, others, 2, first=2)
    assert_equal(params, others)


@every_info
def test_hooks_around_the_step_and_the_checkpoint(info):
    params = parameters(info)
    optimizer, calls = make(info, params, {}), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"saved": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append(f"loading {state.pop('saved')}"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    handles = [
        register(lambda *_, name=name: calls.append(name))
        for register, name in (
            (register_optimizer_step_pre_hook, "before all"),
            (register_optimizer_step_post_hook, "after all"),
        )
    ]
    try:
        train(optimizer, params, 1)
    finally:
        for handle in handles:
            handle.remove()
    optimizer.load_state_dict(dict(optimizer.state_dict()))
    assert calls == ["before all", "before", "after", "after all", "saving", "loading 1", "loaded"]


@every_case
def test_it_is_copied_and_printed_with_everything_that_is_public(info, options):
    params = parameters(info)
    optimizer = make(info, params, options)
    train(optimizer, params, 1)
    twin = copy.deepcopy(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(twin) if not name.startswith("_")}
    assert repr(optimizer) == repr(twin)
    assert all(f"{name}: " in repr(optimizer) for name in ("lr", "momentum", "weight_decay"))


@every_info
def test_named_parameters_keep_their_names(info):
    params = parameters(info)[:2]
    named = [(f"layer.{index}", p) for index, p in enumerate(params)]
    optimizer = info.optim_cls([dict(params=named, **({} if info.optim_cls is Muon else {"use": "muon"}))])
    train(optimizer, params, 1)
    state = optimizer.state_dict()
    names = list(itertools.chain.from_iterable(group["param_names"] for group in state["param_groups"]))
    assert names == ["layer.0", "layer.1"]
    optimizer.load_state_dict(through_a_file(state))
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]


class AdamWHalf(MuonClip):
    """All parameters are the AdamW half's, with torch's defaults; other options are those of the group."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **others):
        groups = [dict(params=list(params), use="adamw", betas=betas, **others)]
        super().__init__(groups, lr, weight_decay, qk_clip=None, adamw=dict(eps=eps))


NOT_HERE = ("amsgrad", "maximize")
ADAMW_CASES = [
    pytest.param(case.kwargs, dtype, id=f"{case.desc}, {dtype}")
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for case in optim_inputs_func_adamw("cpu", dtype)
]


def of_dtype(dtype):
    """Tensors of several shapes, a number and nothing among them."""
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 4), (7,), (), (2, 0), (3,))
    ]


def adamw_steps(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for index, p in enumerate(params):
            p.grad = None if index == 4 else torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(("options", "dtype"), ADAMW_CASES)
def test_the_adamw_half_is_torch_s_to_the_bit_or_refuses_by_name(options, dtype):
    refused = [name for name in NOT_HERE if options.get(name)]
    ours, theirs = of_dtype(dtype), of_dtype(dtype)
    if refused:
        with pytest.raises(ValueError, match=f"{refused[0]}=True is not an option of this optimizer"):
            make_half(ours, options)
        return
    adamw_steps(make_half(ours, options), ours, 5)
    adamw_steps(torch.optim.AdamW(theirs, **copy.deepcopy(options)), theirs, 5)
    assert_equal(ours, theirs)


def make_half(params, options):
    return AdamWHalf(params, **copy.deepcopy(options))


@pytest.mark.parametrize(("options", "dtype"), ADAMW_CASES)
def test_load_nontensor_step(options, dtype):
    options = {name: value for name, value in options.items() if name not in NOT_HERE}
    params = of_dtype(dtype)
    optimizer = make_half(params, options)
    adamw_steps(optimizer, params, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = make_half(others, options)
    loaded.load_state_dict(saved)
    assert {state["step"].dtype for state in loaded.state_dict()["state"].values()} == {torch.float32}
    assert all(isinstance(state["step"], float) for state in saved["state"].values())
    for each in ((optimizer, params), (loaded, others)):
        adamw_steps(*each, 2, first=1)
    assert_equal(params, others)


def test_what_torch_s_adamw_refuses_of_its_options_is_refused_by_name():
    refused = 0
    for case in optim_error_inputs_func_adamw("cpu", torch.float32):
        options = case.optimizer_error_input.kwargs
        if case.optimizer_error_input.params is None and options and "foreach" not in options:
            with pytest.raises(ValueError, match="|".join(map(str, options))):
                make_half(of_dtype(torch.float32), options)
            refused += 1
    assert refused >= 3
