"""Clip the gradients of one half of an optimizer on ranks that shard the model, and of the whole model alone.

    clip_norm_worker.py FOLDER

Leaves `rank0.json`: for each `only`, the norms of both, and the largest difference of their gradients afterwards.
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

from muonclip.torch import MuonClip
from muonclip.torch.distributed import clip_grad_norm_

dist.init_process_group("gloo")
torch.manual_seed(0)
whole = TinyModel("mla").double()
sharded = copy.deepcopy(whole)
for each in (*sharded.layers, sharded):
    fully_shard(each, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
optimizers = [MuonClip(model, qk_clip=None) for model in (whole, sharded)]
tokens = torch.randint(0, 13, (3, 9))
found = {}
for only in ("adamw", "muon", None):
    norms = []
    for model, optimizer in zip((whole, sharded), optimizers, strict=True):
        optimizer.zero_grad()
        model.loss(tokens).backward()
        norms.append(clip_grad_norm_(optimizer, 0.01, only=only).item())
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    apart = max((p.grad - q.grad.full_tensor()).abs().max().item() for p, q in pairs)
    found[str(only)] = {"norms": norms, "apart": apart}
if dist.get_rank() == 0:
    (Path(sys.argv[1]) / "rank0.json").write_text(json.dumps(found), encoding="utf-8")
dist.destroy_process_group()
