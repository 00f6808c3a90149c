"""One rank of `test_sharded_clip.py`: QK-Clip on sharded models, beside the same on a whole one.

Every rank makes the same whole model and sees every rank's batch, so each can follow a single process by itself. Writes
what it saw of each scenario as JSON.
"""

import copy
import hashlib
import sys

import torch
import torch.distributed as dist
from scenarios import run_scenarios
from tiny_attention import HEAD, HEADS, NOPE, ROPE, VALUE, WIDTH, TinyAttention, dense_max_logits
from tiny_llama import attentions_of, tiny_llama, tiny_tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import _context_parallel as experimental
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.attention import flex_attention
from torch.nn.parallel import DistributedDataParallel

from benchmarks.studies.sent_bytes import SentBytes
from muonclip.torch import HeadRows, MaxLogits, MuonClip, QKClip, QKProjection, attention
from muonclip.torch.distributed import clip_grad_norm_

DIVIDED = {
    "mha": ("q", "k", "v"),
    "gqa": ("q", "k", "v"),
    "mla": ("q_up", "kv_up"),
    "fused_interleaved": ("qkv",),
    "by index": ("q", "k", "v"),
}


class Attention(TinyAttention):
    """Counts the heads that its projections give it, as a model for tensor parallelism does."""

    def __init__(self, kind, heads):
        super().__init__("mha" if kind == "by index" else kind, heads)
        self.by_index = kind == "by index"

    def qk_projection(self):
        if not self.by_index:
            return super().qk_projection()
        index = torch.arange(self.heads * HEAD).view(self.heads, HEAD)  # as it stands, but by no rule
        query, key = ((HeadRows(module, self.heads, HEAD, index=index),) for module in (self.q, self.k))
        return QKProjection("mha", self.heads, self.max_logits, query=query, key=key)

    def qkv_of(self, x):
        def split(y, width):
            return y.unflatten(-1, (-1, width)).transpose(1, 2)

        if self.kind == "mla":
            q = split(self.q_up(self.q_down(x)), NOPE + ROPE)
            k_nope, v = split(self.kv_up(self.kv_down(x)), NOPE + VALUE).split([NOPE, VALUE], -1)
            k_rope = self.k_rope(x)[:, None].expand(-1, k_nope.shape[1], -1, -1)
            return q, torch.cat([k_nope, k_rope], -1), v
        if self.kind == "fused_interleaved":
            return split(self.qkv(x), 3 * HEAD).split(HEAD, -1)
        if self.kind in ("mha", "gqa"):
            return split(self.q(x), HEAD), split(self.k(x), HEAD), split(self.v(x), HEAD)
        return super().qkv_of(x)


class Model(nn.Module):
    def __init__(self, kind, heads, layers=2):
        super().__init__()
        self.layers = nn.ModuleList([Attention(kind, heads) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def make_model(kind, heads=HEADS, layers=2):
    torch.manual_seed(0)
    return Model(kind, heads, layers).double()


def batch(step, data_rank):
    generator = torch.Generator().manual_seed(1000 * step + data_rank)
    return 1.5 * torch.randn(2, 7, WIDTH, dtype=torch.float64, generator=generator)


# The engines: each shards the model in place, and says which of the different batches this rank trains on


def fsdp(model, shape, names, placement=None):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, shard_placement_fn=placement)
        part.set_force_sum_reduction_for_comms(True)
    return dist.get_rank()


def tensor_parallel(model, mesh):
    for layer in model.layers:
        plan = {name: ColwiseParallel() for name in DIVIDED["by index" if layer.by_index else layer.kind]}
        parallelize_module(layer, mesh, {**plan, "out": RowwiseParallel()})
        if layer.kind == "mla":  # each rank's heads know a part of the gradient of the key that they share
            layer.k_rope.register_forward_hook(lambda _, args, y: y.register_hook(summed_over(mesh)) and None)


def summed_over(mesh):
    def summed(gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=mesh.get_group())
        return gradient

    return summed


def by_fsdp(model):
    return fsdp(model, (dist.get_world_size(),), ("dp",))


def by_columns(model):
    world = dist.get_world_size()
    return fsdp(
        model, (world,), ("dp",), lambda p: Shard(int(p.ndim == 2 and p.shape[1] % world == 0 and p.shape[0] > WIDTH))
    )


def by_hsdp(model):
    return fsdp(model, (2, dist.get_world_size() // 2), ("replicas", "shards"))


def by_tp(model):
    tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))
    return 0


def by_fsdp_and_tp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh["dp"])
        part.set_force_sum_reduction_for_comms(True)
    return mesh["dp"].get_local_rank()


