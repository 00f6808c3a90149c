"""The variants of Muon against NumPy over trajectories, with the clip, through checkpoints, and what is refused."""

import numpy as np
import pytest
import torch
from tiny_attention import HEAD, HEADS, TinyModel
from torch import nn
from variants import CASES, VARIANTS, Matrix, normal

from muonclip.core.update_rule import agree
from muonclip.torch import Muon, MuonClip, QKClip

STEPS = 24


def parameters(dtype=torch.float64):
    """All cases, by name; their values are NumPy's to change, too."""
    weights = {name: normal(i, shape) for i, (name, (shape, *_)) in enumerate(CASES.items())}
    return weights, {name: nn.Parameter(torch.tensor(weight, dtype=dtype)) for name, weight in weights.items()}


def groups(named, **options):
    return [dict(params=[(name, parameter)], layout=CASES[name][1], **options) for name, parameter in named.items()]


def give_gradients(named, step):
    for i, parameter in enumerate(named.values()):
        parameter.grad = torch.tensor(normal(1000 * step + 500 + i, tuple(parameter.shape)), dtype=parameter.dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trajectory_is_numpy_s_on_every_logical_matrix(variant):
    weights, named = parameters()
    optimizer = Muon(groups(named), lr=0.05, **VARIANTS[variant])
    matrices = {
        name: [Matrix(view, lr=0.05, **VARIANTS[variant]) for view in CASES[name][2](weight)]
        for name, weight in weights.items()
    }
    for step in range(STEPS):
        give_gradients(named, step)
        optimizer.step()
        for name, own in matrices.items():
            gradients = CASES[name][2](named[name].grad.numpy())
            for matrix, gradient in zip(own, gradients, strict=True):
                matrix.step(gradient)
            np.testing.assert_allclose(named[name].detach(), weights[name], atol=1e-10, err_msg=f"{name} {step}")


@pytest.mark.parametrize("kind", ["mha", "fused_blocks"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_next_step_goes_on_from_what_the_clip_has_scaled(variant, per_head, kind):
    torch.manual_seed(0)
    model = TinyModel(kind).double()
    rate = 0.02
    optimizer = MuonClip(
        model, lr=rate, per_head=per_head, qk_clip=QKClip(model, tau=0.3), adjust_lr_fn="original", **VARIANTS[variant]
    )
    tokens = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(0))
    layer, rows = model.layers[0], HEADS * HEAD
    names = ("qkv",) if kind == "fused_blocks" else ("q", "k")
    weights = {name: getattr(layer, name).weight for name in names}
    ours = {name: weight.detach().numpy().copy() for name, weight in weights.items()}
    size = HEAD if per_head else rows
    matrices = {
        name: [Matrix(a[i : i + size], lr=rate, **VARIANTS[variant]) for i in range(0, 2 * rows // len(names), size)]
        for name, a in ours.items()
    }  # those of q and k
    clipped = 0
    for _ in range(20):
        model.loss(tokens).backward()
        gradients = {name: weight.grad.numpy().copy() for name, weight in weights.items()}
        optimizer.step()
        optimizer.zero_grad()
        gamma = optimizer.qk_clip.report().layers["layers.0"].gamma.double().numpy()
        clipped += (gamma < 1).sum()
        factors = np.tile(np.repeat(np.sqrt(gamma), HEAD), 2 // len(names)).reshape(-1, size)
        for name, own in matrices.items():
            for i, matrix in enumerate(own):
                matrix.step(gradients[name][i * size : (i + 1) * size])
                matrix.clip(factors[i])
            seen = slice(0, 2 * rows // len(names))
            np.testing.assert_allclose(weights[name].detach()[seen], ours[name][seen], rtol=1e-5, atol=1e-6)
    assert clipped > 20


def test_hyperball_holds_the_norm_of_each_logical_matrix_and_zeros_stay():
    weight = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    parameter = nn.Parameter(weight.clone())
    optimizer = Muon([parameter], lr=0.3, update="hyperball", weight_decay=0.0)
    for step in range(20):
        parameter.grad = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    torch.testing.assert_close(parameter.detach().norm(dim=(1, 2)), weight.norm(dim=(1, 2)))
    assert not parameter[1].any()
    assert not torch.allclose(parameter[0], weight[0], atol=0.1)


def test_hyperball_turns_a_matrix_by_its_rate_whatever_its_size():
    for size in (1e-6, 1.0, 1e6):
        parameter = nn.Parameter(size * torch.eye(4, 6))
        parameter.grad = 1e-4 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        Muon([parameter], lr=0.1, update="hyperball", weight_decay=0.0).step()
        start = torch.eye(4, 6).flatten()
        turned = torch.nn.functional.cosine_similarity(start, parameter.detach().flatten() / size, dim=0).acos()
        assert 0.05 < turned < 0.12


def test_cautious_decay_leaves_entries_alone_that_grow():
    weight = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    plain, cautious, without = (nn.Parameter(weight.clone()) for _ in range(3))
    for parameter, options in (
        (plain, {"weight_decay": 0.5}),
        (cautious, {"weight_decay": 0.5, "cautious_decay": True}),
        (without, {"weight_decay": 0.0}),
    ):
        parameter.grad = torch.tensor([[1.0, 2.0, -0.5], [-1.0, 0.3, 0.2]])
        Muon([parameter], lr=0.1, ns_dtype=torch.float32, **options).step()
    shrinks = without.detach().abs() < weight.abs()
    assert shrinks.any()
    assert not shrinks.all()
    assert torch.equal(cautious.detach(), torch.where(shrinks, plain, without).detach())


def test_a_decay_that_does_not_follow_the_rate_is_set_before_each_step():
    """Independent decay, as the page has it: a share of the weights, whatever the rate."""
    start = normal(0, (6, 4))
    ours, parameter = Matrix(start.copy(), lr=0.1, weight_decay=0.0), nn.Parameter(torch.tensor(start))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.1)

    def independent(optimizer, *_):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01 / group["lr"]

    optimizer.register_step_pre_hook(independent)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(STEPS):
        gradient = normal(100 + step, (6, 4))
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        schedule.step()
        ours.lr, share = 0.1 / (1 + step), 0.01 * ours.weight
        ours.step(gradient)
        ours.weight -= share
        np.testing.assert_allclose(parameter.detach(), ours.weight, atol=1e-12)


def test_signs_decide_where_a_product_would_be_zero():
    small = np.float32([1e-30, -1e-30, 0.0])
    assert agree(small, small).tolist() == [True, True, False]
    assert agree(small, -small).tolist() == [False, False, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_matrices_of_one_group_step_as_each_alone(variant):
    """Muon's own step takes plain matrices of one shape together."""
    together = [nn.Parameter(torch.tensor(normal(i, (6, 4)))) for i in range(3)]
    alone = [nn.Parameter(each.detach().clone()) for each in together]
    optimizers = [Muon(together, lr=0.1, **VARIANTS[variant])]
    optimizers += [Muon([each], lr=0.1, **VARIANTS[variant]) for each in alone]
    for step in range(2):
        for i, (one, other) in enumerate(zip(together, alone, strict=True)):
            one.grad = torch.tensor(normal(100 * step + 50 + i, (6, 4)))
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_saved_and_loaded_goes_on_to_the_bit(variant, dtype):
    def run(named, optimizer, steps):
        for step in steps:
            give_gradients(named, step)
            optimizer.step()

    (_, straight), (_, first), (_, second) = (parameters(dtype) for _ in range(3))
    run(straight, Muon(groups(straight), lr=0.05, **VARIANTS[variant]), range(6))
    before = Muon(groups(first), lr=0.05, **VARIANTS[variant])
    run(first, before, range(3))
    after = Muon(groups(second), lr=0.5)  # the options come with the state
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    run(second, after, range(3, 6))
    assert all(torch.equal(second[name], straight[name]) for name in straight)


def test_groups_have_updates_of_their_own():
    weights, named = parameters()
    variants = [*VARIANTS.values()]
    given = groups(named)
    for i, group in enumerate(given):
        group.update(variants[i % len(variants)])
    optimizer = Muon(given, lr=0.05)
    give_gradients(named, 0)
    optimizer.step()
    kept = {name: set(optimizer.state[parameter]) for name, parameter in named.items()}
    for i, name in enumerate(named):
        options = variants[i % len(variants)]
        for view, gradient in zip(CASES[name][2](weights[name]), CASES[name][2](named[name].grad.numpy()), strict=True):
            Matrix(view, lr=0.05, **options).step(gradient)
        np.testing.assert_allclose(named[name].detach(), weights[name], atol=1e-12)
        assert ("row_squares" in kept[name]) == (options.get("update") == "normuon")


def test_unused_matrices_stay_as_they_are():
    for options in VARIANTS.values():
        parameter = nn.Parameter(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)))
        optimizer = Muon([parameter], lr=0.1, freeze_unused=True, **options)
        parameter.grad = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        before = parameter.detach().clone()
        parameter.grad[1] = 0
        optimizer.step()
        assert torch.equal(parameter[1], before[1])
        assert not torch.equal(parameter[0], before[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"update": "nor-muon"}, "update='nor-muon'; use 'muon', 'normuon'"),
        ({"update": None}, "update=None; use"),
        ({"update": "muown", "cautious_decay": True}, "cautious_decay=True with update='muown'"),
        ({"update": "hyperball"}, r"weight_decay=0\.1 with update='hyperball', which holds the norm"),
        ({"update": "hyperball", "weight_decay": 0.0, "cautious_decay": True}, "cautious_decay=True with update="),
    ],
)
def test_what_does_not_exist_or_makes_no_sense_is_refused(options, said):
    parameter = nn.Parameter(torch.randn(4, 6))
    with pytest.raises(ValueError, match=said):
        Muon([parameter], **options)
    optimizer = Muon([parameter])
    with pytest.raises(ValueError, match=said):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 6))], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    parameter.grad, before = torch.randn(4, 6), parameter.detach().clone()
    with pytest.raises(ValueError, match=said):
        optimizer.step()
    assert torch.equal(parameter, before)
    with pytest.raises(TypeError, match="cautious_decay='yes' is a str"):
        Muon([parameter], cautious_decay="yes")


