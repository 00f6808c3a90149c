"""PyTorch's scaled-dot-product attention, with the log-sum-exp of its rows where its kernel keeps them.

The kernel computes LSE_i = ln Σ_j exp(s_ij) for its own backward. Returning it costs nothing, and it bounds the row's
maximum from above. It is a bound of the logits only where nothing but a 0/−inf mask is added to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muonclip.torch.logits.host_modes import is_seen, outside_modes, unobservable

host_sdpa = F.scaled_dot_product_attention
"""`torch.nn.functional.scaled_dot_product_attention` itself, whatever has been put in its place since."""


def sdpa_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return `scaled_dot_product_attention`'s output, to the bit, and the LSE of its rows, fp32 [B, H, Tq], or None.

    The kernel is the one that PyTorch would choose. Where a mode of the host sees what is called, it sees what it would
    see of the host's.
    """
    if not _returns_lse(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        y = host_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return y, None
    if attn_mask is not None:
        masked = torch.scalar_tensor(-torch.inf, dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, 0.0, masked)  # as the host makes it
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )


def _returns_lse(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options: Any) -> bool:
    if torch.compiler.is_compiling() or not is_seen():
        return unobservable() is None and _is_cpu_flash(query, key, value, attn_mask, *options)
    if unobservable() is not None or is_seen(by_functions=True):
        return False
    with outside_modes():
        return _is_cpu_flash(query, key, value, attn_mask, *options)


def _is_cpu_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> bool:
    if query.device.type != "cpu" or (torch.is_autocast_enabled("cpu") and query.dtype == torch.float32):
        return False
    if dropout_p or not query.ndim == key.ndim == value.ndim == 4 or not key.dtype == value.dtype == query.dtype:
        return False
    if query.shape[-1] != value.shape[-1] or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if attn_mask is not None and (attn_mask.dtype != torch.bool or is_causal or attn_mask.ndim not in (2, 4)):
        return False
    if torch.compiler.is_compiling():  # the host's own choice cannot be traced; these are its conditions
        fits = (query.shape[0] == key.shape[0] == value.shape[0]) and key.shape[:3] == value.shape[:3]
        fits = fits and (enable_gqa or query.shape[1] == key.shape[1]) and query.shape[1] % key.shape[1] == 0
        return fits and _flash_is_allowed()
    choice = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateImportUsage]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def _flash_is_allowed() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()  # of the CPU's kernel, too


_flash_is_allowed._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
# As `torch.compiler.assume_constant_result` marks it, which imports the compiler.
