"""The plan of an update is made once, and made anew when something that it depends on has changed."""

import copy

import pytest
import torch
import torch.distributed as dist
from tiny_attention import TinyModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from muonclip.torch import Muon, MuonClip
from muonclip.torch.optimizer import matrix_optimizer


@pytest.fixture
def plans(monkeypatch):
    """The names of the parameters of each plan that is made."""
    made = []
    plan = matrix_optimizer.plan_update

    def counted(placed, workspace_bytes):
        made.append([parameter.name for parameter in placed])
        return plan(placed, workspace_bytes)

    monkeypatch.setattr(matrix_optimizer, "plan_update", counted)
    return made


@pytest.fixture
def ranks():
    """The first of four, on a back end that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def weights(count=3):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(6, 4, generator=generator)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


def test_nothing_is_planned_again_while_rates_and_gradients_change(plans):
    parameters = weights()
    optimizer = Muon(parameters, lr=0.1)
    for step in range(3):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.param_groups[0]["momentum"] = 0.9
        optimizer.param_groups[0]["weight_decay"] = 0.0
        parameters[step].grad = None if step == 1 else torch.randn(6, 4)
        optimizer.state_dict()
    assert len(plans) == 1


def frozen(optimizer, parameters):
    parameters[0].requires_grad_(False).grad = None


def replaced(optimizer, parameters):
    new = nn.Parameter(torch.randn(6, 4))
    new.grad = torch.ones_like(new)
    optimizer.param_groups[0]["params"][0] = parameters[0] = new


def of_another_dtype(optimizer, parameters):
    parameters[0].grad = None
    parameters[0].data = parameters[0].data.double()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.state.pop(parameters[0])


def of_another_shape(optimizer, parameters):
    parameters[0].grad = None
    parameters[0].data = torch.randn(10, 4)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.state.pop(parameters[0])


def iterated_longer(optimizer, parameters):
    optimizer.param_groups[0]["ns_steps"] = 7


def iterated_in_bf16(optimizer, parameters):
    optimizer.param_groups[0]["ns_dtype"] = "bfloat16"


def one_more(optimizer, parameters):
    optimizer.add_param_group({"params": weights(1)})


def loaded(optimizer, parameters):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [
    frozen, replaced, of_another_dtype, of_another_shape, iterated_longer, iterated_in_bf16, one_more, loaded,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_step(change, plans):
    """Which ends where a new optimizer with that state would end."""
    parameters = weights()
    optimizer = Muon(parameters, lr=0.1, ns_dtype=torch.float32)
    optimizer.step()
    change(optimizer, parameters)
    fresh = copy.deepcopy(optimizer)
    for group, own in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        for copied, parameter in zip(group["params"], own["params"], strict=True):
            copied.grad = None if parameter.grad is None else parameter.grad.clone()
    plans.clear()
    optimizer.step(), optimizer.step()
    assert len(plans) == 1
    fresh.step(), fresh.step()
    for group, own in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        assert all(map(torch.equal, group["params"], own["params"]))


def test_a_state_that_was_taken_away_is_made_again():
    (parameter,) = weights(1)
    optimizer = Muon([parameter], lr=0.1)
    optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], torch.full((6, 4), 0.05))


def test_other_placements_are_seen(plans, ranks):
    mesh = init_device_mesh("cpu", (4,))

    def sharded(placement):
        return distribute_tensor(torch.ones(8, 4), mesh, [placement], src_data_rank=None)

    parameter = nn.Parameter(sharded(Shard(0)))
    optimizer = Muon([parameter], lr=0.1)
    parameter.grad = sharded(Shard(0))
    optimizer._refresh_plan(), optimizer._refresh_plan()
    assert len(plans) == 1
    optimizer.param_groups[0]["params"][0] = nn.Parameter(sharded(Replicate()))
    optimizer._refresh_plan()
    assert len(plans) == 2


def test_replicas_found_later_are_planned_for(plans, ranks):
    model = nn.Linear(6, 5)
    optimizer = MuonClip(model, qk_clip=None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(), optimizer.step()
    assert [each.mesh.shape for each in optimizer.plan.update_plan.parameters] == [(1,)]
    before = len(plans)
    DistributedDataParallel(model)(torch.randn(2, 6))
    optimizer.step(), optimizer.step()
    assert [each.mesh.shape for each in optimizer.plan.update_plan.parameters] == [(4,)]
    assert len(plans) == before + 1


class Fused(nn.Module):
    """An attention whose inputs cannot be guessed, so that its heads show at the first forward."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, *, x, factor):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q * factor, k, v).transpose(1, 2).flatten(2))


def test_layouts_that_the_first_forward_shows_are_planned_for_before_its_step(plans):
    torch.manual_seed(0)
    model = Fused()
    optimizer = MuonClip(model, lr=0.01)
    assert optimizer.plan.update_plan.parameters[0].layout.blocks == ()
    for _ in range(2):
        model(x=torch.randn(2, 5, 8), factor=2.0).square().sum().backward()
        optimizer.step()
    assert optimizer.plan.update_plan.parameters[0].layout.blocks == (8, 8, 8)
    assert len(plans) <= 3, "at construction, and once or twice in the first step"


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_modules_of_fsdp_give_back_their_weights_once_per_step(monkeypatch, ranks):
    torch.manual_seed(0)
    model = TinyModel("mha")
    mesh = init_device_mesh("cpu", (4,))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = MuonClip(model, lr=0.01)
    # The back end takes no all-to-all that sends nothing and receives something.
    monkeypatch.setattr(matrix_optimizer, "execute", lambda *arguments: None)
    calls = []
    reshard = FSDPModule.reshard
    monkeypatch.setattr(FSDPModule, "reshard", lambda module: calls.append(module) or reshard(module))
    for step in range(3):  # the first finds the attentions
        model.loss(torch.randint(0, 13, (2, 9))).backward()
        optimizer.qk_clip.reset()  # the back end gathers what is not there, so that no logit means anything
        for projection in optimizer.qk_clip.projections.values():
            projection.max_logits.update(torch.ones(projection.num_heads))
        calls.clear()
        optimizer.step()
        if step:
            assert sorted(map(id, calls)) == sorted(map(id, [*model.layers, model]))
