"""One rank of `test_ddp.py`: trains a replica on its own data with the clip firing, and saves what it ended with."""

import sys
import warnings

import torch
import torch.distributed as dist
from tiny_attention import TinyModel
from torch.nn.parallel import DistributedDataParallel

from muonclip.torch import MuonClip, QKClip

warnings.filterwarnings("error", category=FutureWarning)  # of names that torch gives up
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = TinyModel("mla")
replica = DistributedDataParallel(model)
optimizer = MuonClip(model, lr=0.05, qk_clip=QKClip(model, tau=0.5, observe="always"))
clipped, collectives, all_reduce = [], [], dist.all_reduce
dist.all_reduce = lambda tensor, **options: collectives.append(tensor.numel()) or all_reduce(tensor, **options)
for step in range(20):
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, 13, (2, 9), generator=generator)
    logits = replica(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    local = torch.stack([layer.max_logits.maximum.clone() for layer in model.layers])
    collectives.clear()
    optimizer.step()
    agreement = [2] if step == 0 else []  # that both train the same, compared once
    assert collectives == [*agreement, 2 * (3 * 4 + 1)], "one packed collective for all layers"
    optimizer.zero_grad()
    report = optimizer.qk_clip.report()
    seen = torch.stack([layer.max_logits for layer in report.layers.values()])
    clipped.append(report.clipped_heads)
    highest = local.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    assert torch.equal(seen, highest), "the clip must use the maximum over the ranks"
with torch.set_grad_enabled(rank == 0):  # a rank that saw nothing takes part all the same
    model(tokens[:, :-1])
optimizer.qk_clip.step()
unequal = torch.stack([layer.max_logits for layer in optimizer.qk_clip.report().layers.values()])
dist.broadcast(unequal, src=0)
assert torch.equal(unequal, torch.stack([layer.max_logits for layer in optimizer.qk_clip.report().layers.values()]))
torch.save({"model": model.state_dict(), "clipped": clipped, "local": local}, f"{sys.argv[1]}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
