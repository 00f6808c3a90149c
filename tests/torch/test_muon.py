"""`Muon` against `torch.optim.Muon`, against a NumPy oracle, and on parameters that are not one matrix."""

import copy
import importlib
import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from svd_oracle import muon_step, svd_polynomial
from torch import nn

from muonclip.core import COEFFICIENT_SETS, MatrixLayout, orthogonalize, resolve_coefficients, update_scale
from muonclip.torch import Muon, MuonClip
from muonclip.torch.optimizer.options import MuonOptions
from muonclip.torch.update import cost_model

execute_module = importlib.import_module("muonclip.torch.update.execute")  # its package hands on the function


def parameters(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale).to(p.dtype)


def clones(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def test_a_layout_that_does_not_fit_is_refused_with_the_name_of_the_parameter():
    layer = nn.Linear(4, 6, bias=False)
    group = dict(params=list(layer.named_parameters()), layout=MatrixLayout(blocks=(4, 4)))
    with pytest.raises(ValueError, match=r"^'weight': "):
        Muon([group])


def test_every_option_of_a_group_is_an_argument():
    options = [field.name for field in fields(MuonOptions)]
    for cls in (Muon, MuonClip):
        assert not set(options) - set(inspect.signature(cls).parameters)
    given = dict(lr=2e-3, weight_decay=0.2, momentum=0.8, nesterov=False, ns_coefficients="you", eps=1e-3, ns_steps=4)
    given |= dict(adjust_lr_fn="original", ns_dtype=torch.float64, ns_form="gram", products="plain")
    given |= dict(momentum_dtype=torch.float64, freeze_unused=True, update="normuon", cautious_decay=True)
    given |= dict(master_weight_bits=24)
    assert sorted(given) == sorted(options)
    model = nn.Sequential(nn.Linear(4, 4))
    for optimizer in (Muon([model[0].weight], **given), MuonClip(model, **given, qk_clip=None)):
        assert MuonOptions.from_mapping(optimizer.param_groups[0]) == MuonOptions(
            **given | dict(ns_dtype="float64", momentum_dtype="float64")
        )


def test_has_torch_s_names_order_and_defaults():
    ours, theirs = (inspect.signature(cls).parameters for cls in (Muon, torch.optim.Muon))
    assert list(ours)[: len(theirs)] == list(theirs)
    defaults = {name: parameter.default for name, parameter in theirs.items()}
    not_given = {"eps": None, "ns_steps": None}  # may differ from what torch's own numbers do
    assert {name: ours[name].default for name in theirs} == defaults | not_given


def move(optimizer, parameter, gradient_scale):
    """How far one step with a gradient of this scale moves the parameter."""
    before = parameter.detach().clone()
    set_gradients([parameter], 0, gradient_scale)
    optimizer.step()
    return parameter.detach() - before


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-9, 1e-12])
def test_torch_s_own_numbers_given_do_what_they_do_there(scale):
    """Among them small gradients, which its floor of the norm shrinks or swallows."""
    defaults = {n: p.default for n, p in inspect.signature(torch.optim.Muon).parameters.items() if n != "params"}
    (p,), (q,) = parameters((32, 48)), parameters((32, 48))
    ours = move(Muon([p], ns_dtype=torch.bfloat16, **defaults), p, scale)
    theirs = move(torch.optim.Muon([q], **defaults), q, scale)
    assert (ours - theirs).norm() <= 0.03 * theirs.norm()


@pytest.mark.parametrize("ns_coefficients", ["jordan", "polar_express", [(2.0, -1.5, 0.5)] * 7])
def test_five_steps_given_are_five(ns_coefficients):
    options = dict(lr=1.0, weight_decay=0.0, ns_coefficients=ns_coefficients, ns_dtype=torch.float64)
    (p,), (q,) = parameters((6, 9), dtype=torch.float64), parameters((6, 9), dtype=torch.float64)
    given_ = move(Muon([p], ns_steps=5, **options), p, 1.0)
    expected = orthogonalize(p.grad, ns_coefficients, 5, xp=torch)
    torch.testing.assert_close(given_, -expected)
    own_length = move(Muon([q], **options), q, 1.0)
    assert torch.equal(own_length, given_) == (len(resolve_coefficients(ns_coefficients)) == 5)


