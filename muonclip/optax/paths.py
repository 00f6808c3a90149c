"""Names of the arrays in a parameter tree: keys joined by "/", as in `decoder/layers/attention/query/kernel`."""

from __future__ import annotations

from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr
from optax import MaskedNode

Path = tuple[Any, ...]


def is_masked(leaf: Any) -> bool:
    return isinstance(leaf, MaskedNode)


def name_of(path: Path) -> str:
    """The name of a path. The `value` of a Flax variable is no part of it: Flax hands over trees with and without."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name in ("value", "raw_value"):
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The arrays by name; those that `optax.masked` or `partition` took away are `MaskedNode`s."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]}


def named_arrays(tree: Any) -> dict[str, Any]:
    """The same without those."""
    return {name: leaf for name, leaf in named_leaves(tree).items() if not is_masked(leaf)}


def declared_for(arrays: Any, declared: Any, kinds: type | tuple[type, ...], argument: str) -> dict[str, Any]:
    """What a tree of declarations, or a prefix of one, or a function that makes it, says of each array: by name.

    A declaration is one of `kinds` or None. Raises ValueError, naming the `argument`, where it says nothing.
    """
    tree = declared(arrays) if callable(declared) else declared
    leaves = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is None or is_masked(node) or isinstance(node, kinds)
    )[0]
    said = {name_of(path): leaf for path, leaf in leaves}
    found: dict[str, Any] = {}
    for name in named_arrays(arrays):
        above = [prefix for prefix in said if below(prefix, name)]
        if not above:
            raise ValueError(
                f"{argument} says nothing of {name!r}:\n  {argument} {jax.tree.structure(tree)}\n"
                f"  parameters {jax.tree.structure(arrays)}"
            )
        found[name] = said[max(above, key=len)]
        if found[name] is not None and not isinstance(found[name], kinds):
            raise ValueError(f"{argument} has {found[name]!r} for {name!r}; it cannot be used so.")
    return found


def below(prefix: str, name: str) -> bool:
    """Whether `name` is `prefix` itself or stands below it."""
    return name == prefix or not prefix or name.startswith(prefix + "/")
