"""Frozen means frozen: the clip changes no weight with `requires_grad=False`, and says which heads it left loud."""

import copy
import math
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_attention import HEAD, HEADS, WIDTH, TinyAttention, dense_max_logits, head_rows
from torch import nn

from muonclip.torch import HeadRows, MaxLogits, MuonClip, QKClip, QKProjection, attention
from muonclip.torch.clip import clipping_in_words
from muonclip.torch.clip import qk_clip as qk_clip_module


def loud(kind):
    """An attention of which two heads have large logits, and inputs for it."""
    torch.manual_seed(3)
    layer, x = TinyAttention(kind).double(), torch.randn(2, 8, WIDTH, dtype=torch.float64)
    projection = layer.qk_projection()
    with torch.no_grad():
        for rows in (*projection.query, *projection.query_facing_shared):
            for parameter, axis in rows.parameters():
                rows.of(parameter, axis)[1:3] *= 9
    return layer, x


def maxima(layer, x):
    q, k, _ = layer.qkv_of(x)
    return dense_max_logits(q, k)


def step(layer, x, clip):
    layer(x)
    clip.step()
    return clip.report()


def declared(layer, tau, **options):
    return QKClip({"attn": layer.qk_projection()}, tau, observe="always", **options)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("kind", "frozen"),
    [
        ("mha", ["k.weight", "k.bias"]), ("mha", ["q.weight", "q.bias"]), ("mha", ["q.bias"]),
        ("gqa", ["k.weight", "k.bias"]), ("mla", ["kv_up.weight", "kv_up.bias"]), ("mla", ["k_rope.weight"]),
    ],
)  # fmt: skip
def test_the_side_that_is_trained_takes_all_of_gamma(kind, frozen, alpha):
    layer, x = loud(kind)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    before, weights = maxima(layer, x), copy.deepcopy(layer)
    tau = float(np.sort(before)[-2] / 2)
    report = step(layer, x, declared(layer, tau, alpha=alpha))
    np.testing.assert_allclose(maxima(layer, x), np.minimum(before, tau), rtol=1e-6, atol=1e-9)
    assert report.clipped_heads == 2
    assert report.frozen_heads == 0
    for name in frozen:
        assert torch.equal(layer.get_parameter(name), weights.get_parameter(name))
    for head in (before <= tau).nonzero()[0]:
        assert all(map(torch.equal, head_rows(layer, head), head_rows(weights, head)))


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [
        ("mha", ["q.bias", "k.weight"]), ("gqa", ["q.weight"]), ("gqa", ["q.bias"]), ("mla", ["q_up.weight"]),
        ("fused_blocks", ["qkv.bias"]),
    ],
)  # fmt: skip
def test_where_no_side_can_be_scaled_nothing_is_and_the_report_says_so(kind, frozen):
    """Scaling what is left of a side would bend its queries: (W + γB) x is no multiple of (W + B) x."""
    layer, x = loud(kind)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    before, weights = maxima(layer, x), copy.deepcopy(layer)
    tau = float(np.sort(before)[-2] / 2)
    clip = declared(layer, tau)
    with pytest.warns(UserWarning, match=r"heads of attn are above tau and cannot be clipped: .*frozen"):
        report = step(layer, x, clip)
    assert all(map(torch.equal, layer.parameters(), weights.parameters()))
    assert report.layers["attn"].frozen.tolist() == (before > tau).tolist()
    assert report.layers["attn"].gamma.tolist() == [1.0] * HEADS
    assert (report.clipped_heads, report.frozen_heads) == (0, 2)
    heads = ", ".join(map(str, (before > tau).nonzero()[0]))
    assert f"above tau, cannot be clipped: frozen (heads {heads})" in str(report)
    assert report.to_dict()["layers"]["attn"]["frozen"] == (before > tau).tolist()
    np.testing.assert_allclose(report.layers["attn"].max_logits, before, rtol=1e-6)
    step(layer, x, clip)  # it warns the first time: a second warning would be an error here


def test_quiet_heads_and_observed_ones_are_not_called_frozen():
    layer, x = loud("gqa")
    layer.q.requires_grad_(False)
    assert "frozen" not in str(step(layer, x, declared(layer, 1e6)))
    statistic = MaxLogits(2)
    watched = QKClip([QKProjection("mha", 2, statistic, reason="QK-norm")], 1.0)
    statistic.update(torch.tensor([5.0, 0.5]))
    watched.step()
    assert watched.report().frozen_heads == 0


