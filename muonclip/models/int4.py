"""Weights rounded to integers of 4 bits, as Kimi K2 Thinking's experts are trained: in PyTorch and JAX by one formula.

Each 32 weights along the input axis have one scale, max |w| / 7, and are that times integers from −7 to 7. −8 is not
used: the checkpoint has 15 of the 16 values (measured by its readers, ggml-org/llama.cpp#17064), and slime's INT4
training of the same model rounds so. compressed-tensors, whose format the checkpoint is in, would itself choose
max |w| / 7.5 and −8 to 7, at which the largest weight of a group is never kept. Rounded to the nearest, ties to even;
XLA divides by 7 as it likes, which may be seen in the last bit of a scale.
"""

from __future__ import annotations

from typing import Any

GROUP = 32
LARGEST = 7


def round_to_int4(weight: Any, xp: Any) -> Any:
    """Return the nearest weights that 4 bits can hold; a group of zeros stays zeros.

    Args:
        weight: Array […, out, in] of float32 or float64, `in` a multiple of 32.
        xp: `torch` or `jax.numpy`.
    """
    groups = weight.reshape((*weight.shape[:-1], -1, GROUP))
    scales = xp.amax(xp.abs(groups), axis=-1, keepdims=True) / LARGEST
    codes = xp.round(groups / xp.where(scales == 0, xp.ones_like(scales), scales))
    codes = xp.clip(codes, -LARGEST, LARGEST)  # the scale of a subnormal group is itself rounded, by up to a half
    return (codes * scales).reshape(weight.shape)
