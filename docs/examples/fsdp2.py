"""FSDP2 on any number of GPUs, or of processes of this machine: meta device, mixed precision, DCP, resume.

    torchrun --nproc-per-node 8 fsdp2.py             # eight GPUs
    torchrun --nproc-per-node 2 fsdp2.py             # without GPUs: gloo
    torchrun --nproc-per-node 4 fsdp2.py --resume    # goes on with what was saved, on other numbers of ranks, too

Needs muonclip[torch]; on CPUs with PyTorch before 2.13 gloo needs `set_force_sum_reduction_for_comms`, see the page on
FSDP2. On GPUs it was not run.
"""

import argparse
import inspect
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip, QKClip

STEPS, BATCH, FOLDER = 20, 8, "fsdp2-checkpoint"


def make_model(device, mesh):
    with torch.device("meta"):  # shapes alone: no rank ever has the whole model
        model = MoE(MoEConfig.cpu())
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16)  # forward and backward; the optimizer's are float32
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=precision)
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.reset_parameters()
    return model


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--resume", action="store_true")
    resume = options.parse_args().resume
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("shards",))

    model = make_model(device, mesh)
    clip = QKClip(
        model, tau=100.0, observe="always"
    )  # to log logits; "needed" costs less and knows those near tau alone
    optimizer = MuonClip(model, lr=5e-3, weight_decay=0.1, qk_clip=clip)
    done = 0
    if resume:
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "done": 0}
        dcp.load(saved, checkpoint_id=FOLDER)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        done = saved["done"]

    text = torch.tensor(list(Path(inspect.__file__).read_bytes()), device=device)
    for step in range(done, done + STEPS):
        batches = torch.Generator().manual_seed(step)  # the same batch for every number of ranks
        starts = torch.randint(len(text) - 65, (BATCH, 1), generator=batches)[rank::ranks].to(device)
        windows = text[starts + torch.arange(65, device=device)]
        loss = model.loss(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0 and step % 5 == 4:
            report = clip.report()  # on one rank alone, which waits for no other; it is the same on all
            loud = f"largest logit {report.max_logit:.1f}, clipped heads {report.clipped_heads}"
            print(f"step {step + 1}: loss {mean.item() / ranks:.3f}, {loud}", flush=True)

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "done": done + STEPS}, checkpoint_id=FOLDER)
    if rank == 0:
        print(optimizer.plan)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
