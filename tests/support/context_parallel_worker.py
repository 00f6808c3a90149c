"""One rank of `test_context_parallel.py`: MuonClip where every sequence is divided between ranks.

Every rank also trains a whole copy of the model by itself, on the whole sequences of all ranks. Writes what it saw of
each scenario as JSON.
"""

import copy
import sys
from contextlib import contextmanager

import cpu_ring
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scenarios import run_scenarios
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import _context_parallel as experimental
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from muonclip.torch import MaxLogits, MuonClip, QKClip, QKProjection, attention

HEADS, GROUPS, HEAD, WIDTH, VOCABULARY, LENGTH = 4, 2, 8, 24, 48, 32
TAU, STEPS = 0.6, 4


class Core(nn.Module):
    """Attention [B, T, H, d], as TorchTitan calls it: by a module of its own, with positions before heads."""

    is_causal = True

    def forward(self, q, k, v):
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * HEAD, bias=False) for n in (HEADS, GROUPS, GROUPS))
        self.out, self.core = nn.Linear(HEADS * HEAD, WIDTH, bias=False), Core()

    def forward(self, x, positions):
        q, k, v = (each.unflatten(-1, (-1, HEAD)) for each in (self.q(x), self.k(x), self.v(x)))
        return self.out(self.attend(rotated(q, positions), rotated(k, positions), v).flatten(2))

    def attend(self, q, k, v):
        return self.core(q, k, v)


class HeadsFirst(nn.Module):
    """Takes q [B, H, T, d], which torch's style for a module expects."""

    is_causal = True

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=True)


class Styled(Attention):
    def __init__(self):
        super().__init__()
        self.core = HeadsFirst()

    def attend(self, q, k, v):
        return self.core(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)


class Declared(Attention):
    """Hands its statistic to `muonclip.torch.attention` itself."""

    def __init__(self):
        super().__init__()
        self.max_logits = MaxLogits(HEADS)

    def qk_projection(self):
        parts = dict(q=self.q, k=self.k, v=self.v, num_heads=HEADS, num_kv_heads=GROUPS)
        return QKProjection.gqa(**parts, max_logits=self.max_logits)

    def attend(self, q, k, v):
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return attention(q, k, v, is_causal=True, max_logits=self.max_logits).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, kind=Attention, recomputes=False):
        super().__init__()
        self.recomputes = recomputes
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens, positions):
        x = self.embed(tokens)
        for layer in self.layers:
            y = self.norm(x)
            x = x + (checkpoint(layer, y, positions, use_reentrant=False) if self.recomputes else layer(y, positions))
        return self.head(x)


def rotated(x, positions):
    """Rotate each head [B, T, H, d] by its position [T]."""
    angles = positions[:, None, None] * 0.5 ** torch.arange(HEAD // 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def tokens_of(step, number):
    return torch.randint(VOCABULARY, (number, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def loss_of(model, tokens, targets, positions):
    return F.cross_entropy(model(tokens, positions).flatten(0, 1), targets.flatten())


# The ways in which torch divides a sequence: each makes `divided(tokens, targets, positions)`, a context


def by_context(model, mesh):
    @contextmanager
    def divided(*buffers):
        buffers = [each.clone() for each in buffers]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 0]):
            yield buffers

    return divided


def in_order(divide):
    """The same without the balance of load: rank r has the r-th part of each sequence."""

    def divide_in_order(model, mesh):
        experimental._attention._cp_options.enable_load_balance = False
        return divide(model, mesh)

    return divide_in_order


def by_sending_keys_on(model, mesh):
    experimental.set_rotate_method("alltoall")
    return by_context(model, mesh)


def of_buffers(mesh):
    @contextmanager
    def divided(*buffers):
        balance = experimental._HeadTailLoadBalancer(LENGTH, mesh.size(), "cpu")
        yield experimental._context_parallel_shard(mesh, [each.clone() for each in buffers], [1, 1, 0], balance)

    return divided


def by_style(model, mesh):
    style = experimental._ContextParallel(2, experimental._ContextParallel.AttentionType.SDPA)
    experimental._attention._enable_cp_dtensor_dispatcher()
    for layer in model.layers:
        parallelize_module(layer.core, mesh, style)
    return of_buffers(mesh)


def by_forward(model, mesh):
    """As TorchTitan does it."""
    experimental._attention._enable_cp_dtensor_dispatcher()
    for layer in model.layers:

        def forward(q, k, v, inner=layer.core.forward):
            parts = (DTensor.from_local(each, mesh, [Shard(1)], run_check=False) for each in (q, k, v))
            return inner(*parts).to_local()

        layer.core.forward = forward
    return of_buffers(mesh)


# The engines: each takes the gradients of all ranks together


def fsdp(model, mesh):
    for each in (*model.layers, model):
        fully_shard(each, mesh=mesh)
        each.set_force_sum_reduction_for_comms(True)
    return model


def ddp(model, mesh):
    return DistributedDataParallel(model, process_group=mesh.get_group())


def train(alone, engine, divide, *, kind=Attention, causal=True, recomputes=False, compiled=False):
    world = dist.get_world_size()
    ranks = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "cp"))
    everybody = ranks._flatten("dp_cp")
    options = experimental._attention._cp_options
    before = options.enable_load_balance, options.rotate_method
    torch.manual_seed(0)
    whole = Model(kind, recomputes).double()
    for layer in whole.layers:
        layer.core.is_causal = causal
    model = copy.deepcopy(whole)
    divided = divide(model, ranks["cp"])
    model = engine(model, everybody)
    optimizer = MuonClip(model, lr=0.02, qk_clip=QKClip(model, tau=TAU, observe="always"))
    reference = MuonClip(whole, lr=0.02, qk_clip=QKClip(whole, tau=TAU, observe="always", process_group=alone))
    run = torch.compile(model, backend="aot_eager") if compiled else model
    replicas = ranks["dp"].size()
    seen = []
    for step in range(STEPS):
        tokens = tokens_of(step, 2 * replicas)
        own = tokens.chunk(replicas)[ranks["dp"].get_local_rank()]
        positions = torch.arange(LENGTH)
        with divided(own[:, :-1], own[:, 1:], positions) as parts:
            loss_of(run, *parts).backward()
        loss_of(whole, tokens[:, :-1], tokens[:, 1:], positions).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        seen.append([of_heads(each.qk_clip.report()) for each in (optimizer, reference)])
    options.enable_load_balance, options.rotate_method = before
    experimental._attention._disable_cp_dtensor_dispatcher()
    ours, expected = full_state(model), whole.state_dict()
    optimizer.qk_clip.remove()
    return {
        "found": sorted(optimizer.qk_clip.projections) == sorted(reference.qk_clip.projections),
        "seen": seen,
        "error": max((ours[name] - expected[name]).abs().max().item() for name in ours),
    }


