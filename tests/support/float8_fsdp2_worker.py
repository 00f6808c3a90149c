"""One rank of `test_torchao_fsdp2.py`: FSDP2 with torchao's float8 linears, what each rank saw and has, as JSON."""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_attention import dense_max_logits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchao.float8 import Float8LinearConfig, convert_to_float8_training, precompute_float8_dynamic_scale_for_fsdp

from muonclip.torch import MuonClip, QKClip

WIDTH, HEADS, LAYERS, TAU = 32, 2, 2, 0.4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.largest = torch.full((HEADS,), -math.inf)  # by this test, of the products as they are computed

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (each(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        if type(self.q).__name__.endswith("Float8Linear"):  # and not in a search
            self.largest = torch.from_numpy(dense_max_logits(q.detach(), k.detach()))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, 30, bias=False)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, tokens):
        x = 2 * self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def sharded_model(gathered_in_float8):
    torch.manual_seed(0)
    config = Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=gathered_in_float8)
    model = convert_to_float8_training(Model(), config=config, module_filter_fn=lambda _, name: name != "head")
    for part in (*model.layers, model):
        fully_shard(part)
    return model


def backward(model, step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    tokens = torch.randint(30, (2, 9), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    loss.backward()
    return loss.item()


def full(model):
    whole = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local().detach()
        local = getattr(local, "_tensor", local).contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        whole[name] = torch.cat(parts)
    return whole


def of_all_ranks(largest):
    largest = largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def training(gathered_in_float8, precomputed):
    """Three steps beside those of a model that is not clipped, but begins each of them with the same weights."""
    model, other = sharded_model(gathered_in_float8), sharded_model(gathered_in_float8)
    options = dict(lr=2e-2, weight_decay=0.1)
    clipped, unclipped = MuonClip(model, **options, tau=TAU), MuonClip(other, **options, qk_clip=None)
    steps = []
    for step in range(3):
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.copy_(model.get_parameter(name))
        for each, optimizer in ((other, unclipped), (model, clipped)):
            if precomputed:
                precompute_float8_dynamic_scale_for_fsdp(each)
            loss = backward(each, step)
            optimizer.step()
            optimizer.zero_grad()
        layers = clipped.qk_clip.report().layers
        wanted = [of_all_ranks(block.largest) for block in model.layers]
        own, before = full(model), full(other)
        furthest = 0.0
        for layer, seen in enumerate(layers.values()):
            rows = seen.gamma.sqrt().repeat_interleave(WIDTH // HEADS)[:, None]
            for name in (f"layers.{layer}.q.weight", f"layers.{layer}.k.weight"):
                furthest = max(furthest, ((own[name] / (before.pop(name) * rows)) - 1).abs().max().item())
        untouched = all(torch.equal(own[name], each) for name, each in before.items())
        steps.append(
            dict(
                loss=loss,
                gammas=[each.gamma.tolist() for each in layers.values()],
                wanted=[(TAU / each).clamp(max=1).tolist() for each in wanted],
                furthest=furthest,
                untouched=untouched,
            )
        )
    return steps


def kept_scales():
    """A clip after the scales were computed, once as it is, once followed by their computation."""
    model = sharded_model(True)
    clip = QKClip(model, tau=TAU)
    backward(model, 0)
    precompute_float8_dynamic_scale_for_fsdp(model)  # amid an order that torchao does not have in mind
    weight = model.layers[0].q.weight
    kept = weight._local_tensor._precomputed_scale.item()
    clip.step()
    model.zero_grad()
    dropped = weight._local_tensor._precomputed_scale is None
    as_left = backward(model, 1)
    precompute_float8_dynamic_scale_for_fsdp(model)
    fresh = weight._local_tensor._precomputed_scale.item()
    others = model.layers[0].v.weight._local_tensor._precomputed_scale is not None
    return dict(kept=kept, dropped=dropped, fresh=fresh, others=others, losses=[as_left, backward(model, 1)])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = dict(
        shards=training(False, precomputed=False),
        gathered=training(True, precomputed=False),
        precomputed=training(True, precomputed=True),
        kept=kept_scales(),
    )
    Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
