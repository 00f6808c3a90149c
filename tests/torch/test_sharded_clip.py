"""QK-Clip on sharded models: the maxima of all ranks, and every rank its own rows, with one collective."""

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_attention import TinyAttention, TinyModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.placement_types import Partial, _StridedShard
from torch.nn.functional import scaled_dot_product_attention as attend_by_another_name
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from muonclip.torch import HeadRows, MaxLogits, MuonClip, QKClip, attention
from muonclip.torch.clip.ranks import ClipRanks
from muonclip.torch.heads.head_rows import heads_of_rows, sample_rows, scale_heads
from muonclip.torch.heads.query_heads import QueryHeads
from muonclip.torch.mesh.index_ranges import local_indices
from muonclip.torch.observe import AttentionCall
from muonclip.torch.observe.observer import take_in
from muonclip.torch.observe.sdpa import KERNEL

WORKER = Path(__file__).parents[1] / "support" / "sharded_clip_worker.py"


# Pure: one process, a back end that sends nothing


_meshes = itertools.count()


class Ranks:
    """The ranks of a mesh one after the other. No name of a dimension comes twice: DTensor remembers equal meshes, and
    with them the rank."""

    def __init__(self, shape):
        self.shape, self.size = shape, torch.Size(shape).numel()

    def __iter__(self):
        for rank in range(self.size):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=self.size)
            try:
                mesh, number = torch.arange(self.size).view(self.shape), next(_meshes)
                yield DeviceMesh("cpu", mesh, mesh_dim_names=tuple(f"{i}th of {number}" for i in range(mesh.ndim)))
            finally:
                dist.destroy_process_group()


MESHES = st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3), (3, 2)])


def placements(draw, mesh_shape, axes):
    axis = st.integers(0, axes - 1)
    strided = st.builds(lambda d, n: _StridedShard(d, split_factor=n), axis, st.integers(2, 3))
    return tuple(draw(st.one_of(st.just(Replicate()), st.builds(Shard, axis), strided)) for _ in mesh_shape)


@given(st.data())
def test_indices_are_those_of_dtensor(data):
    mesh_shape = data.draw(MESHES)
    placed = placements(data.draw, mesh_shape, 2)
    shape = data.draw(st.integers(0, 13)), data.draw(st.integers(1, 13))
    for mesh in Ranks(mesh_shape):
        for axis, size in enumerate(shape):
            numbers = torch.arange(size).view((-1, 1) if axis == 0 else (1, -1)).expand(shape)
            local = distribute_tensor(numbers.contiguous(), mesh, placed, src_data_rank=None).to_local()
            runs = local_indices(size, axis, placed, mesh_shape, mesh.get_coordinate())
            expected = [i for start, stop in runs for i in range(start, stop)]
            if local.numel():
                assert local.select(1 - axis, 0).tolist() == expected


@given(size=st.integers(0, 40), ways=st.integers(1, 7))
def test_indices_are_those_of_chunk(size, ways):
    chunks = torch.arange(size).chunk(ways) if size else ()
    for at in range(ways):
        expected = chunks[at].tolist() if at < len(chunks) else []
        runs = local_indices(size, 0, (Shard(0),), (ways,), (at,))
        assert [i for start, stop in runs for i in range(start, stop)] == expected


ROWS = [
    dict(size=3),
    dict(size=3, start=2),
    dict(size=2, start=1, stride=5),
    dict(size=3, axis=1),
    dict(size=2, index=torch.tensor([[0, 7], [4, 3], [9, 11], [12, 2]])),
]


