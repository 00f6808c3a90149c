"""Attention observed in training as it is done: compiled, checkpointed, accumulated, packed, copied, replaced."""

import copy
import gc
import io
import math
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from dense_probe import probing
from model_zoo import ZOO
from tiny_attention import TinyAttention, UndeclaredAttention, dense_max_logits
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend_by_another_name
from torch.utils.checkpoint import checkpoint

from muonclip.torch import MuonClip, QKClip
from muonclip.torch.logits.host_sdpa import host_sdpa, sdpa_with_lse

# torch.compile looks at the gradients of its inputs, whatever they are.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
WIDTH, HEADS, HEAD = 10, 4, 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def heads(self, x):
        return [m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v)]

    def forward(self, x, mask=None):
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, checkpointed=None):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x, mask=None):
        x = self.first(x)
        for layer in self.layers:
            if self.checkpointed is None:
                x = x + layer(x, mask)
            else:
                x = x + checkpoint(layer, x, mask, use_reentrant=self.checkpointed)
        return x


def model_and_input(seed=0, **options):
    torch.manual_seed(seed)
    model = Model(**options)
    with torch.no_grad():
        for layer in model.layers:
            layer.q.weight.mul_(6 * torch.rand(HEADS).repeat_interleave(HEAD)[:, None])
    return model, torch.randn(2, 9, WIDTH)


def llama(**options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**ZOO["LlamaForCausalLM"].options, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.normal_(0, 0.4)
    return model, torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def dense(model, *args, **kwargs):
    """[attentions, heads] in one forward, by the probe, of a copy that nobody observes."""
    twin = copy.deepcopy(model)
    with probing() as seen:
        twin(*args, **kwargs)
    return np.array([maxima for maxima, _ in seen])


def observed(clip):
    return np.array([p.max_logits.maximum.tolist() for p in clip.projections.values()])


def reported(clip):
    return np.array([layer.max_logits.tolist() for layer in clip.report().layers.values()])


# Ways to train


def test_compiled_in_one_graph_and_once():
    model, tokens = llama()
    expected = dense(copy.deepcopy(model), input_ids=tokens)
    optimizer = MuonClip(model, lr=1e-3, qk_clip=QKClip(model, tau=1.0, observe="always"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        compiled(input_ids=tokens, use_cache=False).logits.square().mean().backward()
        if step == 0:
            np.testing.assert_allclose(observed(optimizer.qk_clip), expected, rtol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert optimizer.qk_clip.report().clipped_heads > 0
    torch._dynamo.reset()


def graphs_of(model, x):
    """How many graphs it takes to compile each layer on its own."""
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    model(x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return graphs


def test_compiled_layers_share_their_code():
    model, x = model_and_input()
    model.layers.extend(Attention() for _ in range(4))
    expected, graphs = dense(model, x), graphs_of(copy.deepcopy(model), x)
    clip = QKClip(model, observe="always")
    assert graphs_of(model, x) == graphs < len(model.layers)
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)


def test_what_is_compiled_before_anything_was_seen_is_traced_between_graphs_or_says_what_to_do():
    class ByName(Model):
        def forward(self, *, x):
            return super().forward(x)

    model, x = ByName(), torch.randn(2, 9, WIDTH)
    expected = dense(model, x=x)
    clip = QKClip(model, observe="always")
    with pytest.raises(Exception, match=r"has not seen this model's attention yet.*example_inputs"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x=x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        torch._dynamo.utils.counters.clear()
        compiled(x=x).sum().backward()
        np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    clip = QKClip(model, example_inputs={"x": x}, observe="always")
    torch.compile(model, backend="aot_eager", fullgraph=True)(x=x)
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)
    torch._dynamo.reset()


def test_a_clip_removed_amid_a_forward_leaves_nothing_behind():
    model, x = model_and_input()
    clip = QKClip(model)
    handle = model.first.register_forward_hook(lambda *_: clip.remove())
    model(x)
    handle.remove()
    assert hooks_of(model) == 0


class WrittenOut(Attention):
    def forward(self, x, mask=None):
        q, k, v = self.heads(x)
        scores = (q @ k.mT) * HEAD**-0.5
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_attention_that_is_written_out_is_not_compiled_unobserved(fullgraph):
    model, x = model_and_input()
    written = Model()
    written.layers = nn.ModuleList(WrittenOut() for _ in range(2))
    written.load_state_dict(model.state_dict())
    clip = QKClip(written, observe="always")
    written(x)
    np.testing.assert_allclose(observed(clip), dense(model, x), rtol=1e-5)
    clip.reset()
    torch.compile(written, backend="aot_eager", fullgraph=fullgraph)(x)
    with pytest.raises(
        RuntimeError, match=r"observed no forward of layers\.0, layers\.1 .* code that torch\.compile made"
    ):
        clip.step()
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant):
    model, x = model_and_input()
    expected = dense(model, x)
    model.checkpointed = use_reentrant
    clip = QKClip(model, tau=1.0, observe="always")
    model(x).square().sum().backward()
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)
    clip.step()
    assert clip.report().clipped_heads > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_by_transformers(use_reentrant):
    model, tokens = llama()
    expected = dense(model, input_ids=tokens)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    clip = QKClip(model, tau=1.0, observe="always")
    embeddings = model.get_input_embeddings()(tokens)
    model(inputs_embeds=embeddings, use_cache=False).logits.square().mean().backward()
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)


def test_the_maximum_of_all_forwards_with_gradients_and_of_no_other():
    model, x = model_and_input()
    clip = QKClip(model, tau=1e6, observe="always")
    expected = np.maximum(dense(model, x), dense(model, 0.3 * x.flip(0)))
    model(x).sum().backward()
    model(0.3 * x.flip(0)).sum().backward()
    with torch.no_grad():
        model(100 * x)
    with torch.inference_mode():
        model(100 * x)
    model.eval()
    with torch.no_grad():
        model(100 * x)
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)


