"""One rank of `test_ulysses.py`: a Llama under DeepSpeed's sequence parallelism, beside the same on whole sequences."""

import copy
import json
import sys

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from tiny_llama import tiny_llama
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from muonclip.torch import MuonClip, QKClip

LENGTH, VOCABULARY, STEPS = 16, 64, 3


def loss_of(model, tokens, targets, positions):
    logits = model(input_ids=tokens, position_ids=positions.expand(len(tokens), -1)).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def fsdp(model):
    for each in (*model.model.layers, model):
        fully_shard(each)
        each.set_force_sum_reduction_for_comms(True)
    return model


def gammas(report):
    return torch.cat([each.gamma for each in report.layers.values()]).tolist()


def llama(groups):
    config = tiny_llama().config
    config.num_key_value_heads = groups
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def train(engine, size, groups, observe, alone):
    world, rank = dist.get_world_size(), dist.get_rank()
    model = llama(groups).double()
    whole = copy.deepcopy(model)
    whole.set_attn_implementation("eager")  # for which DeepSpeed puts nothing in the place of attention
    model = engine(model)
    optimizer = MuonClip(model, lr=0.02, qk_clip=QKClip(model, tau=0.5, observe=observe))
    reference = MuonClip(whole, lr=0.02, qk_clip=QKClip(whole, tau=0.5, observe="always", process_group=alone))
    seen = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (2 * world // size, LENGTH + 1), generator=generator)
        own = tokens.chunk(world // size)[rank // size]
        positions = torch.arange(LENGTH)
        parts = own[:, :-1], own[:, 1:], positions
        loss_of(model, *(each.chunk(size, -1)[rank % size] for each in parts)).backward()
        loss_of(whole, tokens[:, :-1], tokens[:, 1:], positions).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        seen.append([gammas(each.qk_clip.report()) for each in (optimizer, reference)])
    state = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    state = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in state.items()}
    expected = whole.state_dict()
    return {"seen": seen, "error": max((state[name] - expected[name]).abs().max().item() for name in expected)}


def main():
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    world, rank = dist.get_world_size(), dist.get_rank()
    alone = [dist.new_group([each]) for each in range(world)][rank]
    folder, size, groups, engine, observe = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
    UlyssesSPAttentionHF.register_with_transformers(llama(groups), "sdpa", size, micro_batch_size=2)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(train({"ddp": DistributedDataParallel, "fsdp": fsdp}[engine], size, groups, observe, alone), file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
