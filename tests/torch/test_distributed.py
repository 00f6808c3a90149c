"""Who owns which matrix, which bytes move, and that the result is the single process' one."""

import json
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from muonclip.core import MatrixLayout
from muonclip.torch.distributed import Mesh, NewtonSchulzConfig, PlacedParameter, plan
from muonclip.torch.mesh.index_ranges import local_indices
from muonclip.torch.update.matrix_shards import matrix_shards
from muonclip.torch.update.matrix_views import editing, local_matrices

WORKER = Path(__file__).parents[1] / "support" / "update_worker.py"
FP32 = NewtonSchulzConfig(torch.float32, "jordan", None)
PLAIN, EXPERTS = MatrixLayout(), MatrixLayout(batch_ndim=1)
S0, S1 = Shard(0), Shard(1)


def mesh(*shape):
    return Mesh(shape, tuple(range(torch.Size(shape).numel())), tuple("abc"[: len(shape)]))


def placed(*shapes, mesh, placements, layout=PLAIN, iteration=FP32):
    return [PlacedParameter(f"w{i}", shape, layout, iteration, mesh, placements) for i, shape in enumerate(shapes)]


# Where matrices lie

LAYOUTS = [
    ((12, 10), PLAIN),
    ((10, 12), MatrixLayout(transposed=True, blocks=(6, 3, 3))),
    ((4, 6, 5), EXPERTS),
    ((4, 6, 8), MatrixLayout(1, blocks=(3, 3))),
    ((12, 5), MatrixLayout(blocks=(2, 1, 1), repeats=3)),
    ((12, 5), MatrixLayout(blocks=(2, 1, 1), heads=(3, 1, 1), repeats=3)),
    ((16, 5), MatrixLayout(heads=(4,))),
    ((3, 8, 5), MatrixLayout(1, heads=(4,))),
    ((6, 4, 3, 2), PLAIN),
    ((2, 3, 4, 6), MatrixLayout(batch_ndim=2)),
    ((5, 2, 6), MatrixLayout(transposed=True)),
    ((3, 2, 4, 5), MatrixLayout(1, heads=(2,), out_ndim=2)),
    ((4, 3, 2, 5), MatrixLayout(blocks=(2, 2, 2), repeats=4, out_ndim=3)),
]


@given(st.data())
def test_every_entry_of_every_matrix_is_found_where_it_lies(data):
    """Against indices: each rank's tensor holds the numbers of its entries."""
    shape, layout = data.draw(st.sampled_from(LAYOUTS))
    mesh_shape = data.draw(st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3), (2, 2, 2)]))
    axis = st.integers(0, len(shape) - 1)
    one = st.one_of(
        st.just(Replicate()), st.builds(Shard, axis), st.builds(lambda d: _StridedShard(d, split_factor=2), axis)
    )
    placements = tuple(data.draw(one) for _ in mesh_shape)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    matrices = layout.split(numbers, xp=torch)
    seen = [torch.zeros(block.shape, dtype=torch.int64) for block in matrices]
    copies = 1
    for size, placement in zip(mesh_shape, placements, strict=True):
        copies *= size if isinstance(placement, Replicate) else 1
    heads_of = layout.heads or (1,) * len(matrices)
    for coordinate in torch.cartesian_prod(*map(torch.arange, mesh_shape)).view(-1, len(mesh_shape)).tolist():
        local = numbers
        for dim, size in enumerate(shape):
            runs = local_indices(size, dim, placements, mesh_shape, coordinate)
            index = [i for start, stop in runs for i in range(start, stop)]
            local = local.index_select(dim, torch.tensor(index, dtype=torch.int64))
        for slab in matrix_shards(shape, layout, placements, mesh_shape):
            if any(coordinate[dim] != at for dim, at in slab.fixed):
                continue
            position = 0
            for dim in slab.active:
                position = position * mesh_shape[dim] + coordinate[dim]
            held = local_matrices(local, layout, slab, position)
            rows = [i for start, stop in slab.rows[position] for i in range(start, stop)]
            columns = [i for start, stop in slab.columns[position] for i in range(start, stop)]
            batches = [i for start, stop in slab.batches for i in range(start, stop)]
            which = [batch * heads_of[slab.block] + head for batch in batches for head in slab.heads]
            assert len(which) == slab.count
            expected = matrices[slab.block][which][:, rows][:, :, columns]
            assert torch.equal(held, expected)
            for matrix in which:
                seen[slab.block][matrix].view(-1)[_places(rows, columns, slab.fan_in)] += 1
            changed = local.clone()
            with editing(changed, layout, slab, position) as stack:
                stack.neg_()
            assert torch.equal(local_matrices(changed, layout, slab, position), -expected)
            assert (changed != local).sum() <= expected.numel()
    for block in seen:
        assert (block == copies).all()


def _places(rows, columns, fan_in):
    return (
        torch.tensor(rows, dtype=torch.int64)[:, None] * fan_in + torch.tensor(columns, dtype=torch.int64)
    ).flatten()