def test_autocast_does_not_reach_the_statistic():
    """The logits are those of the queries and keys that attention is given, in float32."""
    model, x = model_and_input()
    clip = QKClip(model, observe="always")
    with torch.autocast("cpu", torch.bfloat16):
        expected = dense(model, x)
        model(x).float().sum().backward()
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-6)


def test_padded_batches():
    model, tokens = llama()
    keep = torch.ones_like(tokens)
    keep[0, :4] = 0
    expected = dense(model, input_ids=tokens, attention_mask=keep)
    assert not np.allclose(expected, dense(model, input_ids=tokens))
    for observe in ("always", "needed"):
        clip = QKClip(model, tau=expected.min() / 2, observe=observe)
        model(input_ids=tokens, attention_mask=keep)
        np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)


def test_packed_sequences_see_their_own_document_only():
    model, _ = llama()
    tokens = torch.randint(3, 50, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    parts = [dense(model, input_ids=tokens[:, a:b]) for a, b in ((0, 5), (5, 8), (8, 12))]
    clip = QKClip(model, observe="always")
    model(input_ids=tokens, position_ids=positions, use_cache=False)
    np.testing.assert_allclose(observed(clip), np.max(parts, axis=0), rtol=1e-4)
    assert not np.allclose(observed(clip), dense(model, input_ids=tokens), rtol=1e-3)


@pytest.mark.parametrize("packed_by", ["cu_seq_lens", "positions"])
def test_what_flash_attention_is_told_is_understood(packed_by):
    """An implementation with the arguments of FlashAttention, which has no CPU kernel."""
    from transformers import AttentionInterface, AttentionMaskInterface

    ends = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
    documents = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)

    def flash(module, query, key, value, attention_mask, *, scaling, **kwargs):
        assert attention_mask is None
        allowed = (documents[:, None] == documents) & torch.ones(12, 12, dtype=torch.bool).tril()
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return host_sdpa(query, key, value, allowed, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("varlen", flash)
    AttentionMaskInterface.register("varlen", lambda *args, **kwargs: None)
    model, _ = llama()
    tokens = torch.randint(3, 50, (1, 12))
    positions = torch.cat([torch.arange(n) for n in (5, 3, 4)])[None]
    expected = np.max([dense(model, input_ids=tokens[:, a:b]) for a, b in ((0, 5), (5, 8), (8, 12))], axis=0)
    model.set_attn_implementation("varlen")
    clip = QKClip(model, observe="always")
    lengths = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=5, max_length_k=5)
    more = lengths if packed_by == "cu_seq_lens" else {}
    model(input_ids=tokens, position_ids=positions, use_cache=False, **more)
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-4)
    assert {kernel.name for kernel in clip.attentions.kernels().values()} == {"Hugging Face attention interface"}


