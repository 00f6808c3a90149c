"""One rank of `test_fsdp1.py`: every order in which FSDP1 and an optimizer or a clip may come, and what each says."""

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from muonclip.torch import Muon, MuonClip, QKClip

TAU = 0.5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.v, self.out = (nn.Linear(16, 16) for _ in range(3))
        self.k = nn.Linear(16, 16, bias=False)  # its gradient would be rounding alone, of which Adam takes the sign

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (2, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def muonclip_of_the_wrapper(wrap):
    model = wrap(Attention())
    return model, MuonClip(model, tau=TAU)


def muonclip_of_a_model_with_a_wrapped_part(wrap):
    model = nn.Sequential(wrap(Attention()))
    return model, MuonClip(model, tau=TAU)


def muonclip_before_the_wrapper(wrap):
    model = Attention()
    optimizer = MuonClip(model, tau=TAU)
    return wrap(model), optimizer


def muonclip_without_a_clip_before_the_wrapper(wrap):
    model = Attention()
    optimizer = MuonClip(model, qk_clip=None)
    return wrap(model), optimizer


def muon_of_matrices(wrap):
    model = wrap(Attention())
    return model, Muon(model.parameters())


def clip_of_the_wrapper(wrap):
    model = wrap(Attention())
    optimizer = sgd(model)
    QKClip(model, tau=TAU).attach(optimizer)
    return model, optimizer


def clip_of_what_is_inside(wrap):
    inner = Attention()
    model = wrap(inner)
    optimizer = sgd(model)
    QKClip(inner, tau=TAU).attach(optimizer)
    return model, optimizer


def clip_before_the_wrapper(wrap):
    inner = Attention()
    clip = QKClip(inner, tau=TAU)
    model = wrap(inner)
    optimizer = sgd(model)
    clip.attach(optimizer)
    return model, optimizer


ORDERS = (
    muonclip_of_the_wrapper,
    muonclip_of_a_model_with_a_wrapped_part,
    muonclip_before_the_wrapper,
    muonclip_without_a_clip_before_the_wrapper,
    muon_of_matrices,
    clip_of_the_wrapper,
    clip_of_what_is_inside,
    clip_before_the_wrapper,
)


def run(order, *, use_orig_params):
    """What is said where the model is made, run or stepped, and whether a weight has moved by then."""

    def wrap(module):
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=use_orig_params)

    said, moved = "", False
    try:
        model, optimizer = order(wrap)
        x = 8 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
        loss = model(x).square().mean()
        loss.backward()
        before = [each.detach().clone() for each in model.parameters()]
        try:
            optimizer.step()
        finally:
            moved = not all(map(torch.equal, model.parameters(), before))
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "moved": moved}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = sys.argv[1]
    seen = {
        f"{order.__name__}, {use_orig_params}": run(order, use_orig_params=use_orig_params)
        for order in ORDERS
        for use_orig_params in (True, False)
    }
    with open(f"{folder}/{dist.get_rank()}.json", "w", encoding="utf-8") as file:
        json.dump(seen, file)
    dist.barrier()
    dist.destroy_process_group()