def test_a_group_s_own_eps_is_its_floor():
    (p,), (q,) = parameters((32, 48)), parameters((32, 48))
    optimizer = Muon([dict(params=[p], eps=1e-7), dict(params=[q])], lr=1.0, weight_decay=0.0)
    set_gradients([p, q], 0, 1e-12)
    before = clones([p, q])
    optimizer.step()
    moved = [(new - old).norm().item() for new, old in zip((p, q), before, strict=True)]
    assert moved[0] < 0.1 < 1 < moved[1]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_every_step_is_torch_s_within_three_percent(nesterov, adjust_lr_fn):
    """From the same state: the same momentum to the bit, the same decay, an update within 3 % in bf16 products."""
    options = dict(lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    ours = parameters((32, 64), (96, 32), (64, 64), (128, 512))
    theirs = clones(ours)
    a, b = Muon(ours, **options, ns_dtype=torch.bfloat16), torch.optim.Muon(theirs, **options)
    for step in range(5):
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                q.copy_(p)
        set_gradients(ours, step, 10.0**-step), set_gradients(theirs, step, 10.0**-step)
        before = clones(ours)
        a.step(), b.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            assert torch.equal(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])
            update, expected = (new - old * (1 - 0.02 * 0.1) for new in (p, q))
            assert (update - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_float64_trajectory_is_the_oracle_s(name, nesterov):
    params = parameters((6, 10), (10, 6), (8, 8), dtype=torch.float64)
    optimizer = Muon(
        params, lr=0.1, weight_decay=0.3, momentum=0.9, nesterov=nesterov, ns_coefficients=name, ns_steps=None
    )
    weights = [p.detach().numpy().copy() for p in params]
    buffers = [np.zeros_like(w) for w in weights]
    for step in range(5):
        set_gradients(params, step)
        for i, p in enumerate(params):
            weights[i], buffers[i] = muon_step(
                weights[i], buffers[i], p.grad.numpy(), lr=0.1, weight_decay=0.3, mu=0.9, nesterov=nesterov,
                coefficients=resolve_coefficients(name), scale=update_scale(*p.shape, None),
            )  # fmt: skip
        optimizer.step()
        for p, w in zip(params, weights, strict=True):
            np.testing.assert_allclose(p.detach(), w, atol=1e-9)


def test_the_heavy_ball_of_the_paper_gives_the_same_update_as_torch_s_average():
    (p,) = parameters((5, 8), dtype=torch.float64)
    optimizer = Muon([p], lr=1.0, weight_decay=0.0, nesterov=False)
    heavy_ball = np.zeros((5, 8))
    for step in range(4):
        set_gradients([p], step)
        heavy_ball = 0.95 * heavy_ball + p.grad.numpy()
        before = p.detach().clone()
        optimizer.step()
        expected = -svd_polynomial(heavy_ball, resolve_coefficients("jordan"))
        np.testing.assert_allclose((p - before).detach(), expected, atol=1e-9)


@pytest.mark.parametrize(("capabilities", "dtype"), [({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_products_are_in_bf16_where_the_device_is_faster_at_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)  # torch 2.9 has none
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cost_model._multiplies_bf16_faster.cache_clear()
    assert cost_model.iteration_dtype("cpu", torch.float32, None) == dtype
    assert cost_model.iteration_dtype("cpu", torch.float64, None) == torch.float64
    assert cost_model.iteration_dtype("cpu", torch.float32, torch.float16) == torch.float16
    cost_model._multiplies_bf16_faster.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert cost_model.iteration_dtype("cpu", torch.float32, None) == torch.float32
    cost_model._multiplies_bf16_faster.cache_clear()


@given(st.permutations(range(5)), st.integers(1, 4000))
def test_batching_is_invisible(order, workspace_bytes):
    """Same-shape matrices of different parameters iterate together, in chunks of any size, in any order."""
    shapes = [(4, 6), (6, 4), (4, 6), (3, 4, 6), (5, 5)]
    alone, together = parameters(*shapes, dtype=torch.float64), parameters(*shapes, dtype=torch.float64)
    set_gradients(alone, 0), set_gradients(together, 0)
    for p in alone:
        Muon([p], lr=0.1).step()
    Muon([together[i] for i in order], lr=0.1, workspace_bytes=workspace_bytes).step()
    for p, q in zip(alone, together, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_same_shapes_share_one_iteration(monkeypatch):
    shapes = []
    iterate = execute_module.iterate
    monkeypatch.setattr(
        execute_module, "iterate", lambda x, *a, **k: shapes.append(tuple(x.shape)) or iterate(x, *a, **k)
    )
    params = parameters((4, 6), (6, 4), (3, 4, 6), (5, 5))
    set_gradients(params, 0)
    Muon(params).step()
    assert sorted(shapes) == [(5, 4, 6), (5, 5)]  # which needs no batch


LAYOUTS = {
    "experts": ((3, 4, 6), MatrixLayout(batch_ndim=1), [(i,) for i in range(3)]),
    "gate|up": ((2, 8, 6), MatrixLayout(1, blocks=(4, 4)), [(e, slice(a, a + 4)) for e in (0, 1) for a in (0, 4)]),
    "q|k|v": ((12, 6), MatrixLayout(blocks=(6, 3, 3)), [slice(0, 6), slice(6, 9), slice(9, 12)]),
    "heads": ((12, 6), MatrixLayout(heads=(3,)), [slice(0, 4), slice(4, 8), slice(8, 12)]),
    "interleaved": ((12, 6), MatrixLayout(blocks=(2, 4), repeats=2), [[0, 1, 6, 7], [2, 3, 4, 5, 8, 9, 10, 11]]),
}


@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw", 0.3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_block_is_updated_as_a_matrix_of_its_own_shape(name, adjust_lr_fn):
    shape, layout, blocks = LAYOUTS[name]
    (p,) = parameters(shape, dtype=torch.float64)
    set_gradients([p], 0)
    before, gradient = p.detach().clone(), p.grad.numpy()
    Muon([dict(params=[p], layout=layout)], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust_lr_fn).step()
    for block in blocks:
        u = svd_polynomial(gradient[block], resolve_coefficients("jordan"))
        expected = -u * update_scale(*u.shape[-2:], adjust_lr_fn)
        np.testing.assert_allclose((p - before).detach()[block], expected, atol=1e-9)


def test_a_convolution_takes_its_scale_from_the_flattened_shape():
    (p,) = parameters((8, 2, 3, 3), dtype=torch.float64)
    set_gradients([p], 0)
    before, gradient = p.detach().clone(), p.grad.numpy().reshape(8, 18)
    Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    expected = -0.2 * np.sqrt(18) * svd_polynomial(gradient, resolve_coefficients("jordan"))
    np.testing.assert_allclose((p - before).detach().reshape(8, 18), expected, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e-30])
def test_gradients_that_torch_swallows_get_a_full_size_update(scale):
    (p,), (q,), (r,) = (parameters((32, 48)) for _ in range(3))
    for optimizer, param in (
        (Muon([p], lr=1.0, weight_decay=0.0), p),
        (torch.optim.Muon([q], lr=1.0, weight_decay=0.0), q),
        (Muon([r], lr=1.0, weight_decay=0.0, eps=1e-7), r),
    ):
        before = param.detach().clone()
        set_gradients([param], 0, scale)
        optimizer.step()
        moved = (param - before).norm().item()
        full_size = orthogonalize(param.grad, xp=torch).norm().item()
        assert (moved == pytest.approx(full_size, rel=0.05)) == (param is p)


def test_small_gradients_survive_products_in_float16():
    """They are normalised before they are narrowed: as float16, all of these would be zero."""
    moved = []
    for ns_dtype in (torch.float32, torch.float16):
        (p,) = parameters((32, 48))
        before = p.detach().clone()
        set_gradients([p], 0, 1e-9)
        Muon([p], lr=1.0, weight_decay=0.0, ns_dtype=ns_dtype).step()
        moved.append(p.detach() - before)
    assert (moved[1] - moved[0]).norm() <= 0.02 * moved[0].norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_and_momentum_are_not_normalised_in_place(dtype, nesterov):
    (p,) = parameters((6, 9), dtype=dtype)
    set_gradients([p], 0)
    gradient = p.grad.clone()
    optimizer = Muon([p], nesterov=nesterov, ns_dtype=dtype)
    optimizer.step()
    assert torch.equal(p.grad, gradient)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.05 * gradient)


def test_a_zero_gradient_leaves_the_weight_to_its_decay():
    (p,) = parameters((6, 9))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), before * 0.95)


def test_an_unused_expert_moves_on_its_momentum_unless_frozen():
    def train(freeze_unused):
        (experts,) = parameters((2, 8, 6), dtype=torch.float64)
        optimizer = Muon([experts], lr=0.1, freeze_unused=freeze_unused)
        set_gradients([experts], 0)
        optimizer.step()
        after_first = experts.detach().clone()
        buffer = optimizer.state[experts]["momentum_buffer"].clone()
        set_gradients([experts], 1)
        experts.grad[1] = 0
        optimizer.step()
        return experts.detach() - after_first, optimizer.state[experts]["momentum_buffer"], buffer

    moved, momentum, before = train(freeze_unused=False)
    assert moved[1].norm() > 0.5 * moved[0].norm()
    torch.testing.assert_close(momentum[1], 0.95 * before[1])
    moved, momentum, before = train(freeze_unused=True)
    assert torch.equal(moved[1], torch.zeros_like(moved[1]))
    assert torch.equal(momentum[1], before[1])
    assert moved[0].norm() > 0.1
    assert not torch.equal(momentum[0], before[0])


def test_loads_torch_s_state_and_goes_on_from_it():
    theirs = parameters((32, 64), (64, 32))
    optimizer = torch.optim.Muon(theirs, lr=0.02, nesterov=False)
    set_gradients(theirs, 0)
    optimizer.step()
    ours = clones(theirs)
    loaded = Muon(ours, ns_dtype=torch.bfloat16)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.param_groups[0]["lr"] == 0.02
    assert loaded.param_groups[0]["nesterov"] is False
    set_gradients(theirs, 1), set_gradients(ours, 1)
    before = clones(ours)
    optimizer.step(), loaded.step()
    for p, q, old in zip(ours, theirs, before, strict=True):
        assert torch.equal(loaded.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"])
        assert (p - q).norm() <= 0.03 * (q - old).norm()
    torch.optim.Muon(clones(theirs)).load_state_dict(loaded.state_dict())


def test_a_state_of_torch_s_muon_brings_the_unclamped_scale():
    """torch 2.14 knows the name; before it no state has it, and only the group differs."""
    params = parameters((6, 10), (10, 6), dtype=torch.float64)
    theirs = torch.optim.Muon(clones(params), lr=0.1, weight_decay=0.3)
    set_gradients(theirs.param_groups[0]["params"], 0)
    theirs.step()
    saved = theirs.state_dict()
    saved["param_groups"][0]["adjust_lr_fn"] = "spectral_unclamped"
    ours = Muon(params)
    ours.load_state_dict(saved)
    for p, buffer in zip(params, [saved["state"][i]["momentum_buffer"] for i in (0, 1)], strict=True):
        set_gradients([p], 1)
        expected, _ = muon_step(
            p.detach().numpy().copy(), buffer.numpy().copy(), p.grad.numpy(), lr=0.1, weight_decay=0.3, mu=0.95,
            nesterov=True, coefficients=resolve_coefficients("jordan"), scale=(p.shape[0] / p.shape[1]) ** 0.5,
        )  # fmt: skip
        p.expected = expected
    ours.step()
    for p in params:
        np.testing.assert_allclose(p.detach(), p.expected, atol=1e-9)
    assert ours.state_dict()["param_groups"][0]["adjust_lr_fn"] == "spectral_unclamped"


def test_torch_s_state_brings_torch_s_floor():
    (p,), (q,) = parameters((32, 48)), parameters((32, 48))
    theirs = torch.optim.Muon([q], lr=1.0, weight_decay=0.0)
    move(theirs, q, 1e-12)
    optimizer = Muon([p], lr=1.0, weight_decay=0.0)
    assert move(optimizer, p, 1e-12).norm() > 1
    optimizer.load_state_dict(theirs.state_dict())
    assert move(optimizer, p, 1e-12).norm() < 0.1


@pytest.mark.parametrize(("eps_given", "floor"), [(False, False), (True, True)])
def test_a_state_says_whether_its_eps_was_given(eps_given, floor):
    """A group as version 0.1 saved it, to the key."""
    (p,) = parameters((32, 48))
    saved = Muon([p], lr=1.0, weight_decay=0.0).state_dict()
    saved["param_groups"] = [
        dict(
            lr=1.0, weight_decay=0.0, momentum=0.95, nesterov=True, ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-07,
            ns_steps=5, adjust_lr_fn=None, ns_dtype=None, ns_form=None, products=None, momentum_dtype=None,
            freeze_unused=False, use="muon", eps_given=eps_given, params=[0],
        )
    ]  # fmt: skip
    optimizer = Muon([p], eps=None if floor else 1e-3)
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == [dict(saved["param_groups"][0], format=1)]
    assert (move(optimizer, p, 1e-12).norm() < 0.1) == floor


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit(tmp_path, dtype, momentum_dtype):
    def build():
        params = parameters((6, 9), (9, 6), dtype=dtype)
        return params, Muon(params, lr=0.1, momentum_dtype=momentum_dtype)

    def run(params, optimizer, steps):
        for step in steps:
            set_gradients(params, step)
            optimizer.step()

    straight, optimizer = build()
    run(straight, optimizer, range(6))
    params, optimizer = build()
    run(params, optimizer, range(3))
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed, optimizer = build()
    with torch.no_grad():
        for p, q in zip(resumed, saved["params"], strict=True):
            p.copy_(q)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state[resumed[0]]["momentum_buffer"].dtype == (momentum_dtype or dtype)
    run(resumed, optimizer, range(3, 6))
    assert all(map(torch.equal, resumed, straight))


def test_a_tensor_rate_is_the_same_rate():
    (p,), (q,) = parameters((6, 9)), parameters((6, 9))
    set_gradients([p], 0), set_gradients([q], 0)
    Muon([p], lr=0.1).step(), Muon([q], lr=torch.tensor(0.1)).step()
    torch.testing.assert_close(p, q)


def test_gradient_clipping_does_not_change_the_size_of_the_update():
    """It belongs before the momentum; after orthogonalisation it would shrink the update many times."""
    (p,), (q,) = parameters((6, 9)), parameters((6, 9))
    set_gradients([p], 0), set_gradients([q], 0)
    torch.nn.utils.clip_grad_norm_([p], 1e-3)
    Muon([p], lr=0.1, ns_dtype=torch.float32).step(), Muon([q], lr=0.1, ns_dtype=torch.float32).step()
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ([(7,)], {}, r"'parameter 0 of the group' has shape \(7,\); Muon needs a matrix\. Leave it to AdamW"),
        ([(6, 4)], dict(lr=-0.1), "lr=-0.1 must be"),
        ([(6, 4)], dict(lr=float("nan")), "lr=nan must be"),
        ([(6, 4)], dict(weight_decay=-1), "weight_decay=-1 must be"),
        ([(6, 4)], dict(momentum=1.0), r"momentum=1.0 must be in \[0, 1\)"),
        ([(6, 4)], dict(ns_coefficients="newton"), "ns_coefficients='newton' is not a known polynomial"),
        ([(6, 4)], dict(ns_steps=0), "ns_steps=0"),
        ([(6, 4)], dict(eps=-1.0), "eps=-1.0"),
        ([(6, 4)], dict(adjust_lr_fn="adam"), "adjust_lr_fn='adam'"),
        ([(6, 4)], dict(products="triton"), "products='triton' is not known"),
        ([(6, 4)], dict(workspace_bytes=0), "workspace_bytes=0"),
        ([(6, 4)], dict(ns_form="fast"), "ns_form='fast'; use 'standard', 'gram', or None"),
        ([(6, 4)], dict(ns_form="gram", ns_coefficients="cans"), "the Gram form is not accurate"),
    ],
)
def test_wrong_arguments_are_named(params, options, message):
    with pytest.raises(ValueError, match=message):
        Muon(parameters(*params), **options)


