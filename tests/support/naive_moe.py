"""The reference model once more, in float64, one sequence, one head, one token at a time; rotary by complex numbers.

It reads the parameters by name and shares no code with the model.
"""

import cmath
import math

import torch


def linear(module, x):
    return x @ module.weight.detach().double().T


def rms_norm(module, x):
    normed = torch.stack([row / math.sqrt(float(row @ row) / len(row) + module.eps) for row in x])
    return normed * module.weight.detach().double()


def rotated(x, frequencies, scale):
    """x [T, width] of one head: the last 2·len(frequencies) turn, pair i being elements i and i + half."""
    half = len(frequencies)
    y = x.clone()
    for t in range(len(x)):
        for i, frequency in enumerate(frequencies):
            a, b = x.shape[1] - 2 * half + i, x.shape[1] - half + i
            z = complex(x[t, a], x[t, b]) * cmath.rect(scale, t * frequency)
            y[t, a], y[t, b] = z.real, z.imag
    return y


def heads_of(attn, x, config):
    """x [T, hidden] → per query head (q, k, v), after norms and rotation."""
    frequencies, heads = config.rotary_frequencies(), []
    for h in range(config.num_heads):
        if config.attention == "mla":
            nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
            if config.q_lora_rank is None:
                q = linear(attn.q_proj, x)
            else:
                q = linear(attn.q_b_proj, rms_norm(attn.q_a_norm, linear(attn.q_a_proj, x)))
            kv = linear(attn.kv_b_proj, rms_norm(attn.kv_a_norm, linear(attn.kv_a_proj, x)))
            q = q[:, h * (nope + rope) : (h + 1) * (nope + rope)]
            kv = kv[:, h * (nope + value) : (h + 1) * (nope + value)]
            k, v = torch.cat((kv[:, :nope], linear(attn.k_rope_proj, x)), 1), kv[:, nope:]
        else:
            width = config.head_dim
            g = h if config.attention == "mha" else h // (config.num_heads // config.num_kv_heads)
            q = linear(attn.q_proj, x)[:, h * width : (h + 1) * width]
            k = linear(attn.k_proj, x)[:, g * width : (g + 1) * width]
            v = linear(attn.v_proj, x)[:, g * width : (g + 1) * width]
        if config.qk_norm:
            q, k = rms_norm(attn.q_norm, q), rms_norm(attn.k_norm, k)
        q, k = (rotated(part, frequencies, config.rotary_scale) for part in (q, k))
        heads.append((q, k, v))
    return heads


def attention(attn, x, config):
    """x [T, hidden] → output [T, hidden] and the maximum logit of each head."""
    outputs, maxima = [], []
    for q, k, v in heads_of(attn, x, config):
        output, maximum = [], -math.inf
        for t in range(len(x)):
            logits = [config.softmax_scale * float(q[t] @ k[s]) for s in range(t + 1)]
            maximum = max(maximum, *logits)
            if config.softcap is not None:
                logits = [config.softcap * math.tanh(logit / config.softcap) for logit in logits]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            output.append(sum(w * v[s] for s, w in enumerate(weights)) / sum(weights))
        outputs.append(torch.stack(output))
        maxima.append(maximum)
    return linear(attn.o_proj, torch.cat(outputs, 1)), maxima


def swiglu(gate_up, down, token):
    width = down.shape[1]
    gate, up = gate_up[:width] @ token, gate_up[width:] @ token
    return down @ (gate / (1 + torch.exp(-gate)) * up)


def mixture(mlp, tokens, config):
    """tokens [N, hidden] → [N, hidden]; differentiable in the parameters of `mlp`."""
    outputs = []
    for token in tokens:
        scores = 1 / (1 + torch.exp(-(mlp.router.weight.double() @ token)))
        ranked = sorted(
            range(config.num_experts), key=lambda e: -(scores[e].item() + mlp.router.correction_bias[e].item())
        )
        chosen = ranked[: config.num_experts_per_tok]
        total = sum(scores[e] for e in chosen)
        output = torch.zeros_like(token)
        for e in chosen:
            weight = config.routed_scaling_factor * scores[e] / total
            gate_up, down = mlp.experts.gate_up_proj[e].double(), mlp.experts.down_proj[e].double()
            output = output + weight * swiglu(gate_up, down, token)
        if mlp.shared_experts is not None:
            shared = mlp.shared_experts
            output = output + swiglu(shared.gate_up_proj.weight.double(), shared.down_proj.weight.double(), token)
        outputs.append(output)
    return torch.stack(outputs)