# The plan


def test_work_and_bytes_are_even_where_the_ranks_divide_the_bucket():
    shapes = [shape for shape in ((64, 64), (32, 96), (96, 32)) for _ in range(16)]
    decided = plan(placed(*shapes, mesh=mesh(8), placements=(S0,)))
    flops, sent = decided.flops(), decided.sent()
    assert max(flops.values()) == min(flops.values())
    elements = sum(m * n for m, n in shapes)
    for by_rank in sent.values():
        assert set(by_rank.values()) == {elements * 7 // 8 * 4 // 8}
    assert sorted(sent) == ["all-to-all back", "all-to-all to owners"]
    owners = decided.owners()
    assert all(sum((rank,) in ranks for ranks in owners.values()) == 6 for rank in range(8))


def test_what_is_left_over_goes_to_those_with_the_least_to_do():
    decided = plan(placed(*[(256, 256)] * 3, *[(128, 128)] * 5, mesh=mesh(4), placements=(S0,)))
    owned = {rank: [name for name, ranks in decided.owners().items() if (rank,) in ranks] for rank in range(4)}
    flops = decided.flops()
    assert sorted(map(len, owned.values())) == [2, 2, 2, 2]
    assert flops[3] < flops[0] == flops[1] == flops[2]


@given(
    st.lists(st.sampled_from([(8, 8), (6, 10), (10, 6), (3, 40)]), min_size=1, max_size=30),
    st.sampled_from(
        [((4,), (S0,)), ((4,), (S1,)), ((2, 2), (Replicate(), S0)), ((2, 2), (S0, S1)), ((4,), (Replicate(),))]
    ),
    st.integers(1, 3000),
)
def test_every_matrix_has_its_owner_in_every_chunking(shapes, sharding, workspace):
    mesh_shape, placements = sharding
    decided = plan(placed(*shapes, mesh=mesh(*mesh_shape), placements=placements), workspace)
    owners = decided.owners()
    assert [len(ranks) for ranks in owners.values()] == [1] * len(shapes)
    again = plan(placed(*shapes, mesh=mesh(*mesh_shape), placements=placements), workspace)
    assert again == decided
    assert all(chunk.bucket.m <= chunk.bucket.n for chunk in decided.rounds)  # of the whole matrices, not of shards
    slots = [(chunk.slot, rank) for chunk in decided.rounds for ranks in chunk.bucket.members() for rank in ranks]
    assert len(set(slots)) == len(slots)
    busiest = max(decided.flops().values())
    biggest = max(FP32.flops(min(shape), max(shape)) for shape in shapes)
    assert busiest <= sum(decided.flops().values()) / 4 + 3 * biggest


def test_the_gram_matrices_are_summed_only_where_that_moves_less():
    def method(m, n, ways, **options):
        iteration = NewtonSchulzConfig(torch.float32, "jordan", None, **options)
        [chunk] = plan(placed((m, n), mesh=mesh(ways), placements=(S1,), iteration=iteration)).rounds
        by_rank = chunk.sent()
        return chunk.method, sum(sum(each.values()) for each in by_rank.values())

    assert method(8, 512, 2)[0] == "gram"
    assert method(8, 512, 16)[0] == "owner"
    assert method(8, 512, 16, form="gram")[0] == "gram"
    assert method(512, 8, 2)[0] == "owner", "the short side is cut"
    for ways in (2, 4, 8):
        chosen, moved = method(8, 512, ways)
        other = 2 * 8 * 512 * (ways - 1) / ways * 4
        assert chosen == "owner" or moved < other


def test_experts_and_heads_that_lie_whole_on_a_rank_move_nothing():
    aligned = [
        *placed((64, 32, 48), mesh=mesh(8), placements=(S0,), layout=EXPERTS),
        *placed((64, 32), mesh=mesh(8), placements=(S0,), layout=MatrixLayout(heads=(16,))),
        *placed((30, 32, 48), mesh=mesh(8), placements=(S0,), layout=EXPERTS),
    ]
    decided = plan(aligned)
    assert decided.sent() == {}
    assert set(decided.owners()["w0"]) == {(rank,) for rank in range(8)}


def test_the_plan_prints():
    text = str(plan(placed(*[(64, 128)] * 9, (8, 512), mesh=mesh(2), placements=(S1,))))
    assert "9 × (64×128)" in text
    assert "to owners and back" in text
    assert "Gram matrices summed" in text
    assert "the busiest of 2 ranks" in text


def test_512_ranks_are_planned_without_processes():
    """A 1T-parameter model over 32 × 16 ranks: experts over 32, everything else over all."""
    everyone, experts = mesh(512), mesh(32, 16)
    layers = []
    for layer in range(61):
        layers += [
            PlacedParameter(f"{layer}.q_b", (12288, 1536), PLAIN, FP32, everyone, (S0,)),
            PlacedParameter(f"{layer}.kv_b", (16384, 512), PLAIN, FP32, everyone, (S0,)),
            PlacedParameter(
                f"{layer}.experts", (384, 4096, 7168), MatrixLayout(1, blocks=(2048, 2048)), FP32, experts, (S0, S1)
            ),
        ]
    decided = plan(layers)
    flops = decided.flops()
    assert len(flops) == 512
    assert max(flops.values()) <= 1.05 * sum(flops.values()) / 512
    elements = 61 * (12288 * 1536 + 16384 * 512 + 384 * 4096 * 7168)
    assert sum(sum(by_rank.values()) for by_rank in decided.sent().values()) <= 2 * elements * 4
    assert sum(map(len, decided.owners().values())) == 61 * (2 + 2 * 384)


def test_a_placement_that_is_no_shard_is_refused_by_name():
    with pytest.raises(ValueError, match=r"w0 is placed as P.*sharded or replicated"):
        plan(placed((4, 6), mesh=mesh(2), placements=(Partial(),)))


# Execution


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = {}

    def of(world):
        if world not in found:
            folder = tmp_path_factory.mktemp(f"world{world}")
            run_ranks(world, WORKER, folder)
            found[world] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
        return found[world]

    return of


WORLDS = [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
EXACT = ("fsdp, divisible", "replicated", "replicated, divisible", "aligned heads", "aligned experts", "bf16 products")


@pytest.mark.parametrize("world", WORLDS)
def test_sharded_equals_whole(results, world):
    ranks = results(world)
    for name in ranks[0]:
        error = max(rank[name]["error"] for rank in ranks)
        assert error <= 1e-13, name
        assert all(rank[name]["state"] == ranks[0][name]["state"] for rank in ranks), name
    for name in EXACT:
        assert all(rank[name]["equal"] for rank in ranks), name
    methods = {method for name in ranks[0] for method in ranks[0][name]["methods"]}
    assert methods == {"in place", "owner", "gram"}


@pytest.mark.parametrize("world", WORLDS)
def test_the_bytes_are_the_plan_s_and_at_the_floor(results, world):
    ranks = results(world)
    for name in ranks[0]:
        flags = 16 if "frozen experts" in name else 0  # which experts had a gradient
        for rank in ranks:
            assert all(0 <= sent - rank[name]["planned"] <= flags for sent in rank[name]["sent"]), name
    for name in ("fsdp, divisible", "bf16 products"):
        floor = 2 * ranks[0][name]["elements"] * (world - 1) / world * ranks[0][name]["itemsize"]
        sent = [rank[name]["sent"][-1] for rank in ranks]
        assert sum(sent) * 1.0 <= floor
        assert max(sent) <= 1.05 * sum(sent) / world
        assert ranks[0][name]["calls"] == ["alltoall_base_"]
    of = ranks[0]["replicated, divisible"]
    assert all(
        rank["replicated, divisible"]["sent"][-1] <= of["elements"] * (world - 1) / world * of["itemsize"]
        for rank in ranks
    )
    for name in ("aligned heads", "aligned experts"):
        assert all(rank[name]["sent"] == [0, 0, 0] for rank in ranks)
        assert ranks[0][name]["calls"] == []


FAKE = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from muonclip.core import MatrixLayout
from muonclip.torch import Muon
from benchmarks.studies.sent_bytes import SentBytes

dist.init_process_group("fake", store=FakeStore(), rank=137, world_size=512)
flat = init_device_mesh("cpu", (512,), mesh_dim_names=("shards",))
hybrid = init_device_mesh("cpu", (64, 8), mesh_dim_names=("replicas", "shards"))
experts = init_device_mesh("cpu", (32, 16), mesh_dim_names=("experts", "shards"))
# As many as there are ranks: the fake back end takes no all-to-all that sends nothing and receives something.
specifications = [((512, 16), flat, [Shard(0)]), ((64, 32), hybrid, [Replicate(), Shard(0)])] * 512
specifications += [((64, 128, 256), experts, [Shard(0), Shard(1)])] * 8
parameters = []
for shape, mesh, placements in specifications:
    whole = torch.empty(shape, device="meta")
    local, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    make = lambda: DTensor.from_local(torch.randn(local), mesh, placements, shape=whole.shape, stride=whole.stride())
    p = nn.Parameter(make())
    p.grad = make()
    parameters.append(p)
optimizer = Muon(parameters, ns_dtype=torch.float32)
with SentBytes(512) as counted:
    optimizer.step()
planned = sum(by_rank.get(137, 0) for by_rank in optimizer._update_plan.sent().values())
assert counted.total == planned > 0, (counted.total, planned)
print(optimizer._update_plan)
"""


def test_one_of_512_ranks_sends_what_the_plan_says(tmp_path):
    """Every collective of a step is issued, on torch's fake back end, which moves nothing: volumes, not numbers."""
    script = tmp_path / "one_of_512.py"
    script.write_text(FAKE, encoding="utf-8")
    run_ranks(1, script, prints=tmp_path)
    assert "512 × (16×512)" in (tmp_path / "rank0.txt").read_text("utf-8")
