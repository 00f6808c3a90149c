"""Checks of the arguments that transformations are made with, as far as their values can be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from muonclip.core.arguments import Rule, check_array, check_number, kind, shown
from muonclip.core.state_storage import Storage


def check_if_concrete(value: Any, check: Callable[[Any], Any]) -> None:
    """Check a value that can be read: not while JAX traces, nor where it is spread over processes."""
    if isinstance(value, jax.Array) and (isinstance(value + 0, Tracer) or not value.is_fully_addressable):
        return
    check(value)


def check_scalar(name: str, value: Any, rule: Rule, *, schedule: bool = False) -> None:
    """Raise TypeError for what is not a number, a traced one or, if allowed, a schedule; ValueError by the rule."""
    if not (schedule and callable(value)):
        hint = "a number, or a schedule." if schedule else ""
        check_if_concrete(value, lambda number: check_number(name, number, rule, hint))


def check_dtype(name: str, dtype: Any) -> None:
    """Raise ValueError unless it is a real floating dtype of two bytes or more, its name, or None."""
    is_value = isinstance(dtype, jax.Array | np.ndarray | np.generic | bool | int | float | complex)
    try:
        known = jnp.dtype(bool) if is_value else None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        known = jnp.dtype(bool)
    if known is not None and not (jnp.issubdtype(known, jnp.floating) and known.itemsize > 1):
        raise ValueError(f"{name}={shown(dtype)} is not a floating dtype; give jnp.float32, jnp.bfloat16, … or None.")


def check_momentum_dtype(dtype: Any) -> None:
    """Raise ValueError unless momentum can be stored so: in a floating dtype, or in a form of `core.state_storage`."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None)  # of jnp.int8
    if Storage.named("mu_dtype", name) is None:
        check_dtype("mu_dtype", dtype)


def check_real(name: str, value: Any) -> None:
    """Raise TypeError unless it is an array of real numbers."""
    check_array(name, value)
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{name} has the dtype {value.dtype}; give an array of real numbers.")


def check_integers(name: str, value: Any) -> None:
    """Raise TypeError unless it is an array of whole numbers."""
    check_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} has the dtype {value.dtype}; give an array of whole numbers.")


def check_tree(name: str, tree: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise TypeError unless every leaf of a tree is of one of the kinds or None; a function makes the tree later."""
    if callable(tree):
        return
    for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds)):
        if not isinstance(leaf, kinds):
            raise TypeError(f"{name} holds {shown(leaf)}; give {wanted}.")


def check_rest(rest: Any, adamw: Any = None) -> None:
    """Raise TypeError unless it is a transformation that was made, or None; ValueError next to options of AdamW."""
    if rest is None:
        return
    if not isinstance(rest, optax.GradientTransformation):
        name = getattr(rest, "__name__", "lion")
        raise TypeError(
            f"rest={shown(rest)} is a {kind(rest)}; give a transformation that was made, with its rate: "
            f"rest=optax.{name}(1e-4)."
        )
    if adamw is not None:
        raise ValueError(f"adamw={shown(adamw)} and rest= are two optimizers for one half. Leave one of them out.")


def check_mask(name: str, mask: Any) -> None:
    """Raise TypeError unless every leaf of a mask is True or False; a function of the parameters makes one later."""
    if mask is None or callable(mask):
        return
    for leaf in jax.tree.leaves(mask):
        if not isinstance(leaf, bool) and str(getattr(leaf, "dtype", "")) != "bool":
            raise TypeError(
                f"{name} holds {shown(leaf)}; give a tree with True or False for each array, or a function of the "
                "parameters that makes it."
            )
