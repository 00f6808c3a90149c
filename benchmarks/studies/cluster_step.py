"""One training step on a cluster, on paper: memory, operations, bytes and seconds of the busiest rank.

Ranks are numbered as Megatron does: tensor parallelism innermost, then data parallelism with expert parallelism inside
it, pipeline stages outermost. N = PP · DP · TP; experts are divided over EP of the DP ranks and repeated DP / EP times;
attention and all other weights are repeated on all DP ranks. ZeRO-1 divides masters, moments and momentum over the
ranks that repeat a weight.

    bubble      (PP − 1) / (VPP · M) of the time of M micro-batches: interleaved 1F1B (arXiv 2104.04473, section 2.2)
    in flight   2 (PP − 1) + (VPP − 1) PP + 1 parts of a micro-batch on the first stage, PP of them where VPP = 1
    a link      NVLink within `node` neighbours, the network between; all bytes of a ring that leaves the node pass the
                network, and of an all-to-all those for ranks elsewhere
    hidden      collectives of experts, of pipeline stages and of gradients run during the products: they cost only what
                is longer than these; those of tensor parallelism and of the optimizer cost all of their time
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.tensor.placement_types import Shard

from benchmarks.studies.cluster_model import (
    Stored,
    Unit,
    Weight,
    activation_bytes,
    forward_flops,
    iteration_flops,
    recomputed_flops,
    units,
)
from muonclip.core.cost_model import Form
from muonclip.models import MoEConfig
from muonclip.torch.distributed import Mesh, NewtonSchulzConfig, PlacedParameter, UpdatePlan, plan

Optimizer = Literal["muonclip", "adamw", "gathering"]
Link = Literal["nvlink", "network"]
LINKS: tuple[Link, ...] = ("nvlink", "network")
BF16, FP32 = 2, 4


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine of `cluster_machines.toml`, which says the units."""

    bf16: float
    fp8: float
    memory: float
    memory_bandwidth: float
    node: int
    nvlink: float
    network: float
    latency: float
    efficiency: float
    sources: tuple[str, ...]


