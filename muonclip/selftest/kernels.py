"""The attention kernels of a self-test: each as a user calls it, on q, k, v [B, T, heads, width] of one device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from muonclip.selftest.llama import llama


@dataclass(frozen=True, slots=True)
class Kernel:
    """A way to call attention. `load` imports it and returns the function of q, k and v; it raises ImportError where
    it is not installed.

    `package`: what has to be there. `device`: the only kind that it runs on, "" for any. `dtype`: of the weights.
    `causal`: whether it forbids later keys here. `setting`: what the calls are made in. `is_everywhere`: that it runs
    on every device. `model`: that `load` returns a whole model and its input instead, of the sizes that it is given.
    """

    name: str
    load: Callable[..., Any]
    package: str = "torch"
    device: str = ""
    dtype: str = "float32"
    causal: bool = True
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext
    is_everywhere: bool = False
    model: bool = False

    def is_installed(self) -> bool:
        """Tell whether the package is there."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:  # of the package around it
            return False


def kernels(device: str) -> Iterator[Kernel]:
    """Yield the kernels to try on a kind of device."""
    yield Kernel("scaled_dot_product_attention", _sdpa, is_everywhere=True)
    if device != "cpu":
        yield Kernel("scaled_dot_product_attention, bf16", _sdpa, dtype="bfloat16")
    if device == "cuda":
        for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            name = f"scaled_dot_product_attention, {backend.partition('_')[0].lower()} alone, bf16"
            yield Kernel(name, _sdpa, dtype="bfloat16", setting=lambda backend=backend: _only(backend))
    yield Kernel("product and softmax", _written_out, is_everywhere=True)
    yield Kernel("FlexAttention", _flex, causal=False, setting=_flex_setting)
    yield Kernel("flash-attn 2", _flash_2, "flash_attn", "cuda", "bfloat16")
    yield Kernel("flash-attn 3", _flash_3, "flash_attn_interface", "cuda", "bfloat16")
    yield Kernel("flash-attn 4", _flash_4, "flash_attn.cute", "cuda", "bfloat16")
    yield Kernel("xFormers", _xformers, "xformers", "cuda", "bfloat16")
    yield Kernel("TransformerEngine", _transformer_engine, "transformer_engine", "cuda", "bfloat16")
    yield Kernel("varlen_attn", _varlen, "torch.nn.attention.varlen", "cuda", "bfloat16")


def _sdpa() -> Callable[[Any, Any, Any], Any]:
    import torch.nn.functional as F

    def call(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


def _only(backend: str) -> AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, backend)])


def _written_out() -> Callable[[Any, Any, Any], Any]:
    import torch

    def call(q: Any, k: Any, v: Any) -> Any:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(later, -torch.inf).softmax(-1), v)

    return call


def _flex() -> Callable[[Any, Any, Any], Any]:
    from torch.nn.attention import flex_attention

    return lambda q, k, v: _heads_first(flex_attention.flex_attention, q, k, v)


def _flex_compiled() -> Callable[[Any, Any, Any], Any]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    return lambda q, k, v: _heads_first(compiled, q, k, v)


def _flex_setting() -> AbstractContextManager[Any]:
    """Let FlexAttention give gradients on processors, which it refuses, though they are right."""
    from torch.nn.attention import flex_attention

    name = "_validate_device"
    return (
        mock.patch.object(flex_attention, name, return_value=None) if hasattr(flex_attention, name) else nullcontext()
    )


def _heads_first(function: Callable[..., Any], q: Any, k: Any, v: Any) -> Any:
    return function(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)


def _flash_2() -> Callable[[Any, Any, Any], Any]:
    from flash_attn import flash_attn_func  # pyright: ignore

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)


def _flash_3() -> Callable[[Any, Any, Any], Any]:
    from flash_attn_interface import flash_attn_func  # pyright: ignore

    return lambda q, k, v: _first(flash_attn_func(q, k, v, causal=True))


def _flash_4() -> Callable[[Any, Any, Any], Any]:
    from flash_attn.cute import flash_attn_func  # pyright: ignore

    return lambda q, k, v: _first(flash_attn_func(q, k, v, causal=True))


def _xformers() -> Callable[[Any, Any, Any], Any]:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention  # pyright: ignore

    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())


def _transformer_engine() -> Callable[[Any, Any, Any], Any]:
    from transformer_engine.pytorch import DotProductAttention  # pyright: ignore

    def call(q: Any, k: Any, v: Any) -> Any:
        attend = DotProductAttention(
            q.shape[2], q.shape[3], attn_mask_type="causal", qkv_format="bshd", attention_dropout=0.0
        )
        return attend(q, k, v).unflatten(-1, q.shape[2:])

    return call


def _varlen() -> Callable[[Any, Any, Any], Any]:
    import torch
    from torch.nn.attention.varlen import varlen_attn

    def call(q: Any, k: Any, v: Any) -> Any:
        length = q.shape[1]
        starts = torch.arange(0, (len(q) + 1) * length, length, dtype=torch.int32, device=q.device)
        flat_q, flat_k, flat_v = (each.flatten(0, 1) for each in (q, k, v))
        out = varlen_attn(flat_q, flat_k, flat_v, starts, starts, length, length, window_size=(-1, 0))
        return _first(out).unflatten(0, q.shape[:2])

    return call


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


TRANSFORMERS = tuple(
    Kernel(f"transformers, {implementation}", partial(llama, implementation), "transformers", model=True)
    for implementation in ("sdpa", "eager")
)
"""Hugging Face's attention interface, in a model of theirs, whose import takes long."""

COMPILED = Kernel("FlexAttention, compiled", _flex_compiled, device="cuda", causal=False)
"""FlexAttention as it is used on GPUs, which takes long to compile."""
