"""The time of new weights on their way to ranks that infer: `python -m benchmarks weight-broadcast`.

Two trainers under FSDP2, with MuonClip, and two ranks with whole models. After every optimizer step the weights go over
in chunks (`benchmarks.execution.weight_broadcast`), of several sizes, or by torch's own functions for a whole state
dict. Then all ranks compare what they have: all bits of the weights, and the logits of their model.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.execution.processes import start
from benchmarks.execution.weight_broadcast import WeightBroadcast
from benchmarks.experiment.errors import RunFailed
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.studies.templates import render
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

SIZES = MoEConfig.cpu(hidden_size=512, moe_intermediate_size=512, num_experts=8, intermediate_size=1024)
CHUNKS = tuple(2**power for power in range(16, 27, 2))
"""From 64 KiB to 64 MiB."""
TRAINERS, RANKS = (0, 1), 4


def model_of(rank: int, config: MoEConfig) -> MoE:
    """Make a model: sharded on a trainer, whole on the others, where it begins with other weights."""
    mesh = DeviceMesh("cpu", list(TRAINERS))  # made by all ranks
    torch.manual_seed(rank not in TRAINERS)
    model = MoE(config)
    if rank in TRAINERS:
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
    return model


def train(model: MoE, optimizer: MuonClip, step: int) -> None:
    """Take one step on tokens of this rank."""
    drawn = torch.Generator().manual_seed(2 * step + dist.get_rank())
    tokens = torch.randint(model.config.vocab_size, (2, 33), generator=drawn)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def differing(model: MoE) -> list[str]:
    """Name what is not the same to the bit on all ranks: weights by their name, and "logits".

    Whole weights are put together by DTensor on the trainers, and nothing of them is sent: digests are.
    """
    whole = {
        name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in weights_of(model).items()
    }
    with torch.no_grad():
        whole["logits"] = model(torch.arange(64).view(2, 32) % model.config.vocab_size)
    digests = {name: hashlib.sha256(each.contiguous().numpy().tobytes()).hexdigest() for name, each in whole.items()}
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, digests)
    return [name for name in digests if len({each[name] for each in said}) > 1]


def weights_of(model: MoE) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in model.state_dict().items()}


def run(options: argparse.Namespace) -> None:
    """Measure on four processes, and write weight_broadcast.json and the table of it."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    part = out / "rows.json"
    status = start(__name__, str(part), str(options.rounds), ranks=RANKS).wait()
    if status:
        raise RunFailed(f"the processes ended with status {status}; they said why above.")
    result = {"environment": environment(), "rounds": options.rounds} | atomic_files.read_record(part, "rows")
    part.unlink()
    atomic_files.write_json(out / "weight_broadcast.json", result)
    atomic_files.write_text(out / "weight_broadcast.md", text := table(result))
    print(text)


def table(result: Mapping[str, Any]) -> str:
    """Write the times in Markdown. A MB is 10⁶ bytes."""
    return render("weight_broadcast.md", **result)


def measure(out: Path, rounds: int, config: MoEConfig = SIZES) -> None:
    """Time chunks of all sizes, and torch's own broadcast of a whole state dict, as one of the ranks of torchrun."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = model_of(rank, config)
    optimizer = MuonClip(model, 1e-3, tau=1e-3) if rank in TRAINERS else None  # so low that all heads are clipped
    senders = {size: WeightBroadcast(weights_of(model), TRAINERS, size) for size in CHUNKS}
    times: dict[int | None, list[float]] = {size: [] for size in (*CHUNKS, None)}
    for step in range(rounds):
        for size, taken in times.items():
            if optimizer is not None:
                train(model, optimizer, step)
            weights = weights_of(model)
            dist.barrier()
            begun = time.perf_counter()
            if size is None:
                _by_state_dict(model)
            else:
                senders[size](weights)
            dist.barrier()
            taken.append(time.perf_counter() - begun)
            if wrong := differing(model):
                raise AssertionError(f"not the same on all ranks: {', '.join(wrong)}")
    if rank == 0:
        sizes = [weight.numel() * weight.dtype.itemsize for weight in model.state_dict().values()]
        rows = [
            {"chunk_bytes": size, "chunks": None if size is None else len(senders[size].chunks)}
            | {"median_ms": 1e3 * statistics.median(taken), "least_ms": 1e3 * min(taken), "most_ms": 1e3 * max(taken)}
            for size, taken in times.items()
        ]
        atomic_files.write_json(out, {"bytes": sum(sizes), "largest": max(sizes), "rows": rows})
    dist.destroy_process_group()


def _by_state_dict(model: MoE) -> None:
    """Let torch gather the whole state dict on the first rank, and broadcast it weight by weight."""
    trains = dist.get_rank() in TRAINERS
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) if trains else {}
    everything = whole if dist.get_rank() == 0 else {}
    set_model_state_dict(model, everything, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]))
