"""The Newton–Schulz iteration by other mathematics: the polynomial applied to the singular values of an SVD."""

import numpy as np


def svd_polynomial(x, coefficients):
    u, s, vt = np.linalg.svd(np.asarray(x, dtype=np.float64), full_matrices=False)
    norm = np.sqrt((s**2).sum(-1, keepdims=True))
    s = s / np.where(norm > 0, norm, 1.0)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vt


def muon_step(weight, momentum, gradient, *, lr, weight_decay, mu, nesterov, coefficients, scale):
    """One step of Muon on float64 NumPy arrays; returns the new weight and momentum (torch's EMA)."""
    momentum = mu * momentum + (1 - mu) * gradient
    update = mu * momentum + (1 - mu) * gradient if nesterov else momentum
    return weight - lr * (scale * svd_polynomial(update, coefficients) + weight_decay * weight), momentum
