"""The types of arguments that are trees, or functions that make one.

A tree has no type of its own in JAX; the names here say in signatures what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import optax

PyTree: TypeAlias = Any
"""A tree that `jax.tree` reads: dicts, lists, modules and states, of arrays or of one value for each array."""

WeightLayouts: TypeAlias = PyTree | Callable[[optax.Params], PyTree] | None
"""A tree like the parameters, a prefix of one, or a function that makes it, of `optax.contrib.MuonDimensionNumbers`,
`muonclip.core.MatrixLayout` or None."""

Shardings: TypeAlias = PyTree | None
"""A tree like the parameters, or a prefix of one, of `jax.sharding.Sharding`."""
