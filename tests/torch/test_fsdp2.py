"""A model of one's own under FSDP2: mixed precision, what is made in which order, and ranks that differ."""

import json
from pathlib import Path
from typing import ClassVar

import fsdp2_worker as worker
import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from muonclip.torch import MuonClip, QKClip

WORKER = Path(worker.__file__)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.fixture
def alone():
    """One rank, whose collectives are real."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", worker.LAYOUTS)
@pytest.mark.parametrize("by_name", [False, True])
def test_the_first_forward_is_traced_in_the_dtypes_it_computes_in(alone, layout, by_name):
    seen = worker.outcome(lambda: worker.of_layout(layout, by_name=by_name))
    assert seen == {"found": ["layers.0", "layers.1"], "clipped": True, "open": [], "warned": []}


def test_a_copy_casts_as_the_policies_of_its_parts_say(alone):
    class Told(worker.Block):
        dtypes: ClassVar = []

        def forward(self, x, *, scale):
            self.dtypes.append((x.dtype, scale["by"].dtype, self.qkv.weight.dtype))
            return super().forward(x * scale["by"])

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Told(), Told()

        def forward(self, x):
            x = self.first(x, scale={"by": x.new_ones(())})
            self.dtypes.append(x.dtype)
            return self.second(x, scale={"by": x.new_ones(())})

        dtypes: ClassVar = Told.dtypes

    model = Two()
    half, single = torch.bfloat16, torch.float32
    fully_shard(model.first, mp_policy=MixedPrecisionPolicy(param_dtype=half, output_dtype=single))
    fully_shard(model.second, mp_policy=MixedPrecisionPolicy(param_dtype=half, cast_forward_inputs=True))
    fully_shard(model, mp_policy=MixedPrecisionPolicy())
    x = torch.randn(2, 5, worker.WIDTH)
    model(x)
    in_training = list(Told.dtypes)
    Told.dtypes.clear()
    QKClip(model, example_inputs=x)
    assert in_training == [(half, half, half), single, (half, half, half)]
    assert Told.dtypes[:3] == in_training


class Picky(nn.Module):
    """No copy of it runs with more than eight tokens."""

    def __init__(self):
        super().__init__()
        self.inner, self.token = worker.Model(), object()
        self.known = id(self.token)

    def forward(self, tokens):
        if tokens.shape[1] > 8 and id(self.token) != self.known:
            raise RuntimeError("not in a copy")
        return self.inner(tokens)


def test_a_forward_that_cannot_be_traced_is_said_once_and_in_the_plan():
    model = Picky()
    optimizer = MuonClip(model, lr=0.01, tau=0.05)
    model(torch.randint(30, (2, 9))).square().mean().backward()
    with pytest.warns(UserWarning, match=r"could not trace the model's forward: RuntimeError: not in a copy.*as found"):
        optimizer.step()
    model(torch.randint(30, (2, 9))).square().mean().backward()
    optimizer.step()  # without a warning
    assert "not checked in a forward of the training" in str(optimizer.plan)
    assert "read the plan again" not in str(optimizer.plan)
    optimizer.qk_clip.attentions.prove_again(["inner.layers.0"])  # which traces the next forward
    model(torch.randint(30, (2, 8))).square().mean().backward()
    assert "not checked" not in str(optimizer.plan)


def test_parameters_that_are_not_the_model_s_any_more_are_an_error(alone):
    model, optimizer = worker.before_sharding()
    model(torch.randint(30, (2, 9))).sum().backward()
    before = [each.detach().clone() for group in optimizer.param_groups for each in group["params"]]
    with pytest.raises(RuntimeError, match=r"16 of the 16 .*sharded after the optimizer was made.*then optimizer = Mu"):
        optimizer.step()
    assert all(map(torch.equal, before, (each for group in optimizer.param_groups for each in group["params"])))
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    optimizer = MuonClip(model, qk_clip=None)
    model[1] = nn.Linear(4, 4)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"2 of the 3 parameters .* '1\.weight' first.*changed after"):
        optimizer.step()


def test_the_model_of_a_clip_shows_that_parameters_are_not_its_any_more(alone):
    model = worker.Model()
    worker.fill(model)
    optimizer = MuonClip([dict(params=list(model.named_parameters()))], qk_clip=QKClip(model, tau=0.05))
    model = worker.shard(model)
    model(torch.randint(30, (2, 9))).sum().backward()
    with pytest.raises(RuntimeError, match=r"16 of the 16 parameters .*sharded after the optimizer was made"):
        optimizer.step()


def test_what_an_engine_has_put_into_the_groups_or_a_forward_has_left_whole_is_no_error(alone):
    model = nn.Linear(4, 4)
    optimizer = MuonClip(model, qk_clip=None)
    for group in optimizer.param_groups:  # full-precision copies
        group["params"][:] = [each.detach().clone().requires_grad_() for each in group["params"]]
        for each in group["params"]:
            each.grad = torch.ones_like(each)
    optimizer.step()
    model = fully_shard(nn.Linear(4, 4))
    optimizer = MuonClip(model, lr=0.1, qk_clip=None)
    model(torch.ones(2, 4)).sum().backward()
    model(torch.ones(2, 4))
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight.full_tensor(), before)


def test_what_a_forward_writes_into_whole_tensors_of_a_mesh_is_not_written_by_the_search(alone):
    class Counting(worker.Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("tokens", torch.zeros(()))

        def forward(self, x, scale):
            scale.mul_(2)
            self.tokens += x.shape[0] * x.shape[1]
            return super().forward(x * scale)

    model = Counting()
    mesh = init_device_mesh("cpu", (1,))
    model.tokens, scale = (distribute_tensor(each, mesh) for each in (model.tokens, torch.ones(())))
    fully_shard(model)
    x = torch.randn(2, 5, worker.WIDTH)
    clip = QKClip(model, example_inputs=(x, scale))
    assert clip.projections
    assert model.tokens.full_tensor() == 0
    assert scale.full_tensor() == 1


@pytest.mark.parametrize("spoil", [torch.nan, 1e30])
def test_weights_that_were_not_filled_are_suspected_first(spoil):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 24)
            self.register_buffer("turn", torch.eye(24))

        def forward(self, x):
            q, k = (each.unflatten(-1, (3, 8)).transpose(1, 2) for each in (self.q(x) @ self.turn, self.k(x)))
            return nn.functional.scaled_dot_product_attention(q, k, k)

    model = Turned()
    MuonClip(model)
    model.turn.fill_(0.5)  # rows feed several heads
    with pytest.raises(ValueError, match=r"\AQK-Clip does not understand"):
        MuonClip(model)
    model.turn.fill_(spoil)
    with pytest.raises((ValueError, RuntimeError), match=r"\AQK-Clip: turn hold no numbers"):
        MuonClip(model)
    model.turn.copy_(torch.eye(24))
    optimizer = MuonClip(model)
    with torch.no_grad():
        model.q.weight.fill_(torch.nan)
    for _ in range(2):  # nothing is left behind
        model(torch.randn(2, 5, 24)).sum().backward()
        with pytest.raises(RuntimeError, match=r"\AQK-Clip: q\.weight hold no numbers[^$]*non-finite attention logits"):
            optimizer.step()


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (dict(betas=(0.9, 0.95)), r"betas= is not an argument of MuonClip.*adamw=dict\(betas=\(0\.9, 0\.95\)\)"),
        (dict(fused=True), r"adamw=dict\(fused=True\)"),
        (dict(adamw_lr=1e-3), r"adamw=dict\(lr=0\.001\)"),
        (dict(adamw_wd=0.1), r"adamw=dict\(weight_decay=0\.1\)"),
        (dict(foreach=True), "foreach= is not an argument of MuonClip. Leave it out"),
        (dict(max_norm=1.0), "unexpected keyword argument 'max_norm'"),
    ],
)
def test_arguments_of_other_optimizers_get_a_hint(given, instead):
    with pytest.raises(TypeError, match=instead):
        MuonClip(worker.Model(), lr=0.01, **given)


def test_tau_is_said_once():
    model = worker.Model()
    with pytest.raises(ValueError, match=r"tau=2\.0 has nothing to clip where qk_clip=None"):
        MuonClip(model, tau=2.0, qk_clip=None)
    with pytest.raises(ValueError, match=r"tau=2\.0 .* own tau is 3"):
        MuonClip(model, tau=2.0, qk_clip=QKClip(model, tau=3.0))
    assert MuonClip(model, qk_clip=QKClip(model, tau=3.0)).qk_clip.tau == 3
    assert MuonClip(model, tau=3.0, qk_clip=QKClip(model, tau=3.0)).qk_clip.tau == 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks saw, by scenario."""
    folder = tmp_path_factory.mktemp("fsdp2")
    run_ranks(2, WORKER, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.xdist_group("fsdp2")
class TestOnTwoRanks:
    @pytest.mark.parametrize("order", ["", ", not guessed", ", before filling", ", before sharding on meta"])
    @pytest.mark.parametrize("layout", worker.LAYOUTS)
    def test_attention_is_found_and_checked_on_every_layout(self, ranks, layout, order):
        for each in ranks:
            seen = each[layout + order]
            assert seen == {"found": ["layers.0", "layers.1"], "clipped": True, "open": [], "warned": []}

    @pytest.mark.parametrize("name", ["compiled", "float32", "tau lowered by all"])
    def test_neither_compiled_blocks_nor_what_all_ranks_change_is_in_the_way(self, ranks, name):
        for each in ranks:
            assert each[name] == {"found": ["layers.0", "layers.1"], "clipped": True, "open": [], "warned": []}

    def test_a_model_sharded_too_late_is_an_error_on_every_rank(self, ranks):
        for each in ranks:
            assert "16 of the 16 parameters" in each["before sharding"]["error"]

    def test_unfilled_weights_are_suspected_first(self, ranks):
        for each in ranks:
            assert " hold no numbers that a model could have" in each["never filled"]["error"].partition("\n")[0]

    @pytest.mark.parametrize(
        ("name", "differs"),
        [
            ("other heads", "  heads of layers.0: 3 on rank 0, 6 on rank 1\n  heads of layers.1: 3 on"),
            ("other tau", "  tau: 2.0 on rank 0, 3.0 on rank 1\nGive"),
            ("other rate", "  lr of param_groups[0]: 0.01 on rank 0, 0.02 on rank 1\n"),
        ],
    )
    def test_ranks_that_disagree_are_told_so(self, ranks, name, differs):
        for each in ranks:
            assert (
                f"RuntimeError: QK-Clip: the ranks that train this model together disagree:\n{differs}"
                in (each[name]["error"])
            )
