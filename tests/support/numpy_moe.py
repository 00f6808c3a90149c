"""The reference model in NumPy, float64: its loss, and the gradients by hand; no framework, no code of the model.

Every function returns its result and its `back`: gradient of the result → gradient of the input. What parameters get is
added to `grads` on the way. Shapes: B sequences, T positions, N = B·T tokens, D hidden, H heads, G key heads.
"""

import numpy as np


def loss_and_gradients(params, buffers, tokens, targets, config, document_ids=None):
    """(loss, {parameter: gradient}, {attention: maxima [H]}, {router: load [E]}); tokens and targets int [B, T]."""
    model = Model(params, buffers, config, document_ids)
    tokens, targets = np.asarray(tokens), np.asarray(targets)
    logits, back = model.forward(tokens)
    counted = (targets != -100).ravel()
    probabilities = softmax(logits.reshape(-1, logits.shape[-1]))
    rows, picked = np.arange(targets.size)[counted], targets.ravel()[counted]
    loss = -np.log(probabilities[rows, picked]).mean()
    d_logits = probabilities * counted[:, None]
    d_logits[rows, picked] -= 1
    back(d_logits.reshape(logits.shape) / counted.sum())
    return loss, model.grads, model.max_logits, model.loads


class Model:
    def __init__(self, params, buffers, config, document_ids):
        self.params = {name: np.asarray(value, np.float64) for name, value in params.items()}
        self.buffers = {name: np.asarray(value, np.float64) for name, value in buffers.items()}
        self.grads = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.config, self.document_ids = config, document_ids
        self.max_logits, self.loads = {}, {}

    def forward(self, tokens):
        steps = []
        x = self.params["embed_tokens.weight"][tokens]
        for i in range(self.config.num_layers):
            for part, function in (("attn", self.attention), ("mlp", self.mlp)):
                h, back_norm = self.rms_norm(f"layers.{i}.{part}_norm", x)
                y, back = function(f"layers.{i}.{part}", h)
                x = x + y
                steps.append((back_norm, back))
        h, back_norm = self.rms_norm("norm", x)
        logits, back_head = self.linear("lm_head", h)

        def back(d_logits):
            d_x = back_norm(back_head(d_logits))
            for back_norm_in, back_part in reversed(steps):
                d_x = d_x + back_norm_in(back_part(d_x))
            np.add.at(self.grads["embed_tokens.weight"], tokens, d_x)

        return logits, back

    def attention(self, name, x):
        c = self.config
        queries, keys, values, back_qkv = (self.latent_qkv if c.attention == "mla" else self.plain_qkv)(name, x)
        backs = {}
        if c.qk_norm:
            queries, backs["q_norm"] = self.rms_norm(f"{name}.q_norm", queries)
            keys, backs["k_norm"] = self.rms_norm(f"{name}.k_norm", keys)
        (queries, turn_back), (keys, _) = self.rotated(queries), self.rotated(keys)
        mixed, maxima, back_softmax = attend(queries, keys, values, c, self.document_ids)
        self.max_logits[name] = maxima
        y, back_output = self.linear(f"{name}.o_proj", mixed.reshape(*x.shape[:2], -1))

        def back(dy):
            dq, dk, dv = back_softmax(back_output(dy).reshape(mixed.shape))
            dq, dk = turn_back(dq), turn_back(dk)
            if c.qk_norm:
                dq, dk = backs["q_norm"](dq), backs["k_norm"](dk)
            return back_qkv(dq, dk, dv)

        return y, back

    def plain_qkv(self, name, x):
        outputs, backs = zip(*(self.linear(f"{name}.{part}_proj", x) for part in "qkv"), strict=True)
        heads = [y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in outputs]

        def back(*d_heads):
            return sum(back(d.reshape(*x.shape[:2], -1)) for back, d in zip(backs, d_heads, strict=True))

        return *heads, back

    def latent_qkv(self, name, x):
        c = self.config
        nope, split = c.qk_nope_head_dim, (*x.shape[:2], c.num_heads, -1)
        if c.q_lora_rank is None:
            q, back_q = self.linear(f"{name}.q_proj", x)
        else:
            q, back_q = self.chain(
                x, (self.linear, "q_a_proj"), (self.rms_norm, "q_a_norm"), (self.linear, "q_b_proj"), name=name
            )
        kv, back_kv = self.chain(
            x, (self.linear, "kv_a_proj"), (self.rms_norm, "kv_a_norm"), (self.linear, "kv_b_proj"), name=name
        )
        shared, back_shared = self.linear(f"{name}.k_rope_proj", x)
        heads = kv.reshape(split)
        keys = np.concatenate((heads[..., :nope], np.repeat(shared[:, :, None], c.num_heads, 2)), -1)

        def back(dq, dk, dv):
            d_heads = np.concatenate((dk[..., :nope], dv), -1)
            d_shared = dk[..., nope:].sum(2)
            return back_q(dq.reshape(q.shape)) + back_kv(d_heads.reshape(kv.shape)) + back_shared(d_shared)

        return q.reshape(split), keys, heads[..., nope:], back

    def rotated(self, x):
        """[B, T, heads, d]: of each head the last elements, as complex numbers i and i + half, turn."""
        frequencies = np.array(self.config.rotary_frequencies())
        turn = self.config.rotary_scale * np.exp(1j * np.arange(x.shape[1])[:, None, None] * frequencies)
        half = len(frequencies)

        def turned(x, turn):
            z = turn * (x[..., -2 * half : -half] + 1j * x[..., -half:])
            return np.concatenate((x[..., : -2 * half], z.real, z.imag), -1)

        return turned(x, turn), lambda dy: turned(dy, turn.conj())

    def mlp(self, name, x):
        if f"{name}.router.weight" not in self.params:
            return self.swiglu(f"{name}.gate_up_proj.weight", f"{name}.down_proj.weight", ..., x)
        tokens = x.reshape(-1, x.shape[-1])
        y, back_experts = self.experts(name, tokens)
        y, back_shared = y.reshape(x.shape), lambda dy: 0.0
        if self.config.num_shared_experts:
            shared = f"{name}.shared_experts"
            more, back_shared = self.swiglu(f"{shared}.gate_up_proj.weight", f"{shared}.down_proj.weight", ..., x)
            y = y + more
        return y, lambda dy: back_experts(dy.reshape(tokens.shape)).reshape(x.shape) + back_shared(dy)

    def experts(self, name, x):
        """x [N, D]: expert by expert, on the tokens that chose it."""
        c = self.config
        logits, back_router = self.linear(f"{name}.router", x)
        scores = 1 / (1 + np.exp(-logits))
        rank = np.argsort(np.argsort(-(scores + self.buffers[f"{name}.router.correction_bias"]), axis=1), axis=1)
        chosen = rank < c.num_experts_per_tok  # [N, E]
        self.loads[f"{name}.router"] = chosen.sum(0)
        total = (scores * chosen).sum(1, keepdims=True)
        weights = c.routed_scaling_factor * scores * chosen / total
        y, parts = np.zeros_like(x), []
        for e in range(c.num_experts):
            tokens = np.nonzero(chosen[:, e])[0]
            out, back = self.swiglu(f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj", e, x[tokens])
            y[tokens] += weights[tokens, e, None] * out
            parts.append((tokens, out, back))

        def back(dy):
            dx, d_weights = np.zeros_like(x), np.zeros_like(weights)
            for e, (tokens, out, back_expert) in enumerate(parts):
                d_weights[tokens, e] = (dy[tokens] * out).sum(1)
                dx[tokens] += back_expert(weights[tokens, e, None] * dy[tokens])
            shared_part = (d_weights * weights).sum(1, keepdims=True) / total  # through the sum of the chosen scores
            d_scores = chosen * (c.routed_scaling_factor * d_weights / total - shared_part)
            return dx + back_router(d_scores * scores * (1 - scores))

        return y, back

    def swiglu(self, gate_up_name, down_name, which, x):
        """`down(silu(gate(x)) · up(x))`, by the matrices `which` of two weights."""
        gate_up, down = self.params[gate_up_name][which], self.params[down_name][which]
        gate, up = np.split(x @ gate_up.T, 2, axis=-1)
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up

        def back(dy):
            d_hidden = dy @ down
            d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
            d_gate_up = np.concatenate((d_gate, d_hidden * gate * sigmoid), -1)
            self.grads[gate_up_name][which] += outer_sum(d_gate_up, x)
            self.grads[down_name][which] += outer_sum(dy, hidden)
            return d_gate_up @ gate_up

        return hidden @ down.T, back

    def linear(self, name, x):
        weight = self.params[f"{name}.weight"]

        def back(dy):
            self.grads[f"{name}.weight"] += outer_sum(dy, x)
            return dy @ weight

        return x @ weight.T, back

    def rms_norm(self, name, x):
        weight = self.params[f"{name}.weight"]
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps)

        def back(dy):
            self.grads[f"{name}.weight"] += (dy * x * scale).reshape(-1, len(weight)).sum(0)
            d_normed = dy * weight
            return scale * (d_normed - x * scale**2 * (d_normed * x).mean(-1, keepdims=True))

        return x * scale * weight, back

    def chain(self, x, *links, name):
        backs = []
        for function, part in links:
            x, back = function(f"{name}.{part}", x)
            backs.append(back)

        def back(d):
            for each in reversed(backs):
                d = each(d)
            return d

        return x, back