def test_flash_attention_aligns_at_the_last_position():
    """Of nine tokens the last six ask, as where keys of three are cached: each sees all before it."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def flash(module, query, key, value, attention_mask, *, scaling, **kwargs):
        rows, columns = query.shape[2], key.shape[2]
        allowed = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        return host_sdpa(query, key, value, allowed, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("bottom_right", flash)

    class Late(Attention):
        is_causal = True

        def forward(self, x, mask=None):
            q, k, v = self.heads(x)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface("bottom_right", None)
            return self.o(attend(self, q[:, :, 3:], k, v, None, scaling=0.5)[0].flatten(2))

    torch.manual_seed(0)
    model, x = Late(), torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        q, k, _ = model.heads(x)
        scores = 0.5 * q[:, :, 3:] @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    at_first, at_last = (
        scores.masked_fill(~torch.ones(6, 9, dtype=torch.bool).tril(shift), -math.inf).amax((0, 2, 3))
        for shift in (0, 3)
    )
    assert (at_last > 1.01 * at_first).any()
    clip = QKClip(model, observe="always")
    model(x).sum().backward()
    clip.step()
    torch.testing.assert_close(clip.report().layers[""].max_logits, at_last, rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_implementation_of_the_interface_gives_the_same(implementation):
    model, tokens = llama()
    expected = dense(model, input_ids=tokens)
    model.set_attn_implementation(implementation)
    clip = QKClip(model, observe="always")
    model(input_ids=tokens).logits.sum().backward()
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)


def test_implementations_may_be_switched_after_the_optimizer_was_built():
    model, tokens = llama()
    expected = dense(model, input_ids=tokens)
    clip = QKClip(model, observe="always")
    model.set_attn_implementation("eager")
    model(input_ids=tokens).logits.sum().backward()
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)


class AsAnAttribute(Attention):
    attend = staticmethod(attend_by_another_name)

    def forward(self, x, mask=None):
        q, k, v = self.heads(x)
        return self.o(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_a_function_that_is_an_attribute_is_observed_and_given_back():
    model, x = AsAnAttribute(), torch.randn(2, 9, WIDTH)
    clip = QKClip(model, observe="always")
    model(x)
    assert clip.projections[""].max_logits.observed == 1
    clip.remove()
    assert AsAnAttribute.attend is host_sdpa


class ByAnotherName(Attention):
    def forward(self, x, mask=None):
        q, k, v = self.heads(x)
        return self.o(attend_by_another_name(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_a_function_imported_by_name_is_observed_and_given_back():
    model = ByAnotherName()
    x = torch.randn(2, 9, WIDTH)
    clip = QKClip(model, observe="always")
    model(x)
    assert clip.projections[""].max_logits.observed == 1
    q, k, _ = model.heads(x)
    scores = (q @ k.mT / math.sqrt(HEAD)).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf)
    np.testing.assert_allclose(observed(clip)[0], scores.amax((0, 2, 3)).detach(), rtol=1e-5)
    clip.remove()
    assert attend_by_another_name is host_sdpa


# Certificates


def test_needed_certifies_quiet_heads_and_clips_as_always_does():
    model, x = model_and_input()
    expected = dense(model, x)
    tau = float(np.median(expected))
    other = copy.deepcopy(model)
    always, needed = QKClip(model, tau=tau, observe="always"), QKClip(other, tau=tau)
    model(x), other(x)
    always.step(), needed.step()
    loud = expected > tau
    np.testing.assert_allclose(reported(needed)[loud], expected[loud], rtol=1e-5)
    layers = needed.report().layers.values()
    exact = np.array([layer.exact.tolist() for layer in layers])
    bound = np.array([layer.bound.tolist() for layer in layers])
    assert exact[loud].all()
    assert not exact.all()
    assert np.isnan(reported(needed)[~exact]).all()
    assert (bound >= expected * (1 - 1e-6)).all()
    assert (bound[~loud] <= tau).all()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert "≤" in str(needed.report())


def test_a_certificate_is_never_used_as_a_maximum():
    """γ of a loud head comes from its exact maximum although its LSE is larger."""
    model, x = model_and_input()
    expected = dense(model, x)
    tau = float(expected.min()) * 0.9
    clip = QKClip(model, tau=tau)
    model(x)
    clip.step()
    gamma = np.array([layer.gamma.tolist() for layer in clip.report().layers.values()])
    np.testing.assert_allclose(gamma, tau / expected, rtol=1e-5)


def test_tau_may_be_changed_between_steps():
    model, x = model_and_input()
    clip = QKClip(model, tau=math.inf)
    model(x)
    expected = dense(model, x)
    clip.step()
    np.testing.assert_allclose(reported(clip), expected, rtol=1e-5)
    clip.tau = 1e3
    model(x)
    clip.step()
    assert np.isnan(reported(clip)).all()
    clip.tau = float(expected.min()) / 2
    model(x)
    clip.step()
    assert clip.report().clipped_heads == 2 * HEADS


def test_tau_lowered_behind_a_forward_is_an_error_and_not_a_head_unclipped():
    model, x = model_and_input()
    clip = QKClip(model, tau=1e3)
    model(x)
    clip.tau = 1e-2
    with pytest.raises(RuntimeError, match=r"tau was lowered to 0\.01 after a forward"):
        clip.step()
    clip.reset()
    model(x)
    clip.step()
    assert clip.report().clipped_heads == 2 * HEADS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "bool4"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sdpa_with_lse_is_the_host_s_to_the_bit(dtype, mask, groups):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 17, 8, dtype=dtype, requires_grad=True) for n in (4, groups, groups))
    options = dict(scale=0.7, enable_gqa=groups != 4, is_causal=mask == "causal")
    if mask == "bool":
        options["attn_mask"] = torch.ones(17, 17, dtype=torch.bool).tril()
    if mask == "bool4":
        options["attn_mask"] = (torch.rand(2, 1, 17, 17) < 0.7) | torch.eye(17, dtype=torch.bool)
    y, lse = sdpa_with_lse(q, k, v, **options)
    expected = host_sdpa(q, k, v, **options)
    assert torch.equal(y, expected)
    ours = torch.autograd.grad(y.float().square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.float().square().sum(), (q, k, v))
    assert all(map(torch.equal, ours, theirs))
    scores = 0.7 * q.double() @ k.repeat_interleave(4 // groups, 1).double().mT
    allowed = options.get("attn_mask", torch.ones(17, 17, dtype=torch.bool))
    allowed = allowed.tril() if mask == "causal" else allowed
    torch.testing.assert_close(
        lse.double(), scores.masked_fill(~allowed, -math.inf).logsumexp(-1), rtol=1e-3, atol=1e-3
    )


# Leaving the model alone


class Watchful(Model):
    """Everything that a forward may leave behind."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.count = 0

    def forward(self, x, mask=None):
        self.count += 1
        return super().forward(self.dropout(self.norm(x.mT).mT), mask)


