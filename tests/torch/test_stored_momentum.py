"""Momentum as int8 codes and with stochastic rounding: NumPy's trajectories, checkpoints, and what is refused."""

import copy
import io

import numpy as np
import pytest
import torch
from stored_momentum import FORMS, StoredMatrix, noise, numbered, stored
from tiny_attention import TinyModel
from torch import nn
from variants import CASES, normal

from muonclip.torch import Monitor, Muon, MuonClip
from muonclip.torch.update import cost_model

STEPS = 12
UPDATES = {
    "muon": {"weight_decay": 0.1},
    "normuon": {"update": "normuon", "weight_decay": 0.1},
    "hyperball": {"update": "hyperball", "weight_decay": 0.0},
    "muown": {"update": "muown", "weight_decay": 0.1},
}


def made(form, dtype=torch.float64, **options):
    """All cases as named parameters, and their optimizer."""
    named = {name: nn.Parameter(torch.tensor(normal(i, shape), dtype=dtype)) for i, (name, (shape, *_)) in cases()}
    groups = [{"params": [(name, p)], "layout": CASES[name][1]} for name, p in named.items()]
    return named, Muon(groups, lr=0.05, momentum_dtype=form, **options)


def cases():
    return enumerate(CASES.items())


def train(named, optimizer, steps):
    for step in steps:
        for i, parameter in enumerate(named.values()):
            parameter.grad = torch.tensor(normal(1000 * step + 500 + i, tuple(parameter.shape)), dtype=parameter.dtype)
        optimizer.step()


def read(state):
    """The momentum of a state whose matrices have up to 2048 columns, which are the last axis."""
    return state["momentum_buffer"].double() * (state["momentum_buffer_absmax"] * np.float32(1 / 127)).double()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("form", FORMS)
def test_a_trajectory_is_numpy_s_on_every_logical_matrix(form, update):
    named, optimizer = made(form, **UPDATES[update])
    weights = {name: parameter.detach().numpy().copy() for name, parameter in named.items()}
    matrices = {
        name: [
            StoredMatrix(view, form=form, name=name, rows=rows, columns=columns, lr=0.05, **UPDATES[update])
            for view, (rows, columns) in zip(CASES[name][2](weight), numbered(name), strict=True)
        ]
        for name, weight in weights.items()
    }
    for step in range(STEPS):
        train(named, optimizer, [step])
        for name, own in matrices.items():
            for matrix, gradient in zip(own, CASES[name][2](named[name].grad.numpy()), strict=True):
                matrix.step(gradient)
            np.testing.assert_allclose(named[name].detach(), weights[name], atol=1e-10, err_msg=f"{name} {step}")


def test_the_first_step_stores_what_numpy_stores_block_by_block():
    """Of 2048 entries of a row, and of the rest of it."""
    for layout_in_last in (True, False):
        shape = (3, 5000) if layout_in_last else (5000, 3)
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([parameter], momentum=0.5, momentum_dtype="int8")
        if not layout_in_last:
            optimizer = Muon([{"params": [parameter], "layout": transposed()}], momentum=0.5, momentum_dtype="int8")
        gradient = torch.tensor(normal(0, shape), dtype=torch.float32)
        gradient[..., :100] *= 1000
        parameter.grad = gradient
        optimizer.step()
        state = optimizer.state[parameter]
        assert state["momentum_buffer"].dtype == torch.int8
        assert state["momentum_buffer"].shape == shape
        assert state["momentum_buffer_absmax"].dtype == torch.float32
        x = (gradient if layout_in_last else gradient.T).numpy() * np.float32(0.5)
        codes, absmax = (state[name] if layout_in_last else state[name].T for name in state)
        assert absmax.shape == (3, 3)
        step = absmax.double().repeat_interleave(2048, 1)[:, :5000] * (1 / 127)
        np.testing.assert_allclose(codes.double() * step, stored(x.astype(np.float64), "int8"), rtol=1e-6)


def transposed():
    return CASES["kernel"][1]


@pytest.mark.parametrize("form", FORMS)
def test_pieces_of_rows_are_stored_as_the_whole(form, monkeypatch):
    parts = []
    for size in (None, 4 * 100 * 7):  # bytes: seven rows
        if size is not None:
            monkeypatch.setattr(cost_model, "PIECE_BYTES", size)
        parameter = nn.Parameter(torch.tensor(normal(0, (60, 100)), dtype=torch.float32))
        optimizer = Muon([("w", parameter)], momentum_dtype=form)
        for step in range(3):
            parameter.grad = torch.tensor(normal(1 + step, (60, 100)), dtype=torch.float32)
            optimizer.step()
        parts.append(optimizer.state[parameter])
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