def scenarios(world):
    kinds = ("mha", "gqa", "mla", "fused_blocks", "fused_interleaved", "transposed", "by index")
    for kind in kinds:
        yield f"fsdp {kind}", by_fsdp, kind, HEADS
    for kind in ("mha", "mla", "fused_blocks", "transposed", "by index"):
        yield f"fsdp {kind}, heads cut", by_fsdp, kind, 3
    for kind in ("mha", "gqa", "mla", "by index"):
        yield f"columns {kind}", by_columns, kind, HEADS
    for kind in DIVIDED:
        if kind != "gqa" or world == 2:
            yield f"tp {kind}", by_tp, kind, HEADS
    if world == 4:
        for kind in ("mha", "gqa", "mla"):
            yield f"hsdp {kind}", by_hsdp, kind, HEADS
        yield "hsdp mha, heads cut", by_hsdp, "mha", 3
        for kind in DIVIDED:
            yield f"fsdp and tp {kind}", by_fsdp_and_tp, kind, HEADS
        yield "fsdp and tp mha, heads cut", by_fsdp_and_tp, "mha", 6


def one_step(shard, kind, heads, alone):
    """The clip on shards against the clip on the whole model, and against τ."""
    whole, model = make_model(kind, heads), make_model(kind, heads)
    clip = QKClip(model, tau=1.0, observe="always") if kind == "mha" else None  # before sharding, and after
    data_rank = shard(model)
    clip = clip or QKClip(model, tau=1.0, observe="always")
    ranks = range(max(gathered(data_rank)) + 1)
    reference = QKClip(whole, tau=1.0, observe="always", process_group=alone)
    inputs = [[] for _ in whole.layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].detach()))
        for layer, into in zip(whole.layers, inputs, strict=True)
    ]
    for rank in ranks:
        whole(batch(0, rank)).sum().backward()
    for hook in hooks:
        hook.remove()
    before = torch.stack([layer.max_logits.maximum.clone() for layer in whole.layers])
    clip.tau = reference.tau = before.quantile(0.5).item()
    original = copy.deepcopy(whole.state_dict())
    model(batch(0, data_rank)).sum().backward()
    with SentBytes(dist.get_world_size()) as agreeing:
        clip._check_agreement(clip._group(), None)
    with SentBytes(dist.get_world_size()) as counted:
        clip.step()
    reference.step()
    ours, expected = full_state(model), whole.state_dict()
    untouched = [name for name in expected if torch.equal(expected[name], original[name])]
    error = max((ours[name] - expected[name]).abs().max().item() for name in expected)
    whole.load_state_dict(ours)
    after = [
        [torch.from_numpy(dense_max_logits(*layer.qkv_of(x)[:2])) for x in into]
        for layer, into in zip(whole.layers, inputs, strict=True)
    ]
    after = torch.stack([torch.stack(each).amax(0) for each in after])
    report = clip.report()
    seen = torch.stack([each.max_logits for each in report.layers.values()])
    return {
        "error": error,
        "untouched": all(torch.equal(ours[name], original[name]) for name in untouched),
        "beyond tau": (after - before.clamp(max=clip.tau)).abs().max().item(),
        "clipped": report.clipped_heads,
        "heads": 2 * heads,
        "seen": (seen - before).abs().max().item(),
        "calls before the first step": agreeing.calls,
        "bytes before the first step": agreeing.total,
        "calls": counted.calls,
        "bytes": counted.total,
        "expected bytes": round(2 * 4 * 2 * (3 * heads + 1) * (dist.get_world_size() - 1) / dist.get_world_size()),
    }


