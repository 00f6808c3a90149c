"""One rank of the engine tests of `test_engines_distributed.py`: 20 steps under every engine of torch.

Writes losses, norms, clipped heads, bytes and whether replicas agree, by engine, as JSON.
"""

import json
import sys

import torch
import torch.distributed as dist
from parallel_training import make_model, make_optimizer, shard, train
from torch.distributed.tensor import DTensor

from benchmarks.studies.sent_bytes import SentBytes
from muonclip.models.parallel import Parallelism, parallelize

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
results = {}
for engine in ("ddp", "ddp, inner model given", "fsdp", "hsdp", "three ways"):
    if engine in ("hsdp", "three ways") and world < 4:
        continue
    model = make_model()
    wrapped, ranks, mine = model, world, rank
    if engine == "three ways":
        meshes = parallelize(model, Parallelism(shards=world // 2, experts=2, tensor=2))
        ranks, mine = meshes.data_size, meshes.data_rank
    else:
        wrapped = shard(model, engine.partition(",")[0])
    optimizer = make_optimizer(wrapped if engine == "ddp" else model)
    losses, norms, clipped = train(wrapped, optimizer, 20, ranks=ranks, rank=mine)
    share = torch.randint(40, (1, 25), generator=torch.Generator().manual_seed(mine))
    wrapped(share[:, :-1]).sum().backward()
    with SentBytes(world) as counted:
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    check = torch.stack([p.detach().double().sum() for p in whole])
    everyone = [torch.zeros_like(check) for _ in range(world)]
    dist.all_gather(everyone, check)
    distribution = optimizer.plan.update_plan
    results[engine] = {
        "losses": losses,
        "norms": norms,
        "clipped": clipped,
        "alike": all(torch.equal(each, check) for each in everyone),
        "sent": counted.by_name,
        "calls": {name: counted.calls.count(name) for name in counted.calls},
        "planned": sum(by_rank.get(rank, 0) for by_rank in distribution.sent().values()),
        "elements": sum(torch.Size(each.shape).numel() for each in distribution.parameters),
        "flops": distribution.flops()[rank],
        "plan": str(optimizer.plan),
    }
json.dump(results, open(f"{sys.argv[1]}/{rank}.json", "w"))  # noqa: SIM115
dist.barrier()
dist.destroy_process_group()