@pytest.mark.parametrize("form", FORMS)
def test_matrices_of_one_group_step_as_each_alone(form):
    together = [(f"w{i}", nn.Parameter(torch.tensor(normal(i, (6, 4))))) for i in range(3)]
    alone = copy.deepcopy(together)
    optimizers = [Muon(together, momentum_dtype=form), *(Muon([each], momentum_dtype=form) for each in alone)]
    for step in range(3):
        for i, ((_, one), (_, other)) in enumerate(zip(together, alone, strict=True)):
            one.grad = torch.tensor(normal(100 * step + 50 + i, (6, 4)))
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (_, one), (_, other) in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_mean_of_what_is_stored_is_the_momentum_where_the_nearest_code_is_none():
    """Entries below half a step of their block: to the nearest they never enter, stochastically on average."""
    found = {}
    for form in ("int8", "int8_stochastic"):
        parameter = nn.Parameter(torch.zeros(4, 400))
        optimizer = Muon([("w", parameter)], lr=0.0, momentum=0.9, momentum_dtype=form)
        parameter.grad = torch.full((4, 400), 1e-3)
        parameter.grad[:, 0] = 1.0
        for _ in range(300):
            optimizer.step()
        found[form] = read(optimizer.state[parameter])[:, 1:]
    assert not found["int8"].any()
    mean, error = (
        found["int8_stochastic"].mean(),
        found["int8_stochastic"].std() / found["int8_stochastic"].numel() ** 0.5,
    )
    assert abs(mean - 1e-3) < 5 * error < 1e-3


def test_parameters_and_steps_have_noise_of_their_own_and_a_name_has_one():
    def codes(name, steps):
        parameter = nn.Parameter(torch.zeros(8, 50))
        optimizer = Muon([(name, parameter)], lr=0.0, momentum=0.0, momentum_dtype="int8_stochastic")
        parameter.grad = torch.tensor(normal(0, (8, 50)), dtype=torch.float32)
        for _ in range(steps):
            optimizer.step()
        return optimizer.state[parameter]["momentum_buffer"]

    assert torch.equal(codes("a", 2), codes("a", 2))
    assert torch.equal(codes("a", 2), codes("module.a", 2)), "as DDP names it"
    assert not torch.equal(codes("a", 2), codes("a", 1))
    assert not torch.equal(codes("a", 2), codes("b", 2))


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_saved_and_loaded_goes_on_to_the_bit(form, dtype):
    straight, optimizer = made(form, dtype)
    train(straight, optimizer, range(6))
    first, before = made(form, dtype)
    train(first, before, range(3))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    second, after = made(None, dtype)  # the options come with the state
    after.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    train(second, after, range(3, 6))
    for name, parameter in second.items():
        assert torch.equal(parameter, straight[name])
        own, others = after.state[parameter], optimizer.state[straight[name]]
        assert own.keys() == others.keys()
        assert all(own[key].dtype == others[key].dtype and torch.equal(own[key], others[key]) for key in own)


def test_a_state_is_made_with_the_optimizer_s_form_before_any_step():
    named, optimizer = made("int8")
    optimizer.state_dict()
    assert optimizer.state[named["experts"]]["momentum_buffer_absmax"].shape == (3, 4, 1)
    assert optimizer.state[named["kernel"]]["momentum_buffer_absmax"].shape == (1, 8)


def saved_as(state, form):
    return {**state, "param_groups": [{**group, "momentum_dtype": form} for group in state["param_groups"]]}


def test_a_checkpoint_in_float32_becomes_codes_and_back_where_its_groups_say_so():
    named, wide = made(None, torch.float32)
    train(named, wide, range(3))
    _, narrow = same = made("int8", torch.float32)
    narrow.load_state_dict(saved_as(wide.state_dict(), "int8"))
    for name, parameter in same[0].items():
        state, momentum = narrow.state[parameter], wide.state[named[name]]["momentum_buffer"]
        assert state["momentum_buffer"].dtype == torch.int8
        size = state["momentum_buffer_absmax"]
        torch.testing.assert_close(read(state), momentum.double(), rtol=0, atol=size.max().item() / 253)
        for view, codes in zip(
            CASES[name][2](momentum.numpy()), CASES[name][2](state["momentum_buffer"].numpy()), strict=True
        ):
            np.testing.assert_array_equal(np.abs(codes).max(1), 127)
            assert (np.sign(view) * codes >= 0).all()
    train(*same, [3])
    again, back = made(None, torch.float32)
    back.load_state_dict(saved_as(narrow.state_dict(), None))
    for name, parameter in again.items():
        assert back.state[parameter].keys() == {"momentum_buffer"}
        torch.testing.assert_close(
            back.state[parameter]["momentum_buffer"].double(), read(narrow.state[same[0][name]]), rtol=1e-6, atol=0
        )
    train(again, back, [4])