def test_tracing_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, x = Watchful(), torch.randn(2, 9, WIDTH)
    twin, calls = copy.deepcopy(model), []
    model.layers[0].register_forward_hook(lambda *_: calls.append("hook"))
    clip = QKClip(model, example_inputs=x)
    state = torch.get_rng_state()
    clip = QKClip(model, example_inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 0
    assert not calls
    y = model(x)
    torch.set_rng_state(state)
    assert torch.equal(y, twin(x))
    assert model.count == 1
    assert calls == ["hook"]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert clip.projections


def test_what_cannot_be_copied_does_not_hinder_a_trace():
    model, x = model_and_input()
    model.lock = threading.Lock()
    model.layers[0].locks = [threading.Lock()]
    model.cache = {"last": model.first(x)}
    clip = QKClip(model, observe="always")
    model(x)
    seen = observed(clip)
    clip.remove()
    np.testing.assert_allclose(seen, [maxima for maxima, _ in _probed(model, x)], rtol=1e-5)


def _probed(model, x):
    with probing() as seen:
        model(x)
    return seen


def test_a_forward_that_an_engine_replaced_is_not_traced_but_what_it_calls():
    model, x = model_and_input()
    expected = dense(model, x)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(batch["x"])

    whole = Whole()
    clip = QKClip(whole, observe="always")
    original = whole.forward
    whole.forward = lambda batch: original(batch)
    whole({"x": x}).sum().backward()
    assert list(clip.projections) == ["model.layers.0", "model.layers.1"]
    np.testing.assert_allclose(observed(clip), expected, rtol=1e-5)


def test_bf16_and_autocast_are_found():
    for wrap in (lambda m: m.bfloat16(), lambda m: m):
        model, x = model_and_input()
        model = wrap(model)
        clip = QKClip(model, tau=1e-2, example_inputs=x.to(model.first.weight.dtype))
        assert {p.kind for p in clip.projections.values()} == {"mha"}

    class ByName(Model):
        def forward(self, *, x):
            return super().forward(x)

    model = ByName()
    clip = QKClip(model, tau=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        model(x=torch.randn(2, 9, WIDTH)).float().sum().backward()
    clip.step()
    assert clip.report().clipped_heads == 2 * HEADS


def test_the_result_and_the_gradients_are_untouched():
    model, x = model_and_input()
    twin = copy.deepcopy(model)
    clip = QKClip(model, tau=1.0)
    y, expected = model(x), twin(x)
    assert torch.equal(y, expected)
    y.square().sum().backward(), expected.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert clip.projections


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_removing_it_restores_the_model(no_other_patches):
    model, x = model_and_input()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    clip = QKClip(model)
    model(x)
    assert hooks_of(model) > 0
    clip.remove()
    assert hooks_of(model) == 0
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert F.scaled_dot_product_attention is host_sdpa
    with pytest.raises(RuntimeError, match="observes nothing any more: it was removed"):
        clip.step()


def test_it_goes_with_its_optimizer():
    model, x = model_and_input()
    optimizer = MuonClip(model, lr=1e-3)
    model(x).sum().backward()
    optimizer.step()
    del optimizer
    gc.collect()
    assert hooks_of(model) == 0


def test_a_second_optimizer_takes_the_place_of_the_first():
    model, x = model_and_input()
    first = MuonClip(model, lr=0.0, weight_decay=0.0, tau=1e-3)
    hooks = hooks_of(model)
    second = MuonClip(model, lr=0.0, weight_decay=0.0, tau=1e-3)
    assert hooks_of(model) == hooks
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="another QKClip was made for the same model"):
        first.step()
    second.step()
    assert second.qk_clip.report().clipped_heads == 2 * HEADS
    del first
    gc.collect()
    model(x).sum().backward()
    second.step()


def test_copies_of_the_model_are_plain_and_do_not_speak_for_it():
    model, x = model_and_input()
    clip = QKClip(model, observe="always")
    model(x)
    seen = observed(clip)
    twin = copy.deepcopy(model)
    clip.reset()
    twin(100 * x)
    assert all(p.max_logits.observed == 0 for p in clip.projections.values())
    again = pickle.loads(pickle.dumps(model))
    again(100 * x)
    assert all(p.max_logits.observed == 0 for p in clip.projections.values())
    model(x)
    np.testing.assert_array_equal(observed(clip), seen)
    own = QKClip(twin, observe="always")
    twin(x)
    np.testing.assert_array_equal(observed(own), seen)


def test_a_copy_of_model_and_optimizer_trains_on():
    model, x = model_and_input()
    optimizer = MuonClip(model, lr=1e-2, tau=0.3)
    model(x).square().sum().backward()
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    for a, b in ((model, optimizer), (twin, other)):
        a.zero_grad()
        a(x).square().sum().backward()
        b.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert other.qk_clip.report().clipped_heads == optimizer.qk_clip.report().clipped_heads > 0


def test_the_state_dict_and_checkpoints_are_unaffected():
    model, x = model_and_input()
    keys = list(model.state_dict())
    optimizer = MuonClip(model, lr=1e-3)
    model(x).sum().backward()
    optimizer.step()
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


def test_generation_with_a_cache_is_unaffected():
    model, tokens = llama(eos_token_id=None, bos_token_id=None)
    model.eval()
    expected = model.generate(tokens[:1], max_new_tokens=8, do_sample=False)
    clip = QKClip(model)
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=8, do_sample=False), expected)
    assert all(p.max_logits.observed == 0 for p in clip.projections.values())


