"""One rank of the sharded tests of `test_master_weights.py`: `master_worker.py NUMBER FOLDER`.

Trains sharded bf16 parameters with masters, of both halves, next to the same whole, with states on the device and in
host memory; two ranks train replicas as well. Gathers the whole state and loads it into other shards. Then goes on
from the checkpoint of the run before, if there was one, and saves its own.
"""

import json
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from drawn_gradients import train, whole
from tiny_attention import TinyModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from muonclip.core import MatrixLayout
from muonclip.torch import MuonClip, QKClip

STEPS = 3
EXPERTS, FUSED = MatrixLayout(batch_ndim=1), MatrixLayout(blocks=(24, 8, 8))
SHAPES = {  # name → shape, layout, sharded axis
    "rows": ((12, 20), MatrixLayout(), 0),
    "uneven_rows": ((13, 10), MatrixLayout(), 0),
    "columns": ((12, 20), MatrixLayout(), 1),
    "experts": ((4, 6, 10), EXPERTS, 0),
    "cut_experts": ((4, 6, 10), EXPERTS, 1),
    "fused": ((40, 24), FUSED, 0),
}
GROUPS = {
    "32": {"master_weight_bits": 32},
    "24": {"master_weight_bits": 24},
    "24 muown": {"master_weight_bits": 24, "update": "muown"},
    "32 adamw": {"master_weight_bits": 32, "use": "adamw"},
    "24 adamw": {"master_weight_bits": 24, "use": "adamw"},
}


def make(mesh, offload=False):
    model, groups = nn.Module(), []
    for group, options in GROUPS.items():
        params = []
        for index, (name, (shape, _, axis)) in enumerate(SHAPES.items()):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(index)).bfloat16()
            if mesh is not None:
                value = distribute_tensor(value, mesh, [Shard(axis)], src_data_rank=None)
            model.register_parameter(f"{group} {name}", nn.Parameter(value))
            params.append((f"{group} {name}", model.get_parameter(f"{group} {name}")))
        layouts = {} if options.get("use") == "adamw" else {"layout": [layout for _, layout, _ in SHAPES.values()]}
        groups.append({"use": "muon", "params": params, **layouts, **options})
    return model, MuonClip(groups, 0.1, qk_clip=None, ns_dtype=torch.float32, offload=offload)


def everything(model, optimizer):
    """Weights, masters and states, whole, by name."""
    wide = optimizer.fp32_state_dict(model)
    flat = {}
    for name, parameter in model.named_parameters():
        flat[name] = {key: whole(value) for key, value in optimizer.state[parameter].items()}
        flat[name] |= {"weight": whole(parameter.detach()), "master": whole(wide[name])}
    return flat


def same(found, expected):
    return all(torch.equal(found[name][key], v) for name, each in expected.items() for key, v in each.items())


def error(found, expected):
    """The largest difference of masters; of 24 bits, in their own last place, where one may be rounded otherwise."""
    return max(
        ((found[name]["master"] - each["master"]).abs() / each["master"].abs().clamp(min=0.5)).max().item()
        for name, each in expected.items()
    )


def clipped(sharded):
    """Masters after three steps in which only the clip acts; from float32 weights."""
    torch.manual_seed(0)
    model = TinyModel("gqa")
    wide = {name: value.clone() for name, value in model.state_dict().items()}
    model.bfloat16()
    if sharded:
        fully_shard(model)
        register_fsdp_forward_method(model, "loss")
        places = {name: (p.device_mesh, p.placements) for name, p in model.named_parameters()}
        wide = {name: distribute_tensor(value, *places[name], src_data_rank=None) for name, value in wide.items()}
    optimizer = MuonClip(model, 0.0, qk_clip=QKClip(model, tau=0.2, observe="always"), master_weight_bits=24)
    optimizer.load_fp32_state_dict(model, wide)
    heads = 0
    for step in range(3):
        tokens = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(step))
        model.loss(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        heads += optimizer.qk_clip.report().clipped_heads
    return heads, {name: whole(value) for name, value in optimizer.fp32_state_dict(model).items()}, wide


def gathered(model, optimizer, mesh, *, offload):
    """Whether a state that is gathered whole is the sharded one, and, loaded into other shards, becomes it again."""
    options = StateDictOptions(full_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    expected = everything(model, optimizer)
    is_same = all(
        torch.equal(moments["state"][name][key], value)
        for name, each in expected.items()
        for key, value in each.items()
        if key not in ("weight", "master")
    )
    again, other = make(mesh, offload=offload)
    set_state_dict(again, other, model_state_dict=weights, optim_state_dict=moments, options=options)
    return is_same, same(everything(again, other), expected)


def of_batches(rank=None):
    """The masters of four steps on two batches: both in turn, or one on each of two replicas."""
    torch.manual_seed(0)
    model = TinyModel("gqa").bfloat16()
    optimizer = MuonClip(model, 0.05, tau=0.5, master_weight_bits=32)
    forward = Loss(model) if rank is None else DistributedDataParallel(Loss(model))
    for step in range(4):
        for batch in (0, 1) if rank is None else (rank,):
            tokens = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(2 * step + batch))
            (forward(tokens) / (2 if rank is None else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.fp32_state_dict(model)


class Loss(nn.Module):
    """The loss of a model as a forward, which is what DistributedDataParallel sees."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.loss(tokens)


if __name__ == "__main__":
    number, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    expected, sharded, offloaded = make(None), make(mesh), make(mesh, offload=True)
    for each in (expected, sharded, offloaded):
        train(*each, range(STEPS))
    found = {
        "error": error(everything(*sharded), everything(*expected)),
        "offloaded": same(everything(*offloaded), everything(*sharded)),
        "sharded": all(isinstance(v, DTensor) for v in sharded[1].fp32_state_dict(sharded[0]).values()),
    }
    found["gathered"], found["scattered"] = gathered(*sharded, mesh, offload=bool(number))
    if world == 2:
        replica, alone = of_batches(rank), of_batches()
        found["replicas"] = max((replica[name] - value).abs().max().item() for name, value in alone.items())
    (heads, alone, wide), (_, together, _) = clipped(False), clipped(True)
    found["clipped"] = bool(heads) and any(not torch.equal(alone[name], value) for name, value in wide.items())
    found["clipped alike"] = all(torch.equal(together[name], value) for name, value in alone.items())
    model, optimizer = make(mesh, offload=bool(number))
    if number:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=f"{folder}/{number - 1}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        saved = torch.load(f"{folder}/{number - 1}.pt", weights_only=True)
        found["loaded"] = same(everything(model, optimizer), saved)
    train(model, optimizer, range(STEPS * number, STEPS * (number + 1)))
    if number:
        straight = make(None)
        train(*straight, range(STEPS * (number + 1)))
        found["resumed"] = error(everything(model, optimizer), everything(*straight))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/{number}")
    flat = everything(model, optimizer)
    if rank == 0:
        torch.save(flat, f"{folder}/{number}.pt")
    json.dump(found, open(f"{folder}/{number}-{rank}.json", "w"))  # noqa: SIM115
    dist.barrier()
    dist.destroy_process_group()
