"""One rank of `test_distributed.py`: Muon on sharded parameters, beside the same on whole ones.

Every rank makes the same whole parameters and gradients, so each can follow a single process by itself. Writes what it
saw of each scenario as JSON.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from benchmarks.studies.sent_bytes import SentBytes
from muonclip.core import MatrixLayout
from muonclip.torch import Muon

warnings.filterwarnings("error", category=FutureWarning)  # of names that torch gives up
STEPS = 3
PLAIN, EXPERTS = MatrixLayout(), MatrixLayout(batch_ndim=1)
R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


def scenarios(world):
    """name → (mesh shape, [(shape, layout, placements)], options)."""
    half = world // 2
    square, wide, tall = (32, 32), (16, 48), (48, 16)
    many = [(shape, PLAIN, (S0,)) for shape in (square, wide, tall) for _ in range(world)]
    fused = MatrixLayout(blocks=(24, 8, 8))
    heads = MatrixLayout(heads=(8,))
    interleaved = MatrixLayout(blocks=(4, 2, 2), repeats=5)
    yield "fsdp, divisible", (world,), many, {}
    yield "fsdp on columns", (world,), [(shape, PLAIN, (S1,)) for shape in (square, wide, tall)] * 3, {}
    yield (
        "fsdp, uneven rows",
        (world,),
        [((13, 40), PLAIN, (S0,)), ((40, 13), PLAIN, (S1,)), ((3, 9), PLAIN, (S0,))],
        {},
    )
    yield "fewer rows than ranks", (world,), [((2, 10), PLAIN, (S0,)), ((5, 10), PLAIN, (S0,))], {}
    yield "one matrix", (world,), [((40, 24), PLAIN, (S0,))], {}
    yield "fused, uneven", (world,), [((40, 24), fused, (S0,)), ((40, 24), interleaved, (S0,))], {}
    yield "transposed", (world,), [((24, 40), MatrixLayout(transposed=True, blocks=(24, 8, 8)), (S1,))], {}
    yield "convolution", (world,), [((8, 6, 3, 3), PLAIN, (S0,)), ((8, 6, 3, 3), PLAIN, (S1,))], {}
    yield "aligned heads", (world,), [((64, 24), heads, (S0,)), ((64, 24), heads, (S0,))], {}
    yield "aligned experts", (world,), [((8, 12, 20), EXPERTS, (S0,)), ((6, 12, 20), EXPERTS, (S0,))], {}
    yield "cut experts", (world,), [((4, 16, 24), EXPERTS, (S1,)), ((4, 16, 24), EXPERTS, (S2,))], {}
    yield "replicated", (world,), [(square, PLAIN, (R,))] * (world + 1) + [(wide, PLAIN, (R,))] * 2, {}
    yield "replicated, divisible", (world,), [(square, PLAIN, (R,))] * (2 * world), {}
    yield "long side cut", (world,), [((6, 320), PLAIN, (S1,)), ((320, 6), PLAIN, (S0,))], {}
    yield "long side cut, Gram form", (world,), [((6, 320), PLAIN, (S1,))] * 2, {"ns_form": "gram"}
    yield (
        "without Nesterov, frozen experts",
        (world,),
        [((4, 16, 24), EXPERTS, (S1,))],
        {
            "nesterov": False,
            "freeze_unused": True,
        },
    )
    yield "small workspace", (world,), many, {"workspace_bytes": 32 * 32 * 4}
    yield "hsdp", (2, half), [(square, PLAIN, (R, S0))] * 5 + [(tall, PLAIN, (R, S1))] * 3, {}
    yield "hsdp, divisible", (2, half), [(square, PLAIN, (R, S0))] * (2 * world), {}
    yield "hsdp, aligned experts", (2, half), [((8, 12, 20), EXPERTS, (R, S0))], {}
    yield (
        "fsdp and tp",
        (half, 2),
        [
            (square, PLAIN, (_StridedShard(0, split_factor=2), S0)),
            (square, PLAIN, (S0, S1)),
            ((40, 24), fused, (_StridedShard(0, split_factor=2), S0)),
            (wide, PLAIN, (S1, S0)),
            ((6, 320), PLAIN, (R, S1)),
        ],
        {},
    )
    yield (
        "experts over fsdp",
        (half, 2),
        [
            ((4, 16, 24), EXPERTS, (S1, S0)),
            ((6, 16, 24), EXPERTS, (_StridedShard(0, split_factor=2), S0)),
            ((3, 16, 24), EXPERTS, (S1, S0)),
        ],
        {},
    )
    yield (
        "no gradient anywhere",
        (world,),
        [(square, PLAIN, (S0,)), (square, PLAIN, (R,)), (wide, PLAIN, (S0,))],
        {"missing": ()},
    )
    yield "no gradient here", (world,), [(square, PLAIN, (S0,)), ((8, 12, 20), EXPERTS, (S0,))], {"missing": (1,)}
    yield "bf16 products", (world,), many[:world], {"ns_dtype": torch.bfloat16}
    yield "fp16 products", (world,), many[:world], {"ns_dtype": torch.float16}


def run(world, mesh_shape, specification, options, dtype):
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("a", "b")[: len(mesh_shape)])
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, _, _ in specification]
    sharded = [
        nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements, src_data_rank=None))
        for p, (_, _, placements) in zip(whole, specification, strict=True)
    ]
    layouts = [layout for _, layout, _ in specification]
    options = dict(options)
    missing = options.pop("missing", None)  # from step 1 on, of the first two; on these ranks, () means all
    make = lambda parameters: Muon([{"params": parameters, "layout": layouts}], lr=0.1, **options)  # noqa: E731
    alone, ours = make(whole), make(sharded)
    counts = []
    for step in range(STEPS):
        for index, (p, q) in enumerate(zip(whole, sharded, strict=True)):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + index), dtype=dtype)
            if options.get("freeze_unused") and step == 1:
                gradient[1] = 0
                gradient[2, 1:] = 0  # used, though most of its parts have a gradient of zero
            p.grad = gradient * 1e-6
            q.grad = distribute_tensor(p.grad, mesh, q.placements, src_data_rank=None)
            if missing == () and step and index < 2:
                p.grad = q.grad = None
            if missing and step and rank in missing:
                q.grad = None
        before = [q.detach().to_local().clone() for q in sharded]
        alone.step()
        with SentBytes(world) as counted:
            ours.step()
        counts.append(counted.total)
    errors = []
    for p, q, old in zip(whole, sharded, before, strict=True):
        expected = distribute_tensor(p.detach(), mesh, q.placements, src_data_rank=None).to_local()
        if missing:  # such a shard stays as it is; what the others do is seen by their not waiting for ever
            expected = old if rank in missing else q.detach().to_local() if q.ndim == 2 else expected
        if expected.numel():
            errors.append((q.detach().to_local() - expected).abs().max().item())
    distribution = ours._update_plan
    planned = sum(by_rank.get(rank, 0) for by_rank in distribution.sent().values())
    return {
        "error": max(errors, default=0.0),
        "equal": all(error == 0 for error in errors),
        "sent": counts,
        "planned": planned,
        "calls": sorted(set(counted.calls)),
        "itemsize": distribution.parameters[0].iteration.dtype.itemsize,
        "elements": sum(p.numel() for p in whole),
        "methods": sorted({chunk.method for chunk in distribution.rounds}),
        "state": sorted(ours.state_dict()["state"]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    results = {}
    for name, mesh_shape, specification, options in scenarios(world):
        dtype = torch.float32 if "ns_dtype" in options else torch.float64
        results[name] = run(world, mesh_shape, specification, options, dtype)
    json.dump(results, open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w"))  # noqa: SIM115
    dist.barrier()
    dist.destroy_process_group()