def of_heads(report):
    layers = report.layers.values()
    return {name: torch.cat([getattr(each, name) for each in layers]).tolist() for name in ("max_logits", "gamma")}


def full_state(model):
    state = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in state.items()}


def certified(alone):
    """Bounds of the steps alone say that no head needs a clip: no maximum is computed, and none is above its bound."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    torch.manual_seed(0)
    whole = Model().double()
    model = copy.deepcopy(whole)
    divided = by_context(model, mesh)
    exact = QKClip(whole, tau=1e3, observe="always", process_group=alone)
    clip = QKClip(model, tau=1e3)
    tokens, positions = tokens_of(0, 2), torch.arange(LENGTH)
    with divided(tokens[:, :-1], tokens[:, 1:], positions) as parts:
        loss_of(model, *parts).backward()
    loss_of(whole, tokens[:, :-1], tokens[:, 1:], positions).backward()
    for each in (clip, exact):
        each.step()
    layers, expected = clip.report().layers.values(), exact.report().layers.values()
    clip.remove()
    return {
        "exact": any(each.exact.any().item() for each in layers),
        "slack": min((a.bound - b.max_logits).min().item() for a, b in zip(layers, expected, strict=True)),
        "gamma": [each.gamma.tolist() for each in layers],
    }


def left_out(alone):
    """Parameters sharded over the data-parallel ranks alone, so that the others of a sequence do not clip with them."""
    ranks = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "cp"))
    torch.manual_seed(0)
    model = Model().double()
    divided = by_context(model, ranks["cp"])
    clip = QKClip(fsdp(model, ranks["dp"]), tau=TAU)
    with divided(*(each[..., :LENGTH] for each in (tokens_of(0, 2), tokens_of(1, 2))), torch.arange(LENGTH)) as parts:
        loss_of(model, *parts).backward()
    try:
        clip.step()
    except ValueError as error:
        return {"message": str(error)}
    finally:
        clip.remove()
    return {"message": ""}


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    cpu_ring.register()
    alone = [dist.new_group([each]) for each in range(world)][rank]
    folder, *wanted = sys.argv[1:]
    work = {
        "fsdp, context": (fsdp, by_context, {}),
        "fsdp, context, in order": (fsdp, in_order(by_context), {}),
        "fsdp, context, in order, not causal": (fsdp, in_order(by_context), {"causal": False}),
        "fsdp, keys sent on": (fsdp, by_sending_keys_on, {}),
        "fsdp, forward": (fsdp, by_forward, {}),
        "fsdp, style": (fsdp, by_style, {"kind": Styled}),
        "fsdp, recomputed": (fsdp, by_forward, {"recomputes": True}),
        "fsdp, declared": (fsdp, by_context, {"kind": Declared}),
        "ddp, context": (ddp, by_context, {}),
    }
    work = {name: (lambda e=e, d=d, o=o: train(alone, e, d, **o)) for name, (e, d, o) in work.items()}
    work |= {"certified": lambda: certified(alone), "left out": lambda: left_out(alone)}
    run_scenarios(work, wanted, folder)


if __name__ == "__main__":
    main()