@settings(max_examples=40)
@given(st.data())
def test_each_rank_scales_its_own_rows_and_no_others(data):
    """On every rank the shard of the scaled weight is the scaled shard, to the bit."""
    mesh_shape = data.draw(MESHES)
    options = data.draw(st.sampled_from(ROWS))
    axis = options.get("axis", 0)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    module = nn.Module()
    weight = torch.randn((5, 19) if axis else (19, 5), generator=generator)
    weight[3], weight[4, 4] = -0.0, torch.nan
    rows = HeadRows(module, 4, **options)
    factors = torch.tensor([1.0, 0.3, 1.0, 0.7])
    placed = [(placements(data.draw, mesh_shape, 2), axis), (placements(data.draw, mesh_shape, 1), 0)]
    for mesh in Ranks(mesh_shape):
        for (where, along), whole in zip(placed, (weight, torch.arange(19.0)), strict=True):
            module.weight = nn.Parameter(distribute_tensor(whole, mesh, where, src_data_rank=None))
            module.bias = None
            scaled = nn.Parameter(whole.clone())
            reference = HeadRows(nn.Module(), 4, **{**options, "axis": along})
            reference.module.weight = scaled
            scale_heads(reference, scaled, along, factors)
            local = module.weight.to_local()
            scale_heads(rows, module.weight, along, factors)
            expected = distribute_tensor(scaled.detach(), mesh, where, src_data_rank=None).to_local()
            assert torch.equal(local.detach().view(torch.int32), expected.view(torch.int32))


STACKED = [  # shape, and which of its axes count rows
    ((3, 12, 5), dict(size=3, start=12, axis=(0, 1))),
    ((3, 4, 3, 5), dict(size=2, start=13, stride=3, axis=(0, 1, 2))),
    ((3, 5, 8), dict(size=2, start=8, axis=(0, 2))),
    ((5, 4, 3), dict(size=2, stride=3, start=1, axis=(1, 2))),
    ((3, 8, 5), dict(size=2, index=torch.tensor([[0, 17], [9, 3], [23, 16], [12, 2]]), axis=(0, 1))),
]


@settings(max_examples=40)
@given(st.data())
def test_rows_along_several_axes_are_scaled_on_every_shard(data):
    mesh_shape = data.draw(MESHES)
    shape, options = data.draw(st.sampled_from(STACKED))
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 100))))
    factors = torch.tensor([1.0, 0.3, 0.6, 0.7])
    axes = options["axis"]
    scaled = whole.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1).clone()
    for head, rows in enumerate(HeadRows(nn.Module(), 4, **options).rows("cpu")):
        scaled[rows] *= factors[head]
    expected = scaled.unflatten(0, [shape[axis] for axis in axes]).movedim(tuple(range(len(axes))), axes)
    where = placements(data.draw, mesh_shape, len(shape))
    for mesh in Ranks(mesh_shape):
        module = nn.Module()
        module.weight = nn.Parameter(distribute_tensor(whole.clone(), mesh, where, src_data_rank=None))
        module.bias = None
        rows = HeadRows(module, 4, **options)
        rows.check("query")
        heads = heads_of_rows(rows, module.weight, axes)
        assert heads.shape == sample_rows(module.weight, axes, 2).shape[:1]
        scale_heads(rows, module.weight, axes, factors)
        local = distribute_tensor(expected.contiguous(), mesh, where, src_data_rank=None).to_local()
        assert torch.equal(module.weight.to_local(), local)


def on(mesh, module, placement, names=("weight", "bias")):
    for name in names:
        whole = getattr(module, name).detach()
        setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [placement], src_data_rank=None)))
    return module


