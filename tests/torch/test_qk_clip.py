"""The clip, judged by a dense probe that shares no code with it, on the same inputs before and after."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import tiny_attention
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_attention import HEADS, KINDS, WIDTH, TinyAttention, TinyModel, dense_max_logits, head_rows
from torch import nn
from torch.distributed.checkpoint.state_dict import _init_optim_state

from muonclip.torch import HeadRows, MaxLogits, MuonClip, QKClip, QKProjection, attention
from muonclip.torch.clip import errors as errors_module
from muonclip.torch.clip import qk_clip as qk_clip_module


def loud_attention(kind, seed, dtype=torch.float64):
    """An attention whose heads have very different maxima, and inputs for it."""
    torch.manual_seed(seed)
    layer, x = TinyAttention(kind).to(dtype), torch.randn(2, 8, WIDTH, dtype=dtype)
    projection = layer.qk_projection()
    with torch.no_grad():
        for rows in (*projection.query, *projection.query_facing_shared):
            for parameter, axis in rows.parameters():
                heads = rows.of(parameter, axis)
                shape = [1] * heads.ndim
                shape[axis] = -1
                heads.mul_(torch.linspace(0.1, 12, HEADS, dtype=dtype)[torch.randperm(HEADS)].view(shape))
    return layer, x


def probe(layer, x):
    q, k, _ = layer.qkv_of(x)
    return dense_max_logits(q, k)


def clip(layer, x, tau, observe="always", **options):
    qk_clip = QKClip({"attn": layer.qk_projection()}, tau, observe=observe, **options)
    layer(x)
    qk_clip.step()
    return qk_clip


cases = {"kind": st.sampled_from(KINDS), "seed": st.integers(0, 10_000), "quantile": st.floats(0.02, 0.98)}


@given(**cases, alpha=st.floats(0, 1))
def test_every_head_ends_at_the_smaller_of_its_maximum_and_tau(kind, seed, quantile, alpha):
    layer, x = loud_attention(kind, seed)
    before = probe(layer, x)
    tau = max(float(np.quantile(before, quantile)), 1e-3)
    clip(layer, x, tau, alpha=alpha)
    np.testing.assert_allclose(probe(layer, x), np.minimum(before, tau), rtol=1e-6, atol=1e-9)


@given(**cases)
def test_quiet_heads_keep_their_bits_and_nothing_else_moves(kind, seed, quantile):
    layer, x = loud_attention(kind, seed, torch.float32)
    before, original, values = probe(layer, x), copy.deepcopy(layer), layer.qkv_of(x)[2]
    tau = max(float(np.quantile(before, quantile)), 1e-3)
    clip(layer, x, tau)
    assert torch.equal(layer.qkv_of(x)[2], values)
    quiet = [head for head in range(HEADS) if before[head] <= tau * (1 - 1e-5)]
    loud = [head for head in range(HEADS) if before[head] > tau * (1 + 1e-5)]
    for head in quiet:
        assert all(map(torch.equal, head_rows(layer, head), head_rows(original, head)))
    for head in loud:
        assert not any(map(torch.equal, head_rows(layer, head), head_rows(original, head)))
    with torch.no_grad():  # the rest: what zeroing every scaled row leaves
        for module in (layer, original):
            for rows in module.qk_projection().scaled_parts():
                for parameter, axis in rows.parameters():
                    rows.of(parameter, axis).zero_()
    assert all(map(torch.equal, layer.parameters(), original.parameters()))


@given(**cases)
def test_is_idempotent(kind, seed, quantile):
    layer, x = loud_attention(kind, seed)
    tau = max(float(np.quantile(probe(layer, x), quantile)), 1e-3)
    clip(layer, x, tau)
    once = copy.deepcopy(layer)
    clip(layer, x, tau)
    for a, b in zip(layer.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@given(seed=st.integers(0, 10_000), quantile=st.floats(0.02, 0.98))
def test_permuting_heads_permutes_the_clip(seed, quantile):
    layer, x = loud_attention("mha", seed)
    order = torch.randperm(HEADS)
    rows = (order[:, None] * 6 + torch.arange(6)).flatten()
    permuted = copy.deepcopy(layer)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            module = getattr(permuted, name)
            module.weight.copy_(module.weight[rows])
            module.bias.copy_(module.bias[rows])
    tau = max(float(np.quantile(probe(layer, x), quantile)), 1e-3)
    gamma = clip(layer, x, tau).report().layers["attn"].gamma
    permuted_gamma = clip(permuted, x, tau).report().layers["attn"].gamma
    torch.testing.assert_close(permuted_gamma, gamma[order])
    torch.testing.assert_close(permuted.q.weight, layer.q.weight[rows])


@given(kind=st.sampled_from(["gqa", "mqa"]), seed=st.integers(0, 10_000))
def test_one_loud_query_head_does_not_shrink_the_others_of_its_group(kind, seed):
    layer, x = loud_attention(kind, seed)
    before, key = probe(layer, x), layer.k.weight.clone()
    tau = float(np.sort(before)[-2:].mean())
    clip(layer, x, tau)
    expected = before.copy()
    expected[before.argmax()] = tau
    np.testing.assert_allclose(probe(layer, x), expected, rtol=1e-6)
    assert torch.equal(layer.k.weight, key)


def test_bf16_weights_are_clipped_to_their_rounding():
    layer, x = loud_attention("mla", 3, torch.bfloat16)
    q, k, _ = layer.qkv_of(x)
    before = dense_max_logits(q.float(), k.float())
    clip(layer, x, 2.0)
    q, k, _ = layer.qkv_of(x)
    np.testing.assert_allclose(dense_max_logits(q.float(), k.float()), np.minimum(before, 2.0), rtol=4e-2)


def test_gamma_uses_the_maximum_of_all_forwards_since_the_last_step():
    layer, x = loud_attention("mha", 0)
    quiet = 0.01 * x
    qk_clip = QKClip({"attn": layer.qk_projection()}, 1.0, observe="always")
    before = probe(layer, x)
    layer(x), layer(quiet)
    with torch.no_grad():
        layer(100 * x)
    qk_clip.step()
    np.testing.assert_allclose(qk_clip.report().layers["attn"].max_logits, before, rtol=1e-6)
    layer(quiet)
    qk_clip.step()
    assert qk_clip.report().layers["attn"].max_logits.max() < before.max()


def test_report():
    layer, x = loud_attention("gqa", 1)
    before = probe(layer, x)
    tau = float(np.median(before))
    qk_clip = clip(layer, x, tau)
    report = qk_clip.report()
    row = report.layers["attn"]
    np.testing.assert_allclose(row.max_logits, before, rtol=1e-6)
    np.testing.assert_allclose(row.gamma, np.minimum(1, tau / before), rtol=1e-6)
    assert row.exact.all()
    assert torch.equal(row.bound, row.max_logits)
    assert report.clipped_heads == int((before > tau).sum())
    assert report.max_logit == pytest.approx(before.max(), rel=1e-6)
    assert f"{report.clipped_heads} of {HEADS} heads clipped at tau" in str(report)
    assert QKClip({"attn": layer.qk_projection()}).report().layers == {}


def test_infinite_tau_observes_without_touching():
    layer, x = loud_attention("mha", 0)
    original = copy.deepcopy(layer)
    assert clip(layer, x, math.inf).report().clipped_heads == 0
    assert all(map(torch.equal, layer.parameters(), original.parameters()))


def test_observed_attention_is_reported_and_never_scaled():
    statistic = MaxLogits(2)
    qk_clip = QKClip([QKProjection("mha", 2, statistic, reason="QK-norm bounds it")], 1.0)
    statistic.update(torch.tensor([5.0, 0.5]))
    qk_clip.step()
    assert qk_clip.report().layers["0"].max_logits.tolist() == [5.0, 0.5]
    assert qk_clip.report().clipped_heads == 0
    qk_clip.step()  # it need not be observed


def test_masters_are_scaled_with_their_copies():
    """Otherwise the clip is undone when the engine copies the master back."""
    layer, x = loud_attention("mla", 0, torch.bfloat16)
    masters = {id(p): p.detach().double().clone() for p in layer.parameters()}
    before = {key: master.clone() for key, master in masters.items()}
    qk_clip = QKClip({"attn": layer.qk_projection()}, 1.0, master_of=lambda p: masters[id(p)])
    layer(x)
    qk_clip.step()
    scaled = {id(p) for rows in layer.qk_projection().scaled_parts() for p, _ in rows.parameters()}
    for parameter in layer.parameters():
        torch.testing.assert_close(masters[id(parameter)].bfloat16(), parameter.detach(), rtol=1e-2, atol=1e-6)
        assert torch.equal(masters[id(parameter)], before[id(parameter)]) == (id(parameter) not in scaled)


def test_missing_observation_is_an_error_that_names_the_layer():
    model = TinyModel()
    qk_clip = QKClip(model)
    model.layers[0](torch.randn(1, 4, WIDTH))
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"observed no forward of layers\.1 since"):
        qk_clip.step()
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    for parameter in model.layers[1].parameters():
        parameter.requires_grad_(False)
    qk_clip.step()  # a frozen attention cannot explode


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_maximum_is_an_error_and_touches_nothing(poison):
    layer, x = loud_attention("mha", 0)
    original = copy.deepcopy(layer)
    qk_clip = QKClip({"attn": layer.qk_projection()}, 1.0)
    layer(x)
    layer.max_logits.update(torch.tensor([1.0, poison, 1.0, 1.0]))
    with pytest.raises(RuntimeError, match=r"non-finite attention logits in attn \(heads \[1\]\)"):
        qk_clip.step()
    assert all(map(torch.equal, layer.parameters(), original.parameters()))
    qk_clip.reset()
    layer(x)
    qk_clip.step()


@pytest.mark.parametrize("ask", ["step", "report"])
def test_an_accelerator_is_not_waited_for(monkeypatch, ask):
    """There the head is left alone, the others are clipped, and the next step or report raises, once."""
    monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: False)
    layer, x = loud_attention("mha", 0)
    original = copy.deepcopy(layer)
    qk_clip = QKClip({"attn": layer.qk_projection()}, 1e-3)
    layer.max_logits.update(torch.tensor([1.0, 1.0, math.nan, 1.0]))
    qk_clip.step()
    assert all(map(torch.equal, head_rows(layer, 2), head_rows(original, 2)))
    assert not any(map(torch.equal, head_rows(layer, 1), head_rows(original, 1)))
    layer(x)
    with pytest.raises(RuntimeError, match="non-finite attention logits in attn"):
        getattr(qk_clip, ask)()
    getattr(qk_clip, ask)()
    with pytest.raises(RuntimeError, match="observed no forward of attn"):
        (qk_clip.step(), qk_clip.step(), qk_clip.report())


def test_a_model_declares_its_attentions_or_is_refused():
    model = TinyModel("gqa")
    assert list(QKClip(model).projections) == ["layers.0", "layers.1"]
    with pytest.raises(ValueError, match=r"no attention was found\. .*qk_projection.*qk_clip=None"):
        QKClip(nn.Linear(3, 3))


def test_wrong_declarations_are_refused():
    q, k, statistic = nn.Linear(5, 12), nn.Linear(5, 6), MaxLogits(4)
    with pytest.raises(ValueError, match="q: 5 heads do not divide the 12 rows"):
        QKProjection.mha(q=q, k=k, num_heads=5, max_logits=MaxLogits(5))
    with pytest.raises(ValueError, match="num_kv_heads=3 must divide num_heads=4"):
        QKProjection.gqa(q=q, k=k, num_heads=4, num_kv_heads=3, max_logits=statistic)
    with pytest.raises(ValueError, match="q has 12 rows; 4 heads of 5 would have 20"):
        QKProjection.mla(
            q=q, kv=k, num_heads=4, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=1, max_logits=statistic
        )
    with pytest.raises(ValueError, match="max_logits counts 4 heads, the projection 3"):
        QKProjection.mha(q=q, k=k, num_heads=3, max_logits=statistic)
    with pytest.raises(ValueError, match="do not fit a weight of shape"):
        QKProjection("mha", 4, statistic, query=(HeadRows(q, 4, 3, start=1),), key=(HeadRows(q, 4, 3),))
    with pytest.raises(ValueError, match="key has rows for 2 heads"):
        QKProjection("gqa", 4, statistic, query=(HeadRows(q, 4, 3),), key=(HeadRows(k, 2, 3),))
    with pytest.raises(ValueError, match="needs `query` and `key`"):
        QKProjection("mha", 4, statistic, query=(HeadRows(q, 4, 3),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tau=0.0), "tau=0.0 must be positive"),
        (dict(alpha=2.0), "alpha=2.0 must be"),
        (dict(observe="sometimes"), "observe='sometimes'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QKClip(TinyModel(), **arguments)
    with pytest.raises(ValueError, match=r"pass the model itself, not model\.parameters"):
        QKClip(TinyModel().parameters())


def test_works_after_any_optimizer():
    torch.manual_seed(0)
    model = TinyModel("mla")
    optimizer, qk_clip = torch.optim.AdamW(model.parameters(), lr=0.1), QKClip(model, tau=0.3)
    optimizer.register_step_post_hook(lambda *_: qk_clip.step())
    clipped = 0
    for step in range(10):
        model.loss(torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        clipped += qk_clip.report().clipped_heads
    assert clipped > 0


def test_a_declared_attention_that_feeds_two_statistics_of_its_own():
    """Without a model: projections declared by hand around `attention`."""
    torch.manual_seed(0)
    q, k, statistic = nn.Linear(5, 12), nn.Linear(5, 12), MaxLogits(3)
    qk_clip = QKClip([QKProjection.mha(q=q, k=k, num_heads=3, max_logits=statistic)], tau=0.01)
    x = torch.randn(2, 7, 5)

    def heads():
        return (m(x).unflatten(-1, (3, 4)).transpose(1, 2) for m in (q, k))

    query, key = heads()
    attention(query, key, key, max_logits=statistic)
    qk_clip.step()
    everything = np.ones((2, 7, 7), dtype=bool)
    np.testing.assert_allclose(dense_max_logits(*heads(), everything), 0.01, rtol=1e-4)


class Wrapper(nn.Module):
    """Forwards its module's attributes, as `torch.compile`, checkpoint and sharding wrappers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x):
        return self.module(x)