def test_a_wholly_frozen_attention_is_reported_without_a_warning():
    layer, x = loud("mha")
    layer.requires_grad_(False)
    weights = copy.deepcopy(layer)
    report = step(layer, x.requires_grad_(), declared(layer, 1e-3))
    assert report.frozen_heads > 0
    assert all(map(torch.equal, layer.parameters(), weights.parameters()))


def test_a_wholly_frozen_attention_stays_with_clip_frozen():
    """Nothing of it is trained, so nothing of it would be saved."""
    layer, x = loud("mha")
    layer.requires_grad_(False)
    weights = copy.deepcopy(layer)
    assert step(layer, x.requires_grad_(), declared(layer, 1e-3, clip_frozen=True)).clipped_heads == 0
    assert all(map(torch.equal, layer.parameters(), weights.parameters()))


def test_what_is_frozen_is_judged_at_each_step():
    layer, x = loud("mha")
    clip = declared(layer, tau := float(maxima(layer, x).max() / 4))
    layer.q.weight.requires_grad_(False)
    query, key = layer.q.weight.clone(), layer.k.weight.clone()
    assert step(layer, x, clip).clipped_heads == 2
    assert torch.equal(layer.q.weight, query)
    assert not torch.equal(layer.k.weight, key)
    layer.q.weight.requires_grad_(True)
    with torch.no_grad():
        layer.q.weight *= 4
        layer.q.bias *= 4
    layer.k.requires_grad_(False)
    query, key = layer.q.weight.clone(), layer.k.weight.clone()
    assert step(layer, x, clip).clipped_heads == HEADS
    assert torch.equal(layer.k.weight, key)
    assert not torch.equal(layer.q.weight, query)
    assert maxima(layer, x).max() == pytest.approx(tau, rel=1e-6)


@pytest.mark.parametrize("ask", ["step", "report"])
def test_an_accelerator_is_not_waited_for_to_warn(monkeypatch, ask):
    monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: False)
    layer, x = loud("gqa")
    layer.q.requires_grad_(False)
    clip = declared(layer, 1e-3)
    layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip.step()
    layer(x)
    if ask == "step":  # it warned in the step before, whose copies are there at once on a CPU
        clip.step()
    assert clip.report().frozen_heads > 0


def test_masters_of_frozen_weights_keep_their_values():
    layer, x = loud("mha")
    masters = {id(p): p.detach().clone() for p in layer.parameters()}
    before = {key: master.clone() for key, master in masters.items()}
    layer.k.requires_grad_(False)
    step(layer, x, declared(layer, 1.0, master_of=lambda p: masters[id(p)]))
    assert torch.equal(masters[id(layer.k.weight)], before[id(layer.k.weight)])
    assert torch.equal(masters[id(layer.q.weight)], layer.q.weight)


# Adapters


class Adapted(nn.Module):
    """A frozen projection and a trained adapter of low rank."""

    def __init__(self, fan_out):
        super().__init__()
        self.base = nn.Linear(WIDTH, fan_out, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, fan_out, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class WithAdapters(nn.Module):
    def __init__(self, *adapted):
        super().__init__()
        for name in "qkv":
            kind = Adapted if name in adapted else (lambda fan_out: nn.Linear(WIDTH, fan_out, bias=False))
            setattr(self, name, kind(HEADS * HEAD))
        self.out = nn.Linear(HEADS * HEAD, WIDTH)

    def qk_of(self, x):
        return (m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q, self.k))

    def forward(self, x):
        v = self.v(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(*self.qk_of(x), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def with_adapters(*adapted):
    torch.manual_seed(0)
    model = WithAdapters(*adapted).double()
    return model, torch.randn(2, 9, WIDTH, dtype=torch.float64)


def test_an_adapter_on_queries_and_keys_is_observed_only():
    model, x = with_adapters("q", "k")
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, tau=1e-3)
    assert "partly frozen: observed only" in str(optimizer.plan)
    before = copy.deepcopy(model)
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match="cannot be clipped"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    assert optimizer.qk_clip.report().frozen_heads > 0


def test_an_adapter_on_the_queries_leaves_the_clip_to_the_keys():
    model, x = with_adapters("q")
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, tau=0.2)
    assert "above tau, by the keys alone: the others are frozen" in str(optimizer.plan)
    before, logits = copy.deepcopy(model), dense_max_logits(*model.qk_of(x))
    assert logits.max() > 0.2
    model(x).square().mean().backward()
    optimizer.step()
    np.testing.assert_allclose(dense_max_logits(*model.qk_of(x)), np.minimum(logits, 0.2), rtol=1e-6)
    assert all(map(torch.equal, model.q.parameters(), before.q.parameters()))