def many_steps(shard, kind):
    """Replicas after 50 steps with the clip firing."""
    model = make_model(kind)
    clip = QKClip(model, tau=0.8)
    data_rank = shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    fired = 0
    for step in range(50):
        (model(batch(step, data_rank)) - batch(step + 1, data_rank)).square().mean().backward()
        optimizer.step()
        clip.step()
        optimizer.zero_grad()
        fired += clip.report().clipped_heads > 0
    digests = {}
    for name, parameter in model.named_parameters():
        local, where = parameter.detach(), ""
        if isinstance(parameter, DTensor):
            coordinate = parameter.device_mesh.get_coordinate()
            where = [
                None if placement.is_replicate() else at
                for placement, at in zip(parameter.placements, coordinate, strict=True)
            ]
            local = local.to_local()
        digests[f"{name} {where}"] = hashlib.sha256(local.contiguous().numpy().tobytes()).hexdigest()
    return {"digests": digests, "fired": fired}


def only_one_rank_observes(alone):
    """And no backward follows: after its forward FSDP has the whole weights of the root in the place of its shards."""
    model = make_model("mha")
    clip = QKClip(model, tau=0.5, observe="always")
    fully_shard(model)
    with torch.set_grad_enabled(dist.get_rank() == 0):
        model(batch(0, 0))
    clip.step()
    seen = torch.stack([each.max_logits for each in clip.report().layers.values()])
    whole = make_model("mha")
    reference = QKClip(whole, tau=0.5, observe="always", process_group=alone)
    whole(batch(0, 0))
    reference.step()
    ours, expected = full_state(model), whole.state_dict()
    return {
        "seen": seen.tolist(),
        "clipped": clip.report().clipped_heads,
        "error": max((ours[name] - expected[name]).abs().max().item() for name in expected),
    }


def a_rank_in_trouble(alone):
    """What happens on one rank is raised on all."""
    messages = {}
    last = dist.get_rank() == dist.get_world_size() - 1

    def attempt(name, spoil):
        model = make_model("mha")
        clip = QKClip(model, tau=0.5, observe="always")
        by_fsdp(model)
        x = batch(0, dist.get_rank())
        model(x * float("nan") if name == "non-finite" and last else x).sum().backward()
        if last:
            spoil(model, clip)
        try:
            clip.step()
            messages[name] = "no error"
        except RuntimeError as error:
            messages[name] = str(error)

    attempt("non-finite", lambda model, clip: None)
    attempt("unknown attention", lambda model, clip: setattr(clip.attentions._monitor._live.unclaimed, "calls", 1))
    attempt("skipped step", lambda model, clip: model.layers[0].max_logits.update(torch.full((HEADS,), torch.inf)))

    def forget(model, clip):
        model.layers[0].max_logits.reset()

    attempt("seen elsewhere", forget)
    return messages


def gradients_on_one_rank(alone):
    """An attention that did not run moves where one rank has a gradient of it, and is an error on all."""
    messages = {}
    for who in ("nobody", "the last rank"):
        model = make_model("mha")
        clip = QKClip(model, tau=0.5)
        by_fsdp(model)
        model(batch(0, 0)).sum().backward()
        model.layers[1].max_logits.reset()
        if who == "nobody" or dist.get_rank() < dist.get_world_size() - 1:
            for parameter in model.layers[1].parameters():
                parameter.grad = None
        try:
            clip.before_update()
            messages[who] = "no error"
        except RuntimeError as error:
            messages[who] = str(error)
    return messages


