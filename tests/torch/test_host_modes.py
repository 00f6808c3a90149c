"""What a host has around a model: modes, checkpointing, transforms, wrappers of modules. The model runs under them as
without a clip, they see nothing of it, and what cannot be observed is said."""

import contextlib
import copy
import functools
import pickle
import types
import warnings

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from muonclip.torch import MaxLogits, MuonClip, QKClip, QKProjection, attention
from muonclip.torch.discover.replica import _process_state, has_a_foreign_forward

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The .grad attribute of a Tensor that is not a leaf",  # torch.export looks at it
        "The PyTorch API of nested tensors is in prototype stage",  # as attention of jagged ones makes them
        "There is a performance drop because we have not yet implemented the batching rule",
        "Anomaly Detection has been enabled",
    )
]
WIDTH, HEADS, HEAD = 16, 2, 8


class Attention(nn.Module):
    """Causal, by a mask, with a mask of bools; `cache` are keys and values before those of x."""

    kind = "sdpa"

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x):
        return [m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v)]

    def attend(self, q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (q @ k.mT * HEAD**-0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def forward(self, x, cache=None):
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(cache, (k, v), strict=True))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class WrittenOut(Attention):
    kind = "written out"


class Torchs(nn.Module):
    """torch's own, which writes its attention out where the weights are asked for."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=True)[0]


KINDS = pytest.mark.parametrize("kind", [Attention, WrittenOut, Torchs])


class Model(nn.Module):
    def __init__(self, kind=Attention, around=None):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.around = [around]  # a function of a layer and its input

    def forward(self, *, x, caches=(None, None)):  # by a name that cannot be guessed: the first forward is traced
        x = self.first(x)
        for layer, cache in zip(self.layers, caches, strict=True):
            if self.around[0] is not None:
                x = x + self.around[0](layer, x)
            else:
                x = x + (layer(x) if cache is None else layer(x, cache))
        return x


def data(seed=0):
    """Louder with each seed, so that heads are clipped in each step."""
    return 4 * 2**seed * torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def train(model, *, clip=True, context=contextlib.nullcontext, steps=2, tau=0.3):
    """What the contexts of each forward and backward have seen, the losses, and the optimizer."""
    optimizer = MuonClip(model, lr=1e-2, qk_clip=QKClip(model, tau=tau) if clip else None)
    seen, losses = [], []
    for step in range(steps):
        with context() as inside:
            loss = model(x=data(step)).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(inside)
        losses.append(loss.item())
        assert not clip or optimizer.qk_clip.report().clipped_heads or tau > 1e3
    return seen, losses, optimizer


def maxima(clip):
    return np.array([p.max_logits.maximum.tolist() for p in clip.projections.values()])


def are_found_whole(optimizer):
    projections = optimizer.qk_clip.projections
    return len(projections) == 2 and all(each.query and each.key for each in projections.values())


# Modes that see what runs


class Operators(TorchDispatchMode):
    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self):
        self.seen = []
        super().__init__(lambda tensor: (self.seen.append(tuple(tensor.shape)), tensor)[1], lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self


class EveryModule(contextlib.ExitStack):
    """A hook on all modules of the process."""

    def __enter__(self):
        self.seen = []
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: self.seen.append(type(module).__name__)
        )
        self.callback(hook.remove)
        return super().__enter__()


class Flops(FlopCounterMode):
    def __init__(self):
        super().__init__(display=False)

    @property
    def seen(self):
        return {name: dict(counts) for name, counts in self.get_flop_counts().items()}


@KINDS
@pytest.mark.parametrize("mode", [Operators, Functions, SavedTensors, EveryModule, Flops])
def test_who_sees_what_runs_sees_what_runs_without_a_clip(mode, kind):
    """In the first step, which searches, and in later ones; where heads are measured exactly, too."""
    without, losses, _ = train(Model(kind), clip=False, context=mode)
    observed, losses_observed, _ = train(Model(kind), context=mode, tau=1e6)
    assert [each.seen for each in observed] == [each.seen for each in without]
    assert losses_observed == losses
    clipped, _, optimizer = train(Model(kind), context=mode, tau=0.3)
    assert [each.seen for each in clipped] == [each.seen for each in without]
    np.testing.assert_array_equal(maxima(optimizer.qk_clip), -np.inf)


@KINDS
def test_modes_do_not_change_what_is_observed(kind):
    plain, seen = train(Model(kind))[2], train(Model(kind), context=Operators)[2]
    for one, other in zip(plain.qk_clip.last_layers.values(), seen.qk_clip.last_layers.values(), strict=True):
        torch.testing.assert_close(one.max_logits, other.max_logits, rtol=1e-6, atol=0)


def saved(*operators):
    def policy(context, operator, *args, **kwargs):
        is_saved = not operators or operator in operators
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


@KINDS
@pytest.mark.parametrize("operators", [(), (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)])
def test_selective_checkpointing_keeps_nothing_of_the_observers(operators, kind):
    _, losses, optimizer = train(Model(kind, saved(*operators)))
    _, expected, plain = train(Model(kind))
    assert losses == expected
    for one, other in zip(optimizer.param_groups, plain.param_groups, strict=True):
        assert all(map(torch.equal, one["params"], other["params"]))


def test_a_model_that_is_checkpointed_as_a_whole_is_traced_outside():
    model = Model()
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for step in range(2):
        saved(torch.ops.aten.mm.default)(lambda x: model(x=x), data(step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.qk_clip.report().clipped_heads


class OfCheckpoints(Attention):
    """A checkpoint between projection and attention, or around the projections."""

    around_projections = False

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.around_projections:
            q, k, v = (
                checkpoint(m, x, use_reentrant=True).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
                for m in (self.q, self.k, self.v)
            )
        else:
            q = checkpoint(lambda tensor: 2 * tensor, q, use_reentrant=True)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("around_projections", [False, True])
def test_reentrant_checkpoints_before_the_attention(around_projections):
    kind = type("Layer", (OfCheckpoints,), {"around_projections": around_projections})
    _, _, optimizer = train(Model(kind))
    assert are_found_whole(optimizer)
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


def test_an_error_within_a_checkpoint_is_told_as_it_is():
    class Layer(Attention):
        def forward(self, x):
            raise ValueError("its own")

    with pytest.raises(RuntimeError, match=r"could not trace the model.*ValueError: its own"):
        QKClip(Model(Layer, saved()), example_inputs={"x": data()})


class AgainInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, run):
        ctx.save_for_backward(q)
        ctx.run = run
        return 2 * q

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            ctx.run(ctx.saved_tensors[0].detach().requires_grad_())
        return 2 * gradient, None


class OfForces(Attention):
    """Takes a derivative in its forward, whose backward runs attention again."""

    def forward(self, x):
        q, k, v = self.heads(x)
        q = AgainInBackward.apply(q, lambda tensor: self.attend(tensor, tensor, tensor))
        y = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return y + 0.01 * torch.autograd.grad(y.sum(), x, retain_graph=True)[0]


@pytest.mark.parametrize("kind", ["sdpa", "written out"])
def test_attention_in_a_backward_within_a_forward_is_nobodys(kind):
    model = Model(type("Layer", (OfForces,), {"kind": kind}))
    _, _, optimizer = train(model)
    assert are_found_whole(optimizer)


# States of the process or the thread


@pytest.mark.parametrize("kind", [Attention, Torchs])
def test_anomaly_detection_stays_as_it_is(kind):
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    try:
        train(Model(kind))
        assert torch.is_anomaly_enabled()
        assert not torch.is_anomaly_check_nan_enabled()
    finally:
        torch.autograd.set_detect_anomaly(False)


def test_a_nan_on_a_side_that_does_not_matter_is_no_anomaly_of_the_search():
    class Layer(Attention):
        def attend(self, q, k, v):
            return super().attend(q, k, torch.where(v.isfinite(), v, (v - v).sqrt()))  # whose derivative is 0 · inf

    model = Model(Layer)
    torch.autograd.set_detect_anomaly(True)
    try:
        MuonClip(model, lr=1e-2, qk_clip=QKClip(model, example_inputs={"x": data()}))
    finally:
        torch.autograd.set_detect_anomaly(False)


def test_the_cache_of_autocast_gets_no_weight_of_a_copy():
    is_cached = []

    class Layer(Attention):
        def forward(self, x):
            is_cached.append(torch.is_autocast_cache_enabled())
            return super().forward(x)

    model = Model(Layer)
    with torch.autocast("cpu", torch.bfloat16):
        QKClip(model, example_inputs={"x": data()})
        assert is_cached
        assert not any(is_cached)
        model(x=data())
    assert is_cached[-1]


@KINDS
def test_inference_is_no_forward_of_the_training(kind):
    model = Model(kind)
    clip = QKClip(model, tau=0.3, observe="always")
    with torch.inference_mode(), torch.enable_grad():
        model(x=data())
    assert not clip.projections
    train(model)


def test_hooks_of_saved_tensors_may_be_forbidden():
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        train(Model())


def test_what_a_trace_could_not_change_leaves_the_next_one_undisturbed(monkeypatch):
    """Inside a region that is compiled torch refuses to compile nothing."""
    set_stance = torch.compiler.set_stance

    def refuse(*args):
        raise RuntimeError("attempted to set_stance in a torch.compile region")

    monkeypatch.setattr(torch.compiler, "set_stance", refuse)
    with pytest.raises(RuntimeError, match="compile region"), _process_state.kept():
        pass
    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    state = torch.get_rng_state()
    with _process_state.kept():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


# Wrappers of modules and modules of other kinds


def hook_of_accelerate(module):
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))


def wrapper(module):
    inside = module.forward
    module.forward = lambda *args, **kwargs: inside(*args, **kwargs)


def named_wrapper(module):
    inside = module.forward

    @functools.wraps(inside)
    def forward(*args, **kwargs):
        vars(module).setdefault("forward", None)  # the module itself is in the closure, too
        return inside(*args, **kwargs)

    module.forward = forward


def bound_wrapper(module):
    inside = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: inside(*args, **kwargs), module)


@pytest.mark.parametrize("put_on", [hook_of_accelerate, wrapper, named_wrapper, bound_wrapper])
@pytest.mark.parametrize("when", ["before", "after", "twice"])
def test_a_wrapper_around_the_forward_of_every_module(when, put_on):
    model, plain = Model(), Model()
    for module in [*model.modules()] * ((when != "after") + (when == "twice")):
        put_on(module)
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    if when == "after":
        for module in model.modules():
            put_on(module)
    for step in range(2):
        model(x=data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.qk_clip.report().clipped_heads
    assert are_found_whole(optimizer)
    assert train(plain)[1][0] == pytest.approx(Model()(x=data()).square().mean().item())


def test_accelerates_device_map():
    model = Model()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert are_found_whole(train(model)[2])


def test_a_forward_that_something_else_replaces_is_not_the_models():
    model = Model()

    def redirected(*args, **kwargs):
        model.forward = own
        return model(x=data())

    own, model.forward = model.forward, redirected
    assert has_a_foreign_forward(model)
    model.forward = own
    assert not has_a_foreign_forward(model)
    model.forward = lambda x: x
    assert has_a_foreign_forward(model)


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


class BehindTorchScript(Attention):
    def __init__(self):
        super().__init__()
        self.child = scripted(Child())

    def forward(self, x):
        return super().forward(self.child(x))


def test_a_child_of_torchscript_is_no_hindrance():
    model = Model(BehindTorchScript)
    model.first = scripted(model.first)
    assert are_found_whole(train(model)[2])


def test_projections_of_torchscript_are_clipped_as_others():
    model, plain = Model(), Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in model.layers:
            layer.q, layer.k = torch.jit.script(layer.q), torch.jit.trace(layer.k, data())
    optimizer, expected = train(model)[2], train(plain)[2]
    assert are_found_whole(optimizer)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)
    for name, layer in expected.qk_clip.last_layers.items():
        torch.testing.assert_close(optimizer.qk_clip.last_layers[name].gamma, layer.gamma)


class Jagged(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.attn, self.norm = Attention(), nn.LayerNorm(WIDTH)

    def forward(self, *, x, y):
        (q, _, _), (_, k, v) = self.attn.heads(self.norm(x)), self.attn.heads(self.norm(y))
        return self.attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("cross", [False, True])
def test_jagged_sequences(cross):
    """The maxima are those of the sequences one by one."""
    generator = torch.Generator().manual_seed(3)
    xs, ys = ([torch.randn(n, WIDTH, generator=generator) for n in lengths] for lengths in ((3, 5, 1), (4, 2, 6)))
    ys = ys if cross else xs
    model = Jagged()
    with torch.no_grad():
        model.attn.q.weight.mul_(9)
    one_by_one = QKClip(copy.deepcopy(model), observe="always")
    for x, y in zip(xs, ys, strict=True):
        one_by_one.attentions.model(x=x[None], y=y[None])
    expected = maxima(one_by_one)
    optimizer = MuonClip(model, lr=1e-2, qk_clip=QKClip(model, tau=0.5, observe="always"))
    x = torch.nested.nested_tensor(xs, layout=torch.jagged)
    y = torch.nested.nested_tensor(ys, layout=torch.jagged) if cross else x
    model(x=x, y=y).values().sum().backward()
    np.testing.assert_allclose(maxima(optimizer.qk_clip), expected, rtol=1e-5)
    optimizer.step()
    assert optimizer.qk_clip.report().clipped_heads
    [projection] = optimizer.qk_clip.projections.values()
    assert projection.query
    assert projection.key


def test_jagged_groups_of_sequences_of_one_length():
    class Groups(Attention):
        def forward(self, x):  # [B, ragged, T, WIDTH]
            parts = [m(x).unflatten(-1, (HEADS, HEAD)).transpose(2, 3) for m in (self.q, self.k, self.v)]
            values = [part.values() for part in parts]
            return F.scaled_dot_product_attention(*values).sum()

    groups = [torch.randn(n, 4, WIDTH) for n in (2, 3)]
    model = Groups()
    clip = QKClip(model, observe="always")
    model(torch.nested.nested_tensor(groups, layout=torch.jagged))
    other = copy.deepcopy(model)
    expected = QKClip(other, observe="always")
    other(torch.nested.nested_tensor([torch.cat(groups)], layout=torch.jagged))
    np.testing.assert_allclose(maxima(clip), maxima(expected), rtol=1e-5)


# Keys from a cache


def caches(model, x):
    with torch.no_grad():
        x = model.first(x)
        found = []
        for layer in model.layers:
            found.append(layer.heads(x)[1:])
            x = x + layer(x)
    return found


@pytest.mark.parametrize("given", [(False, True), (True, False), (True, True)])
def test_with_and_without_a_cache_it_is_the_same_attention(given):
    model = Model()
    optimizer = MuonClip(model, lr=1e-2, qk_clip=QKClip(model, tau=0.3, observe="always"))
    for seed, with_cache in enumerate(given):
        model(x=data(seed), caches=caches(model, data(7)) if with_cache else (None, None)).sum().backward()
    projections = optimizer.qk_clip.projections
    assert len(projections) == 2
    assert all(each.scaled_parts() for each in projections.values())
    optimizer.step()
    assert optimizer.qk_clip.report().clipped_heads


class Decoder(Attention):
    """Takes all keys and values from the cache where there is one."""

    def forward(self, x, cache=None):
        q, *own = self.heads(x)
        k, v = own if cache is None else cache
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("given", [(False, True), (True, False)])
def test_keys_that_are_all_cached_are_those_of_another_forward(given):
    model = Model(Decoder)
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for seed, with_cache in enumerate(given):
        model(x=data(seed), caches=caches(model, data(7)) if with_cache else (None, None)).sum().backward()
    assert are_found_whole(optimizer)
    optimizer.step()


# Where nothing can be observed


def functional(model, x):
    return lambda parameters: torch.func.functional_call(model, parameters, (), {"x": x}).square().mean()


def gradients(model, x):
    """By torch.func, of all parameters."""
    return torch.func.grad(functional(model, x))({name: p.detach() for name, p in model.named_parameters()})


def gradients_of_samples(model, x):
    def of_sample(parameters, sample):
        return torch.func.grad(functional(model, sample[None]))(parameters)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {name: each.mean(0) for name, each in torch.vmap(of_sample, (None, 0))(parameters, x).items()}


class Declared(Attention):
    def __init__(self):
        super().__init__()
        self.max_logits = MaxLogits(HEADS)

    def qk_projection(self):
        return QKProjection.mha(q=self.q, k=self.k, v=self.v, num_heads=HEADS, max_logits=self.max_logits)

    def attend(self, q, k, v):
        return attention(q, k, v, is_causal=True, max_logits=self.max_logits)


@pytest.mark.parametrize("take", [gradients, gradients_of_samples])
@pytest.mark.parametrize(
    ("kind", "trained"), [(Attention, False), (Attention, True), (WrittenOut, True), (Torchs, False), (Declared, True)]
)
def test_gradients_of_torch_func_are_those_without_a_clip_and_the_step_says_that_nothing_was_observed(
    kind, trained, take
):
    model = Model(kind)
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    if trained:
        model(x=data()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = Model(kind)
    plain.load_state_dict(model.state_dict())
    expected, found = take(plain, data(1)), take(model, data(1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name, parameter in model.named_parameters():
        parameter.grad = found[name]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"the model ran inside a transform of torch\.func.*forward with the same"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    model(x=data(1))  # as it advises
    optimizer.step()
    assert optimizer.qk_clip.report().clipped_heads


def test_a_transform_with_other_parameters_next_to_the_training_is_nobodys_business():
    model = Model()
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for step in range(2):
        model(x=data(step)).square().mean().backward()
        gradients(model, data(step))
        optimizer.step()
        optimizer.zero_grad()


def test_a_transform_of_the_model_itself_next_to_the_training_is_said_once():
    model = Model()
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for expected in (
        contextlib.nullcontext(),
        pytest.warns(UserWarning, match="not all forwards of layers.0, layers.1"),
    ):
        model(x=data()).square().mean().backward()
        if not isinstance(expected, contextlib.nullcontext):
            torch.vmap(lambda x: model(x=x[None]))(data()).square().mean().backward()
        with expected:
            optimizer.step()
    model(x=data()).square().mean().backward()
    torch.vmap(lambda x: model(x=x[None]))(data()).square().mean().backward()
    optimizer.step()


class InsideVmap(Attention):
    def attend(self, q, k, v):
        return torch.vmap(lambda *parts: F.scaled_dot_product_attention(*(t[None] for t in parts))[0])(q, k, v)


def test_attention_inside_a_transform_in_a_forward_is_an_error_of_the_step():
    model = Model()
    model.layers[1] = InsideVmap()
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    model(x=data()).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"called inside a transform of torch\.func.* within the forwards"):
        optimizer.step()


def test_an_attention_that_is_known_and_moves_into_a_transform_is_an_error_of_the_step():
    model = Model()
    optimizer = train(model)[2]
    model.layers[1].attend = functools.partial(InsideVmap.attend, model.layers[1])
    model(x=data()).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"observed no forward of layers\.1 .* the model ran inside a transform"):
        optimizer.step()


def test_a_transform_in_a_forward_without_attention_is_no_hindrance():
    class Layer(Attention):
        def forward(self, x):
            slope = torch.func.grad(lambda each: (each @ self.out.weight).square().sum())(x)
            return super().forward(x + 0.01 * slope)

    assert are_found_whole(train(Model(Layer))[2])


def test_functional_call_with_the_models_own_parameters_is_observed():
    model = Model()
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for step in range(2):
        functional(model, data(step))(dict(model.named_parameters())).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.qk_clip.report().clipped_heads


@pytest.mark.parametrize("first", [False, True])
def test_functional_call_with_other_parameters_is_not_observed(first):
    """As those of a teacher, or of an average, which are louder here."""
    model = Model()
    clip = QKClip(model, observe="always")
    others = {name: 10 * parameter.detach() for name, parameter in model.named_parameters()}
    if first:
        functional(model, data())(others)
        assert not clip.projections
    model(x=data()).square().mean().backward()
    seen = maxima(clip)
    functional(model, data())(others)
    np.testing.assert_array_equal(maxima(clip), seen)
    clip.step()


def test_gradients_through_other_parameters_are_an_error_of_the_step():
    """As in meta-learning: those of the inner step are made of the model's own."""
    model = Model()
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    functional(model, data())({name: 0.9 * parameter for name, parameter in model.named_parameters()}).backward()
    with pytest.raises(RuntimeError, match="with other parameters than the model's own, by functional_call"):
        optimizer.step()


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("kind", "strict"), [(Attention, True), (WrittenOut, False)])
def test_an_export_is_that_without_a_clip(kind, strict):
    """Before the first forward and after it; and the training goes on."""
    model = Model(kind)
    expected = targets(torch.export.export(Model(kind), (), {"x": data()}, strict=strict).graph)
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for step in range(2):
        assert targets(torch.export.export(model, (), {"x": data()}, strict=strict).graph) == expected
        model(x=data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.qk_clip.report().clipped_heads


def graph_of(model):
    return make_fx(lambda x: model(x=x))(data()).graph


@KINDS
def test_graphs_of_make_fx_are_those_without_a_clip(kind):
    model, plain = Model(kind), Model(kind)
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for step in range(2):
        found, expected = (graph_of(each) for each in (model, plain))
        assert targets(found) == targets(expected)
        model(x=data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_graphs_of_torchscript_are_those_without_a_clip():
    model, plain = nn.Sequential(Torchs(), Torchs()), nn.Sequential(Torchs(), Torchs())
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for step in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected = (torch.jit.trace(each, data()).inlined_graph for each in (model, plain))
        assert [node.kind() for node in found.nodes()] == [node.kind() for node in expected.nodes()]
        model(data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@KINDS
def test_fake_tensors_are_not_observed(kind):
    model = Model(kind)
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    for step in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = model(x=torch.empty(2, 5, WIDTH))
            assert fake.shape == (2, 5, WIDTH)
        assert model(x=mode.from_tensor(data())).shape == (2, 5, WIDTH) if step else True
        model(x=data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.qk_clip.report().clipped_heads


# Copies


@KINDS
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_model_and_optimizer_are_copied_together(copied, trained, kind):
    model = Model(kind)
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    if trained:
        model(x=data()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = [copied((model, optimizer)), (model, optimizer)]
    for each, its_optimizer in pairs:
        for step in (1, 2):
            each(x=data(step)).square().mean().backward()
            its_optimizer.step()
            its_optimizer.zero_grad()
            assert its_optimizer.qk_clip.report().clipped_heads
    assert all(map(torch.equal, pairs[0][0].parameters(), model.parameters()))


def test_a_clip_that_was_removed_stays_so_in_a_copy():
    model = Model()
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    optimizer.qk_clip.remove()
    other, its_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    other(x=data()).square().mean().backward()
    with pytest.raises(RuntimeError, match="it was removed"):
        its_optimizer.step()
