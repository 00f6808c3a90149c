"""Names of the arrays in a parameter tree: keys joined by "/", as in `decoder/layers/attention/query/kernel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr
from optax import MaskedNode


def is_masked_node(leaf: Any) -> bool:
    """Tell whether `optax.masked` or `partition` took this leaf away."""
    return isinstance(leaf, MaskedNode)


def name_of(path: tuple[Any, ...]) -> str:
    return keystr(path, simple=True, separator="/")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] = is_masked_node) -> dict[str, Any]:
    """Return the leaves by name, in order; those that `optax.masked` or `partition` took away are `MaskedNode`s.

    The `value` of a Flax variable does not belong to its name: Flax hands over trees with and without.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    children: dict[tuple[Any, ...], set[Any]] = {}
    for path, _ in leaves:
        for depth in range(len(path)):
            children.setdefault(path[:depth], set()).add(path[depth])
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        of_variable = path and isinstance(path[-1], GetAttrKey) and path[-1].name in ("value", "raw_value")
        named[name_of(path[:-1] if of_variable and len(children[path[:-1]]) == 1 else path)] = leaf
    assert len(named) == len(leaves), "two arrays of one name"
    return named


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map as `jax.tree.map` does, with a function that gets the name of each array first."""
    leaves, treedef = jax.tree.flatten(tree)
    others = (treedef.flatten_up_to(other) for other in rest)
    return treedef.unflatten(map(function, named_arrays(tree), leaves, *others))


def named_arrays(tree: Any) -> dict[str, Any]:
    """Return the arrays by name, in order, without `MaskedNode`s."""
    return {name: leaf for name, leaf in named_leaves(tree).items() if not is_masked_node(leaf)}


def declared_for(arrays: Any, declared: Any, kinds: type | tuple[type, ...], argument: str) -> dict[str, Any]:
    """Return what was declared for each array, by name.

    `declared`: a tree of declarations, a prefix of one, or a function that makes it from `arrays`. A declaration is one
    of `kinds` or None. Raises ValueError, naming the `argument`, where nothing was declared for an array.
    """
    tree = declared(arrays) if callable(declared) else declared
    said = named_leaves(tree, lambda node: node is None or is_masked_node(node) or isinstance(node, kinds))
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
    """Tell whether `name` is `prefix` itself or below it."""
    return name == prefix or not prefix or name.startswith(prefix + "/")
