"""What ranks know apart from each other, such as which gradients are there, changes no collective of theirs."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from muonclip.core import MatrixLayout
from muonclip.torch import Muon, MuonClip, QKClip
from muonclip.torch.distributed import Mesh, NewtonSchulzConfig, PlacedParameter, clip_grad_norm_, plan

FP32 = NewtonSchulzConfig(torch.float32, "jordan", None)


@pytest.fixture(autouse=True)
def rank():
    """The first of four, on a back end that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def test_ddp_is_found_after_forwards_outside_of_it():
    model = nn.Linear(6, 5)
    optimizer = MuonClip(model, qk_clip=None)
    x = torch.randn(2, 6)
    model(x)
    copy.deepcopy(model)(x)
    pickle.loads(pickle.dumps(model))(x)
    assert optimizer._topology.position(model.weight).mesh.shape == (1,)
    replica = DistributedDataParallel(model)
    replica(x)
    assert optimizer._topology.position(model.weight).mesh.shape == (4,)
    assert not model._forward_pre_hooks


def test_a_stage_without_attention_takes_part_where_stages_compare_theirs(monkeypatch):
    gathered = []
    monkeypatch.setattr(dist, "all_gather", lambda each, own: gathered.append(own))
    with pytest.warns(UserWarning, match="nothing to clip"):
        optimizer = MuonClip(nn.Embedding(5, 4))
    for _ in range(2):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(5, 4)
        optimizer.qk_clip.before_update()
    assert len(gathered) == 1  # and not again at each step


@pytest.mark.parametrize("missing", [(), (0,), (1,), (0, 1, 2)])
def test_the_norm_of_gradients_takes_the_same_sums_on_every_rank(missing, monkeypatch):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    weights = [
        nn.Parameter(distribute_tensor(torch.ones(4, 4), part, [Shard(0)], src_data_rank=None))
        for part in (mesh["a"], mesh["b"], mesh["a"])
    ]
    for index, weight in enumerate(weights):
        if index not in missing:
            weight.grad = DTensor.from_local(torch.ones(2, 4), weight.device_mesh, [Shard(0)], run_check=False)
    groups = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: groups.append(group))
    norm = clip_grad_norm_(weights, 1.0)
    assert groups == [mesh.get_group("a"), mesh.get_group("b")]
    assert norm**2 == pytest.approx(8 * (3 - len(missing)))


def test_what_one_rank_has_alone_stands_behind_what_is_shared():
    ranks, alone = Mesh((4,), (0, 1, 2, 3), ("a",)), Mesh((1,), (0,), ("rank",))

    def slots(*own):
        shared = [PlacedParameter(f"w{n}", (n, n), MatrixLayout(), FP32, ranks, (Shard(0),)) for n in (32, 8)]
        mine = [PlacedParameter(f"e{n}", (n, n), MatrixLayout(), FP32, alone, (Replicate(),)) for n in own]
        decided = plan([*mine, *shared], workspace_bytes=4 * 16 * 16)
        return [(chunk.slot, chunk.bucket.m) for chunk in decided.rounds if chunk.bucket.active]

    assert slots() == slots(16) == slots(64, 16, 16, 16, 4)


def test_a_state_that_lies_otherwise_is_refused_before_anything_is_loaded():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = nn.Parameter(torch.randn(8, 4))
    sharded = nn.Parameter(distribute_tensor(whole.detach(), mesh["a"], [Shard(0)], src_data_rank=None))
    other = nn.Parameter(distribute_tensor(whole.detach(), mesh["b"], [Shard(0)], src_data_rank=None))
    short = nn.Parameter(torch.randn(4, 4))
    states = {}
    for parameter in (whole, sharded, other, short):
        parameter.grad = torch.ones_like(parameter)
        optimizer = Muon([parameter], lr=0.5)
        states[parameter] = optimizer.state_dict()
    for target in (whole, sharded):
        optimizer = Muon([("w", target)], lr=0.1)
        optimizer.load_state_dict(states[target])
        optimizer = Muon([("w", target)], lr=0.1)
        for parameter in {whole, sharded, other, short} - {target}:
            with pytest.raises(ValueError, match=r"momentum_buffer of w in the checkpoint is \(\(.*Nothing was loaded"):
                optimizer.load_state_dict(states[parameter])
            assert optimizer.param_groups[0]["lr"] == 0.1
            assert not optimizer.state


def test_attentions_stand_in_the_order_of_the_model_whichever_ran_first():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            q, k = (each(x).unflatten(-1, (2, 3)).transpose(1, 2) for each in (self.q, self.k))
            return nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = Attention(), Attention()

        def forward(self, x, which):
            return getattr(self, which)(x)

    model, x = Either(), torch.randn(2, 5, 6)
    clip = QKClip(model, example_inputs=(x, "image"))
    assert list(clip.projections) == ["image"]
    model(x, "text")
    model(x, "image")
    clip.step()
    assert list(clip.projections) == list(clip.report().layers) == ["text", "image"]
