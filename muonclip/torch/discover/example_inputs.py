"""Inputs to call a model with before it is trained: those that it names, else some that are guessed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from muonclip.torch.discover.discovery import Inputs


def guess_inputs(model: nn.Module) -> list[Inputs]:
    """Return inputs to try, in this order.

    They are what a Hugging Face model names, else tokens for a model that begins with an embedding, else numbers of the
    width of its first module; and with them what else its forward asks for, such as targets.
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
            return _calls(model, tokens)
        shape = _input_shape(module)
        if shape is not None:
            x = torch.randn(shape, device=first.device, dtype=first.dtype, generator=_generator(first.device))
            return _calls(model, x)
    return []


def _calls(model: nn.Module, first: Tensor) -> list[Inputs]:
    """Return ways to call a model with its first input.

    Whatever else it asks for has the shape and dtype of that, as targets of tokens and a memory have; or it is a whole
    number for each sequence, as classes and times are; masks let everything pass.
    """
    asked, most = _positions(model)
    others = asked[1:]
    if not others:
        return [Inputs((first,), {}), Inputs((first, first), {})][:most]
    for_sequences = torch.arange(len(first), device=first.device)
    return [
        Inputs((first, *(_open_mask(first) if "mask" in name else value for name in others)), {})
        for value in (first, for_sequences)
    ]


def _positions(model: nn.Module) -> tuple[list[str], int | None]:
    """Return the names of the positions that a model's forward has no default for, and how many it has in all, None for
    any number, as far as its signature tells."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return [], None
    positions = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    known = [each for each in parameters if each.kind in positions]
    several = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    asked = [each.name for each in known if each.default is inspect.Parameter.empty]
    return asked, None if several else max(1, len(known))


def _open_mask(first: Tensor) -> Tensor:
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)


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
