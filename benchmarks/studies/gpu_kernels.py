"""The Triton kernels of the statistic against float64, in fp32, fp16 and bf16."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.timing import seconds, wall_clock
from muonclip.core import attention_mask as core
from muonclip.torch import AttentionMask

_TOLERANCE = 1e-5  # relative; the products are in float32
_SCALE = 0.3
Shape = tuple[int, int, int, int, int]
"""Sequences, heads, heads of keys, tokens, width."""
SHAPES: tuple[Shape, ...] = ((2, 16, 16, 4096, 128), (2, 32, 8, 4096, 64), (1, 64, 64, 4096, 192), (3, 4, 2, 333, 80))
DRY: tuple[Shape, ...] = ((1, 2, 1, 70, 24),)


def records(dry_run: bool) -> Iterator[dict[str, Any]]:
    """Yield the largest relative error of each kernel, shape, dtype and mask, and the seconds of a call."""
    from muonclip.torch.logits.kernels.head_maxima import head_maxima
    from muonclip.torch.logits.kernels.mask_levels import mask_levels

    device = "cpu" if dry_run else "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        _let_interpreter_run_with_numpy()
    torch.manual_seed(0)
    for shape in DRY if dry_run else SHAPES:
        batch, heads, groups, length, width = shape
        for dtype in (torch.float32, torch.float16) + (() if dry_run else (torch.bfloat16,)):
            q, k = (torch.randn(batch, each, length, width, device=device).to(dtype) for each in (heads, groups))
            q[:, 1] *= 50
            for is_causal in (False, True):
                mask = AttentionMask(length, length, is_causal)
                floor = torch.full((heads,), -math.inf, device=device)

                def call(q: Tensor = q, k: Tensor = k, mask: AttentionMask = mask, floor: Tensor = floor) -> Tensor:
                    return head_maxima(q, k, scale=_SCALE, mask=mask, floor=floor)[0]

                error = _relative_error(call(), _exact(q, k, is_causal))
                took = statistics.median(seconds(call, lambda: wall_clock(device)) for _ in range(1 if dry_run else 5))
                yield _record("head_maxima", shape, dtype, error, _TOLERANCE) | {"causal": is_causal, "seconds": took}
            added = torch.randn(batch, 1, length, length, device=device).mul(60).to(dtype)
            added[:, :, :, -3:] = -math.inf
            expected = torch.stack(core.mask_levels(added.float(), xp=torch)).double()
            # In fp16 the definition rounds where the kernel does not.
            tolerance = torch.finfo(dtype).eps if dtype == torch.float16 else _TOLERANCE
            yield _record(
                "mask_levels", shape, dtype, _relative_error(torch.stack(mask_levels(added)), expected), tolerance
            )


def _record(kernel: str, shape: Shape, dtype: torch.dtype, error: float, tolerance: float) -> dict[str, Any]:
    of = {"kernel": kernel, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    return of | {"ok": error <= tolerance, "error": error}


def _exact(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """Return the maxima [H] of dense products in float64, one head of one sequence after the other."""
    maxima = q.new_full((q.shape[1],), -math.inf, dtype=torch.float64)
    forbidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    for sequence in range(len(q)):
        for head in range(q.shape[1]):
            logits = q[sequence, head].double() @ k[sequence, head * k.shape[1] // q.shape[1]].double().mT * _SCALE
            if is_causal:
                logits.masked_fill_(forbidden, -math.inf)
            maxima[head] = torch.maximum(maxima[head], logits.amax())
    return maxima


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest one; infinite where one is finite and the other is not."""
    found = found.double()
    same = found == expected
    error = ((found - expected).abs() / expected.abs().clamp_min(1e-30)).masked_fill(same, 0.0)
    return error.nan_to_num(math.inf).max().item()


def _let_interpreter_run_with_numpy() -> None:
    """Triton 3.6 takes int() of arrays [1] in its interpreter, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched
