"""The optimizer classes of `test_rest.py`, and one of its ranks: `rest_worker.py FOLDER`.

For each class a model is trained under FSDP2, and its checkpoint saved in the middle; the weights at the end are
written whole, to be compared with one process, which does the same alone and goes on from the checkpoint.
"""

import functools
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from muonclip.torch import MuonClip

WIDTH, HEADS, LAYERS, STEPS = 24, 3, 1, 2


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675: the sign of an average, decoupled decay."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(average.lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                    average.lerp_(p.grad, 1 - beta2)


CLASSES = {
    "Lion": functools.partial(Lion, lr=1e-3, weight_decay=0.3),
    "NAdam": functools.partial(torch.optim.NAdam, decoupled_weight_decay=True, weight_decay=0.1),
    "Adafactor": torch.optim.Adafactor,
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, centered=True),
    "Adagrad": torch.optim.Adagrad,  # which makes its states when it is made
}
SHARDED = ("Lion", "NAdam", "Adagrad")  # torch's Adafactor takes no rows that are sharded, whoever calls it


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # the gradient of a bias of keys is zero, and its sign noise
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 30, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def make(name, *, sharded):
    torch.manual_seed(0)
    model = Model().double()
    if sharded:
        for part in (*model.layers, model):
            fully_shard(part)
    return model, MuonClip(model, lr=0.01, tau=0.01, rest=CLASSES[name])


def train(model, optimizer, first, *, ranks=1, rank=0):
    """Train on batches that the ranks divide, so that the mean of their gradients is one process's."""
    for step in range(first, first + STEPS):
        tokens = torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert first or optimizer.qk_clip.report().clipped_heads > 0


def resume_alone(folder):
    """Train in one process, from the beginning and from the checkpoint of the ranks; both come to their weights."""
    for name in SHARDED:
        expected = torch.load(f"{folder}/{name}.pt")
        straight, optimizer = make(name, sharded=False)
        train(straight, optimizer, 0)
        train(straight, optimizer, STEPS)
        resumed, optimizer = make(name, sharded=False)
        weights, states = get_state_dict(resumed, optimizer)
        state = {"model": weights, "optimizer": states}
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it says that it is one process
            dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_state_dict(resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        train(resumed, optimizer, STEPS)
        for key, weight in expected.items():
            torch.testing.assert_close(straight.state_dict()[key], weight, atol=1e-9, rtol=0, msg=f"{name} {key}")
            torch.testing.assert_close(resumed.state_dict()[key], weight, atol=1e-9, rtol=0, msg=f"{name} {key}")


def main(folder):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name in SHARDED:
        model, optimizer = make(name, sharded=True)
        train(model, optimizer, 0, ranks=ranks, rank=rank)
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{name}")
        train(model, optimizer, STEPS, ranks=ranks, rank=rank)
        whole = {key: weight.full_tensor() for key, weight in model.state_dict().items()}
        if rank == 0:
            torch.save(whole, f"{folder}/{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
