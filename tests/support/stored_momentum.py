"""Momentum stored as codes of blocks, or rounded stochastically, in NumPy; the noise in whole numbers of Python."""

import zlib

import numpy as np
from variants import CASES, Matrix

FORMS = ("int8", "int8_stochastic", "bfloat16_stochastic")
BLOCK = 2048


def hashed(x):
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def noise(name, step, row, column):
    """16 bits for one entry."""
    key = hashed(hashed(step) + (zlib.crc32(name.encode()) & 0x7FFFFFFF))
    slope, shift = hashed(row + hashed(key + 1)) | 1, hashed(row + hashed(key + 2))
    return (slope * hashed(column + hashed(key + 3)) + shift) >> 16 & 0xFFFF


def numbered(name):
    """The row and the column of every entry of a case among those of its parameter, by logical matrix."""
    shape, layout, view = CASES[name]
    batch = [1] * (3 - len(shape)) + [*shape]
    rows, columns = (np.zeros(batch, dtype=int) for _ in range(2))
    for e, i, j in np.ndindex(*batch):
        out, into = (j, i) if layout.transposed else (i, j)
        rows[e, i, j], columns[e, i, j] = e * batch[2 if layout.transposed else 1] + out, into
    return list(zip(view(rows.reshape(shape)), view(columns.reshape(shape)), strict=True))


def stored(x, form, bits=None):
    """What is read of x [rows, columns], float64, once it is stored; `bits`: the noise, of the same shape."""
    if form is None:
        return x
    if form == "bfloat16_stochastic":
        words = x.astype(np.float32).view(np.uint32).astype(np.int64)
        return (words + bits & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
    read = np.empty_like(x)
    for start in range(0, x.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        absmax = np.abs(x[:, block]).max(1, keepdims=True).astype(np.float32)
        step = (absmax * np.float32(1 / 127)).astype(np.float64)
        ratio = x[:, block] / np.where(step > 0, step, 1)
        if form == "int8":
            codes = np.rint(ratio)
        else:
            codes = np.clip(np.floor(ratio + (bits[:, block] + 0.5) / 65536), -127, 127)
        read[:, block] = codes * step
    return read


class StoredMatrix(Matrix):
    """A logical matrix whose momentum is stored; `rows`, `columns`: their numbers, for the noise of `name`."""

    def __init__(self, weight, *, form, name, rows, columns, **options):
        super().__init__(weight, **options)
        self.form, self.name, self.rows, self.columns, self.count = form, name, rows, columns, 0

    def step(self, gradient):
        super().step(gradient)
        self.count += 1
        bits = np.vectorize(lambda i, j: noise(self.name, self.count, int(i), int(j)))(self.rows, self.columns)
        self.momentum = stored(self.momentum, self.form, bits)