def idle(alone):
    """Whether a step has nothing to do is known to all alike."""
    model = make_model("mha")
    clip = QKClip(model, tau=0.5)
    by_fsdp(model)
    nothing = not clip.before_update(idle=True)
    model(batch(0, 0)).sum().backward()
    if dist.get_rank():
        clip.reset()
        model.zero_grad()
    return {"before": nothing, "after": not clip.before_update(idle=True)}


def stages(alone, how="meshes"):
    """Pipeline stages: ranks of their own, with different numbers of attentions."""
    world, rank = dist.get_world_size(), dist.get_rank()
    stage = rank // (world // 2)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "dp"))["dp"]
    model = make_model("mha", layers=1 + stage)
    options = dict(tau=0.5, observe="always")
    if how == "meshes":
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
            part.set_force_sum_reduction_for_comms(True)
        clip = QKClip(model, **options)
    elif how == "ddp":
        model = DistributedDataParallel(model, process_group=mesh.get_group())
        clip = QKClip(model, **options)
    else:
        clip = QKClip(model, **options, process_group=mesh.get_group())
    model(batch(0, rank)).sum().backward()
    if stage == 1:  # the stages take different numbers of steps: who waited for the other would wait for ever
        for _ in range(3):
            clip.step()
            model(batch(0, rank)).sum().backward()
    clip.step()
    seen = [each.max_logits.tolist() for each in clip.report().layers.values()]
    return {"layers": len(seen), "seen": seen, "steps": clip.report().steps}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(HEADS * HEAD, HEADS * HEAD, bias=False).double() for _ in range(4)
        )

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return x + self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


def pipeline(alone, by=None):
    """Two stages under torch's own schedule, whose modules have the same names. `by`: who averages over replicas."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp"))
    number, data_rank = mesh.get_coordinate()
    torch.manual_seed(0)
    whole = nn.Sequential(*(Residual() for _ in range(4)))
    with torch.no_grad():
        for loudness, layer in enumerate(whole, 1):
            layer.q.weight.mul_(3 * loudness)
    of_stage = slice(2 * number, 2 * number + 2)
    part = copy.deepcopy(whole)[of_stage]
    reference = MuonClip(whole, lr=0.02, qk_clip=QKClip(whole, tau=0.5, process_group=alone))
    if by == "fsdp":
        for each in (*part, part):
            fully_shard(each, mesh=mesh["dp"])
            each.set_force_sum_reduction_for_comms(True)
    optimizer = MuonClip(part, lr=0.02, tau=0.5)
    stage = PipelineStage(part, number, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    clipped, norms = [], []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(2, 4 * mesh["dp"].size(), 5, HEADS * HEAD, dtype=torch.float64, generator=generator)
        own = slice(4 * data_rank, 4 * data_rank + 4)
        schedule.step(*([x[own]] if number == 0 else []), **({"target": target[own]} if number == 1 else {}))
        if by == "hand":
            for parameter in part.parameters():
                dist.all_reduce(parameter.grad, group=mesh["dp"].get_group())
                parameter.grad /= mesh["dp"].size()
        nn.functional.mse_loss(whole(x), target).backward()
        norm = clip_grad_norm_(part.parameters(), 0.1, stages=mesh["pp"].get_group())
        expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        norms.append([norm.item(), expected.item()])
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        clipped.append(optimizer.qk_clip.report().clipped_heads)
    ours, expected = full_state(part), whole[of_stage].state_dict()
    error = max((ours[name] - expected[name]).abs().max().item() for name in ours)
    return {"clipped": clipped, "norms": norms, "error": error}


def ambiguous_meshes(alone):
    model = make_model("mha")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    fully_shard(model.layers[0], mesh=mesh["dp"])
    fully_shard(model.layers[1], mesh=mesh["tp"])
    clip = QKClip(model, tau=0.5)
    try:
        clip.step()
    except ValueError as error:
        return {"message": str(error)}


def llama(alone):
    """A model of transformers, its attentions found before and after it was sharded."""
    results = {}
    for order in ("before", "after"):
        whole, model = tiny_llama().double(), tiny_llama().double()
        clip = QKClip(model, tau=1.0, observe="always") if order == "before" else None
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
            part.set_force_sum_reduction_for_comms(True)
        if clip is None:
            with SentBytes(dist.get_world_size()) as counted:
                clip = QKClip(model, tau=1.0, observe="always")
            results["calls"] = counted.calls
        reference = QKClip(whole, tau=1.0, observe="always", process_group=alone)
        for step in range(3):
            for rank in range(dist.get_world_size()):
                whole(tiny_tokens(2, 10 * step + rank))
            model(tiny_tokens(2, 10 * step + dist.get_rank())).logits.sum().backward()
            model.zero_grad()
            before = clip.report().clipped_heads
            clip.step()
            reference.step()
        ours, expected = full_state(model), whole.state_dict()
        results[order] = {
            "found": {name: each.kind for name, each in clip.projections.items()},
            "clipped": clip.report().clipped_heads + before,
            "error": max((ours[name] - expected[name]).abs().max().item() for name in ours),
            "classes": sorted({type(module).__name__ for module in attentions_of(model)}),
        }
    return results


class Plain(nn.Module):
    """Calls the host's attention and declares nothing; its inputs cannot be guessed."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD, WIDTH)
        self.kind, self.by_index = "mha", False

    def forward(self, inputs):
        q, k, v = (each(inputs["x"]).unflatten(-1, (-1, HEAD)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class PlainModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Plain() for _ in range(2)])
        self.double()

    def forward(self, inputs):
        x = inputs["x"]
        for layer in self.layers:
            x = x + layer({"x": x})
        return x


