"""The variants of Muon in NumPy, float64, one logical matrix at a time, and the parameters on which they are compared.

The polar factor is that of an SVD. Hyperball keeps its radius here, and takes it anew where the clip has scaled rows.
"""

import numpy as np
from svd_oracle import svd_polynomial

from muonclip.core import MatrixLayout, resolve_coefficients, update_scale

JORDAN = resolve_coefficients("jordan")
VARIANTS = {  # name → options, the same in both adapters
    "normuon": {"update": "normuon", "weight_decay": 0.3},
    "hyperball": {"update": "hyperball", "weight_decay": 0.0},
    "cautious": {"cautious_decay": True, "weight_decay": 0.3},
    "muown": {"update": "muown", "weight_decay": 0.3},
    "cautious normuon": {"update": "normuon", "cautious_decay": True, "weight_decay": 0.3},
}
EXPERTS = MatrixLayout(batch_ndim=1)
CASES = {  # name → shape, layout, its logical matrices [rows, columns] as views into an array of this shape
    "tall": ((8, 6), MatrixLayout(), lambda a: [a]),
    "wide": ((5, 10), MatrixLayout(), lambda a: [a]),
    "kernel": ((6, 8), MatrixLayout(transposed=True), lambda a: [a.T]),
    "experts": ((3, 4, 6), EXPERTS, list),
    "fused experts": ((2, 8, 5), MatrixLayout(1, blocks=(4, 4)), lambda a: [e[i : i + 4] for e in a for i in (0, 4)]),
    "fused": ((16, 6), MatrixLayout(blocks=(8, 4, 4)), lambda a: [a[:8], a[8:12], a[12:]]),
    "by head": ((12, 8), MatrixLayout(heads=(3,)), lambda a: [a[:4], a[4:8], a[8:]]),
    "fused by head": (
        (12, 6), MatrixLayout(blocks=(8, 4), heads=(2, 1)), lambda a: [a[:4], a[4:8], a[8:]]
    ),
}  # fmt: skip


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


class Matrix:
    """One logical matrix in training; `weight` is a view into the parameter, changed in place."""

    def __init__(
        self, weight, *, lr, weight_decay, update="muon", cautious_decay=False, adjust_lr_fn="original", mu=0.95
    ):
        self.weight, self.lr, self.decay = weight, lr, weight_decay
        self.update, self.cautious, self.mu = update, cautious_decay, mu
        self.scale = update_scale(*weight.shape, adjust_lr_fn)
        self.momentum, self.squares = np.zeros_like(weight), np.zeros((len(weight), 1))
        self.radius = np.linalg.norm(weight)
        self.direction, self.magnitude = weight.copy(), np.linalg.norm(weight, axis=1, keepdims=True)
        self.moments, self.steps = [0.0, 0.0], 0

    def step(self, gradient):
        if self.update == "muown":
            lengths = np.linalg.norm(self.direction, axis=1, keepdims=True)
            unit = self.direction / lengths
            of_magnitude = (gradient * unit).sum(1, keepdims=True)
            gradient = self.magnitude / lengths * (gradient - unit * of_magnitude)
        self.momentum = self.mu * self.momentum + (1 - self.mu) * gradient
        direction = self.mu * self.momentum + (1 - self.mu) * gradient
        polar = svd_polynomial(direction, JORDAN)
        if self.update == "hyperball":
            if self.radius:
                moved = self.weight - self.lr * self.radius * polar / np.linalg.norm(polar)
                self.weight[...] = self.radius * moved / np.linalg.norm(moved)
            return
        if self.update == "muown":
            self.steps += 1
            for i, (beta, value) in enumerate(((0.9, of_magnitude), (0.95, of_magnitude**2))):
                self.moments[i] = beta * self.moments[i] + (1 - beta) * value
            mean, squares = (m / (1 - b**self.steps) for m, b in zip(self.moments, (0.9, 0.95), strict=True))
            self.direction = self.direction - self.lr * self.scale * polar
            self.magnitude = self.magnitude * (1 - self.lr * self.decay) - self.lr * mean / (np.sqrt(squares) + 1e-8)
            lengths = np.linalg.norm(self.direction, axis=1, keepdims=True)
            self.weight[...] = self.magnitude * self.direction / lengths
            return
        if self.update == "normuon":
            self.squares = 0.95 * self.squares + 0.05 * (polar**2).mean(1, keepdims=True)
            rows = polar / (np.sqrt(self.squares) + 1e-8)
            polar = rows * np.linalg.norm(polar) / np.linalg.norm(rows)
        decayed = np.where(polar * self.weight > 0, self.weight, 0) if self.cautious else self.weight
        self.weight[...] = self.weight - self.lr * (self.scale * polar + self.decay * decayed)

    def clip(self, factors):
        """Multiply the rows by what the clip has multiplied them by."""
        self.weight *= np.reshape(factors, (-1, 1))
        self.radius = np.linalg.norm(self.weight)
        self.magnitude = self.magnitude * np.reshape(factors, (-1, 1))
