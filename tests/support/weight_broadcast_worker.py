"""One rank of the test of weights on their way to ranks that infer: `weight_broadcast_worker.py`.

Ranks 0 and 1 train under FSDP2 with MuonClip, ranks 2 and 3 infer. What is sent is compared with weights that the
trainers put together and send whole, by other functions.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.execution.weight_broadcast import WeightBroadcast
from benchmarks.studies.weight_broadcast import TRAINERS, differing, model_of, train, weights_of
from muonclip.models import MoEConfig
from muonclip.torch import MuonClip

CHUNK = 20_000  # less than most weights have


class Watched(TorchDispatchMode):
    """Notes what is broadcast, and the largest storage that an operation makes."""

    def __init__(self):
        super().__init__()
        self.sent, self.sources, self.largest = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "broadcast" in func._schema.name:
            self.sent.append(args[0][0].nbytes)
            self.sources.append(args[0][0].device.type)
        elif func._schema.name.startswith(("aten::empty", "aten::new_", "aten::clone", "aten::_to_copy", "aten::cat")):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def from_first(whole):
    """Give every rank what the first one has."""
    held = [whole]
    dist.broadcast_object_list(held, src=0)
    return held[0]


torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = model_of(rank, MoEConfig.cpu(num_layers=2))
optimizer = MuonClip(model, 1e-2, tau=1e-3) if rank in TRAINERS else None
send = WeightBroadcast(weights_of(model), TRAINERS, CHUNK)
number = sum(weight.numel() for weight in weights_of(model).values())
assert differing(model)
for step in range(2):
    if optimizer is not None:
        train(model, optimizer, step)
        assert optimizer.qk_clip.report().clipped_heads
    with Watched() as watched:
        send(weights_of(model))
    assert max(watched.sent) <= watched.largest <= CHUNK
    if rank not in TRAINERS:
        assert 4 * number <= sum(watched.sent) <= 4 * number + 16 * len(weights_of(model)) * 2
    whole = {
        name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in weights_of(model).items()
    }
    for name, expected in from_first(whole).items():
        assert torch.equal(whole[name], expected), name
    assert differing(model) == []

# An odd number of entries in bfloat16 before float32, which begins where it can be read; not replicated twice: both
# trainers have all of these.
mine = {
    "half": torch.arange(6003.0).view(3, 2001).bfloat16(),
    "scalar": torch.tensor(3.0 + rank // 2),
    "whole": torch.arange(2400.0).view(40, 60) + 0.125,
}
if rank not in TRAINERS:
    mine["whole"] = torch.zeros(40, 60, dtype=torch.bfloat16)
    mine["half"] = torch.zeros(3, 2001)
expected = from_first(mine)
with Watched() as watched:
    WeightBroadcast(mine, TRAINERS, 512)(mine)
if rank not in TRAINERS:
    for name, tensor in mine.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert sum(watched.sent) < 4 * 6003 + 4 + 2 * 2400 + 16 * 60

for chunk, changed, words in (
    (8, {}, "chunk_bytes=8 must be at least 16"),
    (
        512,
        {"whole": torch.zeros(40, 61)},
        r"whole has shape \(40, 61\), and shape \(40, 60\) on the trainers, on rank 2",
    ),
    (512, {"more": torch.zeros(4)}, "more has shape .4,., and no weight on the trainers, on rank 2"),
):
    with pytest.raises(ValueError, match=words):
        WeightBroadcast(mine | (changed if rank == 2 else {}), TRAINERS, chunk)
with pytest.raises(ValueError, match="the dtypes on rank 3 are not those on rank 2"):
    WeightBroadcast(mine | ({"whole": torch.zeros(40, 60)} if rank == 3 else {}), TRAINERS, 512)
dist.barrier()
dist.destroy_process_group()
