"""A model whose run has stages, and one rank of the stage on several: `stages_worker.py FOLDER`.

It goes on from FOLDER/before, on as many ranks as there are, and leaves FOLDER/after.
"""

import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_attention import WIDTH, UndeclaredAttention
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from muonclip.torch import MuonClip

TAU = 0.05


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(layers)
        self.layers = nn.Sequential(*(UndeclaredAttention() for _ in range(layers)))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.layers(x))


def batch(seed):
    return torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, seed, part=slice(None)):
    model(batch(seed)[part]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def largest_logits(model, x):
    """[layers][heads], of the dense logits."""
    maxima = []
    with torch.no_grad():
        for layer in model.layers:
            maxima.append(layer.maxima(x))
            x = layer(x)
    return np.array(maxima)


def save(folder, model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load(folder, model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def main(folder):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Model(2)
    for part in (*model.layers, model):
        fully_shard(part)
        part.set_force_sum_reduction_for_comms(True)
    optimizer = MuonClip(model, lr=0.5, tau=TAU)
    load(f"{folder}/before", model, optimizer)
    size = 4 // ranks
    for seed in (10, 11):
        step(model, optimizer, seed, slice(rank * size, (rank + 1) * size))
    save(f"{folder}/after", model, optimizer)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