def attend(q, k, v, config, document_ids):
    """q [B, T, H, d], k and v [B, T, G, ·] → [B, T, H, ·], the maxima [H], and back: d output → dq, dk, dv."""
    batch, length, heads, _ = q.shape
    sharing = heads // k.shape[2]
    q, k, v = q.swapaxes(1, 2), np.repeat(k, sharing, 2).swapaxes(1, 2), np.repeat(v, sharing, 2).swapaxes(1, 2)
    allowed = np.tri(length, dtype=bool)[None, None]
    if document_ids is not None:
        ids = np.asarray(document_ids)
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
    logits = config.softmax_scale * q @ k.swapaxes(2, 3)
    maxima = np.where(allowed, logits, -np.inf).max((0, 2, 3))
    capped, slope = logits, 1.0
    if config.softcap is not None:
        tanh = np.tanh(logits / config.softcap)
        capped, slope = config.softcap * tanh, 1 - tanh**2
    weights = softmax(np.where(allowed, capped, -np.inf))

    def back(dy):
        dy = dy.swapaxes(1, 2)
        d_weights = dy @ v.swapaxes(2, 3)
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * slope * config.softmax_scale
        dk, dv = d_logits.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dy
        of_group = (batch, length, heads // sharing, sharing)
        dk, dv = (d.swapaxes(1, 2).reshape(*of_group, -1).sum(3) for d in (dk, dv))
        return (d_logits @ k).swapaxes(1, 2), dk, dv

    return (weights @ v).swapaxes(1, 2), maxima, back


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def outer_sum(dy, x):
    """Σ over all positions of dy xᵀ: the gradient of a weight [out, in]."""
    return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