def test_a_wrapped_attention_is_clipped_once():
    layer, x = loud_attention("mha", 0)
    model = nn.ModuleDict({"attn": Wrapper(layer)})
    before = probe(layer, x)
    qk_clip = QKClip(model, tau=0.5)
    assert list(qk_clip.projections) == ["attn"]
    model["attn"](x)
    qk_clip.step()
    np.testing.assert_allclose(probe(layer, x), np.minimum(before, 0.5), rtol=1e-6)


def test_attentions_that_share_a_statistic_are_refused():
    model = TinyModel()
    model.layers[1].max_logits = model.layers[0].max_logits
    with pytest.raises(ValueError, match=r"layers\.0 and layers\.1 share one MaxLogits"):
        QKClip(model)


def test_an_attention_with_a_reason_is_observed_and_never_scaled():
    """QK-norm: scaling the projections changes no logit, so they would shrink for ever."""
    layer, x = loud_attention("mha", 0)
    original = copy.deepcopy(layer)
    qk_clip = QKClip([dataclasses.replace(layer.qk_projection(), reason="QK-norm")], 1e-3)
    layer(x)
    qk_clip.step()
    assert all(map(torch.equal, layer.parameters(), original.parameters()))
    assert qk_clip.report().layers["0"].max_logits.max() > 1
    with pytest.raises(RuntimeError, match="observed no forward of 0"):
        qk_clip.step()


