"""Matrices whose singular values are hard for a Newton–Schulz iteration in narrow products."""

import torch

HARD = ("rank below the width", "k⁻²", "e^(−k/16)", "e^(−k/40)", "Gaussian")


def hard_spectra(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Return one matrix m × n for each name of `HARD`, float64 [5, m, n]."""
    draw = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    k = torch.arange(1, m + 1, dtype=torch.float64)
    left, right = torch.linalg.qr(gaussian(m, m)).Q, torch.linalg.qr(gaussian(n, m)).Q
    rank = max(1, m // 8)
    decaying = [(left * values) @ right.mT for values in (k**-2, torch.exp(-k / 16), torch.exp(-k / 40))]
    return torch.stack([gaussian(m, rank) @ gaussian(rank, n), *decaying, gaussian(m, n)])


def two_levels(count: int, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Return matrices with one large singular value and m − 1 equal small ones, float64 [count, m, n].

    The small ones are 0.002 to 0.5 of the large one: their squares are near the rounding of XXᵀ in bf16, where its
    eigenvalues lose their sign.
    """
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(count, m, m, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(count, n, m, generator=draw, dtype=torch.float64)).Q
    values = torch.ones(count, m, dtype=torch.float64)
    values[:, 1:] = 10 ** (-0.3 - 2.4 * torch.rand(count, 1, generator=draw, dtype=torch.float64))
    return (left * values[:, None]) @ right.mT
