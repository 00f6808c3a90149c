"""What is saved and restored goes on as if nothing had happened, on any number of devices."""

import os
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny_jax as tiny
from orbax_worker import named, run

from muonclip.optax import accumulate, muonclip

pytestmark = pytest.mark.slow  # compiles much

BATCHES = tiny.batches(4)
SUPPORT = Path(__file__).parents[1] / "support"


def through_orbax(tree, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoint", jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))


def through_flax(tree, folder):
    data = flax.serialization.to_bytes(tree)
    return flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, tree), data)


def plain():
    return tiny.optimizer()


def bfloat16_momentum():
    return tiny.optimizer(mu_dtype=jnp.bfloat16)


def injected_and_accumulated():
    arguments = {"qk_projections": tiny.PROJECTIONS, "tau": tiny.TAU, "adamw": {"eps": 1e-3}}
    return accumulate(optax.inject_hyperparams(muonclip)(0.05, **arguments), 3)


@pytest.mark.parametrize("through", [through_orbax, through_flax])
@pytest.mark.parametrize("make", [plain, bfloat16_momentum, injected_and_accumulated])
def test_a_round_trip_gives_every_bit_of_the_state_back_and_training_goes_on(tmp_path, through, make):
    middle = tiny.train(make(), tiny.init(), BATCHES[:2])
    params, state = through(middle, tmp_path)
    assert tiny.equal((params, state), middle)
    moved = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating) and np.any(leaf)]
    assert len(moved) > len(jax.tree.leaves(params)), "momenta and moments are there"
    tx = make()  # a new process makes its own
    went_on, _ = tiny.train(tx, params, BATCHES[2:], state)
    uninterrupted, _ = tiny.train(tx, middle[0], BATCHES[2:], middle[1])
    assert tiny.equal(went_on, uninterrupted)
    forgotten, _ = tiny.train(tx, params, BATCHES[2:])
    assert tiny.distance(forgotten, uninterrupted) > 1e-4, "the state matters"


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_on_four_and_on_one(tmp_path):
    def worker(devices, *arguments):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
        }
        command = [sys.executable, SUPPORT / "orbax_worker.py", tmp_path, *map(str, arguments)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(np.load(tmp_path / f"{devices}.npz"))

    eight = worker(8, 2, 4, 0, 6, 3)
    four = worker(4, 2, 2, 3, 6)
    params, clipped = run(tmp_path, 1, 1, 3, 6)
    assert eight.pop("clipped").tolist()[3:] == four.pop("clipped").tolist() == clipped
    assert sum(clipped) > 0
    for continued in (four, named(params)):
        assert max(np.abs(continued[name] - eight[name]).max() for name in eight) < 1e-6
