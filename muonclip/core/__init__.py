"""The mathematics, written once: pure functions over NumPy, PyTorch and JAX arrays.

Here are the polynomials and the Newton–Schulz iteration, the scale of an update, how a parameter is read as matrices,
the factors of the clip, published recipes, and the learning-rate schedule. Nothing here imports a framework: the array
namespace is an argument, `xp`. What needs a device, a process group or a model belongs to `muonclip.torch` and
`muonclip.optax`.
"""

from muonclip.core.coefficients import COEFFICIENT_SETS, CoefficientSet, resolve_coefficients
from muonclip.core.matrix_layout import MatrixLayout
from muonclip.core.newton_schulz import (
    Products,
    gram_newton_schulz,
    iterate,
    newton_schulz,
    normalize,
    orthogonalize,
    plain_products,
)
from muonclip.core.polar_express import polar_express
from muonclip.core.qk_clip import ClipFactors, clip_factors
from muonclip.core.recipes import RECIPES, Recipe
from muonclip.core.schedules import WarmupConstantCosine
from muonclip.core.update_scale import adamw_update_rms, update_scale

__all__ = [
    "COEFFICIENT_SETS",
    "RECIPES",
    "ClipFactors",
    "CoefficientSet",
    "MatrixLayout",
    "Products",
    "Recipe",
    "WarmupConstantCosine",
    "adamw_update_rms",
    "clip_factors",
    "gram_newton_schulz",
    "iterate",
    "newton_schulz",
    "normalize",
    "orthogonalize",
    "plain_products",
    "polar_express",
    "resolve_coefficients",
    "update_scale",
]