def test_the_plan_names_the_variant_and_the_bytes_of_its_state():
    torch.manual_seed(0)
    model = TinyModel("mha")
    plain, variant = MuonClip(model), MuonClip(model, update="normuon", momentum_dtype=torch.bfloat16)
    variant.state_dict()
    states = [variant.state[parameter] for parameter in variant.state if "row_squares" in variant.state[parameter]]
    sizes = {name: sum(each[name].nbytes for each in states) for name in ("momentum_buffer", "row_squares")}
    assert variant.plan.state_bytes == {"normuon": sizes}
    line = f"update normuon: state momentum_buffer {sizes['momentum_buffer'] / 1024:.4g} KiB, row_squares"
    assert line in str(variant.plan)
    assert "update = normuon" in str(variant.plan)
    assert "cautious_decay = False" in str(variant.plan)
    assert "state momentum_buffer" not in str(plain.plan)


def test_magnitudes_of_muown_may_pass_through_zero():
    start = normal(0, (6, 8))
    start[2] *= 0.01
    ours, parameter = start.copy(), nn.Parameter(torch.tensor(start))
    optimizer = Muon([parameter], lr=0.4, update="muown", weight_decay=0.1)
    matrix = Matrix(ours, lr=0.4, update="muown", weight_decay=0.1)
    for step in range(20):
        gradient = normal(100 + step, (6, 8))
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        matrix.step(gradient)
        np.testing.assert_allclose(parameter.detach(), ours, rtol=1e-6, atol=1e-8)
    assert (matrix.magnitude < 0).any()


def test_rows_that_begin_at_zero_stay_with_muown():
    start = torch.tensor(normal(0, (6, 8)))
    start[1] = 0
    parameter = nn.Parameter(start.clone())
    optimizer = Muon([parameter], lr=0.1, update="muown")
    for step in range(3):
        parameter.grad = torch.tensor(normal(1 + step, (6, 8)))
        optimizer.step()
        assert not parameter[1].any()
        assert parameter.isfinite().all()
    assert (parameter != start).any(1).tolist() == [True, False, True, True, True, True]