def test_heads_of_a_tensor_parallel_forward_go_to_their_places():
    q, k, v = (torch.randn(2, 2, 5, 6) for _ in range(3))
    for rank, mesh in enumerate(Ranks((2,))):
        layer = TinyAttention("mha")
        copied, unpickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for each in (layer, copied, unpickled):
            each.qk_projection()
            on(mesh, each.q, Shard(0))
            attention(q, k, v, max_logits=each.max_logits)
            whole = MaxLogits(2)
            attention(q, k, v, max_logits=whole)
            own, others = each.max_logits.maximum.view(2, 2)[[rank, 1 - rank]]
            assert torch.equal(own, whole.maximum)
            assert (others == -torch.inf).all()
            each.max_logits.reset()
            each.max_logits.update(whole.maximum)
            assert torch.equal(each.max_logits.bound.view(2, 2)[rank], whole.maximum)
            assert (each.max_logits.bound.view(2, 2)[1 - rank] == -torch.inf).all()
        of_all = [DTensor.from_local(each, mesh, [Shard(1)], run_check=False) for each in (q, k)]
        for seen in ((q, k), of_all, [each.flatten(0, 1) for each in (q, k)]):
            layer.max_logits.reset()
            take_in(AttentionCall(KERNEL, list, *seen, v), layer.max_logits, None)
            torch.testing.assert_close(layer.max_logits.maximum.view(2, 2)[rank], whole.maximum)
            assert (layer.max_logits.maximum.view(2, 2)[1 - rank] == -torch.inf).all()
        with pytest.raises(ValueError, match=r"called with 3 query heads.*this rank has all rows of the heads \["):
            layer.max_logits.first_of(3)


def test_errors_say_which_weight_and_what_to_do():
    for mesh in Ranks((2,)):
        layer = TinyAttention("mha")
        layer.q.weight = nn.Parameter(DTensor.from_local(torch.randn(24, 10), mesh, [Partial()]))
        with pytest.raises(ValueError, match=r"query: weight of Linear is placed as \(Partial.*Redistribute it"):
            layer.qk_projection()
        layer = TinyAttention("mha")
        projection = layer.qk_projection()
        rows = projection.query[0]
        layer.q.weight = nn.Parameter(DTensor.from_local(torch.randn(24, 10), mesh, [Partial()]))
        with pytest.raises(ValueError, match="weight of Linear is placed as"):
            scale_heads(rows, layer.q.weight, 0, torch.full((4,), 0.5))
        on(mesh, layer.q, Replicate(), ["bias"])
        assert rows.of(layer.q.bias, 0).shape == (4, 6)
        on(mesh, layer.k, Shard(0))
        with pytest.raises(ValueError, match="has its 24 rows on several ranks"):
            projection.key[0].of(layer.k.weight, 0)
    with pytest.raises(ValueError, match=r"counts 4 heads, but q .* has 2 query heads.*build QKClip\(model\)"):
        attention(*(torch.randn(1, 2, 3, 4) for _ in range(3)), max_logits=MaxLogits(4))
    layer = TinyAttention("mha")
    layer.qk_projection()
    with pytest.raises(ValueError, match="is not a DTensor, which would say which"):
        layer.max_logits.first_of(2)


def test_copies_know_their_own_queries():
    model = TinyModel()
    optimizer = MuonClip(model)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    again, again_optimizer = pickle.loads(pickle.dumps((model, [*optimizer.qk_clip.projections.values()])))
    for copied, projections in ((twin, twin_optimizer.qk_clip.projections.values()), (again, again_optimizer)):
        for layer, projection in zip(copied.layers, projections, strict=True):
            assert projection.max_logits is layer.max_logits
            assert layer.max_logits.query_heads.module() is layer.q
    assert model.layers[0].max_logits.query_heads.module() is model.layers[0].q
    del model.layers[0].q  # it is held weakly
    assert isinstance(twin.layers[0].max_logits.query_heads, QueryHeads)


