"""Maximum logits seen by nobody's code but this: every attention of a model replayed on recorded inputs.

`Replay` records the inputs of modules in one forward. Later it runs each of them alone, on the same inputs, and
measures the logits of the attention that it calls, densely and in float64, head by head.
"""

import contextlib
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from transformers.modeling_utils import AttentionInterface


class Replay:
    def __init__(self, model, names):
        self.modules = {name: _of_these_weights(model, model.get_submodule(name)) for name in names}
        self.calls = defaultdict(list)

    @contextlib.contextmanager
    def recording(self):
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: self.calls[name].append((module, args, kwargs)),
                with_kwargs=True,
            )
            for name, modules in self.modules.items()
            for module in modules
        ]
        yield
        for hook in hooks:
            hook.remove()

    def run(self):
        """{name: (S [heads], [q, ...] of each call)}"""
        results = {}
        for name in self.modules:
            with torch.no_grad(), probing() as seen:
                for module, args, kwargs in self.calls[name]:
                    module(*args, **kwargs)
            results[name] = np.max([maxima for maxima, _ in seen], axis=0), [q for _, q in seen]
        return results


def _of_these_weights(model, module):
    """The modules of a model that have the weights of one of them."""
    weights = list(map(id, module.parameters()))
    return [
        each for each in model.modules() if type(each) is type(module) and list(map(id, each.parameters())) == weights
    ]


@contextlib.contextmanager
def probing():
    seen = []
    sdpa, interface, baddbmm = F.scaled_dot_product_attention, AttentionInterface.get_interface, torch.Tensor.baddbmm
    matmul, softmax = torch.matmul, F.softmax
    products = []

    def probe_sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        allowed = np.tri(query.shape[-2], key.shape[-2], dtype=bool) if is_causal else allowed_by(attn_mask)
        seen.append((dense(query, key, scale, allowed), query))
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def get_interface(self, implementation, default):
        function = interface(self, implementation, default)
        if implementation == "sdpa":
            return function

        def probed(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            seen.append((dense(query, key, scale, allowed_by(attention_mask)), query))
            with monkeypatched(torch, "matmul", matmul):
                return function(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)

        return probed

    def probe_baddbmm(self, batch1, batch2, beta=1, alpha=1):
        products.append((batch1, batch2.mT, alpha))
        return baddbmm(self, batch1=batch1, batch2=batch2, beta=beta, alpha=alpha)

    def probe_matmul(a, b):
        if a.ndim == b.ndim == 4:
            products.append((a, b.mT, None))
        return matmul(a, b)

    def probe_softmax(input, dim=None, *args, **kwargs):
        if products:  # of a model that writes its attention out
            q, k, scale = products.pop()
            heads = input.shape[1]
            q, k = (t.reshape(-1, heads, *t.shape[-2:]) for t in (q, k))
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            seen.append((dense(q, k, scale, input.numpy() > -1e9), q))
            products.clear()
        return softmax(input, dim, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for holder, name, value in (
            (F, "scaled_dot_product_attention", probe_sdpa),
            (AttentionInterface, "get_interface", get_interface),
            (torch.Tensor, "baddbmm", probe_baddbmm),
            (torch, "matmul", probe_matmul),
            (F, "softmax", probe_softmax),
        ):
            stack.enter_context(monkeypatched(holder, name, value))
        yield seen


@contextlib.contextmanager
def monkeypatched(holder, name, value):
    original = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


def allowed_by(mask):
    if mask is None:
        return np.ones((), dtype=bool)
    return mask.numpy() if mask.dtype == torch.bool else mask.float().numpy() > -1e30


def dense(q, k, scale, allowed):
    """[H]: max over batch and allowed pairs of scale · q_i · k_j."""
    q, k = (t.detach().double().numpy() for t in (q, k))
    heads, groups = q.shape[1], k.shape[1]
    maxima = []
    for head in range(heads):
        logits = scale * np.einsum("bid,bjd->bij", q[:, head], k[:, head * groups // heads])
        mask = np.broadcast_to(
            allowed[..., : k.shape[2]] if allowed.ndim else allowed, (len(q), heads, *logits.shape[1:])
        )
        maxima.append(logits[mask[:, head]].max())
    return np.array(maxima)
