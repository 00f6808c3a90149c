"""Train with a τ for each attention, one of them a function of the step, on ranks that shard the model, and alone.

    tau_worker.py FOLDER

Leaves `rank0.json`: how many heads both have clipped, and the largest difference of their weights.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_attention import TinyModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonclip.torch import MuonClip, QKClip

dist.init_process_group("gloo")
alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
torch.manual_seed(0)
whole = TinyModel("mla").double()
sharded = copy.deepcopy(whole)
for each in (*sharded.layers, sharded):
    fully_shard(each, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
tau = {"layers.0": lambda step: 0.3 / (1 + step), "*": 0.2}
optimizers = [
    MuonClip(whole, lr=0.02, qk_clip=QKClip(whole, tau, process_group=alone)),
    MuonClip(sharded, lr=0.02, tau=tau),
]
tokens = torch.randint(0, 13, (2 * dist.get_world_size(), 9))
clipped = []
for _ in range(3):
    for model, optimizer, batch in zip((whole, sharded), optimizers, (tokens, tokens), strict=True):
        optimizer.zero_grad()
        own = batch if model is whole else batch.chunk(dist.get_world_size())[dist.get_rank()]
        model.loss(own).backward()
        optimizer.step()
    clipped.append([optimizer.qk_clip.report().clipped_heads for optimizer in optimizers])
pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
apart = max((p - q.full_tensor()).abs().max().item() for p, q in pairs)
if dist.get_rank() == 0:
    found = json.dumps({"clipped": clipped, "apart": apart})
    (Path(sys.argv[1]) / "rank0.json").write_text(found, encoding="utf-8")
dist.destroy_process_group()
