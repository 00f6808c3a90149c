"""Small training states, saved once for each release and never changed after it: `tests/golden`.

    python tests/support/golden_states.py        writes tests/golden/VERSION of the version that is installed

Each folder holds `torch.pt` (torch.save), `dcp` (torch.distributed.checkpoint), `optax.npz` (a state's leaves by their
paths) and `orbax`, with the weights before and after the step that follows; `optax_clip.npz` and `orbax_clip` are of a
state with QK-Clip.
"""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import muonclip
from muonclip.optax import QKProjection
from muonclip.optax import muonclip as optax_muonclip
from muonclip.torch import MuonClip

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def torch_start():
    """A model in float64 and an optimizer with two groups of matrices, one with options of its own, and AdamW's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 4)).double()
    named = dict(model.named_parameters())
    groups = [
        dict(params=[("1.weight", named["1.weight"])], use="muon"),
        dict(params=[("2.weight", named["2.weight"])], use="muon", eps=1e-9, momentum_dtype=torch.float32, lr=0.02),
        dict(params=[("0.weight", named["0.weight"])], use="adamw"),
        dict(params=[(name, named[name]) for name in ("1.bias", "2.bias")], use="adamw", weight_decay=0.0),
    ]
    return model, MuonClip(groups, lr=0.01, weight_decay=0.1, qk_clip=None)


def torch_step(model, optimizer, seed):
    """Let the optimizer follow gradients that depend on the seed alone."""
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.grad = torch.from_numpy(rng.normal(size=tuple(parameter.shape)))
    optimizer.step()
    optimizer.zero_grad()


def dcp_load(folder, model, optimizer):
    """Load what `main` has saved by torch.distributed.checkpoint."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def optax_start():
    """Arrays of a matrix, an embedding and a bias, a transformation, and its state."""
    rng = np.random.default_rng(0)
    shapes = {"embed": {"embedding": (5, 4)}, "dense": {"kernel": (4, 6), "bias": (6,)}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    tx = optax_muonclip(0.01, qk_projections=None)
    return params, tx, tx.init(params)


def optax_clip_start():
    """The same of an attention with scanned layers and one without, both clipped."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed": {"embedding": (5, 4)},
        "layers": {side: {"kernel": (3, 4, 2, 3), "bias": (3, 2, 3)} for side in ("query", "key")},
        "last": {"query": {"kernel": (4, 2, 3)}, "key": {"kernel": (4, 1, 3)}},
    }
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    projections = {
        "layers": QKProjection.mha(q="layers/query", k="layers/key", num_heads=2, layer_axis=0),
        "last": QKProjection.gqa(q="last/query", k="last/key", num_heads=2, num_kv_heads=1),
    }
    tx = optax_muonclip(0.01, qk_projections=projections, tau=optax.linear_schedule(2.0, 1.0, 4))
    return params, tx, tx.init(params)


OPTAX_STARTS = {"": optax_start, "_clip": optax_clip_start}
"""How each state begins, by what its files end in."""


def optax_step(params, tx, state, seed):
    """Return arrays and state after gradients, and maxima, that depend on the seed alone."""
    rng = np.random.default_rng(seed)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    maxima = {"layers": jnp.asarray(rng.uniform(0, 4, (3, 2)), jnp.float32), "last": jnp.asarray([9.0, seed / 2])}
    updates, state = tx.update(gradients, state, params, max_logits=maxima)
    return optax.apply_updates(params, updates), state


def by_path(tree):
    """The leaves of a tree by their paths, as NumPy arrays."""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def main(folder):
    """Save the states after two steps, and the weights that the third one makes of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model, optimizer = torch_start()
    for seed in (0, 1):
        torch_step(model, optimizer, seed)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "dcp", no_dist=True)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / "torch.pt")
    torch_step(model, optimizer, 2)
    torch.save(model.state_dict(), folder / "torch_after.pt")

    for ending, start in OPTAX_STARTS.items():
        params, tx, state = start()
        for seed in (0, 1):
            params, state = optax_step(params, tx, state, seed)
        np.savez(folder / f"optax{ending}.npz", **by_path((params, state)))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / f"orbax{ending}", (params, state))
        # Orbax writes the folder's path, which is this machine's; that the file is there is what it reads.
        (folder / f"orbax{ending}" / "commit_success.txt").write_text("Checkpoint commit was successful\n")
        np.savez(folder / f"optax{ending}_after.npz", **by_path(optax_step(params, tx, state, 2)[0]))


if __name__ == "__main__":
    main(GOLDEN / (sys.argv[1] if sys.argv[1:] else muonclip.__version__))