def test_the_group_is_that_of_the_largest_mesh():
    for mesh in Ranks((2, 2)):
        weights = [torch.randn(4, 4)]
        assert ClipRanks().group(weights, {}) is dist.group.WORLD
        first, second = mesh.mesh_dim_names
        for part in (mesh[second], mesh):
            weights.append(distribute_tensor(torch.randn(4, 4), part, [Shard(0)] * part.ndim, src_data_rank=None))
            group = ClipRanks().group(weights, {})
            assert dist.get_process_group_ranks(group) == sorted(part.mesh.flatten().tolist())
        given = dist.new_group([0, 1, 2, 3])
        assert ClipRanks(given).group(weights, {}) is given
        assert ClipRanks(dist.new_group([dist.get_rank()])).group(weights, {}) is None
        across = [
            distribute_tensor(torch.randn(4, 4), mesh[name], [Shard(0)], src_data_rank=None) for name in (first, second)
        ]
        with pytest.raises(ValueError, match="process_group="):
            ClipRanks().group(across, {})
        with pytest.raises(ValueError, match="process_group="):
            ClipRanks(replicas=mesh.get_group(first)).group(across[1:], {})
        ranks = copy.deepcopy(ClipRanks(given))
        assert ranks.group(weights, {}) is given
        assert pickle.loads(pickle.dumps(ranks)).group([], {}) is dist.group.WORLD
    with pytest.raises(TypeError, match=r"process_group=3 is a int; give a process group, or None"):
        QKClip(TinyModel(), process_group=3)
    assert ClipRanks().group([], {}) is None


class Watched(nn.Module):
    """A block that notes, wherever it runs, how many bytes the matrices of its whole model take: `held`, the most in a
    copy of it."""

    held: ClassVar[list[int]] = []

    def __init__(self, root):
        super().__init__()
        self.qkv, self.out, self.up = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 40)
        self.down = nn.Parameter(torch.randn(40, 24) / 6)
        self.root = [root]  # not a child of it

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.up(x).relu() @ self.down
        weights = [p.untyped_storage() for p in self.root[0].parameters() if p.ndim > 1 and not isinstance(p, DTensor)]
        Watched.held.append(sum({each.data_ptr(): each.nbytes() for each in weights}.values()))
        return x


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.blocks = nn.ModuleList(Watched(self) for _ in range(24))
        self.head = nn.Linear(24, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


BYTES_OF_A_BLOCK = 4 * 24 * (72 + 24 + 40 + 40)


@pytest.mark.parametrize("by", ["fully_shard", "tensor parallelism"])
def test_a_sharded_model_is_copied_and_tried_block_by_block(by):
    tokens = torch.randint(30, (2, 5))
    rows = {name: each.query[0].rows("cpu") for name, each in QKClip(Deep(), example_inputs=tokens).projections.items()}
    Watched.held.clear()
    for mesh in Ranks((2,)):
        model = Deep()
        if by == "fully_shard":
            for each in (*model.blocks, model):
                fully_shard(each, mesh=mesh)
        else:
            for block in model.blocks:
                for each in (block.qkv, block.out, block.up):
                    on(mesh, each, Shard(0))
                on(mesh, block, Shard(0), ["down"])
        clip = QKClip(model, example_inputs=tokens)
        assert clip.projections.keys() == rows.keys()
        assert all(torch.equal(each.query[0].rows("cpu"), rows[name]) for name, each in clip.projections.items())
        assert {each.kind for each in clip.projections.values()} == {"mha"}
        clip.remove()
    # The queries and keys that are tried are whole at once where nothing says that a block's weights are its own.
    most = 2.5 if by == "fully_shard" else 12.5
    assert 0 < max(Watched.held) < most * BYTES_OF_A_BLOCK
    assert len(Watched.held) >= 2 * 3 * 24  # ranks, runs, blocks


@pytest.mark.parametrize("by", ["fully_shard", "tensor parallelism"])
def test_a_sharded_block_is_proven_by_its_weights_and_not_by_stand_ins_that_stay_as_they_are(by):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 24, bias=False) for _ in range(3))

        def forward(self, x):
            q, k, v = (each(x).unflatten(-1, (-1, 6)).transpose(1, 2) for each in (self.q, self.k, self.v))
            return nn.functional.scaled_dot_product_attention(q, k, v) * q.sigmoid()

    x = torch.randn(2, 5, 12)
    for mesh in Ranks((2,)):
        model = nn.Sequential(Gated(), nn.Flatten(1, 2), nn.Linear(6, 12), Gated())
        if by == "fully_shard":
            for each in (model[0], model[3], model):
                fully_shard(each, mesh=mesh)
        else:
            for each in (model[0].q, model[0].k, model[3].k):
                on(mesh, each, Shard(0), ["weight"])
        clip = QKClip(model, example_inputs=x)
        assert [each.fixed for each in clip.projections.values()] == [("query",)] * 2
        clip.remove()