def found_in_the_first_forward(alone):
    results = {}
    engines = [
        by_fsdp,
        by_tp,
        *([by_fsdp_and_tp, by_single_layers] if dist.get_world_size() == 4 else []),
    ]
    for shard in engines:
        for order in ("before", "after", "declared"):
            whole, model = PlainModel(), PlainModel()
            declare = {
                f"layers.{i}": QKProjection.mha(q=each.q, k=each.k, num_heads=HEADS, max_logits=MaxLogits(HEADS))
                for i, each in enumerate(model.layers)
            }
            options = dict(tau=0.6, observe="always", declare=declare if order == "declared" else None)
            clip = QKClip(model, **options) if order == "before" else None
            data_rank = shard(model)
            clip = clip or QKClip(model, **options)
            reference = QKClip(whole, tau=0.6, observe="always", process_group=alone)
            for step in range(2):
                for each in range(max(gathered(data_rank)) + 1):
                    whole({"x": batch(step, each)})
                model({"x": batch(step, data_rank)}).sum().backward()
                model.zero_grad()
                clip.step()
                reference.step()
            ours, expected = full_state(model), whole.state_dict()
            results[f"{shard.__name__} {order}"] = {
                "found": list(clip.projections),
                "clipped": clip.report().clipped_heads,
                "error": max((ours[name] - expected[name]).abs().max().item() for name in ours),
            }
    return results


