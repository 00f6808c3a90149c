"""Measurements in addition to losses and logits: attention entropy, spectral norms, the size of an update.

None of it touches the training: no gradients, no observation of logits, no random number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muonclip.models.torch import MoE
from muonclip.torch import HeadRows, QKProjection

_TOKENS = 512  # of the sample; at least one window

Weights = list[Tensor]


class Probe:
    """Measures a model on the same few validation windows [windows, T + 1] every time."""

    def __init__(self, windows: NDArray[np.int64]) -> None:
        self.tokens = torch.from_numpy(windows[: max(1, _TOKENS // (windows.shape[1] - 1)), :-1])

    def weights(self, model: MoE) -> Weights:
        """Copy what `measure` compares with: the matrices of the layers, those that Muon updates."""
        return [parameter.detach().clone() for parameter in _matrices(model)]

    @torch.no_grad()
    def measure(self, model: MoE, before: Weights, lr: float) -> dict[str, Any]:
        """Return the measured fields of a record, after the update of rate `lr` that began from `before`."""
        query_norms, key_norms = {}, {}
        for name, attention in _attentions(model):
            projection: QKProjection = attention.declare()
            sides = {side: [rows for of, rows in projection.parts() if of == side] for side in ("query", "key")}
            query_norms[name] = head_norms(sides["query"])
            key_norms[name] = head_norms(sides["key"])
        return {
            "attention_entropy": self._entropies(model),
            "query_norms": query_norms,
            "key_norms": key_norms,
            "update_rms": rms(now - then for now, then in zip(_matrices(model), before, strict=True)) / lr,
        }

    def _entropies(self, model: MoE) -> dict[str, list[float]]:
        entropies: dict[str, list[float]] = {}

        def observe(name: str, attention: Any, inputs: tuple[Any, ...]) -> None:
            q, k, _ = attention.queries_keys_values(*inputs[:2])
            with torch.autocast(q.device.type, enabled=False):
                config = attention.config
                entropies[name] = causal_entropy(q.float(), k.float(), config.softmax_scale, config.softcap)

        with contextlib.ExitStack() as hooks:
            for name, attention in _attentions(model):
                handle = attention.register_forward_pre_hook(partial(observe, name))
                hooks.callback(handle.remove)
            model(self.tokens.to(model.lm_head.weight.device))
        return entropies


def causal_entropy(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> list[float]:
    """Return the mean over queries of `−Σ_j p_j ln p_j` in nats, by head; q [B, H, T, d], k [B, G, T, d].

    It is ln T for attention that is spread evenly over T keys, 0 for attention to one.
    """
    logits = scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    log_p = torch.log_softmax(logits.masked_fill(future, -math.inf), -1).masked_fill(future, 0.0)
    p = log_p.exp().masked_fill(future, 0.0)
    return (-(p * log_p).sum(-1)).mean((0, 2)).tolist()


def head_norms(parts: list[HeadRows]) -> list[float]:
    """Return the largest singular value of each head's rows.

    All parts of a side are taken together (MLA's query: nope and rope).
    """
    heads = [
        rows.of(weight, axis).movedim(min((axis,) if isinstance(axis, int) else axis), 0)
        for rows in parts
        for weight, axis in [next(rows.parameters())]
    ]
    return torch.linalg.matrix_norm(torch.cat(heads, -1).float(), ord=2).tolist()


def rms(tensors: Iterable[Tensor]) -> float:
    """Return the root mean square over the entries of all."""
    total, count = 0.0, 0
    for tensor in tensors:
        total += tensor.square().sum().item()
        count += tensor.numel()
    return math.sqrt(total / count)


def _attentions(model: MoE) -> list[tuple[str, Any]]:
    return [(f"layers.{index}.attn", layer.attn) for index, layer in enumerate(model.layers)]


def _matrices(model: MoE) -> list[nn.Parameter]:
    return [parameter for parameter in model.layers.parameters() if parameter.ndim >= 2]