def test_weights_of_a_part_that_are_used_elsewhere_are_told_by_their_rows():
    class Borrowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lent = nn.ModuleList([nn.ModuleDict({name: nn.Linear(24, 24, bias=False) for name in "qk"})])

        def forward(self, x):
            q, k = (nn.functional.linear(x, self.lent[0][name].weight) for name in "qk")
            q, k = (each.unflatten(-1, (-1, 6)).transpose(1, 2) for each in (q, k))
            return nn.functional.scaled_dot_product_attention(q, k, x[:, None, :, :6].expand_as(q))

    x, rows = torch.randn(2, 5, 24), torch.arange(24).view(4, 6)
    for mesh in Ranks((2,)):
        model = Borrowing()
        for each in model.lent[0].values():
            on(mesh, each, Shard(0), ["weight"])
        (found,) = QKClip(model, example_inputs=x).projections.values()
        assert all(torch.equal(each.rows("cpu"), rows) for each in (*found.query, *found.key))
        assert found.kind == "mha"


def test_a_model_sharded_on_meta_is_filled_behind_its_optimizer():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = nn.Sequential(ByFunctional(), nn.Flatten(1, 2), nn.Linear(6, 2), nn.Tanh())
        for each in (model[0], model):
            fully_shard(each)
        optimizer = MuonClip(model, lr=1e-3, tau=1e-3)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().copy_(torch.randn(parameter.shape))
        before = [parameter.to_local().clone() for parameter in model.parameters()]
        model(torch.randn(2, 5, 12)).square().sum().backward()
        with pytest.warns(UserWarning, match=r"2\.weight \(output head"):  # which no forward on meta could show
            optimizer.step()
        assert optimizer.qk_clip.report().clipped_heads == 4
        assert not any(torch.equal(a, b.to_local()) for a, b in zip(before, model.parameters(), strict=True))
    finally:
        dist.destroy_process_group()