def machines() -> dict[str, Machine]:
    """Read the machines, by name."""
    read = tomllib.loads(Path(__file__).with_name("cluster_machines.toml").read_text(encoding="utf-8"))
    return {name: Machine(**each | {"sources": tuple(each["sources"])}) for name, each in read.items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism, and how what the backward pass needs is kept.

    Raises ValueError where the degrees do not divide each other.
    """

    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    data: int = 1
    tensor: int = 1
    recompute: frozenset[Stored] = frozenset()
    fp8: frozenset[Stored] = frozenset()
    offload: bool = False
    """Whether activations wait in the host's memory."""
    host_states: bool = False
    """Whether masters, moments and momentum do."""

    def __post_init__(self) -> None:
        for each in fields(self)[:5]:
            if getattr(self, each.name) < 1:
                raise ValueError(f"{each.name}={getattr(self, each.name)} must be at least 1.")
        if self.data % self.expert:
            raise ValueError(f"expert={self.expert} must divide data={self.data}: experts are spread over data ranks.")

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def expert_data(self) -> int:
        """The number of ranks that repeat each expert."""
        return self.data // self.expert

    def owned(self, experts: float, others: float) -> float:
        """Return what one rank has, by ZeRO-1, of the states of experts and all others that it and others repeat."""
        return experts / self.expert_data + others / self.data


@dataclass(frozen=True, slots=True)
class Batch:
    """The `tokens` that one step trains on, in micro-batches of `sequences` for each rank of `length` tokens."""

    tokens: int
    length: int
    sequences: int = 1

    def micro_batches(self, layout: Layout) -> int:
        """Count the micro-batches of a rank. Raises ValueError where they are not whole."""
        each = layout.data * self.sequences * self.length
        if self.tokens % each:
            raise ValueError(f"tokens={self.tokens} must be a multiple of data · sequences · length = {each}.")
        return self.tokens // each


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of collective of a step: what the busiest rank sends through each link, and how long that takes."""

    name: str
    sent: dict[Link, float]
    seconds: float
    hidden: bool


@dataclass(frozen=True, slots=True)
class Step:
    """The prediction for one step; memory in bytes of the rank that has most of it, times in seconds."""

    layout: Layout
    peak: float
    """Operations in a second, of each rank, next to which the utilisation is counted."""
    memory: dict[str, float]
    fits: bool
    model_flops: float
    update_flops: float
    compute: float
    bubble: float
    update: float
    collectives: tuple[Collective, ...]

    @property
    def mfu(self) -> float:
        """The model's operations, without what is computed again, in parts of what the machine can do meanwhile."""
        return self.model_flops / (self.seconds * self.layout.ranks * self.peak)

    @property
    def exposed(self) -> float:
        """Seconds that wait for collectives: those that are not hidden, and what is longer than the products."""
        hidden = sum(each.seconds for each in self.collectives if each.hidden)
        return sum(each.seconds for each in self.collectives if not each.hidden) + max(0.0, hidden - self.compute)

    @property
    def seconds(self) -> float:
        return self.compute + self.bubble + self.update + self.exposed

    @property
    def update_share(self) -> float:
        """The time of the optimizer and of its own collectives, in parts of that of the forward and backward passes."""
        own = sum(each.seconds for each in self.collectives if each.name.startswith("update"))
        return (self.update + own) / (self.seconds - self.update - own)


def stages(config: MoEConfig, layout: Layout) -> list[list[Unit]]:
    """Divide the units over the pipeline stages, each with `virtual` parts, as evenly as whole layers allow.

    The embedding is on the first and the head on the last part; where layers do not divide, these have fewer, and then
    other parts of the last stage. Raises ValueError where there are more parts than layers and ends.
    """
    embedding, *layers, head = units(config)
    parts = layout.pipeline * layout.virtual
    if parts > len(layers) + 3:
        raise ValueError(f"pipeline · virtual = {parts} parts are too many for {len(layers)} layers.")
    each, rest = divmod(len(layers), parts)
    sizes = [each + 1] * parts
    of_last = range(parts - 1, -1, -layout.pipeline)  # the head weighs as much as layers do
    short = dict.fromkeys([parts - 1, 0, *of_last, *range(parts - 1, -1, -1)])
    for part in [*short][: parts - rest]:
        sizes[part] -= 1
    ordered, waiting = [[embedding], *([] for _ in range(parts - 1))], iter(layers)
    for part, size in enumerate(sizes):
        ordered[part] += [next(waiting) for _ in range(size)]
    ordered[-1].append(head)
    return [[unit for part in ordered[stage :: layout.pipeline] for unit in part] for stage in range(layout.pipeline)]


def parts_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Count the parts of micro-batches whose activations a stage holds at most."""
    ahead = layout.pipeline - stage - 1
    warm_up = ahead if layout.virtual == 1 else 2 * ahead + (layout.virtual - 1) * layout.pipeline
    return min(warm_up + 1, micro_batches * layout.virtual)


def bubble_share(layout: Layout, micro_batches: int) -> float:
    """Return what the pipeline waits, in parts of the time that its micro-batches take."""
    return (layout.pipeline - 1) / (layout.virtual * micro_batches)


def numel_of(stage: Sequence[Unit], layout: Layout) -> tuple[float, float]:
    """Count the parameters that a rank of a stage has: of experts, and all others."""
    experts = sum(unit.numel(experts=True) for unit in stage) / layout.expert / layout.tensor
    return experts, sum(unit.numel(experts=False) for unit in stage) / layout.tensor


def memory_of(
    config: MoEConfig, stage: Sequence[Unit], index: int, layout: Layout, batch: Batch, optimizer: Optimizer
) -> dict[str, float]:
    """Count the bytes of one rank of a stage: states, and what waits for the backward pass.

    With `offload`, the activations of two parts of a micro-batch are here: one that is computed, one on its way.
    """
    experts, others = numel_of(stage, layout)
    own = layout.owned(experts, others)
    moments = 2 if optimizer == "adamw" else _moments(stage)
    state = 0.0 if layout.host_states else FP32
    waiting = sum(
        activation_bytes(config, unit, recompute=layout.recompute, fp8=layout.fp8) / layout.tensor
        for unit in stage
        if unit.kind != "head"
    )
    head = sum(activation_bytes(config, unit) / layout.tensor for unit in stage if unit.kind == "head")
    at_once = parts_in_flight(layout, index, batch.micro_batches(layout))
    at_once = min(at_once, 2) if layout.offload else at_once
    tokens = batch.sequences * batch.length
    return {
        "parameters": BF16 * (experts + others),
        "gradients": FP32 * (experts + others),
        "masters": state * own,
        "momentum": state * own * moments,
        "activations": tokens * (waiting / layout.virtual * at_once + head),
    }


def _moments(stage: Sequence[Unit]) -> float:
    """Return how many moments an element has: one where Muon updates it, two where AdamW does."""
    weights = [weight for unit in stage for weight in unit.weights]
    adam = sum(weight.numel for weight in weights if weight.layout is None)
    return 1 + adam / sum(weight.numel for weight in weights)


def predict(
    config: MoEConfig,
    machine: Machine,
    layout: Layout,
    batch: Batch,
    optimizer: Optimizer = "muonclip",
    *,
    form: Form | Literal["symmetric"] = "standard",
    rate: Literal["bf16", "fp8"] = "bf16",
    efficiency: float | None = None,
) -> Step:
    """Predict one step; `rate` and `efficiency` are of the forward and backward products, the update's are bf16."""
    count, divided = batch.micro_batches(layout), stages(config, layout)
    tokens = batch.tokens / layout.data  # of one pipeline
    peak = getattr(machine, rate)
    speed = peak * (machine.efficiency if efficiency is None else efficiency) * layout.tensor

    def operations(stage: Sequence[Unit], *, again: bool) -> float:
        each = sum(3 * forward_flops(config, unit, batch.length) for unit in stage)
        return each + again * sum(recomputed_flops(config, unit, layout.recompute) for unit in stage)

    compute = max(operations(stage, again=True) for stage in divided) * tokens / speed
    model_flops = sum(operations(stage, again=False) for stage in divided) * batch.tokens
    busiest = max(divided, key=lambda stage: sum(numel_of(stage, layout)))
    update, flops, exchanged = _update(busiest, machine, layout, optimizer, form)
    memory = max(
        (memory_of(config, stage, index, layout, batch, optimizer) for index, stage in enumerate(divided)),
        key=lambda each: sum(each.values()),
    )
    collectives = (*_collectives(config, busiest, machine, layout, batch, count), *exchanged)
    bubble = compute * bubble_share(layout, count)
    fits = sum(memory.values()) < machine.memory
    return Step(layout, peak, memory, fits, model_flops, flops, compute, bubble, update, collectives)


_ADAMW_BYTES = 4 + 8 + 8 + 8 + 2  # gradient; both moments and the master, read and written; the weight
_MUON_BYTES = 4 + 8 + 2 + 2 + 8 + 2  # gradient; momentum, read and written; to the iteration and back; master; weight


def _update(
    stage: Sequence[Unit], machine: Machine, layout: Layout, optimizer: Optimizer, form: Form | Literal["symmetric"]
) -> tuple[float, float, list[Collective]]:
    """Return the seconds of the update without its collectives, the busiest rank's operations, and the collectives."""
    weights = [weight for unit in stage for weight in unit.weights]
    own = layout.owned(*numel_of(stage, layout))
    if optimizer == "adamw":
        return own * _ADAMW_BYTES / machine.memory_bandwidth, 0.0, []
    matrices = [weight for weight in weights if weight.layout is not None]
    in_experts = sum(weight.numel for weight in matrices if weight.is_expert) / layout.expert / layout.tensor
    in_others = sum(weight.numel for weight in matrices if not weight.is_expert) / layout.tensor
    muon = layout.owned(in_experts, in_others)
    passes = (muon * _MUON_BYTES + (own - muon) * _ADAMW_BYTES) / machine.memory_bandwidth
    of_experts = Group(layout.expert_data, layout.expert * layout.tensor, machine)
    of_others = Group(layout.data, layout.tensor, machine)
    if optimizer == "gathering":
        each = [iteration_flops([weight], form) / (layout.expert if weight.is_expert else 1) for weight in matrices]
        gathered = [of_experts.ring("", BF16 * in_experts), of_others.ring("", BF16 * in_others)]
        flops = sum(each) / layout.tensor
        return passes + flops / (machine.bf16 * machine.efficiency), flops, [_joined("update, gathered", gathered)]
    decided = update_plan(tuple(matrices), layout)
    flops = max(decided.flops().values()) * iteration_flops(matrices, form) / iteration_flops(matrices, "standard")
    links = by_link(decided, max(1, machine.node // layout.tensor))
    sent: dict[Link, float] = {link: max(each[link] for each in links.values()) for link in LINKS}
    wait = machine.latency if sent["network"] else 0.0
    moved = max(sent["nvlink"] / machine.nvlink, sent["network"] / machine.network) + wait
    seconds = passes + flops / (machine.bf16 * machine.efficiency * layout.tensor)
    return seconds, flops, [Collective("update, to owners and back", sent, moved, False)]


@cache
def update_plan(weights: tuple[Weight, ...], layout: Layout) -> UpdatePlan:
    """Make our own plan for the weights of a stage: they are sharded over the ranks that repeat them."""
    config = NewtonSchulzConfig(torch.bfloat16, "jordan", None, device="cuda")
    copies, parts = layout.expert_data, layout.expert
    dense = Mesh((layout.data,), tuple(range(layout.data)), ("data",))
    of_experts = Mesh((copies, parts), tuple(range(layout.data)), ("copies", "experts"))
    placed: list[PlacedParameter] = []
    for each in weights:
        assert each.layout is not None
        mesh, where = dense, (Shard(0),)
        if each.is_expert:  # whole experts where they divide, rows of all else, as `muonclip.models.parallel` has it
            mesh, where = of_experts, (Shard(0 if each.shape[0] // parts % copies == 0 else 1), Shard(0))
        placed.append(PlacedParameter(each.name, each.shape, each.layout, config, mesh, where))
    return plan(placed)


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of one collective: how many, the distance of their numbers, and their machine."""

    size: int
    stride: int
    machine: Machine

    @property
    def neighbours(self) -> int:
        """The number of them within reach of NVLink."""
        return min(self.size, max(1, self.machine.node // self.stride))

    def ring(self, name: str, whole: float, *, times: int = 1, hidden: bool = False) -> Collective:
        """Count a reduce-scatter or an all-gather of `whole` bytes, in `times` equal collectives."""
        sent = whole * (self.size - 1) / self.size
        link: Link = "nvlink" if self.neighbours == self.size else "network"
        wait = times * (self.size - 1) * self.machine.latency if link == "network" else 0.0
        return Collective(name, {link: sent}, sent / getattr(self.machine, link) + wait, hidden)

    def all_to_all(self, name: str, held: float, *, times: int = 1, hidden: bool = False) -> Collective:
        """Count an all-to-all of `held` bytes of a rank, of which every rank gets as much, in `times` collectives."""
        inside = held * (self.neighbours - 1) / self.size
        outside = held * (self.size - self.neighbours) / self.size
        wait = times * self.machine.latency if outside else 0.0
        seconds = max(inside / self.machine.nvlink, outside / self.machine.network) + wait
        return Collective(name, {"nvlink": inside, "network": outside}, seconds, hidden)


def _joined(name: str, parts: Sequence[Collective]) -> Collective:
    sent: dict[Link, float] = {link: sum(part.sent.get(link, 0.0) for part in parts) for link in LINKS}
    return Collective(name, sent, sum(part.seconds for part in parts), parts[0].hidden)


def _collectives(
    config: MoEConfig, stage: Sequence[Unit], machine: Machine, layout: Layout, batch: Batch, count: int
) -> Iterator[Collective]:
    """Count the collectives of the forward and backward passes, and of ZeRO-1, in the order of a step."""
    tokens = count * batch.sequences * batch.length
    row = BF16 * config.hidden_size
    layers = [unit for unit in stage if unit.kind in ("dense", "mixture")]
    if layout.expert > 1:
        mixtures = sum(unit.kind == "mixture" for unit in layers)
        held = 4 * mixtures * tokens * config.num_experts_per_tok * row  # there and back, forward and backward
        group = Group(layout.expert, layout.tensor, machine)
        yield group.all_to_all("experts, tokens there and back", held, times=4 * mixtures * count, hidden=True)
    if layout.tensor > 1:
        group, times = Group(layout.tensor, 1, machine), 4 * len(layers) * count
        yield _joined("tensor, sums of activations", [group.ring("", times / count * tokens * row, times=times)] * 2)
    if layout.pipeline > 1:
        sent = 2 * layout.virtual * tokens * row
        link: Link = "nvlink" if layout.data * layout.tensor < machine.node else "network"
        yield Collective("pipeline, to the next stage", {link: sent}, sent / getattr(machine, link), True)
    experts, others = numel_of(stage, layout)
    groups = (
        (Group(layout.expert_data, layout.expert * layout.tensor, machine), experts),
        (Group(layout.data, layout.tensor, machine), others),
    )
    yield _joined("gradients, reduce-scatter in fp32", [g.ring("", FP32 * n, hidden=True) for g, n in groups])
    yield _joined("parameters, all-gather in bf16", [g.ring("", BF16 * n, hidden=True) for g, n in groups])


def by_link(decided: UpdatePlan, node: int) -> dict[int, dict[Link, int]]:
    """Divide what each rank sends into what stays within `node` neighbours, and what leaves them.

    A sum of Gram matrices is a ring, all of which passes the network where one of its ranks is elsewhere.
    """
    links: dict[int, dict[Link, int]] = {rank: {"nvlink": 0, "network": 0} for rank in decided.ranks}
    for each in decided.rounds:
        if each.bucket.num_replicas > 1:
            raise NotImplementedError("links are counted for shards, not for replicas.")
        for by_rank in each.sent().values() if each.method == "gram" else ():
            near = len({rank // node for rank in each.bucket.members()[0]}) == 1
            for rank, amount in by_rank.items():
                links[rank]["nvlink" if near else "network"] += amount
        if each.method != "owner":
            continue
        out, back = each.bucket.iteration.sent.itemsize, each.bucket.iteration.dtype.itemsize
        sizes = each.bucket.sizes()
        for ranks, owned in zip(each.bucket.members(), each.counts, strict=True):
            nodes: dict[int, list[int]] = {}
            for at, rank in enumerate(ranks):
                nodes.setdefault(rank // node, []).append(at)
            for inside in nodes.values():
                there, elements = sum(owned[at] for at in inside), sum(sizes[at] for at in inside)
                for at in inside:
                    link = links[ranks[at]]
                    link["nvlink"] += (there - owned[at]) * sizes[at] * out + owned[at] * (elements - sizes[at]) * back
                    link["network"] += (sum(owned) - there) * sizes[at] * out
                    link["network"] += owned[at] * (sum(sizes) - elements) * back
    return links


def states(step: Step) -> float:
    """Return the bytes of all states of a rank: everything but activations."""
    return math.fsum(size for name, size in step.memory.items() if name != "activations")
