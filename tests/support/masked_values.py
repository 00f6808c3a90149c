"""What models put where a query may not attend, as (name of the dtype, number), and biases that forbid nothing."""

import functools
import math

import numpy as np
import torch

LOWEST = {
    "float16": -65504.0,
    "bfloat16": -3.3895313892515355e38,
    "float32": -3.4028234663852886e38,
    "float64": -1.7976931348623157e308,
}
FORBIDDING = [
    (dtype, value)
    for dtype, lowest in LOWEST.items()
    for value in (-math.inf, lowest, -1e9, -1e4)
    if value >= lowest or value == -math.inf
]
LOWEST_BIAS = -2000.0
"""Of ALiBi, far away: its pairs are allowed."""


def added_tensors(batch, heads, length, dtype="float32"):
    """Name -> what is added to logits [batch, heads, length, length], float64 numbers of this dtype, and the pairs that
    it allows. Of two sequences or more, and 12 positions or more."""
    rng = np.random.default_rng(0)
    rounded = functools.partial(_rounded, dtype=dtype)
    lowest = LOWEST[dtype]
    i, j = np.arange(length)[:, None], np.arange(length)
    every, future = np.ones((batch, heads, length, length), bool), j > i
    pairs = rng.random((length, length)) < 0.5
    pairs |= i == j
    slopes = 0.8 ** np.arange(heads)[:, None, None]
    alibi = -slopes * abs(i - j) * 30000 / length  # as at distances up to 30000
    near_alibi = alibi * 200 / 30000
    windows = rng.random((batch, 1, length, length)) < 0.5
    windows[0] = True
    bias = rng.normal(size=(1, heads, length, length)) * 5
    three, summed = np.where(pairs, 0.0, -100.0), np.where(pairs, 0.0, -100.0) + np.where(pairs.T, 0.0, -100.0)
    three[1, 1] = -1
    tensors = {
        "two values": (np.where(pairs, 0.0, -100.0), pairs),
        "two values, just so": (np.where(pairs, 0.0, -50.0), pairs),
        "two values, -1000": (np.where(pairs, 0.0, -1000.0), pairs),
        "two values of which none forbids": (np.where(pairs, 0.0, -49.0), every),
        "two values and -inf": (np.where(future, -math.inf, np.where(pairs, 0.0, -100.0)), pairs & ~future),
        "two values, not 0": (np.where(pairs, 1.0, -100.0), every),
        "three values": (three, every),
        "twice -100": (summed, every),
        "twice -1e4": (summed * 100, pairs & pairs.T),
        "-1e4 alone in a row of keys": (np.where(j < length // 2, 0.0, -1e4), j < length // 2),
        "of windows": (bias + np.where(windows, 0.0, -100.0), windows),
        "of windows, without a gap": (10 * bias + np.where(windows, 0.0, -100.0), every),
        "of pairs": (rng.normal(size=every.shape) * 40, every),
        "relative": (40 * bias, every),
        "relative, and -1e4 added": (bias + np.where(pairs, 0.0, -1e4), pairs),
        "ALiBi at 200": (near_alibi, every),
        "ALiBi at 30000": (alibi, every),
        "ALiBi and -inf": (np.where(future, -math.inf, alibi), ~future),
        "ALiBi and the lowest number": (np.where(future, lowest, alibi), ~future),
        "distances, ever -10000": (-1e4 * abs(i - j) / (1 if dtype != "float16" else length / 6), every),
    }
    return {name: (rounded(added), np.broadcast_to(allowed, every.shape)) for name, (added, allowed) in tensors.items()}


def _rounded(values, dtype):
    return torch.from_numpy(values).to(getattr(torch, dtype)).double().numpy()


ADDED = list(added_tensors(2, 1, 12))