def test_frozen_projections_keep_their_weights():
    layer, x = loud_attention("mha", 0)
    layer.requires_grad_(False)
    original = copy.deepcopy(layer)
    clip(layer, x.requires_grad_(), 1e-3)
    assert all(map(torch.equal, layer.parameters(), original.parameters()))


def test_a_computed_weight_is_refused():
    """Scaling what a parametrization computes would change nothing."""
    q = nn.utils.parametrizations.weight_norm(nn.Linear(5, 12))
    with pytest.raises(ValueError, match="the weight of ParametrizedLinear is not a parameter but computed"):
        QKProjection.mha(q=q, k=nn.Linear(5, 12), num_heads=4, max_logits=MaxLogits(4))


def test_transposed_weights_are_known_by_their_module():
    class Conv1D(tiny_attention.Transposed):
        pass

    projection = QKProjection.mha(q=Conv1D(12, 12), k=nn.Linear(12, 12), num_heads=4, max_logits=MaxLogits(4))
    assert [rows.axis for rows in projection.scaled_parts()] == [1, 0]


def test_query_and_key_take_their_shares_of_gamma():
    """γ^α and γ^(1−α) where the key is the head's own, all of γ where heads share it."""
    for kind in ("mha", "gqa", "mla"):
        layer, x = loud_attention(kind, 0)
        original = copy.deepcopy(layer)
        gamma = clip(layer, x, 0.5, alpha=0.3).report().layers["attn"].gamma.double()
        assert (gamma < 1).any()
        now, then = layer.qk_projection(), original.qk_projection()
        for part, exponent in (("query", 0.3), ("key", 0.7), ("query_facing_shared", 1.0)):
            for rows, before in zip(getattr(now, part), getattr(then, part), strict=True):
                for (p, axis), (q, _) in zip(rows.parameters(), before.parameters(), strict=True):
                    shape = [1] * (p.ndim + 1)
                    shape[axis] = -1
                    expected = before.of(q, axis) * (gamma**exponent).view(shape)
                    torch.testing.assert_close(rows.of(p, axis), expected, rtol=1e-6, atol=1e-12)