class ByAnotherName(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(12, 24, bias=False), nn.Linear(12, 24, bias=False)

    def forward(self, x):
        q, k = (each(x).unflatten(-1, (-1, 6)).transpose(1, 2) for each in (self.q, self.k))
        return attend_by_another_name(q, k, k)


class ByFunctional(ByAnotherName):
    def forward(self, x):
        q, k = (each(x).unflatten(-1, (-1, 6)).transpose(1, 2) for each in (self.q, self.k))
        return nn.functional.scaled_dot_product_attention(q, k, k)


def test_a_function_imported_by_name_is_observed_after_fully_shard():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = fully_shard(nn.Sequential(fully_shard(ByAnotherName())))
        clip = QKClip(model, example_inputs=torch.randn(2, 5, 12), observe="always")
        model(torch.randn(2, 5, 12))
        assert clip.projections["0"].max_logits.observed == 1
        clip.remove()
    finally:
        dist.destroy_process_group()
    assert attend_by_another_name is nn.functional.scaled_dot_product_attention


def test_the_group_is_that_of_ddp_around_a_forward():
    for mesh in Ranks((2, 2)):
        model = ByAnotherName()
        clip = QKClip(model)
        assert clip._group() is dist.group.WORLD
        replicas = mesh.get_group(1)
        DistributedDataParallel(model, process_group=replicas)(torch.randn(2, 5, 12))
        for each in (clip, copy.deepcopy(clip)):
            assert each._group() is replicas
            each.remove()


def ring(mesh):
    return context_parallel(mesh, buffers=[torch.zeros(8, 12)], buffer_seq_dims=[0])


def own_kernel(*args, **kwargs):
    return attend_by_another_name(*args, **kwargs)


@pytest.mark.parametrize("standing", [attend_by_another_name, own_kernel])
def test_a_clip_does_not_keep_context_parallelism_from_its_place(standing, no_other_patches, monkeypatch):
    """Torch replaces attention under the name that the function there has."""
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", standing)
    if standing is own_kernel:
        monkeypatch.setattr(own_kernel, "__name__", "scaled_dot_product_attention")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = DeviceMesh("cpu", range(2))
        model = ByFunctional()
        clip = QKClip(model, example_inputs=torch.randn(2, 6, 12))
        door = nn.functional.scaled_dot_product_attention
        with ring(mesh), pytest.raises(ValueError, match="saw none of the steps"):  # torch has no ring for the CPU
            model(torch.randn(2, 6, 12))
        assert nn.functional.scaled_dot_product_attention is door
        with ring(mesh):
            clip.remove()
        again = QKClip(ByAnotherName())
        assert nn.functional.scaled_dot_product_attention is door  # put back, and not twice in each other
        again.remove()
    finally:
        dist.destroy_process_group()


def test_the_first_run_of_a_pipeline_s_stage_is_not_observed(no_other_patches):
    original = PipelineStage._compute_outputs
    declared, found = TinyModel(), ByAnotherName()
    clips = [QKClip(model, observe="always") for model in (declared, found)]
    assert PipelineStage._compute_outputs is not original
    PipelineStage._compute_outputs(None, torch.zeros(2, 5, dtype=torch.int64), module=declared)
    PipelineStage._compute_outputs(None, torch.full((2, 5, 12), torch.nan), module=found)
    for clip in clips:
        assert clip.projections
        assert not any(each.max_logits.observed for each in clip.projections.values())
        clip.remove()
    assert PipelineStage._compute_outputs is original


# On ranks


def ranks_of(world, folder):
    run_ranks(world, WORKER, folder)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """Scenario → what each rank saw."""
    return ranks_of(request.param, tmp_path_factory.mktemp("sharded_clip"))


@pytest.mark.slow
@pytest.mark.xdist_group("sharded_clip")
class TestOnRanks:
    def test_shards_are_clipped_as_the_whole_model_is(self, results):
        steps = {name: ranks for name, ranks in results.items() if "beyond tau" in ranks[0]}
        assert len(steps) > 15
        for name, ranks in steps.items():
            for each in ranks:
                assert 0 < each["clipped"] < each["heads"], name
                assert each["error"] < 1e-9, name
                assert each["seen"] < 1e-6, name
                assert each["beyond tau"] < 1e-5, name
                assert each["untouched"], name

    def test_one_collective_and_nothing_else(self, results):
        for name, ranks in results.items():
            for each in ranks:
                if "beyond tau" in each:
                    assert each["calls"] == ["allreduce_"], name
                    assert each["bytes"] == each["expected bytes"], name
                    assert each["calls before the first step"] == ["allreduce_"], name
                    assert each["bytes before the first step"] <= 32, name

    def test_replicas_stay_the_same_to_the_bit_while_the_clip_fires(self, results):
        runs = {name: ranks for name, ranks in results.items() if name.startswith("50 steps")}
        assert len(runs) == 4
        shared = 0
        for name, ranks in runs.items():
            digests = {}
            assert len({each["fired"] for each in ranks}) == 1, name
            assert ranks[0]["fired"] > 20, name
            for each in ranks:
                for parameter, digest in each["digests"].items():
                    shared += parameter in digests
                    assert digests.setdefault(parameter, digest) == digest, f"{name}: {parameter}"
        assert shared

    def test_a_rank_that_saw_nothing_takes_part(self, results):
        first, *others = results["only_one_rank_observes"]
        assert first["clipped"]
        assert first["error"] < 1e-9
        assert all(each == first for each in others)

    def test_what_is_wrong_on_one_rank_is_raised_on_all(self, results):
        *others, last = results["a_rank_in_trouble"]
        for each in (*others, last):
            assert "non-finite attention logits in layers.0" in each["non-finite"]
            assert each["skipped step"] == each["seen elsewhere"] == "no error"
        assert "attention was called 1 times" in last["unknown attention"]
        assert all("on another rank attention was called" in each["unknown attention"] for each in others)

    def test_a_gradient_on_one_rank_counts_for_all(self, results):
        for each in results["gradients_on_one_rank"]:
            assert each["nobody"] == "no error"
            assert "observed no forward of layers.1" in each["the last rank"]

    def test_all_ranks_know_alike_whether_there_is_something_to_do(self, results):
        assert all(each == {"before": True, "after": False} for each in results["idle"])

    @pytest.mark.parametrize("how", ["", ", ddp", ", given"])
    def test_pipeline_stages_do_not_wait_for_each_other(self, results, how):
        ranks = results["stages" + how]
        half = len(ranks) // 2
        assert [each["layers"] for each in ranks] == [1] * half + [2] * half
        assert [each["steps"] for each in ranks] == [1] * half + [4] * half
        assert all(each["seen"] == ranks[0]["seen"] for each in ranks[:half])
        assert all(each["seen"] == ranks[-1]["seen"] for each in ranks[half:])

    def test_attentions_are_found_and_checked_in_the_first_forward(self, results):
        for each in results["found_in_the_first_forward"]:
            assert len(each) >= 6
            for name, run in each.items():
                assert run["found"] == ["layers.0", "layers.1"], name
                assert run["clipped"], name
                assert run["error"] < 1e-9, name

    def test_stages_under_torch_s_schedule_are_clipped_each_by_its_own_maxima(self, results):
        pipelines = {name: ranks for name, ranks in results.items() if name.startswith("pipeline")}
        assert pipelines
        for name, ranks in pipelines.items():
            for each in ranks:
                assert any(each["clipped"]), name
                assert each["error"] < 1e-7, name
                for norm, expected in each["norms"]:
                    assert norm == pytest.approx(expected, rel=1e-6), name
                    assert norm > 0.1

    def test_sequence_parallelism_trains_as_one_process(self, results):
        for each in results["sequence_parallel"]:
            assert all(ours == expected for ours, expected in each["clipped"])
            assert any(ours for ours, _ in each["clipped"])
            assert each["error"] < 1e-7
            for norm, expected in each["norms"]:
                assert norm == pytest.approx(expected, rel=1e-6)
                assert norm > 0.5

    def test_parts_of_sequences_give_the_maxima_of_whole_ones(self, results):
        ranks = results["context_parallel"]
        assert any(each["lower alone"] for each in ranks)
        for each in ranks:
            assert each["length"] == 256
            assert each["clipped"]
            assert each["seen"] < 1e-6
            assert each["error"] < 1e-9

    def test_attention_takes_dtensors(self, results):
        for each in results["attention_of_dtensors"]:
            for groups in ("4", "1"):
                assert each[groups]["maxima"] < 1e-6
                assert max(each[groups]["output"], each[groups]["gradients"]) < 1e-9
            assert "keys or values placed as (Replicate(),)" in each["message"]

    def test_a_model_of_transformers_is_found_before_and_after_it_is_sharded(self, results):
        if "llama" not in results:
            return  # at two ranks only
        for each in results["llama"]:
            assert each["calls"] == [], "nothing is gathered to find it"
            for order in ("before", "after"):
                run = each[order]
                assert run["found"] == {f"model.layers.{i}.self_attn": "gqa" for i in (0, 1)}
                assert run["clipped"]
                assert run["error"] < 1e-9

    def test_meshes_that_do_not_say_who_belongs_together_are_refused(self, results):
        if "ambiguous_meshes" not in results:
            return  # at four ranks only
        assert all("process_group=" in each["message"] for each in results["ambiguous_meshes"])
