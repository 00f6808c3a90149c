"""One rank of the checkpoint tests: `dcp_worker.py MODE FOLDER`.

save: train, save sharded (at once, and once more asynchronously while training goes on) and as plain state dicts, train
on. load, async: from the sharded checkpoint at another number of ranks; plain, unsharded: from the plain one, into a
model that is sharded or not. All then train on alike.
"""

import json
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_training import make_model, make_optimizer, shard, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

mode, folder = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole(state):
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def flat(model, optimizer):
    """Everything that is a tensor, whole, by name."""
    weights, moments = get_state_dict(model, optimizer)
    flat = whole(weights)
    for name, values in moments["state"].items():
        flat |= {f"{name}:{key}": value for key, value in whole(values).items()}
    return flat


model = make_model()
if mode != "unsharded":
    shard(model, "fsdp")
optimizer = make_optimizer(model)
losses = []
if mode == "save":
    before = flat(model, optimizer)  # before any step
    train(model, optimizer, 3, ranks=world, rank=rank)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/sharded")
    saved = flat(model, optimizer)
    whole_weights, whole_moments = get_state_dict(model, optimizer, options=WHOLE)
    if rank == 0:
        torch.save({"model": whole_weights, "optimizer": whole_moments}, f"{folder}/plain.pt")
        torch.save(saved, f"{folder}/saved.pt")
    weights, moments = get_state_dict(model, optimizer)
    apart = dist.new_group()  # its collectives run beside those of the training
    state = {"model": weights, "optimizer": moments}
    pending = dcp.async_save(state, checkpoint_id=f"{folder}/async", process_group=apart)
    losses, _, _ = train(model, optimizer, 4, ranks=world, rank=rank, first=3)
    pending.result()
    assert before.keys() == saved.keys(), "the state is there from the start"
else:
    if mode in ("plain", "unsharded"):
        plain = torch.load(f"{folder}/plain.pt", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            model, optimizer, model_state_dict=plain["model"], optim_state_dict=plain["optimizer"], options=options
        )
    else:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=f"{folder}/{'sharded' if mode == 'load' else 'async'}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    saved, now = torch.load(f"{folder}/saved.pt", weights_only=True), flat(model, optimizer)
    assert saved.keys() == now.keys()
    for name, value in saved.items():
        assert torch.equal(value, now[name]), name
    losses, _, _ = train(model, optimizer, 4, ranks=world, rank=rank, first=3)
if rank == 0:
    json.dump(losses, open(f"{folder}/{mode}-{world}.json", "w"))  # noqa: SIM115
dist.barrier()
dist.destroy_process_group()