def test_clip_frozen_scales_base_and_adapter_and_the_plan_says_what_to_save():
    model, x = with_adapters("q", "k")
    clip = QKClip(model, tau=0.1, clip_frozen=True)
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, qk_clip=clip)
    plan = str(optimizer.plan)
    assert "above tau, frozen weights too" in plan
    saved = plan.partition("frozen weights that the clip scales; save them with what is trained:\n")[2]
    assert saved.partition("\n\n")[0].split() == ["q.base.weight", "k.base.weight"]
    before = dense_max_logits(*model.qk_of(x))
    model(x).square().mean().backward()
    optimizer.step()
    np.testing.assert_allclose(dense_max_logits(*model.qk_of(x)), np.minimum(before, 0.1), rtol=1e-6)
    assert clip.report().clipped_heads > 0
    assert "save them" not in str(MuonClip(with_adapters()[0], lr=0.1).plan)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which PEFT asks for
def test_a_lora_adapter_is_all_that_has_to_be_saved(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        num_key_value_heads=2, head_dim=10, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    fresh, tokens = copy.deepcopy(base), torch.randint(3, 50, (2, 9))
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"]))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = MuonClip(model, lr=1e-2, tau=1e-3)
    model(input_ids=tokens).logits.square().mean().backward()
    with pytest.warns(UserWarning, match="cannot be clipped"):
        optimizer.step()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in frozen.items())
    assert optimizer.qk_clip.report().frozen_heads > 0
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which PEFT asks for
@pytest.mark.parametrize("clip_frozen", [False, True])
@pytest.mark.filterwarnings("ignore:.*cannot be clipped")
def test_a_lora_run_that_is_resumed_goes_on_to_the_bit(tmp_path, clip_frozen):
    """From the adapter, the optimizer's state, and the frozen weights that the plan names; dropout in the adapter."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        num_key_value_heads=2, head_dim=10, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    fresh, tau = copy.deepcopy(base), 0.01

    def optimizer_of(model):
        model.train()
        return MuonClip(model, lr=3e-2, qk_clip=QKClip(model, tau, clip_frozen=clip_frozen))

    def train(model, optimizer, numbers):
        clipped = []
        for number in numbers:
            torch.manual_seed(number)
            tokens = torch.randint(3, 50, (2, 9))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clipped.append(optimizer.qk_clip.report().clipped_heads)
        return clipped

    adapter = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.3)
    model = peft.get_peft_model(base, adapter)
    optimizer = optimizer_of(model)
    clipped = train(model, optimizer, range(3))
    names = optimizer.plan.weights_to_save
    assert len(names) == 2 * clip_frozen  # the queries of two layers: keys that heads share are not scaled
    assert (sum(clipped) > 0) == clip_frozen
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({name: model.get_parameter(name) for name in names}, tmp_path / "frozen.pt")

    again = peft.PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    again.load_state_dict(torch.load(tmp_path / "frozen.pt", weights_only=True), strict=False)
    resumed = optimizer_of(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert train(model, optimizer, range(3, 5)) == train(again, resumed, range(3, 5))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_rows_of_a_frozen_fused_weight_are_not_touched_from_either_side():
    torch.manual_seed(0)
    fused, statistic = nn.Linear(WIDTH, 2 * HEADS * HEAD), MaxLogits(HEADS)
    rows = [HeadRows(fused, HEADS, HEAD, side * HEADS * HEAD) for side in range(2)]
    clip = QKClip([QKProjection("mha", HEADS, statistic, query=(rows[0],), key=(rows[1],))], 1e-3)
    fused.weight.requires_grad_(False)
    q, k = (part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in fused(torch.randn(2, 7, WIDTH)).chunk(2, -1))
    attention(q, k, k, max_logits=statistic)
    before = copy.deepcopy(fused.state_dict())
    with pytest.warns(UserWarning, match="of 0 are above tau"):
        clip.step()
    assert all(map(torch.equal, fused.state_dict().values(), before.values()))
    assert math.isinf(statistic.maximum.max())


def test_both_reasons_why_a_side_is_scaled_are_in_the_plan():
    """The queries feed something else, and the frozen keys take all of γ knowingly."""

    class Gated(WithAdapters):
        def forward(self, x):
            return super().forward(x) * torch.sigmoid(self.q(x)).mean()

    torch.manual_seed(0)
    clip = QKClip(Gated("k").double(), clip_frozen=True, example_inputs=torch.randn(2, 9, WIDTH, dtype=torch.float64))
    words = [clipping_in_words(each, clip_frozen=True) for each in clip.projections.values()]
    assert words == ["above tau, by the keys alone, frozen weights too: the queries feed something else"]
