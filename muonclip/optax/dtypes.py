"""Dtypes chosen without the implicit promotion that `jax_numpy_dtype_promotion="strict"` forbids."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """Return the dtype in which values of a dtype are added up: float64 for float64, float32 for all others."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
