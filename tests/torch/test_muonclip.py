"""`MuonClip` as a torch optimizer: the order of a step, groups, state, and everything that scripts do to it."""

import copy
import inspect
from functools import partial

import numpy as np
import pytest
import torch
from svd_oracle import svd_polynomial
from tiny_attention import KINDS, WIDTH, TinyModel, dense_max_logits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from muonclip.core import COEFFICIENT_SETS, resolve_coefficients
from muonclip.torch import MuonClip, QKClip
from muonclip.torch.clip import qk_clip as qk_clip_module


def tokens(seed, batch=2, length=9):
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(seed))


def build(kind="mha", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = TinyModel(kind).to(dtype)
    tau = {} if options.get("qk_clip", "auto") is None else {"tau": 0.5}
    return model, MuonClip(model, **{"lr": 0.05, **tau, **options})


def train(model, optimizer, steps):
    for step in steps:
        model.loss(tokens(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(model, other):
    return all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_muon_and_adamw_and_then_the_clip(kind):
    """Against the three done by hand: the update from the gradient, the host's AdamW, and factors from S before it."""
    model, optimizer = build(kind, torch.float64, tau=0.3, nesterov=False, adamw=dict(lr=0.01))
    reference = copy.deepcopy(model)
    model.loss(tokens(0)).backward()
    reference.loss(tokens(0)).backward()
    optimizer.step()

    muon = {line.name: line for line in optimizer.plan.parameters if line.use == "muon"}
    decayed = {line.name: line.decays for line in optimizer.plan.parameters}
    parameters = dict(reference.named_parameters())
    adamw = torch.optim.AdamW(
        [dict(params=[p], weight_decay=0.1 * decayed[n]) for n, p in parameters.items() if n not in muon],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    adamw.step()
    with torch.no_grad():
        for name, line in muon.items():
            if parameters[name].grad is None:
                continue
            updates = [
                0.2
                * max(block.shape[-2:]) ** 0.5
                * torch.from_numpy(svd_polynomial(block, resolve_coefficients("jordan")))
                for block in line.layout.split(parameters[name].grad, xp=torch)
            ]
            update = line.layout.join(updates, line.shape, xp=torch)
            parameters[name].sub_(0.05 * (update + 0.1 * parameters[name]))
    qk_clip = QKClip(reference, tau=0.3)
    qk_clip.step()
    assert qk_clip.report().clipped_heads > 0
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_at_rate_zero_only_the_clip_acts(kind):
    model, optimizer = build(kind, torch.float64, lr=0.0, tau=0.2)
    x = model.embed(tokens(0)[:, :-1])
    layer = model.layers[0]
    q, k, _ = layer.qkv_of(x)
    before = dense_max_logits(q, k)
    values = copy.deepcopy(model)
    train(model, optimizer, [0])
    q, k, _ = layer.qkv_of(x)
    np.testing.assert_allclose(dense_max_logits(q, k), np.minimum(before, 0.2), rtol=1e-6)
    assert torch.equal(model.lm_head.weight, values.lm_head.weight)


def test_training_with_the_clip_holds_the_logits():
    last = {}
    for tau in (1.0, float("inf")):
        model, optimizer = build("gqa", tau=tau, lr=0.05, weight_decay=0.0)
        train(model, optimizer, range(40))
        last[tau] = optimizer.qk_clip.report().max_logit
    assert last[1.0] < 4
    assert last[float("inf")] > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
def test_resumes_bit_for_bit(tmp_path, dtype, momentum_dtype):
    straight, optimizer = build("mla", dtype, momentum_dtype=momentum_dtype)
    train(straight, optimizer, range(6))
    model, optimizer = build("mla", dtype, momentum_dtype=momentum_dtype)
    train(model, optimizer, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    model, optimizer = build("mla", dtype, momentum_dtype=momentum_dtype, lr=0.9)
    for target, state in zip(
        (model, optimizer), torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True
    ):
        target.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    assert equal(model, straight)


def test_closures_run_with_gradients_and_return_their_loss():
    model, optimizer = build()
    other, by_hand = build()
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model.loss(tokens(0))
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    train(other, by_hand, [0])
    assert calls == [True]
    assert loss.item() == pytest.approx(other.loss(tokens(0)).item(), rel=2)
    assert equal(model, other)


def test_schedulers_hooks_and_group_options():
    model, optimizer = build()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, optimizer, [0])
    scheduler.step()
    assert seen == ["pre", "post"]
    assert {group["lr"] for group in optimizer.param_groups} == {0.025}
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [(group["use"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("muon", 0.1),
        ("adamw", 0.1),
        ("adamw", 0.0),
    ]


def test_adamw_options():
    _, optimizer = build(adamw=dict(lr=0.3, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.7))
    _, decayed, plain = optimizer.param_groups
    assert (decayed["lr"], decayed["betas"], decayed["eps"], decayed["weight_decay"]) == (0.3, (0.8, 0.9), 1e-5, 0.7)
    assert (plain["lr"], plain["weight_decay"]) == (0.3, 0.0)


def test_added_groups_are_updated_and_planned():
    model, optimizer = build()
    extra = nn.Linear(WIDTH, 12)
    optimizer.add_param_group(dict(params=extra.named_parameters(prefix="extra"), lr=0.5))
    muon, vector = optimizer.param_groups[-2:]
    assert (muon["use"], muon["param_names"], muon["lr"]) == ("muon", ["extra.weight"], 0.5)
    assert (vector["use"], vector["param_names"], vector["weight_decay"]) == ("adamw", ["extra.bias"], 0.0)
    assert "extra.weight" in str(optimizer.plan)
    before = copy.deepcopy(extra)
    extra(torch.randn(3, WIDTH)).square().sum().backward()
    train(model, optimizer, [0])
    assert not torch.equal(extra.weight, before.weight)
    assert not torch.equal(extra.bias, before.bias)


def test_parameters_without_gradient_and_frozen_ones_stay():
    model, optimizer = build()
    model.embed.weight.requires_grad_(False)
    unused = model.layers[1].v.weight
    model.loss(tokens(0)).backward()
    unused.grad = None
    before = copy.deepcopy(model)
    optimizer.step()
    assert torch.equal(unused, before.layers[1].v.weight)
    assert torch.equal(model.embed.weight, before.embed.weight)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    frozen, optimizer = build()
    frozen.embed.weight.requires_grad_(False)
    assert "frozen" in str(MuonClip(frozen).plan)


def test_a_step_that_the_scaler_skips_clips_nothing_and_spoils_nothing():
    model, optimizer = build(tau=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    start = copy.deepcopy(model)
    scaler.scale(model.loss(tokens(0))).backward()
    model.lm_head.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer), scaler.update(), model.zero_grad()
    assert equal(model, start)
    scaler.scale(model.loss(tokens(1))).backward()
    scaler.step(optimizer), scaler.update()
    assert optimizer.qk_clip.report().clipped_heads > 0
    assert not equal(model, start)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_non_finite_maximum_of_a_skipped_step_does_not_fail_the_next(set_to_none):
    model, optimizer = build(tau=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = model.layers[0].q.weight
    start = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("inf")
    scaler.scale(model.loss(tokens(0))).backward()
    assert model.layers[0].max_logits.nonfinite.any()
    scaler.step(optimizer), scaler.update(), model.zero_grad(set_to_none=set_to_none)
    with torch.no_grad():
        weight.copy_(start)
    scaler.scale(model.loss(tokens(1))).backward()
    scaler.step(optimizer), scaler.update()
    assert optimizer.qk_clip.report().layers["layers.0"].max_logits.isfinite().all()


def test_a_non_finite_maximum_is_an_error_before_anything_moves():
    model, optimizer = build()
    with torch.no_grad():
        model.layers[1].k.weight[3, 0] = float("nan")
    model.loss(tokens(0)).backward()
    before, state = copy.deepcopy(model.state_dict()), len(optimizer.state)
    with pytest.raises(RuntimeError, match=r"non-finite attention logits in layers\.1 \(heads \[0\]\)"):
        optimizer.step()
    assert all(torch.equal(before[name].nan_to_num(), t.nan_to_num()) for name, t in model.state_dict().items())
    assert len(optimizer.state) == state == 0


def test_a_missing_observation_is_an_error_before_anything_moves():
    model, optimizer = build()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"observed no forward of layers\.0, layers\.1"):
        optimizer.step()
    assert equal(model, before)
    assert not optimizer.state


def test_an_initialising_step_at_rate_zero_needs_no_observation():
    """Checkpoint libraries run one step with zero gradients and rate 0 to create the state."""
    model, optimizer = build(lr=0.0)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert equal(model, before)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_gradient_accumulation_is_one_step():
    """Momentum advances once and the clip sees the maximum over the micro-batches."""
    model, optimizer = build(dtype=torch.float64)
    whole, reference = build(dtype=torch.float64)
    both = torch.cat([tokens(0), tokens(1)])
    whole.loss(both).backward()
    for seed in (0, 1):
        (model.loss(tokens(seed)) / 2).backward()
    optimizer.step(), reference.step()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_without_the_clip():
    model, optimizer = build(qk_clip=None)
    assert optimizer.qk_clip is None
    assert "QK-Clip off" in str(optimizer.plan)
    train(model, optimizer, [0])


def test_a_clip_of_one_s_own_keeps_its_tau():
    model, _ = build()
    optimizer = MuonClip(model, qk_clip=QKClip(model, tau=0.01, alpha=0.3))
    train(model, optimizer, [0])
    assert optimizer.qk_clip.tau == 0.01
    assert optimizer.qk_clip.report().clipped_heads > 0


def test_named_parameters_and_groups():
    model, _ = build()
    by_name = MuonClip(model.named_parameters(), qk_clip=None)
    by_module = MuonClip(model, qk_clip=None)
    assert [g["param_names"] for g in by_name.param_groups] == [g["param_names"] for g in by_module.param_groups]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [dict(params=matrices, use="muon", lr=0.1), dict(params=rest, use="adamw", betas=(0.5, 0.6))]
    optimizer = MuonClip(groups, qk_clip=QKClip(model), weight_decay=0.2)
    assert [(g["use"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("muon", 0.1, 0.2),
        ("adamw", 1e-3, 0.2),
    ]
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    train(model, optimizer, [0])


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_every_polynomial_trains(name):
    model, optimizer = build(ns_coefficients=name, lr=0.02, tau=100.0, ns_dtype=torch.bfloat16)
    first = model.loss(tokens(0)).item()
    train(model, optimizer, [0] * 15)
    assert model.loss(tokens(0)).item() < 0.7 * first


def test_copies_and_leaves_the_model_alone():
    model, optimizer = build()
    train(model, optimizer, [0])
    copied_model, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, [1]), train(copied_model, copied, [1])
    assert equal(model, copied_model)
    assert str(copied.plan) == str(optimizer.plan)
    assert set(model.state_dict()) == set(TinyModel().state_dict())


def test_memory_is_freed_with_the_optimizer():
    import gc
    import weakref

    model, optimizer = build()
    train(model, optimizer, [0])
    gone = weakref.ref(optimizer.qk_clip)
    del optimizer
    gc.collect()
    assert gone() is None
    model.loss(tokens(0)).backward()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: MuonClip(m.parameters()), r"Pass the model itself, MuonClip\(model"),
        (lambda m: MuonClip(m.named_parameters()), "Pass the model itself"),
        (lambda m: MuonClip(m.parameters(), qk_clip=None), "parameters without names"),
        (lambda m: MuonClip(nn.Linear(4, 5), qk_clip="required"), "no attention was found"),
        (lambda m: MuonClip(m, tau=0), "tau=0 must be positive"),
        (lambda m: MuonClip(m, tau=-3.0), "tau=-3.0 must be positive"),
        (lambda m: MuonClip(m, lr=-1e-3), "lr=-0.001 must be"),
        (lambda m: MuonClip(m, ns_coefficients="jordon"), "'jordon' is not a known polynomial"),
        (lambda m: MuonClip(m, qk_clip="on"), "qk_clip='on'; use 'auto', 'required', a QKClip, or None"),
        (lambda m: MuonClip(m, adamw=dict(beta1=0.9)), r"adamw=\{beta1: …\} is not an option.*known: lr, betas"),
        (lambda m: MuonClip(m, adamw=dict(lr=-1.0)), "lr=-1.0 must be"),
        (lambda m: MuonClip(m, adamw=dict(betas=(0.9, 1.0))), "betas="),
        (lambda m: MuonClip(m.named_parameters(), qk_clip=None, per_head=True), "per_head=True needs"),
        (lambda m: MuonClip([dict(params=m.named_parameters(), use="sgd")], qk_clip=None), "use='sgd' in a parameter"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(TinyModel())


def test_without_the_clip_the_matrices_are_the_same():
    """A comparison with and without the clip must not compare two different Muons."""
    for options in ({}, {"per_head": True}):
        for kind in ("fused_interleaved", "mla"):
            with_clip, without = (build(kind, qk_clip=clip, **options)[1].plan for clip in ("auto", None))
            assert with_clip.parameters == without.parameters
            assert without.attentions


def test_an_attention_without_gradient_may_be_unobserved():
    """A layer that a batch does not reach does not move, so it cannot explode unseen."""
    model, optimizer = build()
    skipped = model.layers[1].forward
    model.layers[1].forward = lambda x: torch.zeros_like(x)
    train(model, optimizer, [0])
    model.layers[1].forward = skipped
    train(model, optimizer, [1])
    assert list(optimizer.qk_clip.report().layers) == ["layers.0", "layers.1"]


def test_a_step_without_any_observation_is_an_error_though_no_query_has_a_gradient():
    """One observed attention says that the forward ran; without any, nobody knows what has."""
    model, optimizer = build()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"observed no forward of layers\.0, layers\.1 since"):
        optimizer.step()
    assert equal(model, before)


def test_the_initialising_step_of_a_checkpoint_library_keeps_weights_and_observation():

    model, optimizer = build(tau=0.1)
    model.loss(tokens(0))
    before = copy.deepcopy(model)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert equal(model, before)
    assert model.layers[0].max_logits.observed == 1
    train(model, optimizer, [0])
    resumed, other = build(tau=0.1)
    set_optimizer_state_dict(resumed, other, state)
    train(resumed, other, [0])
    assert equal(resumed, model)


def test_a_tensor_rate_is_each_group_s_own():
    _, optimizer = build(lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0):
        scheduler.step(loss)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05] * 3)


def test_a_checkpoint_with_other_groups_is_refused():
    _, optimizer = build()
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"][::-1]
    for group in state["param_groups"]:
        del group["param_names"]  # by which they would be found
    with pytest.raises(ValueError, match="group 0 of the checkpoint is for 'adamw', of the optimizer for 'muon'"):
        build()[1].load_state_dict(state)


class Resorted(nn.Module):
    """A parameter that an earlier rule gave to Muon and one that it gave to AdamW: today the other way round."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8, bias=False)
        self.logits_dense = nn.Linear(8, 8, bias=False)
        self.time_emb_proj = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.logits_dense(self.time_emb_proj(self.norm(self.body(self.embed(x)))))


def resorted(division=None):
    torch.manual_seed(0)
    model = Resorted()
    named = dict(model.named_parameters())
    groups = [dict(group, params=[(n, named[n]) for n in group["params"]]) for group in division or ()]
    return model, MuonClip(groups or model, lr=0.01, qk_clip=None)


def steps_of(model, optimizer, seeds):
    for seed in seeds:
        model(torch.randint(12, (2, 5), generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


EARLIER = [  # as many of each shape as today: by position every state would fit
    dict(params=["body.weight", "logits_dense.weight"], use="muon"),
    dict(params=["embed.weight", "time_emb_proj.weight"], use="adamw"),
    dict(params=["norm.weight", "norm.bias"], use="adamw", weight_decay=0.0),
]


@pytest.mark.parametrize("how", ["torch", "dcp", "flat dcp", "without names"])
def test_a_checkpoint_that_sorted_a_parameter_otherwise_is_refused_by_name(how):
    model, optimizer = resorted(EARLIER)
    steps_of(model, optimizer, range(2))
    options = StateDictOptions(flatten_optimizer_state_dict=how == "flat dcp")
    state = optimizer.state_dict() if how == "torch" else get_optimizer_state_dict(model, optimizer, options=options)
    if how == "without names":
        for group in state["param_groups"]:
            del group["param_names"]
    other, today = resorted()
    last = [group["param_names"][-1] for group in today.param_groups[:2]]
    assert last == ["time_emb_proj.weight", "logits_dense.weight"]
    load = today.load_state_dict if how == "torch" else partial(set_optimizer_state_dict, other, today, options=options)
    with pytest.raises(ValueError, match=r"'(logits_dense|time_emb_proj)\.weight' .*Nothing was loaded.*use='muon'"):
        load(state) if how == "torch" else load(optim_state_dict=state)


def test_a_checkpoint_that_sorted_a_parameter_otherwise_goes_on_with_its_own_groups():
    model, optimizer = resorted(EARLIER)
    steps_of(model, optimizer, range(2))
    other, resumed = resorted(EARLIER)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer), (other, resumed)):
        steps_of(*each, range(2, 4))
    assert equal(other, model)


def test_a_checkpoint_that_decayed_a_parameter_otherwise_is_refused_by_name():
    decayed = dict(EARLIER[1], params=["norm.weight", "time_emb_proj.weight"])
    _, earlier = resorted([EARLIER[0], decayed, dict(EARLIER[2], params=["embed.weight", "norm.bias"])])
    _, today = resorted(EARLIER)
    with pytest.raises(ValueError, match=r"'norm\.weight' is in group 1 .* in group 2 of the optimizer"):
        today.load_state_dict(earlier.state_dict())


def test_a_refused_group_adds_nothing():
    _, optimizer = build()
    extra = nn.Linear(WIDTH, 12)
    plan = str(optimizer.plan)
    with pytest.raises(ValueError, match="betas="):
        optimizer.add_param_group(dict(params=extra.named_parameters(), betas=(2.0, 3.0)))
    with pytest.raises(ValueError, match="layout in a parameter group that does not say"):
        optimizer.add_param_group(dict(params=extra.named_parameters(), layout=None))
    twice = [*extra.named_parameters(), *nn.Linear(3, 4).named_parameters()]
    with pytest.raises(ValueError, match="two parameters are named 'weight'"):
        optimizer.add_param_group(dict(params=twice))
    for option in ("amsgrad", "maximize", "differentiable"):
        with pytest.raises(ValueError, match=f"{option}=True is not an option"):
            optimizer.add_param_group(dict(params=[extra.bias], use="adamw", **{option: True}))
    assert len(optimizer.param_groups) == 3
    assert str(optimizer.plan) == plan


def test_everything_is_updated_in_place():
    """CUDA graphs and sharding engines hold on to addresses."""
    model, optimizer = build("mla", tau=0.05)
    train(model, optimizer, [0])

    def addresses():
        state = [value for values in optimizer.state.values() for value in values.values()]
        statistics = [layer.max_logits.packed for layer in model.layers]
        return [tensor.data_ptr() for tensor in (*model.parameters(), *state, *statistics)]

    before = addresses()
    train(model, optimizer, [1])
    assert optimizer.qk_clip.report().clipped_heads > 0
    assert addresses() == before


def test_one_group_at_rate_zero_is_not_an_initialising_step():
    model, optimizer = build(adamw=dict(lr=0.0))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="observed no forward"):
        optimizer.step()


def test_a_deferred_error_is_raised_before_a_checkpoint_is_written(monkeypatch):
    model, optimizer = build()
    monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: False)
    model.loss(tokens(0)).backward()
    model.layers[0].max_logits.nonfinite[0] = 1.0
    model.layers[0].q.weight.grad[0, 0] = float("nan")
    optimizer.step()
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.state_dict()


def test_defaults():
    _, optimizer = build(tau=100.0)
    defaults = inspect.signature(MuonClip).parameters
    assert (defaults["tau"].default, defaults["eps"].default, defaults["lr"].default) == (100.0, None, 1e-3)
    assert optimizer.qk_clip.tau == 100.0
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups[1:]} == {((0.9, 0.95), 1e-8)}


def test_schedulers_that_cycle_momentum_work():
    _, optimizer = build()
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, max_momentum=0.9)
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_capturable_is_refused_on_the_cpu_before_anything_moves():
    model, optimizer = build(capturable=True)
    before = copy.deepcopy(model)
    model.loss(tokens(0)).backward()
    with pytest.raises(ValueError, match=r"capturable=True is for CUDA graphs, but embed\.weight is on the CPU"):
        optimizer.step()
    assert equal(model, before)