def test_a_model_on_the_meta_device_is_found_and_filled_later():
    with torch.device("meta"):
        model = Model()
    optimizer = MuonClip(model, lr=1e-3, tau=1e-3)
    model(torch.randn(2, 9, WIDTH, device="meta")).sum().backward()  # as those who count FLOPs do
    assert "after to_empty: the model is on the meta device" in optimizer.qk_clip.attentions.to_come
    with pytest.raises(ValueError, match=r"is on the meta device and has no numbers"):
        optimizer.step()
    with torch.no_grad():
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.randn(2, 9, WIDTH)).sum().backward()
    optimizer.step()
    assert optimizer.qk_clip.report().clipped_heads == 2 * HEADS
    assert not any(map(torch.equal, before, model.parameters()))
    assert optimizer.state.keys() == set(model.parameters())


def test_parameters_that_stay_on_the_meta_device_are_not_trained_in_silence():
    with torch.device("meta"):
        model = Model()
    optimizer = MuonClip(model.named_parameters(), lr=1e-3, qk_clip=None)
    saved = MuonClip(model_and_input()[0].named_parameters(), lr=1e-3, qk_clip=None).state_dict()
    with pytest.raises(ValueError, match=r"is on the meta device.*make the optimizer afterwards"):
        optimizer.load_state_dict(saved)
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"is on the meta device.*make the optimizer afterwards"):
        optimizer.step()
    with torch.device("meta"):
        model = Model()
    whole = MuonClip(model, lr=1e-3, qk_clip=None)
    model.to_empty(device="cpu")
    whole.load_state_dict(saved)
    assert not any(value.is_meta for state in whole.state.values() for value in state.values())