def test_defaults_are_k2_s():
    qk_clip = QKClip(TinyModel())
    assert (qk_clip.tau, qk_clip.alpha) == (100.0, 0.5)


def test_parameters_that_an_engine_replaced_are_the_ones_scaled():
    layer, x = loud_attention("mha", 0)
    qk_clip = QKClip({"attn": layer.qk_projection()}, 0.5)
    before = probe(layer, x)
    for module in (layer.q, layer.k):
        module.weight = nn.Parameter(module.weight.detach().clone())
        module.bias = nn.Parameter(module.bias.detach().clone())
    layer(x)
    qk_clip.step()
    np.testing.assert_allclose(probe(layer, x), np.minimum(before, 0.5), rtol=1e-6)


@pytest.fixture
def late_copies(monkeypatch):
    """An accelerator whose copies to the host arrive when they are called."""
    copies = []

    def copy_later(host, device):
        snapshot = device.clone()
        copies.append(lambda: host.copy_(snapshot))

    monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: False)
    monkeypatch.setattr(errors_module, "copy_to_host", copy_later)
    return copies


def test_an_error_that_is_waiting_survives_a_clean_step(late_copies):
    layer, x = loud_attention("mha", 0)
    qk_clip = QKClip({"attn": layer.qk_projection()}, 1e-3)
    layer.max_logits.update(torch.tensor([1.0, 1.0, math.nan, 1.0]))
    qk_clip.step()
    layer(x)
    qk_clip.step()
    with pytest.raises(RuntimeError, match="non-finite"):
        qk_clip.report()