def test_codes_that_were_read_as_numbers_are_refused():
    """As torch.distributed.checkpoint reads them into the states of an optimizer in float32."""
    named, optimizer = made("int8", torch.float32)
    train(named, optimizer, range(2))
    state = optimizer.state_dict()
    for own in state["state"].values():
        own["momentum_buffer"] = own["momentum_buffer"].float()
        del own["momentum_buffer_absmax"]
    with pytest.raises(ValueError, match=r"holds whole numbers only: codes that were read without the sizes"):
        made("int8", torch.float32)[1].load_state_dict(state)


def without_absmax(state):
    del state["momentum_buffer_absmax"]


def of_another_shape(state):
    state["momentum_buffer_absmax"] = torch.ones(2, 2)


def with_nan(state):
    state["momentum_buffer_absmax"] = torch.full_like(state["momentum_buffer_absmax"], torch.nan)


def below_zero(state):
    state["momentum_buffer_absmax"] = -1 - state["momentum_buffer_absmax"]


def of_int16(state):
    state["momentum_buffer"] = state["momentum_buffer"].to(torch.int16)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_absmax, "is torch.int8, and momentum_buffer_absmax, the sizes of its blocks, is not there"),
        (of_another_shape, "momentum_buffer_absmax of .* is .*2, 2"),
        (with_nan, "momentum_buffer_absmax of .* holds nan"),
        (below_zero, "momentum_buffer_absmax of .* holds -.*, and is a largest absolute value"),
        (of_int16, "momentum_buffer of .* is torch.int16"),
    ],
)
def test_a_damaged_state_is_refused_before_anything_is_loaded(damage, said):
    named, optimizer = made("int8", torch.float32)
    train(named, optimizer, range(2))
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    damage(saved["state"][3])
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(saved)
    for key, own in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][key][name]) for name, value in own.items())


def test_a_state_that_lost_its_sizes_is_refused_by_the_step():
    named, optimizer = made("int8", torch.float32)
    train(named, optimizer, [0])
    before = named["wide"].detach().clone()
    del optimizer.state[named["tall"]]["momentum_buffer_absmax"]
    with pytest.raises(ValueError, match="momentum_buffer_absmax is a NoneType"):
        train(named, optimizer, [1])
    assert torch.equal(named["wide"], before)


def test_a_gradient_that_is_not_finite_diverges_as_in_float32():
    for value in (torch.nan, torch.inf):
        for form in ("int8", "int8_stochastic", "bfloat16_stochastic", torch.float32):
            parameter = nn.Parameter(torch.ones(4, 6))
            optimizer = Muon([("w", parameter)], momentum_dtype=form)
            parameter.grad = torch.ones(4, 6)
            parameter.grad[1, 2] = value
            optimizer.step()
            parameter.grad = torch.ones(4, 6)
            optimizer.step()
            assert parameter.isnan().all()


def test_a_gradient_of_zeros_is_stored_as_zeros():
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([parameter], momentum_dtype="int8")
    parameter.grad = torch.zeros(4, 6)
    optimizer.step()
    assert not any(value.any() for value in optimizer.state[parameter].values())
    assert parameter.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_unused_experts_keep_their_codes(form):
    parameter = nn.Parameter(torch.tensor(normal(0, (3, 6, 40)), dtype=torch.float32))
    optimizer = Muon([("w", parameter)], freeze_unused=True, momentum_dtype=form)
    parameter.grad = torch.tensor(normal(1, (3, 6, 40)), dtype=torch.float32)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    for step in range(5):
        parameter.grad = torch.tensor(normal(2 + step, (3, 6, 40)), dtype=torch.float32)
        parameter.grad[1] = 0
        optimizer.step()
    for name, value in optimizer.state[parameter].items():
        assert torch.equal(value[1], before[name][1])
        assert not torch.equal(value[0], before[name][0])


def test_groups_have_forms_of_their_own():
    parameters = [nn.Parameter(torch.tensor(normal(i, (6, 4)))) for i in range(3)]
    groups = [
        {"params": [each], "momentum_dtype": form}
        for each, form in zip(parameters, ("int8", None, torch.int8), strict=True)
    ]
    optimizer = Muon(groups)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [optimizer.state[each]["momentum_buffer"].dtype for each in parameters]
    assert held == [torch.int8, torch.float64, torch.int8]


