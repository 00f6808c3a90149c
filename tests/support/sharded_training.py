"""The tiny model trained on a mesh of devices, as its users would: parameters sharded, the batch too, one jitted step.

The axis of the mesh named "fsdp" divides the model width (10), "tp" the width of a head (4).
"""

import jax
import numpy as np
import optax
import tiny_jax as tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(fsdp, tp, kind=AxisType.Auto):
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=(kind, kind))


def shardings(params, mesh):
    """A tree like the parameters."""
    axes = {tiny.WIDTH: "fsdp", tiny.HEAD: "tp"}
    return jax.tree.map(lambda p: NamedSharding(mesh, P(*map(axes.get, p.shape))), params)


def place(tree, placed):
    """Arrays that every process has whole → global arrays."""
    return jax.tree.map(
        lambda whole, sharding: jax.make_array_from_callback(
            whole.shape, sharding, lambda index: np.asarray(whole)[index]
        ),
        tree,
        placed,
    )


def state_shardings(tx, params, placed, mesh):
    """Of the state: moments lie as their parameters, everything else is everywhere."""
    return optax.tree_map_params(
        tx,
        lambda moment, sharding: moment if isinstance(moment, optax.MaskedNode) else sharding,
        jax.eval_shape(tx.init, params),
        placed,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def train(tx, params, state, batches, mesh, in_shardings=None):
    """→ parameters, state, how many heads were clipped in each step. `in_shardings`: of automatic axes."""
    explicit = mesh.axis_types[0] is AxisType.Explicit

    def gradients(params, tokens):
        if explicit:  # the forward pass of FSDP: gather, compute, scatter
            params = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
        return tiny.loss(params, tokens)

    def step(params, state, tokens):
        grads, maxima = jax.grad(gradients, has_aux=True)(params, tokens)
        updates, state = tx.update(grads, state, params, max_logits=maxima)
        clipped = sum((gamma < 1).sum() for gamma in state[-1].gamma.values())
        return optax.apply_updates(params, updates), state, clipped

    out = None if in_shardings is None else (*in_shardings, NamedSharding(mesh, P()))
    step = jax.jit(step, out_shardings=out, donate_argnums=(0, 1))
    tokens_sharding = NamedSharding(mesh, P() if explicit else P("fsdp"))
    history = []
    with jax.set_mesh(mesh):
        for tokens in batches:
            params, state, clipped = step(params, state, place(tokens, tokens_sharding))
            history.append(int(clipped))
    return params, state, history
