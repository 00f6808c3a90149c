"""One rank of `test_row_state.py`: `row_state_worker.py NUMBER FOLDER`.

Trains the variants, one group each, on sharded parameters in addition to the same on whole ones, which every rank has.
Then goes on from the checkpoint of the run before, if there was one, and saves its own. Writes what it found as JSON.
"""

import json
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from drawn_gradients import train, whole
from row_state import NorMuon
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from muonclip.core import MatrixLayout

STEPS = 3
PLAIN, EXPERTS = MatrixLayout(), MatrixLayout(batch_ndim=1)
R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
FUSED = MatrixLayout(blocks=(24, 8, 8))
VARIANTS = {  # "rows" is the page's class, the others are the library's
    "rows": {},
    "normuon": {"update": "normuon", "cautious_decay": True},
    "hyperball": {"update": "hyperball", "weight_decay": 0.0},
    "muown": {"update": "muown"},
    "int8": {"momentum_dtype": "int8"},
    "int8_stochastic": {"momentum_dtype": "int8_stochastic", "update": "muown"},
    "bfloat16_stochastic": {"momentum_dtype": "bfloat16_stochastic"},
}
CASES = {  # name → shape, layout, placements on a mesh of one dimension
    "rows": ((12, 20), PLAIN, (S0,)),
    "uneven_rows": ((13, 10), PLAIN, (S0,)),
    "columns": ((12, 20), PLAIN, (S1,)),
    "long_columns": ((6, 320), PLAIN, (S1,)),
    "experts": ((4, 6, 10), EXPERTS, (S0,)),
    "cut_experts": ((4, 6, 10), EXPERTS, (S1,)),
    "expert_columns": ((4, 6, 10), EXPERTS, (S2,)),
    "fused": ((40, 24), FUSED, (S0,)),
    "fused_columns": ((40, 24), FUSED, (S1,)),
    "interleaved": ((40, 24), MatrixLayout(blocks=(4, 2, 2), repeats=5), (S0,)),
    "heads": ((16, 10), MatrixLayout(heads=(4,)), (S0,)),
    "transposed": ((24, 40), MatrixLayout(transposed=True, blocks=(24, 8, 8)), (S1,)),
    "transposed_inputs": ((24, 40), MatrixLayout(transposed=True), (S0,)),
    "convolution": ((8, 6, 3, 3), PLAIN, (S0,)),
    "convolution_inputs": ((8, 6, 3, 3), PLAIN, (S1,)),
    "replicated": ((8, 8), PLAIN, (R,)),
    "cut_blocks": ((3, 5000), PLAIN, (S1,)),
    "cut_blocks_of_inputs": ((5000, 3), MatrixLayout(transposed=True), (S0,)),
}
ON_FOUR = {  # on a mesh of two by two
    "hsdp": ((12, 20), PLAIN, (R, S0)),
    "hsdp_experts": ((4, 6, 10), EXPERTS, (R, S0)),
    "fsdp_and_tensor_rows": ((12, 20), PLAIN, (_StridedShard(0, split_factor=2), S0)),
    "rows_and_columns": ((12, 20), PLAIN, (S1, S0)),
    "columns_and_rows": ((40, 24), FUSED, (S0, S1)),
    "experts_and_rows": ((4, 6, 10), EXPERTS, (S1, S0)),
}


def make(cases, mesh):
    """Parameters by name and their optimizer; whole ones without a mesh."""
    model, groups = nn.Module(), []
    for variant, options in VARIANTS.items():
        for index, (name, (shape, _, placements)) in enumerate(cases.items()):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            if mesh is not None:
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            model.register_parameter(f"{variant}_{name}", nn.Parameter(value))
        params = [(name, each) for name, each in model.named_parameters() if name.startswith(f"{variant}_")]
        groups.append({"params": params, "layout": [layout for _, layout, _ in cases.values()], **options})
    return model, NorMuon(groups, lr=0.1, weight_decay=0.1)


def everything(model, optimizer):
    """Weights and states, whole, by name."""
    flat = {}
    for name, parameter in model.named_parameters():
        state = {key: whole(value) for key, value in optimizer.state[parameter].items()}
        flat[name] = {"weight": whole(parameter.detach()), **state}
    return flat


def errors(found, expected):
    return {
        name: max((value - expected[name][key]).abs().max().item() for key, value in values.items())
        for name, values in found.items()
    }


def keeps_its_rows_alone(optimizer, parameter, layout):
    """Whether the state has one number for each row of the shard, and no more."""
    local, state = parameter.to_local(), optimizer.state[parameter]["row_squares"].to_local()
    fan_in = layout.axes(parameter.ndim).fan_in
    return state.shape == torch.Size(1 if axis in fan_in else size for axis, size in enumerate(local.shape))


if __name__ == "__main__":
    number, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shards",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")) if world == 4 else None
    found = {"errors": {}, "held": {}}
    for cases, on in ((CASES, mesh), (ON_FOUR, square)):
        if on is not None:
            expected, model = make(cases, None), make(cases, on)
            train(*expected, range(STEPS), torch.float64), train(*model, range(STEPS), torch.float64)
            found["errors"] |= errors(everything(*model), everything(*expected))
            for name, (_, layout, _) in cases.items():
                for variant in ("rows", "normuon"):
                    parameter = getattr(model[0], f"{variant}_{name}")
                    found["held"][f"{variant}_{name}"] = keeps_its_rows_alone(model[1], parameter, layout)

    model, optimizer = make(CASES, mesh)
    first = STEPS * number
    if number:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=f"{folder}/{number - 1}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        saved, now = torch.load(f"{folder}/{number - 1}.pt", weights_only=True), everything(model, optimizer)
        found["loaded"] = all(torch.equal(now[name][key], v) for name, each in saved.items() for key, v in each.items())
    train(model, optimizer, range(first, first + STEPS), torch.float64)
    if number:
        straight = make(CASES, None)
        train(*straight, range(first + STEPS), torch.float64)
        found["resumed"] = max(errors(everything(model, optimizer), everything(*straight)).values())
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/{number}")
    flat = everything(model, optimizer)
    if rank == 0:
        torch.save(flat, f"{folder}/{number}.pt")
    json.dump(found, open(f"{folder}/{number}-{rank}.json", "w"))  # noqa: SIM115
    dist.barrier()
    dist.destroy_process_group()