@pytest.mark.parametrize("form", ["int4", "float32_stochastic", "stochastic", "int8-stochastic", torch.int16])
def test_other_forms_are_refused(form):
    with pytest.raises(ValueError, match="momentum_dtype="):
        Muon([nn.Parameter(torch.ones(4, 6))], momentum_dtype=form)


def test_stochastic_rounding_in_a_graph_is_refused():
    model = TinyModel("mha")
    with pytest.raises(ValueError, match=r"capturable=True with momentum_dtype='int8_stochastic': the noise"):
        MuonClip(model, momentum_dtype="int8_stochastic", capturable=True)


def test_the_plan_says_the_bytes_of_each_state_and_of_all():
    torch.manual_seed(0)
    model = TinyModel("mha")
    plain, optimizer = MuonClip(model), MuonClip(model, momentum_dtype="int8")
    optimizer.state_dict()
    states = [state for state in optimizer.state.values() if "momentum_buffer" in state]
    sizes = {name: sum(each[name].nbytes for each in states) for name in ("momentum_buffer", "momentum_buffer_absmax")}
    assert optimizer.plan.state_bytes == {"muon": sizes}
    assert sizes["momentum_buffer"] == sum(plain.plan.state_bytes["muon"].values()) / 4
    assert f"update muon: state momentum_buffer {sizes['momentum_buffer'] / 1024:.4g} KiB" in str(optimizer.plan)
    assert f"state of the Muon half: {sum(sizes.values()) / 1024:.4g} KiB" in str(optimizer.plan)
    assert "momentum_dtype = int8" in str(optimizer.plan)
    assert "state of the Muon half" not in str(plain.plan)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_optimizer_trains_with_the_clip(form):
    torch.manual_seed(0)
    model = TinyModel("mha")
    optimizer = MuonClip(model, lr=0.02, tau=0.3, momentum_dtype=form)
    tokens = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(0))
    losses, clipped = [], 0
    for _ in range(30):
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clipped += optimizer.qk_clip.report().clipped_heads
    assert losses[-1] < 0.8 * losses[0]
    assert clipped


def test_the_monitor_reads_the_norm_of_codes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    optimizer = Muon([each for each in model.parameters() if each.ndim == 2], momentum_dtype="int8")
    monitor = Monitor(model, optimizer, logits=False)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    for i, name in enumerate(("0.weight", "1.weight")):
        expected = read(optimizer.state[model[i].weight]).norm()
        found = monitor.matrices()[name].momentum_norm
        torch.testing.assert_close(found.double(), expected[None], rtol=1e-5, atol=0)


def test_noise_of_numpy_is_that_of_the_first_step():
    """A code of a single entry by hand, so that a change of the noise is seen: checkpoints depend on it."""
    assert [noise("w", 1, row, column) for row, column in ((0, 0), (0, 1), (1, 0))] == PINNED
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = Muon([("w", parameter)], lr=0.0, momentum=0.0, momentum_dtype="int8_stochastic")
    parameter.grad = torch.tensor([[127.0, 0.5, 0.25], [127.0, 1.5, 1.25]])
    optimizer.step()
    step = (torch.tensor(127.0) * (1 / 127)).item()
    expected = [
        [int(np.clip(np.floor(g / step + (noise("w", 1, i, j) + 0.5) / 65536), -127, 127)) for j, g in enumerate(row)]
        for i, row in enumerate(parameter.grad.tolist())
    ]
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == expected


PINNED = [6417, 6974, 13066]


def test_codes_go_with_masters_of_bf16_parameters():
    """The momentum and the weight are those of a run in float32, whose gradients are rounded to bf16."""
    start = torch.tensor(normal(0, (6, 40)), dtype=torch.bfloat16)
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizers = [
        Muon([("w", narrow)], momentum_dtype="int8", master_weight_bits=32, ns_dtype=torch.float32),
        Muon([("w", wide)], momentum_dtype="int8", ns_dtype=torch.float32),
    ]
    for step in range(4):
        narrow.grad = torch.tensor(normal(1 + step, (6, 40)), dtype=torch.bfloat16)
        wide.grad = narrow.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    own, other = (optimizer.state[each] for optimizer, each in zip(optimizers, (narrow, wide), strict=True))
    assert torch.equal(own["momentum_buffer"], other["momentum_buffer"])
    assert torch.equal(own["momentum_buffer_absmax"], other["momentum_buffer_absmax"])
    assert torch.equal(narrow, wide.bfloat16())