# The report


def test_the_report_as_table_dictionary_and_scalars():
    model, x = model_and_input()
    clip = QKClip(model, tau=1.0, observe="always")
    assert clip.report().status == "no step yet"
    model(x)
    clip.step()
    report = clip.report()
    assert report.status == "active"
    scalars = report.scalars()
    assert scalars["qk_clip/max_logit"] == report.max_logit == scalars["qk_clip/bound"] == reported(clip).max()
    assert scalars["qk_clip/clipped_heads"] == report.clipped_heads > 0
    assert scalars["qk_clip/min_gamma"] == pytest.approx(1 / report.max_logit, rel=1e-5)
    plain = report.to_dict()
    assert plain["layers"]["layers.0"]["max_logits"] == report.layers["layers.0"].max_logits.tolist()
    clip.tau = 1e3
    for _ in range(2):
        model(x)
        clip.step()
    assert clip.report().status == "inactive since step 2"
    assert clip.report().last_clipped_step == 1
    assert "inactive since step 2" in str(clip.report())
    clip = QKClip(model, tau=1e3)
    for words in ("none in 1 step", "none in 2 steps"):
        model(x)
        clip.step()
        assert clip.report().status == words


def test_a_step_without_a_look_at_the_report_still_counts():
    model, x = model_and_input()
    clip = QKClip(model, tau=1.0)
    model(x)
    clip.step()
    clip.tau = 1e3
    model(x)
    clip.step()
    assert clip.report().last_clipped_step == 1


def test_declare_is_for_models():
    clip = QKClip(model_and_input()[0])
    with pytest.raises(ValueError, match="go with a model, but QKClip was given projections"):
        QKClip(clip.projections, declare={"layers.0": clip.projections["layers.0"]})


@pytest.mark.parametrize("sizes", [(0, 2, 2), (2, 0, 2), (0, 0, 2)])
@pytest.mark.parametrize("declared", [True, False])
def test_an_empty_batch_shows_nothing_and_the_next_one_is_clipped(sizes, declared):
    """As the first one, too: what a search sees of an empty batch is that logits do not move."""
    torch.manual_seed(0)
    part = TinyAttention() if declared else UndeclaredAttention()
    clip = QKClip(part, tau=1e-3)
    for size in sizes:
        with torch.no_grad():
            part.q.weight.mul_(99)
        part(torch.randn(size, 6, WIDTH)).sum().backward()
        weight = part.q.weight.detach().clone()
        clip.step()
        assert torch.equal(part.q.weight, weight) == (size == 0)
    assert clip.report().clipped_heads == HEADS


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("sizes", [[(2,), (0, 2), (2, 0), (0,), (0, 0), (2,)], [(2, 0, 2), (0, 2, 0)]], ids=str)
def test_empty_micro_batches_amid_a_run_show_nothing_and_hide_nothing(sizes, declared):
    """A step counts what its other micro-batches have shown; one of empty ones alone clips nothing and is no error."""
    torch.manual_seed(0)
    part = TinyAttention() if declared else UndeclaredAttention()
    model = nn.Sequential(part, nn.Linear(WIDTH, WIDTH))
    optimizer = MuonClip(model, lr=1e-4, tau=0.01)
    for step, micro_batches in enumerate(sizes):
        with torch.no_grad():
            part.q.weight.mul_(30)
        seen = []
        for index, size in enumerate(micro_batches):
            x = torch.randn(size, 6, WIDTH, generator=torch.Generator().manual_seed(10 * step + index))
            if size:
                seen.append(dense_max_logits(*(heads_of_part(part, each, x) for each in ("q", "k"))))
            model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        report = next(iter(optimizer.qk_clip.report().layers.values()))
        if seen:
            np.testing.assert_allclose(report.max_logits, np.max(seen, 0), rtol=1e-5)
            assert (report.gamma < 1).any()
        else:
            assert (report.gamma == 1).all()


def heads_of_part(part, name, x):
    with torch.no_grad():
        return getattr(part, name)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