def by_single_layers(model):
    """Every projection gives its shards back before the attention runs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    for layer in model.layers:
        for part in (layer.q, layer.k, layer.v, layer):
            fully_shard(part, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    for part in model.modules():
        if hasattr(part, "set_force_sum_reduction_for_comms"):
            part.set_force_sum_reduction_for_comms(True)
    return mesh["dp"].get_local_rank()


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = SelfAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width, bias=False))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Laid out for torch's tensor-parallel plan with sequence parallelism."""

    def __init__(self, width=HEADS * HEAD):
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, width), nn.RMSNorm(width)
        self.layers = nn.ModuleList(TransformerLayer(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 64, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

    def divide(self, mesh):
        shards, inputs = Shard(1), dict(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        plan = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=shards),
            "norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=shards, output_layouts=Replicate()),
        }
        for index in range(len(self.layers)):
            plan |= {f"layers.{index}.{name}": SequenceParallel() for name in ("norm", "mlp_norm")}
            plan |= {f"layers.{index}.{name}": PrepareModuleInput(**inputs) for name in ("attention", "mlp")}
            plan |= {f"layers.{index}.{name}": ColwiseParallel() for name in ("attention.[qkv]", "mlp.0")}
            plan |= {f"layers.{index}.{n}": RowwiseParallel(output_layouts=shards) for n in ("attention.out", "mlp.2")}
        parallelize_module(self, mesh, plan)


def sequence_parallel(alone):
    """Norms between sequence shards have gradients that are partial sums, the embedding's is whole on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    whole = Transformer().double()
    model = copy.deepcopy(whole)
    model.divide(mesh["tp"])
    if mesh["dp"].size() > 1:
        for each in (*model.layers, model):
            fully_shard(each, mesh=mesh["dp"])
            each.set_force_sum_reduction_for_comms(True)
    optimizer = MuonClip(model, lr=0.02, tau=0.3)
    reference = MuonClip(whole, lr=0.02, qk_clip=QKClip(whole, tau=0.3, process_group=alone))
    clipped, norms = [], []
    for step in range(4):
        tokens = torch.randint(64, (2 * mesh["dp"].size(), 17), generator=torch.Generator().manual_seed(step))
        own = tokens.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
        for each, batch in ((model, own), (whole, tokens)):
            nn.functional.cross_entropy(each(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        norm = clip_grad_norm_(model.parameters(), 0.5)
        norms.append([norm.item(), nn.utils.clip_grad_norm_(whole.parameters(), 0.5).item()])
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        clipped.append([each.qk_clip.report().clipped_heads for each in (optimizer, reference)])
    ours, expected = full_state(model), whole.state_dict()
    error = max((ours[name] - expected[name]).abs().max().item() for name in ours)
    return {"clipped": clipped, "norms": norms, "error": error}


class FlexCore(nn.Module):
    def forward(self, q, k, v, block_mask):
        return flex_attention.flex_attention(q, k, v, block_mask=block_mask)


class FlexModel(nn.Module):
    """Two layers whose attention torch divides along the sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(HEADS * HEAD, 3 * HEADS * HEAD).double() for _ in range(2))
        self.cores = nn.ModuleList(FlexCore() for _ in range(2))

    def forward(self, x, block_mask):
        for qkv, core in zip(self.layers, self.cores, strict=True):
            q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in qkv(x).chunk(3, -1))
            x = x + core(q, k, v, block_mask).transpose(1, 2).flatten(2)
        return x