@pytest.mark.parametrize("arrived", [0, 1])
def test_an_error_comes_once_however_late_its_copies_arrive(late_copies, arrived):
    layer, x = loud_attention("mha", 0)
    qk_clip = QKClip({"attn": layer.qk_projection()}, 1e-3)
    layer.max_logits.update(torch.tensor([1.0, 1.0, math.nan, 1.0]))
    qk_clip.step()
    layer(x)
    qk_clip.step()
    for arrive in late_copies[:arrived]:
        arrive()
    layer(x)
    with pytest.raises(RuntimeError, match="non-finite"):
        qk_clip.step() if arrived else qk_clip.report()
    for arrive in late_copies[arrived:]:
        arrive()
    for _ in range(2):
        layer(x)
        qk_clip.step()
        for arrive in late_copies:
            arrive()
    assert qk_clip.report().steps == 4
    qk_clip.step()
    for arrive in late_copies:
        arrive()
    with pytest.raises(RuntimeError, match="observed no forward"):
        qk_clip.step()


def test_an_error_keeps_its_name_when_another_attention_is_found(monkeypatch):
    monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: False)
    first, second = (loud_attention("mha", seed)[0] for seed in (0, 1))
    qk_clip = QKClip({"first": first.qk_projection()}, 1e-3)
    qk_clip.step()
    qk_clip.projections["second"] = second.qk_projection()
    with pytest.raises(RuntimeError, match="observed no forward of first since"):
        qk_clip.step()


