"""One process of `test_processes.py`: 2 devices of its own, parameters sharded over the devices of all processes.

python process_worker.py FOLDER ADDRESS PROCESSES RANK
"""

import pathlib
import sys

import jax
import numpy as np

folder, address, processes, rank = sys.argv[1:]
if int(processes) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(rank))
assert jax.process_count() == int(processes)

import sharded_training as sharded  # noqa: E402
import tiny_jax as tiny  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import AxisType  # noqa: E402

whole = tiny.init()


def train(kind):
    """Steps on a mesh whose axes are of one kind → parameters, heads clipped in each step."""
    mesh = sharded.make_mesh(2, jax.device_count() // 2, AxisType[kind])
    placed = sharded.shardings(whole, mesh)
    params = sharded.place(whole, placed)
    kernel = params["first"]["attention"]["query"]["kernel"]
    assert kernel.is_fully_addressable == (int(processes) == 1)
    tx = tiny.optimizer() if kind == "Explicit" else tiny.optimizer(shardings=placed)
    in_shardings = None
    if kind == "Explicit":
        with jax.set_mesh(mesh):
            state = jax.jit(tx.init)(params)
    else:
        in_shardings = placed, sharded.state_shardings(tx, whole, placed, mesh)
        state = jax.jit(tx.init, out_shardings=in_shardings[1])(params)
    params, _, clipped = sharded.train(tx, params, state, tiny.batches(5), mesh, in_shardings)
    return multihost_utils.process_allgather(params, tiled=True), clipped


for kind in ("Auto", "Explicit"):
    params, clipped = train(kind)
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    np.savez(pathlib.Path(folder) / f"{kind}-{rank}.npz", clipped=clipped, **leaves)
