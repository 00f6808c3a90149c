"""The reference model in small, trained by MuonClip under one of torch's engines, as a user would."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip, QKClip
from muonclip.torch.distributed import clip_grad_norm_

BATCH, TAU = 8, 0.3


def make_model(**overrides):
    torch.manual_seed(0)
    return MoE(MoEConfig.cpu(num_layers=2, vocab_size=40, max_seq_len=24, **overrides))


def make_optimizer(model, **options):
    clip = QKClip(model, tau=TAU, observe="always")
    return MuonClip(model, lr=0.02, weight_decay=0.1, qk_clip=clip, ns_dtype=torch.float32, **options)


def windows(step):
    return torch.randint(40, (BATCH, 25), generator=torch.Generator().manual_seed(step))


def shard(model, engine):
    """The model under the engine, in place where it can be; what the forward is called on."""
    world = dist.get_world_size()
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shards",))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)
    return model


def train(model, optimizer, steps, *, ranks=1, rank=0, max_norm=1.0, first=0, loss_of=None):
    """Losses, gradient norms, and how many heads were clipped, by step; each rank takes its share of the batch."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    losses, norms, clipped = [], [], []
    for step in range(first, first + steps):
        share = windows(step).chunk(ranks)[rank]
        logits = model(share[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), share[:, 1:].flatten())
        loss.backward()
        norms.append(clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        inner.step_hook()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
        clipped.append(optimizer.qk_clip.report().clipped_heads if optimizer.qk_clip else 0)
    return losses, norms, clipped