@pytest.mark.parametrize("waits", [True, False])
def test_a_lower_tau_after_a_forward_is_an_error_everywhere(monkeypatch, waits):
    """The maxima between the two were not computed. On an accelerator the error comes later."""
    monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: waits)
    layer, x = loud_attention("mha", 0)
    original = copy.deepcopy(layer)
    qk_clip = QKClip({"attn": layer.qk_projection()}, 1e4)
    layer(x)
    qk_clip.tau = 1e-3
    if not waits:
        qk_clip.step()
    with pytest.raises(RuntimeError, match=r"tau was lowered to 0\.001 .* some maxima of attn"):
        qk_clip.step() if waits else qk_clip.report()
    assert all(map(torch.equal, layer.parameters(), original.parameters()))
    qk_clip.reset()
    layer(x)
    qk_clip.step()
    assert qk_clip.report().clipped_heads > 0


def test_a_step_walks_over_no_module(monkeypatch):
    """Parameters and their placements are read again only where weights of an attention were replaced."""
    model = TinyModel()
    optimizer = MuonClip(model, tau=0.3)

    def backward():
        model.loss(torch.randint(0, 13, (2, 9))).backward()

    backward()
    optimizer.step()
    backward()
    walks = []
    walk = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda self, *a, **b: walks.append(self) or walk(self, *a, **b))
    optimizer.step()
    assert not walks
    q = model.layers[0].q
    q.weight = nn.Parameter(q.weight.detach().clone())
    optimizer.qk_clip.attentions.refresh()
    assert walks
    assert optimizer.qk_clip.attentions.placement_version == 2


# Attached to another optimizer


def trained(make_optimizer, attached, steps=4, closure=False, schedule=False, scaler=None):
    torch.manual_seed(0)
    model = TinyModel("mla")
    qk_clip = QKClip(model, tau=0.3)
    optimizer = make_optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step) if schedule else None
    if attached:
        qk_clip.attach(optimizer)
    clipped = 0
    for step in range(steps):
        tokens = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(step))

        def backward(tokens=tokens):
            optimizer.zero_grad()
            loss = model.loss(tokens)
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        if closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if not attached:
            qk_clip.step()
        if scaler is not None:
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        clipped += qk_clip.report().clipped_heads
    return [parameter.detach().clone() for parameter in model.parameters()], clipped


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(closure=True), dict(schedule=True), dict(scaler=torch.amp.GradScaler("cpu", enabled=False))],
    ids=["plain", "closure", "scheduler", "disabled scaler"],
)
def test_attached_to_an_optimizer_it_does_what_step_after_it_does(options):
    with_hooks, clipped = trained(adamw, attached=True, **options)
    by_hand, as_many = trained(adamw, attached=False, **options)
    assert clipped == as_many > 0
    assert all(map(torch.equal, with_hooks, by_hand))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_is_not_clipped(fused):
    """A fused optimizer is called all the same and skips by itself."""
    model = TinyModel()
    qk_clip = QKClip(model, tau=0.01)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=fused), torch.amp.GradScaler("cpu")
    qk_clip.attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    for poison in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model.loss(torch.randint(0, 13, (2, 9))) * poison).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(map(torch.equal, model.state_dict().values(), before.values()))
        assert unchanged == (poison == math.inf)
        assert qk_clip.report().steps == (poison == 1.0)
    assert qk_clip.report().clipped_heads > 0


@pytest.mark.parametrize("closure", [None, lambda: torch.zeros(())])
def test_attached_its_errors_come_before_the_update_and_end_with_the_attachment(closure):
    model = TinyModel()
    qk_clip = QKClip(model)
    optimizer = adamw(model.parameters())
    attachment = qk_clip.attach(optimizer)
    model.loss(torch.randint(0, 13, (2, 9))).backward()
    qk_clip.reset()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="observed no forward"):
        optimizer.step(closure)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    attachment.remove()
    optimizer.step(closure)
    assert not all(map(torch.equal, model.state_dict().values(), before.values()))
    with pytest.raises(ValueError, match="MuonClip clips by itself"):
        qk_clip.attach(MuonClip(TinyModel()))


def test_attached_it_lets_checkpoint_libraries_make_the_state():
    """They take a step at rate 0 with gradients of zero before any forward."""
    model = TinyModel()
    optimizer = adamw(model.parameters())
    QKClip(model).attach(optimizer)
    _init_optim_state(optimizer)
    assert len(optimizer.state) == len(list(model.parameters()))