def test_wrong_groups_are_named():
    p, q = parameters((6, 4), (4, 6))
    with pytest.raises(ValueError, match=r"blocks=.* do not fill the 6 rows"):
        Muon([dict(params=[p], layout=MatrixLayout(blocks=(4, 4)))])
    with pytest.raises(ValueError, match="'w' has shape"):
        Muon([("w", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match="layout lists 1 layouts for the 2 parameters"):
        Muon([dict(params=[p, q], layout=[MatrixLayout()])])
    with pytest.raises(ValueError, match="use='adamw' in a parameter group; it is one of 'muon'"):
        Muon([dict(params=[p], use="adamw")])
    with pytest.raises(ValueError, match="complex"):
        Muon([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
    optimizer = Muon([p])
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group(dict(params=[q], lr=-1))
    assert len(optimizer.param_groups) == 1
    p.grad = torch.zeros(6, 4).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_its_state_loads_into_torch_s_optimizer_and_steps_there():
    (p,), (q,) = parameters((32, 48)), parameters((32, 48))
    ours, theirs = Muon([p]), torch.optim.Muon([q])
    set_gradients([p], 0)
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    set_gradients([q], 1)
    theirs.step()
    assert theirs.param_groups[0]["eps"] == 1e-7
    assert q.isfinite().all()


def test_ns_steps_left_at_its_default_is_the_set_s_own_length():
    (p,) = parameters((6, 9))
    for given_, expected in ((dict(ns_coefficients="deepseek_v4"), None), (dict(), 5), (dict(ns_steps=3), 3)):
        assert Muon([p], **given_).param_groups[0]["ns_steps"] == expected
    three = [(2.0, -1.5, 0.5)] * 3
    set_gradients([p], 0)
    Muon([p], ns_coefficients=three).step()


def test_frozen_unused_matrices_decay_only_when_used_even_with_bf16_momentum():
    (p,) = parameters((2, 8, 6))
    before = p.detach().clone()
    optimizer = Muon([p], lr=2e-4, weight_decay=0.1, freeze_unused=True, momentum_dtype=torch.bfloat16, momentum=0.0)
    p.grad = torch.zeros_like(p)
    p.grad[0, 0, 0] = 1.0
    for _ in range(100):
        optimizer.step()
    untouched = before[0, 1:, 1:] * (1 - 2e-5) ** 100
    torch.testing.assert_close(p.detach()[0, 1:, 1:], untouched, rtol=1e-5, atol=0)
    assert torch.equal(p.detach()[1], before[1])


def test_schedulers_that_cycle_momentum_work():
    (p,) = parameters((6, 9))
    torch.optim.lr_scheduler.OneCycleLR(Muon([p]), max_lr=0.1, total_steps=10)


def test_empty_parameters_are_left_alone():
    empty, p = nn.Parameter(torch.zeros(0, 5)), parameters((6, 9))[0]
    optimizer = Muon([empty, p])
    empty.grad = torch.zeros(0, 5)
    set_gradients([p], 0)
    optimizer.step()


def test_no_batch_is_larger_than_the_workspace(monkeypatch):
    sizes = []
    iterate = execute_module.iterate
    monkeypatch.setattr(execute_module, "iterate", lambda x, *a, **k: sizes.append(len(x)) or iterate(x, *a, **k))
    params = parameters(*[(2, 3)] * 60, (40, 2, 3))
    set_gradients(params, 0)
    Muon(params, workspace_bytes=40 * 6 * 4).step()
    assert sizes == [40, 40, 20]


def test_a_resumed_optimizer_still_has_no_floor():
    (p,) = parameters((32, 48))
    optimizer = Muon([p], lr=1.0, weight_decay=0.0)
    optimizer.load_state_dict(Muon([p], lr=1.0, weight_decay=0.0).state_dict())
    set_gradients([p], 0, 1e-12)
    before = p.detach().clone()
    optimizer.step()
    assert (p - before).norm() > 1


def test_loading_shares_no_memory_with_the_checkpoint():
    (p,) = parameters((6, 9), dtype=torch.bfloat16)
    optimizer = Muon([p], momentum_dtype=torch.float32)
    set_gradients([p], 0)
    optimizer.step()
    checkpoint = optimizer.state_dict()
    saved = checkpoint["state"][0]["momentum_buffer"].clone()
    other = Muon([p], momentum_dtype=torch.float32)
    other.load_state_dict(checkpoint)
    other.step()
    assert torch.equal(checkpoint["state"][0]["momentum_buffer"], saved)


@pytest.mark.parametrize("ns_dtype", [torch.float64, torch.bfloat16])
def test_the_gram_form_gives_the_same_update(ns_dtype):
    for shape in ((32, 128), (128, 32), (3, 32, 64), (32, 32)):
        (p,), (q,) = parameters(shape, dtype=torch.float64), parameters(shape, dtype=torch.float64)
        before = p.detach().clone()
        set_gradients([p], 0), set_gradients([q], 0)
        for parameter, form in ((p, "gram"), (q, None)):
            Muon([parameter], lr=1.0, weight_decay=0.0, ns_form=form, ns_dtype=ns_dtype).step()
        tolerance = 0.04 if ns_dtype == torch.bfloat16 else 1e-9
        assert (p - q).norm() <= tolerance * (q - before).norm()


def test_engines_that_flatten_matrices_are_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Flattened(FullyShardedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    model = nn.Sequential(nn.Linear(4, 6), nn.Identity())
    model[1] = Flattened()
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        MuonClip(model, qk_clip=None)
    (p,) = parameters((6, 9))
    p.ds_id = 3
    set_gradients([p], 0)
    with pytest.raises(ValueError, match=r"w is sharded by DeepSpeed's ZeRO \(stage 3\)"):
        Muon([("w", p)]).step()


def test_what_cannot_be_updated_shard_by_shard_is_refused_before_anything_moves():
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        (p,) = parameters((6, 9))
        before = p.detach().clone()
        set_gradients([p], 0)
        summed = nn.Parameter(DTensor.from_local(torch.randn(6, 9), mesh, [Partial()]))
        summed.grad = torch.zeros_like(summed)
        cases = [(summed, "w is placed as .*Partial")]
        for placement in (Shard(0), Replicate()):  # on more ranks either would have to travel
            across = nn.Parameter(distribute_tensor(torch.randn(6, 9), mesh, [placement]))
            across.grad = distribute_tensor(torch.randn(6, 9), mesh, [Shard(1)])
            cases.append((across, "its gradient as"))
        for sharded, message in cases:
            with pytest.raises(ValueError, match=message):
                Muon([("p", p), ("w", sharded)]).step()
        assert torch.equal(p, before)
    finally:
        dist.destroy_process_group()


def test_a_matrix_without_a_gradient_has_a_state():
    """As an expert that gets no token in the first steps."""
    matrices = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    optimizer = Muon(matrices)
    matrices[0].grad = torch.randn(4, 6)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert sorted(state) == [0, 1]
    assert not state[1]["momentum_buffer"].any()
