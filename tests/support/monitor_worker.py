"""One rank of `test_monitor.py`: matrices of models that ranks share, watched next to the same whole ones."""

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchmarks.studies.sent_bytes import SentBytes
from muonclip.torch import Monitor, MuonClip


class Model(nn.Module):
    """Attention with heads that ranks share, a matrix of uneven rows, and a stack of three experts."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 24, bias=False) for _ in range(3))
        self.out = nn.Linear(24, 12, bias=False)
        self.uneven = nn.Linear(12, 7)
        self.experts = nn.Parameter(torch.randn(3, 7, 5) / 3)

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (-1, 6)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = x + self.out(y.transpose(1, 2).flatten(2))
        return torch.einsum("bti,eio->bteo", self.uneven(y), self.experts)


def fsdp(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def tensor_parallel(model):
    plan = {name: ColwiseParallel() for name in ("q", "k", "v")} | {"out": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


OPTIMIZERS = {
    "muonclip": lambda model: MuonClip(model, lr=1e-2, ns_dtype=torch.float32),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False),
}


def seen(optimizer, shard):
    """What is seen in the second of two steps, one matrix each and as scalars; the collectives of a look."""
    torch.manual_seed(0)
    model = Model()
    if shard is not None:
        shard(model)
    own = OPTIMIZERS[optimizer](model)
    monitor = Monitor(model, own, every=1)
    for number in range(2):
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        own.step()
        own.zero_grad()
    values = {
        name: {field: getattr(each, field).tolist() for field in each.__slots__}
        for name, each in monitor.matrices().items()
    }
    scalars = monitor.scalars("")
    monitor._begin()
    with SentBytes(2) as sent:
        monitor._end()
    return values, scalars, sent.calls


dist.init_process_group("gloo")
found = {
    f"{optimizer}, {shard.__name__ if shard else 'whole'}": seen(optimizer, shard)
    for optimizer in OPTIMIZERS
    for shard in (None, fsdp, tensor_parallel)
}
with open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w", encoding="utf-8") as file:
    json.dump(found, file)
dist.destroy_process_group()
