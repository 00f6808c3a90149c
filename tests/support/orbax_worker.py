"""A run of `test_checkpoint.py`: begin or resume on a mesh of devices, train, save, and leave the parameters.

python orbax_worker.py FOLDER FSDP TP FIRST LAST [SAVE_AT]
"""

import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import sharded_training as sharded
import tiny_jax as tiny

BATCHES = tiny.batches(6)


def run(folder, fsdp, tp, first, last, save_at=None):
    """Steps `first` to `last`, resumed from the checkpoint where `first` is not 0 → parameters, heads clipped."""
    mesh = sharded.make_mesh(fsdp, tp)
    params = tiny.init()
    placed = sharded.shardings(params, mesh)
    tx = tiny.optimizer(shardings=placed)
    in_shardings = placed, sharded.state_shardings(tx, params, placed, mesh)
    if first:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            (params, jax.eval_shape(tx.init, params)),
            in_shardings,
        )
        with ocp.StandardCheckpointer() as checkpointer:
            params, state = checkpointer.restore(folder / "checkpoint", target)
        for leaf, sharding in zip(jax.tree.leaves((params, state)), jax.tree.leaves(in_shardings), strict=True):
            assert leaf.sharding == sharding
    else:
        params = sharded.place(params, placed)
        state = jax.jit(tx.init, out_shardings=in_shardings[1])(params)
    middle = last if save_at is None else save_at
    params, state, clipped = sharded.train(tx, params, state, BATCHES[first:middle], mesh, in_shardings)
    if save_at is not None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "checkpoint", (params, state))
        params, state, more = sharded.train(tx, params, state, BATCHES[middle:last], mesh, in_shardings)
        clipped += more
    return params, clipped


def named(params):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }


if __name__ == "__main__":
    folder, numbers = pathlib.Path(sys.argv[1]), list(map(int, sys.argv[2:]))
    params, clipped = run(folder, *numbers)
    np.savez(folder / f"{jax.device_count()}.npz", clipped=clipped, **named(params))
