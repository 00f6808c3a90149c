"""MuonClip: Muon with QK-Clip, the optimizer of Kimi K2 (arXiv 2507.20534, Algorithm 1).

    from muonclip.torch import MuonClip      # PyTorch
    from muonclip.core import orthogonalize  # the mathematics, on NumPy, PyTorch and JAX arrays

Importing `muonclip` imports neither PyTorch nor JAX.
"""

from muonclip.core import clip_factors, newton_schulz, orthogonalize

__version__ = "0.1.0"

__all__ = ["__version__", "clip_factors", "newton_schulz", "orthogonalize"]
