"""One rank of `test_deepspeed.py`: DeepSpeed drives MuonClip, beside DDP and masters that are driven by hand."""

import copy
import json
import sys
import warnings

import deepspeed
import torch
import torch.distributed as dist
from fsdp1_worker import TAU, Attention, sgd

from muonclip.torch import MuonClip, QKClip

STEPS = 4
OPTIONS = dict(lr=5e-3, weight_decay=0.1)


def data(step):
    return 8 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def initialize(model, optimizer, stage, **config):
    config |= {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}  # which would be 1
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, clip, dtype):
    """How many heads were clipped, by step."""
    clipped = []
    for step in range(STEPS):
        engine.backward(engine(data(step).to(dtype)).float().square().mean())
        engine.step()
        clipped.append(clip.report().clipped_heads)
    return clipped


def by_ddp(model):
    optimizer = MuonClip(model, tau=TAU, **OPTIONS)
    replica = torch.nn.parallel.DistributedDataParallel(model)
    clipped = []
    for step in range(STEPS):
        replica(data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        clipped.append(optimizer.qk_clip.report().clipped_heads)
    return clipped


def by_hand(model):
    """Masters in float32, which the clip is told of; DeepSpeed begins with a step without gradients, which decays."""
    masters = {name: each.detach().float().requires_grad_() for name, each in model.named_parameters()}
    of = dict(zip(model.parameters(), masters.values(), strict=True))
    clip = QKClip(model, tau=TAU, master_of=of.get)
    optimizer = MuonClip(masters.items(), qk_clip=clip, **OPTIONS)
    for parameter, master in of.items():
        parameter.grad, master.grad = torch.zeros_like(parameter), torch.zeros_like(master)
    optimizer.step()
    optimizer.zero_grad()
    for parameter in of:
        parameter.grad = None
    clipped = []
    for step in range(STEPS):
        model(data(step).bfloat16()).float().square().mean().backward()
        for parameter, master in of.items():
            dist.all_reduce(parameter.grad)
            master.grad = (parameter.grad / dist.get_world_size()).float()
            parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for parameter, master in of.items():
                parameter.copy_(master)
        clipped.append(clip.report().clipped_heads)
    return clipped


def compared(model, clipped, other, expected):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    error = max((ours.float() - theirs.float()).abs().max().item() for ours, theirs in pairs)
    return {"clipped": clipped, "expected": expected, "error": error}


def stage_0_in_float32():
    model, other = Attention(), Attention()
    optimizer = MuonClip(model, tau=TAU, **OPTIONS)
    clipped = train(initialize(model, optimizer, 0), optimizer.qk_clip, torch.float32)
    return compared(model, clipped, other, by_ddp(other))


def stage_0_in_bfloat16():
    model, other = Attention().bfloat16(), Attention().bfloat16()
    optimizer = MuonClip(model, tau=TAU, **OPTIONS)
    engine = initialize(model, optimizer, 0, bf16={"enabled": True})
    clipped = train(engine, optimizer.qk_clip, torch.bfloat16)
    masters = [each for group in optimizer.param_groups for each in group["params"]]
    return {
        **compared(model, clipped, other, by_hand(other)),
        "masters": sorted({str(each.dtype) for each in masters}),
    }


def stage_0_in_bfloat16_with_an_attached_clip():
    """Of an optimizer that knows nothing of it, attached to what DeepSpeed has made around it."""
    model = Attention().bfloat16()
    engine = initialize(model, sgd(model), 0, bf16={"enabled": True})
    clip = QKClip(model, tau=TAU)
    clip.attach(engine.optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clipped = train(engine, clip, torch.bfloat16)
    warned = [str(each.message) for each in caught if "QK-Clip" in str(each.message)]
    halves, masters = (getattr(engine.optimizer, name)[0] for name in ("fp16_groups", "fp32_groups"))
    same = all(torch.equal(half, master.bfloat16()) for half, master in zip(halves, masters, strict=True))
    return {"clipped": clipped, "same": same, "warned": warned}


def with_muonclip(model):
    return MuonClip(model, tau=TAU, **OPTIONS)


def without_a_clip(model):
    return MuonClip(model, qk_clip=None, **OPTIONS)


def by_names(model):
    """Of parameters alone: the optimizer does not know the model that DeepSpeed marks."""
    return MuonClip(model.named_parameters(), qk_clip=None, **OPTIONS)


def with_an_attached_clip(model):
    optimizer = sgd(model)
    QKClip(model, tau=TAU).attach(optimizer)
    return optimizer


def made(make, config):
    model = Attention().to(torch.bfloat16 if "bf16" in config else torch.float32)
    return model, make(model)


def refused(model, optimizer, stage, config):
    """What is said in the first step, and whether a weight has moved by then."""
    engine = initialize(model, optimizer, stage, **copy.deepcopy(config))
    held = [getattr(each, "ds_tensor", each) for each in model.parameters()]  # of ZeRO-3: this rank's part
    before, said = [each.detach().clone() for each in held], ""
    try:
        engine.backward(engine(data(0).to(next(model.parameters()).dtype)).float().square().mean())
        engine.step()
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "moved": not all(map(torch.equal, held, before))}


HALF = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__ = {}  # none is compiled: collectives are gloo's
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    seen = {
        each.__name__: each()
        for each in (stage_0_in_float32, stage_0_in_bfloat16, stage_0_in_bfloat16_with_an_attached_clip)
    }
    cases = [
        (f"{name}, {make.__name__}", stage, config, made(make, config))  # ZeRO-3 changes what all linears call
        for name, stage, config in [("1", 1, {}), ("1, bf16", 1, HALF), ("2", 2, {}), ("3", 3, {})]
        for make in (with_muonclip, without_a_clip, by_names, with_an_attached_clip)
    ]
    for name, stage, config, (model, optimizer) in cases:
        seen[name] = refused(model, optimizer, stage, config)
    with open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w", encoding="utf-8") as file:
        json.dump(seen, file)
    dist.barrier()
    dist.destroy_process_group()
