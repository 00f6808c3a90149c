"""One rank of `test_fsdp2.py`: what somebody who brings a model of their own to FSDP2 meets, each scenario as JSON."""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from muonclip.torch import MuonClip

WIDTH, HEADS, LAYERS = 24, 3, 2
LAYOUTS = {  # what is sharded by itself, besides the layers; the rest is the root's
    "root holds the rest": (),
    "embedding by itself": ("embed",),
    "empty root": ("embed", "norm", "head"),
}


class Block(nn.Module):
    def __init__(self, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """With `by_name` nobody can guess what it is called with."""

    def __init__(self, heads=HEADS, by_name=False):
        super().__init__()
        self.by_name = by_name
        self.embed = nn.Embedding(30, WIDTH)
        self.layers = nn.ModuleList(Block(heads) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 30, bias=False)

    def forward(self, tokens, *, batch=None):
        x = self.embed(batch["tokens"] if self.by_name else tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def fill(model):
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def shard(model, layout="root holds the rest", dtype=torch.bfloat16):
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*model.layers, *(getattr(model, name) for name in LAYOUTS[layout]), model):
        fully_shard(part, mp_policy=policy)
    return model


def on_meta(**options):
    with torch.device("meta"):
        return Model(**options)


def filled(model):
    model.to_empty(device="cpu")
    fill(model)
    return model


def train(model, optimizer, steps=2):
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(30, (2, 9), generator=generator)
        (model(None, batch={"tokens": tokens}) if model.by_name else model(tokens)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def outcome(make):
    """What a model and its optimizer come to, or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model, optimizer = make()
            train(model, optimizer)
        except (RuntimeError, ValueError, TypeError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
    clip, plan = optimizer.qk_clip, str(optimizer.plan)
    return {
        "found": list(clip.projections),
        "clipped": clip.report().clipped_heads > 0,
        "open": [line for line in plan.splitlines() if "to be found" in line or "not checked" in line],
        "warned": [str(each.message) for each in caught if "QK-Clip" in str(each.message)],
    }


def of_layout(layout, dtype=torch.bfloat16, *, by_name=False, compiled=False):
    model = on_meta(by_name=by_name)
    if compiled:
        for layer in model.layers:
            layer.compile(fullgraph=True, backend="eager")
    filled(shard(model, layout, dtype))
    return model, MuonClip(model, lr=0.01, tau=0.05)


def before_filling(layout):
    model = shard(on_meta(), layout)
    optimizer = MuonClip(model, lr=0.01, tau=0.05)
    return filled(model), optimizer


def before_sharding_on_meta(layout):
    model = on_meta()
    optimizer = MuonClip(model, lr=0.01, tau=0.05)
    return filled(shard(model, layout)), optimizer


def before_sharding():
    model = Model()
    fill(model)
    optimizer = MuonClip(model, lr=0.01, tau=0.05)
    return shard(model), optimizer


def with_heads(number):
    model = filled(shard(on_meta(heads=number)))
    return model, MuonClip(model, lr=0.01, tau=0.05)


def with_options(**options):
    model = filled(shard(on_meta()))
    return model, MuonClip(model, **{"lr": 0.01, "tau": 0.05, **options})


def never_filled():
    model = shard(on_meta())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model, MuonClip(model, lr=0.01)


def tau_lowered_by_all():
    model = filled(shard(on_meta()))
    optimizer = MuonClip(model, lr=0.01, tau=5.0)
    train(model, optimizer, 1)
    optimizer.qk_clip.tau = 0.05
    for group in optimizer.param_groups:
        group["lr"] = 0.001
    return model, optimizer


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = {}
    for layout in LAYOUTS:
        seen[f"{layout}"] = outcome(lambda at=layout: of_layout(at))
        seen[f"{layout}, not guessed"] = outcome(lambda at=layout: of_layout(at, by_name=True))
        seen[f"{layout}, before filling"] = outcome(lambda at=layout: before_filling(at))
        seen[f"{layout}, before sharding on meta"] = outcome(lambda at=layout: before_sharding_on_meta(at))
    seen["compiled"] = outcome(lambda: of_layout("root holds the rest", compiled=True))
    seen["float32"] = outcome(lambda: of_layout("root holds the rest", None))
    seen["before sharding"] = outcome(before_sharding)
    seen["never filled"] = outcome(never_filled)
    seen["other heads"] = outcome(lambda: with_heads((3, 6)[rank]))
    seen["other tau"] = outcome(lambda: with_options(tau=(2.0, 3.0)[rank]))
    seen["other rate"] = outcome(lambda: with_options(lr=(0.01, 0.02)[rank]))
    seen["tau lowered by all"] = outcome(tau_lowered_by_all)
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
