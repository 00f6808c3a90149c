"""The update in pieces that stay in the cache, and symmetric products by halves."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate

from muonclip.core import MatrixLayout, orthogonalize
from muonclip.torch import Muon
from muonclip.torch.distributed import NewtonSchulzConfig, PlacedParameter, plan
from muonclip.torch.update.products import PRODUCTS, choose_products
from muonclip.torch.update.symmetric_products import divides

execute_module = importlib.import_module("muonclip.torch.update.execute")  # its package hands on the function


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("threads", "most"), [(1, 4), (2, 8), (64, 15)])
def test_a_processor_takes_few_matrices_at_once(monkeypatch, threads, most):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sizes = []
    iterate = execute_module.iterate
    monkeypatch.setattr(execute_module, "iterate", lambda x, *a, **k: sizes.append(len(x)) or iterate(x, *a, **k))
    parameters = [nn.Parameter(random(128, 1024)) for _ in range(7)] + [nn.Parameter(random(8, 1024, 128))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    Muon(parameters, ns_steps=1).step()
    assert sum(sizes) == 15
    assert max(sizes) == most


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("options", [dict(), dict(nesterov=False), dict(freeze_unused=True)])
@pytest.mark.parametrize("shape", [(20, 4, 6), (20, 6, 4), (1, 31, 17)])
def test_rows_in_pieces_are_the_rows(monkeypatch, shape, options, lr):
    """Momentum, input and weight of a matrix that is too large for the cache are made by rows."""
    results = []
    for size in (10**6, 40):
        monkeypatch.setattr("muonclip.torch.update.cost_model.PIECE_BYTES", size)
        parameter = nn.Parameter(random(*shape))
        optimizer = Muon([dict(params=[parameter], layout=MatrixLayout(1))], lr=lr, ns_dtype=torch.float64, **options)
        for step in range(3):
            parameter.grad = random(*shape, seed=step)
            optimizer.step()
        results.append((parameter.detach(), optimizer.state[parameter]["momentum_buffer"]))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0])


LAYOUTS = {
    "wide": ((12, 20), MatrixLayout()),
    "tall": ((20, 12), MatrixLayout()),
    "experts": ((3, 12, 20), MatrixLayout(1)),
    "tall experts": ((2, 20, 12), MatrixLayout(1)),
    "fused": ((24, 20), MatrixLayout(blocks=(12, 12))),
    "interleaved": ((24, 20), MatrixLayout(blocks=(3, 3), repeats=4)),
    "as [in, out]": ((20, 12), MatrixLayout(transposed=True)),
}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, dict()),
        (torch.float32, dict(momentum_dtype=torch.bfloat16)),
        (torch.bfloat16, dict(nesterov=False)),
        (torch.bfloat16, dict(momentum_dtype=torch.float32)),
    ],
    ids=["float32", "narrow momentum", "bfloat16", "wide momentum"],
)
def test_matrices_that_step_together_move_as_they_do_alone(dtype, options, monkeypatch):
    """Small matrices of one shape go through the stages in lists, whatever holds them; each is its own."""

    def stepped():
        groups = []
        for kinds, decay in ((list(LAYOUTS), 0.1), (list(LAYOUTS)[::-1], 1.1)):  # neighbours of two groups are alike
            shapes, layouts = zip(*(LAYOUTS[kind] for kind in kinds for _ in range(2)), strict=True)
            parameters = [nn.Parameter(random(*shape, seed=at, dtype=dtype)) for at, shape in enumerate(shapes)]
            groups.append(dict(params=parameters, layout=layouts, weight_decay=decay))
        optimizer = Muon(groups, lr=0.1, ns_dtype=torch.float32, **options)
        everything = [parameter for group in groups for parameter in group["params"]]
        for step in range(3):
            for at, parameter in enumerate(everything):
                unused = step == 1 and at == 2
                parameter.grad = None if unused else random(*parameter.shape, seed=100 * step + at, dtype=dtype)
            optimizer.step()
        return [(parameter.detach(), optimizer.state[parameter]["momentum_buffer"]) for parameter in everything]

    together = stepped()
    monkeypatch.setattr(execute_module, "together", lambda segments: segments)
    for at, (mine, alone) in enumerate(zip(together, stepped(), strict=True)):
        for value, truth in zip(mine, alone, strict=True):
            assert torch.equal(value, truth), at


def test_tall_and_wide_matrices_in_turn_step_in_two_lists(monkeypatch):
    """As the layers of a model have them, up and down or a and b of an adapter."""
    parameters = [nn.Parameter(random(*shape)) for shape in ((12, 20), (20, 12)) * 3]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    joined, real = [], execute_module.together

    def spied(segments):
        joined.append(list(real(segments)))
        return joined[-1]

    monkeypatch.setattr(execute_module, "together", spied)
    Muon(parameters).step()
    assert [[each.count for each in steps] for steps in joined] == [[3, 3]]


@pytest.mark.parametrize("products", ["baddbmm", "halves"])
@pytest.mark.parametrize("options", [dict(), dict(ns_form="gram"), dict(ns_dtype=torch.bfloat16)], ids=str)
def test_one_matrix_alone_is_multiplied_without_a_batch_to_the_same_bits(products, options, monkeypatch):
    def moved():
        parameter = nn.Parameter(random(24, 130))
        parameter.grad = random(24, 130, seed=1)
        Muon([parameter], products=products, **options).step()
        return parameter.detach()

    alone = moved()
    calls = []
    monkeypatch.setattr(execute_module, "for_one_matrix", lambda *_: calls.append(None))
    assert torch.equal(alone, moved())
    assert calls


def test_matrices_too_small_to_gain_by_bf16_are_multiplied_in_float32():
    def dtype(m, n, **options):
        config = NewtonSchulzConfig(torch.bfloat16, "jordan", None, **options)
        [round_] = plan([on_one_rank("w", (m, n), config)]).rounds
        return round_.bucket.iteration.dtype

    assert dtype(8, 128, is_asked=False) == dtype(128, 16, is_asked=False) == torch.float32
    assert dtype(64, 128, is_asked=False) == torch.bfloat16
    assert dtype(8, 128) == dtype(8, 128, is_asked=False, device="cuda:0") == torch.bfloat16


@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matrices_of_every_size_share_a_batch(ns_dtype):
    """Squares vanish or overflow in some of them; each moves as it does alone, by a full-size update."""
    scales = [1.0, 1e-30, 1e30, 0.0, 1e-3, 1e-42]
    gradients = [random(16, 24, seed=seed) * scale for seed, scale in enumerate(scales)]

    def moved(*gradients):
        parameters = [nn.Parameter(torch.zeros(16, 24)) for _ in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        Muon(parameters, lr=1.0, weight_decay=0.0, momentum=0.0, ns_dtype=ns_dtype).step()
        return [parameter.detach() for parameter in parameters]

    together = moved(*gradients)
    for scale, gradient, update in zip(scales, gradients, together, strict=True):
        assert torch.equal(update, moved(gradient)[0]), scale
        if scale > 1e-40:  # below, float32 has few digits left
            expected = -orthogonalize(gradient.double(), xp=torch)
            assert (update - expected).norm() <= 0.05 * expected.norm(), scale
    assert not together[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 515, 771), (2, 512, 1024)])
def test_symmetric_products_by_halves_are_the_whole_ones(shape, dtype):
    halves, whole = PRODUCTS["halves"], PRODUCTS["baddbmm"]
    x = random(*shape, dtype=torch.float64)
    x = x / x.norm(dim=(1, 2), keepdim=True) * 4
    made = [(products.gram(x.to(dtype)), products) for products in (halves, whole)]
    # Two that commute, as the iteration has them.
    pairs = [(gram, products.polynomial(gram, -4.775, 2.0315), products) for gram, products in made]
    updates = [
        (products.symmetric_update or products.update)(gram, polynomial, 3.4445) for gram, polynomial, products in pairs
    ]
    gram = x @ x.mT
    polynomial = -4.775 * gram + 2.0315 * gram @ gram
    exact = gram, polynomial, 3.4445 * gram + polynomial @ gram
    for by_halves, in_one, truth in zip(
        (pairs[0][0], pairs[0][1], updates[0]), (pairs[1][0], pairs[1][1], updates[1]), exact, strict=True
    ):
        error, allowed = (by_halves - truth).norm(), (in_one - truth).norm()
        assert error <= 1.5 * allowed + 1e-6 * truth.norm()


def test_small_products_are_not_divided():
    assert not divides(torch.empty(256, 512, device="meta", dtype=torch.bfloat16))
    assert divides(torch.empty(2048, 7168, device="meta", dtype=torch.bfloat16))
    assert choose_products(None, "cuda") is PRODUCTS["baddbmm"]
    assert choose_products(None, "cpu") is PRODUCTS["halves"]


def on_one_rank(name, shape, config):
    return PlacedParameter(name, shape, MatrixLayout(), config, placements=(Replicate(),))


def form(m, n, dtype=torch.bfloat16, device="cpu", **options):
    given = dict(ns_coefficients="jordan", ns_steps=None, form=None, device=device) | options
    [round_] = plan([on_one_rank("w", (m, n), NewtonSchulzConfig(dtype, **given))]).rounds
    return round_.bucket.iteration.form


def test_the_form_is_chosen_by_the_shape_and_the_polynomials():
    for m, n in ((512, 1792), (2048, 7168), (7168, 2048), (256, 512), (64, 512)):
        assert form(m, n) == form(m, n, torch.float32) == "gram"
        assert form(m, n, torch.float64) == "standard"
        assert form(m, n, device="cuda:0") == "standard"
        assert form(m, n, form="standard") == "standard"
        assert form(m, n, ns_coefficients="cans") == form(m, n, ns_coefficients=(2.0, -1.5, 0.5)) == "standard"
    for m, n in ((1024, 1024), (1792, 2048), (64, 96), (16, 20)):
        assert form(m, n) == "standard"


@pytest.mark.parametrize("ns_dtype", [torch.bfloat16, torch.float32])
def test_the_chosen_form_is_as_accurate(ns_dtype):
    """Against float64, also where singular values decay and the rank is low; both forms round as the dtype does."""
    left, right = (random(64, 64, seed=seed, dtype=torch.float64).svd()[0] for seed in (1, 2))
    for values in (torch.ones(64), torch.arange(1, 65) ** -2.0, (torch.arange(64) < 8) * 1.0):
        gradient = (left * values) @ right @ random(64, 256, seed=3, dtype=torch.float64) / 16
        errors = []
        for ns_form in (None, "standard"):
            parameter = nn.Parameter(torch.zeros(64, 256))
            parameter.grad = gradient.float()
            optimizer = Muon([parameter], lr=1.0, weight_decay=0.0, ns_form=ns_form, ns_dtype=ns_dtype)
            optimizer.step()
            exact = -orthogonalize(parameter.grad.double(), xp=torch)
            errors.append(((parameter.detach() - exact).norm() / exact.norm()).item())
        assert errors[0] <= max(2 * errors[1], 0.03)
        assert errors[0] != errors[1]


def test_the_plan_prints_the_form():
    config = NewtonSchulzConfig(torch.bfloat16, "jordan", None, form=None)
    shapes = {"a": (256, 1024), "b": (64, 64)}
    text = str(plan([on_one_rank(name, shape, config) for name, shape in shapes.items()]))
    assert "1 × (256×1024)  bfloat16, Gram form" in text
    assert "1 × (64×64)     bfloat16, standard form" in text
    operations = 3 * 4 * 256**2 * 1024 + 11 * 2 * 256**3 + 5 * 6 * 64**3
    assert f"{operations / 1e9:.3g} GFLOP" in text


def placed(**options):
    iteration = NewtonSchulzConfig(torch.float32, "jordan", None)
    return PlacedParameter("w", (4, 6), MatrixLayout(), iteration, placements=(Replicate(),), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan(3), "parameters=3 is a int"),
        (lambda: plan("x"), "parameters='x' is a str"),
        (lambda: plan([placed(), None]), r"parameters\[1\]=None is a NoneType"),
        (lambda: plan([placed()], workspace_bytes=0), "workspace_bytes=0"),
        (lambda: plan([placed()], workspace_bytes="1"), "workspace_bytes='1'"),
        (lambda: plan([replace(placed(), placements=())]), r"w: placements=\(\) must be one for each of the 1 axes"),
        (lambda: execute_module.execute(3, [], {}), "update_plan=3 is a int"),
        (lambda: execute_module.execute(plan([placed()]), None, {}), "steps=None is a NoneType"),
        (lambda: execute_module.execute(plan([placed()]), [], {}), "0 steps for a plan of 1 parameters"),
        (lambda: execute_module.execute(plan([placed()]), [None], {}), "positions lacks"),
        (lambda: execute_module.execute(plan([placed()]), [None], 3), "positions=3 is a int"),
    ],
)
def test_plans_and_steps_of_another_kind_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
