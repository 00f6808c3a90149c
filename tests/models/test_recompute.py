"""Activations in FP8 and in host memory: what is stored, what is left on the device, and which numbers change."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from host_memory import HostMemory
from small_moe import random_tokens, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training.activation_memory import held_bytes
from muonclip.models import MoEConfig, stored_activations
from muonclip.models.parallel import Parallelism, parallelize
from muonclip.models.recompute import recompute
from muonclip.models.stored_activations import Float8Blocks
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

BOTH = {"store_activations": "float8", "offload_activations": True}
WAYS = [{}, {"store_activations": "float8"}, {"offload_activations": True}, BOTH]


class Counted(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model, how=None):
    if how is not None:
        for layer in model.layers:
            recompute(layer, **how)
    tokens, targets = random_tokens(model.config), random_tokens(model.config, seed=1)
    loss = model.loss(tokens, targets)
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


# What is stored


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300])
def test_a_block_of_128_has_its_own_scale(width):
    """Codes are those of torch's own cast of x / scale, block by block, in a plain loop."""
    x = torch.randn(3, 5, width) * torch.logspace(-6, 6, width)
    stored = Float8Blocks.from_tensor(x)
    assert stored.codes.shape == x.shape
    assert stored.scales.shape == (3, 5, -(-width // 128))
    assert stored.codes.element_size() == 1
    for row, codes, scales in zip(
        x.flatten(0, 1), stored.codes.flatten(0, 1), stored.scales.flatten(0, 1), strict=True
    ):
        for start, scale in zip(range(0, width, 128), scales, strict=True):
            block = row[start : start + 128]
            assert scale == block.abs().max() / 448
            assert torch.equal(codes[start : start + 128].float(), (block / scale).to(torch.float8_e4m3fn).float())
    back = stored.to_tensor()
    assert back.dtype == x.dtype
    if width <= 128:  # one block; 3 bits of mantissa: half a unit is 2^-4; subnormals end at 2^-10 of 448, so to say
        bound = torch.maximum(x.abs() * 2**-4, x.abs().amax(-1, keepdim=True) * 2**-10 / 448)
        assert ((back - x).abs() <= bound * (1 + 1e-6)).all()


def test_zeros_come_back_and_what_is_not_finite_stays_visible():
    x = torch.zeros(2, 256)
    x[0, 3], x[1, 200] = torch.inf, torch.nan
    back = Float8Blocks.from_tensor(x).to_tensor()
    assert back[0, :128].isnan().all()
    assert back[1, 128:].isnan().all()
    assert not back[0, 128:].any()
    assert not back[1, :128].any()


# Numbers


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_only_float8_changes_gradients_and_nothing_changes_a_loss(attention, how, dtype):
    loss, plain = gradients(small_model(attention=attention, dtype=dtype))
    again, kept = gradients(small_model(attention=attention, dtype=dtype), how)
    assert torch.equal(loss, again)
    exact = {name for name in plain if torch.equal(plain[name], kept[name])}
    if "store_activations" not in how:
        assert exact == plain.keys()
        return
    # The head's weight, the last norm's gain and what no MLP's gradient passes are exact; the rest is near.
    assert {"lm_head.weight", "norm.weight"} <= exact
    assert "layers.1.mlp.experts.gate_up_proj" not in exact
    for name in plain:
        error = (plain[name] - kept[name]).norm() / plain[name].norm()
        assert error < 0.15, (name, error)


def test_the_gradient_is_that_of_rounded_inputs():
    """In one SwiGLU: the weights' gradients are products with the rounded inputs, exactly."""
    model = small_model(dtype=torch.float32)
    recompute(model.layers[0], store_activations="float8")
    mlp = model.layers[0].mlp
    x = torch.randn(7, 40, requires_grad=True)
    y = mlp(x)
    probe = torch.randn_like(y)
    (y * probe).sum().backward()
    rounded = Float8Blocks.from_tensor(mlp.gate_up_proj(x).detach()).to_tensor().requires_grad_()
    gate, up = rounded.chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(mlp.down_proj.weight.grad, probe.T @ inner.detach())
    (inward,) = torch.autograd.grad(inner, rounded, probe @ mlp.down_proj.weight.detach())
    stored = Float8Blocks.from_tensor(x.detach()).to_tensor()
    torch.testing.assert_close(mlp.gate_up_proj.weight.grad, inward.T @ stored)
    torch.testing.assert_close(x.grad, inward @ mlp.gate_up_proj.weight.detach())


def test_up_projections_are_not_repeated_and_tokens_are_routed_once():
    model = small_model(dtype=torch.float32)
    with Counted() as plain:
        gradients(small_model(dtype=torch.float32))
    with Counted() as counted:
        gradients(model, {"store_activations": "float8"})
    assert model.layers[1].mlp.router.load.sum() == 2 * 11 * 2  # without float8, tokens are counted again
    assert counted.calls["topk"] == plain.calls["topk"] == 1
    assert counted.calls["silu"] == 2 * plain.calls["silu"] == 6  # dense, shared, routed
    assert counted.calls["_grouped_mm"] == plain.calls["_grouped_mm"] + 1  # the down-projection


@pytest.mark.parametrize("how", [{}, {"offload_activations": True}], ids=str)
def test_the_clip_finds_and_scales_what_is_computed_again(how):
    """A copy of a layer, as the search for attentions makes one, computes itself and not its original."""
    trained = []
    for again in (False, True):
        model = small_model(dtype=torch.float32)
        for layer in model.layers if again else ():
            recompute(layer, **how)
        optimizer = MuonClip(model, lr=1e-2, tau=1.0)
        for seed in range(2):
            optimizer.zero_grad()
            model.loss(random_tokens(model.config, seed=seed), random_tokens(model.config, seed=9)).backward()
            optimizer.step()
        report = optimizer.qk_clip.report()
        assert report.clipped_heads > 0
        trained.append([*model.parameters(), *(layer.gamma for layer in report.layers.values())])
    assert all(map(torch.equal, *trained))


# Memory


def test_float8_and_offload_leave_less_on_the_device(monkeypatch):
    """NumPy's memory stands for the host's: what torch's allocator still holds after a forward is the device's."""
    monkeypatch.setattr(stored_activations, "save_on_cpu", HostMemory)
    tokens = torch.randint(256, (16, 65), generator=torch.Generator().manual_seed(0))
    found, grads = {}, {}
    for how in (None, *WAYS):
        torch.manual_seed(0)
        model = MoE(MoEConfig.cpu(num_layers=2))
        if how is not None:
            for layer in model.layers:
                recompute(layer, **how)
        HostMemory.bytes = 0
        found[str(how)] = held_bytes(model, tokens), HostMemory.bytes // 2  # of two forwards
        grads[str(how)] = [parameter.grad for parameter in model.parameters()]
    device = {how: bytes for how, (bytes, _) in found.items()}
    host = {how: bytes for how, (_, bytes) in found.items()}
    plain, again, float8, offload, both = device
    assert device[plain] > 1.5 * device[float8] > 1.5 * device[again]
    assert device[offload] < 0.5 * device[again]
    assert device[both] <= 1.02 * device[offload]
    assert host[plain] == host[again] == host[float8] == 0
    assert 0 < host[both] < host[offload] + device[float8]
    parameters = sum(parameter.nbytes for parameter in MoE(MoEConfig.cpu(num_layers=2)).parameters())
    assert host[offload] < device[plain] + parameters  # and no parameter among it
    assert all(map(torch.equal, grads[plain], grads[offload]))
    assert all(map(torch.equal, grads[float8], grads[both]))


def test_no_parameter_is_moved(monkeypatch):
    seen = []

    class Seen(HostMemory):
        def __init__(self, pin_memory=False):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: seen.append(tensor.untyped_storage().data_ptr()) or pack(tensor)

    monkeypatch.setattr(stored_activations, "save_on_cpu", Seen)
    model = small_model(dtype=torch.float32)
    gradients(model, BOTH)
    assert len(seen) > 20
    assert not {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} & {*seen}


# Refusals


def test_another_storage_is_named():
    with pytest.raises(ValueError, match="store_activations='int8' is unknown; give 'float8'"):
        recompute(small_model().layers[0], store_activations="int8")


@pytest.mark.parametrize("options", [{"store_activations": "float8"}, {"offload_activations": True}])
def test_the_options_are_those_of_recomputation(options, one_rank):
    with pytest.raises(ValueError, match=r"_activations=.* but recompute=False. Give recompute=True"):
        parallelize(small_model(), Parallelism(), **options)
