"""One rank of `test_declared_layouts.py`: declared heads on shards of FSDP2 and of tensor parallelism, and whole."""

import copy
import json
import sys

import torch
import torch.distributed as dist
from linear_attention import LAYOUTS, Model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muonclip.torch import MuonClip


def trained(model, used, whole):
    optimizer = MuonClip(model, lr=0.05, qk_clip=None, layouts={name: LAYOUTS[name] for name in used})
    for step in range(3):
        whole.zero_grad()
        whole.loss(step).backward()
        gradients = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            gradient = gradients[name].grad.clone()
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    errors = {}
    for fused, used in ((False, ("*.q", "*.k", "*.v")), (True, ("*.qkv",))):
        torch.manual_seed(0)
        model = Model(fused).double()
        expected = trained(copy.deepcopy(model), used, model)
        by_fsdp, by_rows = copy.deepcopy(model), copy.deepcopy(model)
        for layer in by_fsdp.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(by_fsdp, mesh=mesh)
        for layer in by_rows.layers:
            for name in used:
                module = getattr(layer, name[2:])
                placed = distribute_tensor(module.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
                module.weight = nn.Parameter(placed)
        for kind, sharded in (("fsdp", by_fsdp), ("tensor", by_rows)):
            found = trained(sharded, used, model)
            errors[f"{kind} {used[0]}"] = max((found[n] - expected[n]).abs().max().item() for n in expected)
    json.dump(errors, open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w"))  # noqa: SIM115
    dist.barrier()
    dist.destroy_process_group()