def context_parallel(alone):
    """Each rank has a part of every sequence; FlexAttention gathers the keys, the ranks' maxima are joined."""
    world = dist.get_world_size()
    length = 256 * world  # two blocks of the mask for each rank
    flex_attention._validate_device = lambda *_: None  # which refuses gradients on the CPU, though they are right
    mask = flex_attention.create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
    x = torch.randn(2, length, HEADS * HEAD, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, model = FlexModel(), FlexModel()
    reference = QKClip(whole, tau=0.5, observe="always", process_group=alone)
    mesh = init_device_mesh("cpu", (world,))
    flex = experimental._ContextParallel(2, experimental._ContextParallel.AttentionType.FLEX)
    for core in model.cores:
        parallelize_module(core, mesh, flex)
    clip = QKClip(model, tau=0.5, observe="always")
    balance = experimental._HeadTailLoadBalancer(length, world, "cpu")
    own = experimental._context_parallel_shard(mesh, [x.clone(), mask], [1, 2], balance)
    whole(x, mask)
    model(*own)
    seen = [each.max_logits.maximum.clone() for each in clip.projections.values()]
    expected = [each.max_logits.maximum.clone() for each in reference.projections.values()]
    clip.step()
    reference.step()
    return {
        "length": len(own[0][0]),
        "lower alone": any((one < other - 1e-3).any().item() for one, other in zip(seen, expected, strict=True)),
        "clipped": reference.report().clipped_heads,
        "seen": max(
            (clip.report().layers[name].max_logits - layer.max_logits).abs().max().item()
            for name, layer in reference.report().layers.items()
        ),
        "error": max(
            (one - other).abs().max().item() for one, other in zip(model.parameters(), whole.parameters(), strict=True)
        ),
    }


def attention_of_dtensors(alone):
    """Queries that are DTensors, sharded on their heads."""
    results = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    q = torch.randn(2, HEADS, 5, HEAD, dtype=torch.float64)
    for groups in (HEADS, 1):
        k, v = (torch.randn(2, groups, 5, HEAD, dtype=torch.float64) for _ in range(2))
        expected = [each.clone().requires_grad_() for each in (q, k, v)]
        whole = MaxLogits(HEADS)
        y = attention(*expected, is_causal=True, max_logits=whole)
        y.square().sum().backward()
        layer = Attention("mha", HEADS)
        layer.qk_projection()
        parallelize_module(layer.q, mesh, ColwiseParallel())
        shared = Shard(1) if groups == HEADS else Replicate()
        given = [
            distribute_tensor(each, mesh, [placement]).requires_grad_()
            for each, placement in zip((q, k, v), (Shard(1), shared, shared), strict=True)
        ]
        z = attention(*given, is_causal=True, max_logits=layer.max_logits)
        z.square().sum().backward()
        dist.all_reduce(layer.max_logits.packed, op=dist.ReduceOp.MAX)
        results[str(groups)] = {
            "output": (z.full_tensor() - y).abs().max().item(),
            "gradients": max(
                (one.grad.full_tensor() - other.grad).abs().max().item()
                for one, other in zip(given, expected, strict=True)
            ),
            "maxima": (layer.max_logits.maximum - whole.maximum).abs().max().item(),
        }
        if groups == HEADS:
            try:
                attention(given[0], given[1].redistribute(mesh, [Replicate()]), given[2])
            except ValueError as error:
                results["message"] = str(error)
    return results


def undeclared_heads(alone):
    """Errors where nobody says which heads a forward has."""
    messages = {}
    q = torch.randn(2, 2, 5, 4)
    for name, statistic in (("no projection", MaxLogits(4)), ("plain weights", make_model("mha").layers[0])):
        if name == "plain weights":
            layer = statistic
            statistic, _ = layer.max_logits, layer.qk_projection()
        try:
            statistic.first_of(q.shape[1])
        except ValueError as error:
            messages[name] = str(error)
    return messages


def full_state(model):
    state = {}
    for name, value in model.state_dict().items():
        state[name] = value.full_tensor() if isinstance(value, DTensor) else value
    return state


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    alone = [dist.new_group([each]) for each in range(world)][rank]
    folder, *wanted = sys.argv[1:]
    work = {
        name: (lambda s=shard, k=kind, h=heads: one_step(s, k, h, alone))
        for name, shard, kind, heads in scenarios(world)
    }
    others = [only_one_rank_observes, a_rank_in_trouble, gradients_on_one_rank, idle, stages, undeclared_heads]
    others += [found_in_the_first_forward, attention_of_dtensors, context_parallel, sequence_parallel]
    others += [llama] if world == 2 else [ambiguous_meshes]
    work |= {each.__name__: (lambda each=each: each(alone)) for each in others}
    work |= {f"stages, {how}": (lambda how=how: stages(alone, how)) for how in ("ddp", "given")}
    replicas = [None] if world == 2 else ["hand", "fsdp"]
    work |= {f"pipeline, by {how}": (lambda how=how: pipeline(alone, how)) for how in replicas}
    engines = [by_fsdp, by_tp] if world == 2 else [by_hsdp, by_fsdp_and_tp]
    work |= {f"50 steps {e.__name__} {k}": (lambda e=e, k=k: many_steps(e, k)) for e in engines for k in ("gqa", "mla")}
    run_scenarios(work, wanted, folder)
