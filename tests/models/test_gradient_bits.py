"""The reference model to the bit: loss and gradients of a plain composition that adds in the order it is known for.

x feeds several projections, and in floating point (a + b) + c is not a + (b + c). Autograd adds the gradients of the
last use first, so the order in which a layer uses x decides last bits, and with them the figures of every report.
"""

import pytest
import torch
import torch.nn.functional as F

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE, rotary_table, rotate
from muonclip.torch import attention


def rms(x, gain, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], gain, eps)


def mla(p, x, c, rotary):
    """Queries, then keys and values, then the rotary key."""
    q = F.linear(rms(F.linear(x, p["q_a_proj"]), p["q_a_norm"]), p["q_b_proj"])
    kv = F.linear(rms(F.linear(x, p["kv_a_proj"]), p["kv_a_norm"]), p["kv_b_proj"])
    k_rope = F.linear(x, p["k_rope_proj"])
    q, kv = q.unflatten(-1, (c.num_heads, -1)), kv.unflatten(-1, (c.num_heads, -1))
    k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
    return q, torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, c.num_heads, -1)), -1), v


def gqa(p, x, c, rotary):
    q, k, v = (F.linear(x, p[f"{name}_proj"]) for name in "qkv")
    return tuple(each.unflatten(-1, (-1, c.head_dim)) for each in (q, k, v))


def swiglu(p, x):
    gate, up = F.linear(x, p["gate_up_proj"]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, p["down_proj"])


def mixture(p, bias, x, c):
    """The router's scores, the experts' rows, then the shared experts."""
    tokens = x.flatten(0, 1)
    scores = torch.sigmoid(F.linear(tokens, p["router"]))
    chosen = torch.topk(scores.detach() + bias, c.num_experts_per_tok, sorted=False).indices
    weights = scores.gather(1, chosen)
    weights = c.routed_scaling_factor * weights / (weights.sum(1, keepdim=True) + 1e-20)
    by_expert, order = chosen.flatten().sort(stable=True)
    ends = torch.bincount(by_expert, minlength=c.num_experts).cumsum(0).to(torch.int32)
    rows = tokens[:, None].expand(*chosen.shape, -1).flatten(0, 1).index_select(0, order)
    gate, up = F.grouped_mm(rows, p["experts.gate_up_proj"].mT, offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, p["experts.down_proj"].mT, offs=ends)
    y = rows.index_select(0, order.argsort()).view(*chosen.shape, -1)
    y = (y * weights[..., None]).sum(1).view_as(x)
    return y + swiglu({name: p[f"shared_experts.{name}"] for name in ("gate_up_proj", "down_proj")}, x)


def composed_loss(named, biases, config, tokens, targets):
    def below(prefix):
        return {
            name.removeprefix(prefix).removesuffix(".weight"): p for name, p in named.items() if name.startswith(prefix)
        }

    rotary = tuple(table[: tokens.shape[1]].float() for table in rotary_table(config))
    x = F.embedding(tokens, named["embed_tokens.weight"])
    for i in range(config.num_layers):
        attn, mlp = below(f"layers.{i}.attn."), below(f"layers.{i}.mlp.")
        h = rms(x, named[f"layers.{i}.attn_norm.weight"])
        q, k, v = (mla if config.attention == "mla" else gqa)(attn, h, config, rotary)
        q, k, v = rotate(q, rotary).transpose(1, 2), rotate(k, rotary).transpose(1, 2), v.transpose(1, 2)
        output = attention(q, k, v, scale=config.softmax_scale, is_causal=True)
        x = x + F.linear(output.transpose(1, 2).flatten(2), attn["o_proj"])
        h = rms(x, named[f"layers.{i}.mlp_norm.weight"])
        x = x + (swiglu(mlp, h) if i < config.num_dense_layers else mixture(mlp, biases[i], h, config))
    logits = F.linear(rms(x, named["norm.weight"]), named["lm_head.weight"])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="before torch 2.10 the experts are multiplied otherwise")
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_loss_and_gradients_are_those_of_the_plain_composition_to_the_bit(kind):
    torch.manual_seed(0)
    config = MoEConfig.cpu(attention=kind)
    model = MoE(config)
    windows = torch.randint(256, (4, 65))
    tokens, targets = windows[:, :-1], windows[:, 1:]
    biases = {i: layer.mlp.router.correction_bias for i, layer in enumerate(model.layers) if i >= 1}
    named = dict(model.named_parameters())
    loss = model.loss(tokens, targets)
    gradients = torch.autograd.grad(loss, [*named.values()])
    expected = composed_loss(named, biases, config, tokens, targets)
    assert torch.equal(loss, expected)
    for name, one, other in zip(named, gradients, torch.autograd.grad(expected, [*named.values()]), strict=True):
        assert torch.equal(one, other), name
