"""Inputs to call a model with before it is trained: those that it names, else some that are guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from muonclip.torch.discover.discovery import Inputs


def guess_inputs(model: nn.Module) -> list[Inputs]:
    """Return keyword arguments to try, `args` being the positional ones.

    They are what a Hugging Face model names, else tokens for a model that begins with an embedding, else numbers of the
    width of its first module.
    """
    first = next(model.parameters(), None)
    if first is None:
        return []
    named = getattr(model, "dummy_inputs", None)
    if isinstance(named, Mapping):
        return [Inputs((), kwargs) for kwargs in _of_hugging_face(model, named, first)]
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tokens = torch.arange(16, device=first.device).view(2, 8) % module.num_embeddings
            return [Inputs((tokens,), {})]
        shape = _input_shape(module)
        if shape is not None:
            x = torch.randn(shape, device=first.device, dtype=first.dtype, generator=_generator(first.device))
            return [Inputs((x,), {}), Inputs((x, x), {})]
    return []


def _of_hugging_face(model: nn.Module, named: Mapping[str, Any], first: Tensor) -> list[dict[str, Any]]:
    inputs = {key: value.to(first.device) for key, value in named.items() if isinstance(value, Tensor)}
    guesses = [inputs]
    if "input_ids" in inputs:
        guesses.append({**inputs, "decoder_input_ids": inputs["input_ids"]})
    config = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if isinstance(size, int) and isinstance(channels, int):
        pixels = torch.zeros(2, channels, size, size, device=first.device, dtype=first.dtype)
        guesses.insert(0, {"pixel_values": pixels})
    return guesses


def _generator(device: torch.device) -> torch.Generator | None:
    """Numbers of its own: those of the model's run do not move."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


def _input_shape(module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, nn.Linear):
        return 2, 8, module.in_features
    if isinstance(module, nn.MultiheadAttention):
        return 2, 8, module.embed_dim
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return 2, 8, module.normalized_shape[-1]
    if isinstance(module, _ConvNd):
        return 2, module.in_channels, *(4 * size for size in module.kernel_size)
    return None
