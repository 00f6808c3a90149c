"""`master_weight_bits`: bf16 parameters are updated as the float32 weights would be of which they are the rounding."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks
from rounded_masters import rounded_to_24
from tiny_attention import TinyModel
from torch import nn
from variants import CASES, VARIANTS, normal

from muonclip.torch import Muon, MuonClip
from muonclip.torch.update.split_weights import errors_of, joined, split_into

WORKER = Path(__file__).parents[1] / "support" / "master_worker.py"
BITS = (24, 32)
OPTIONS = {**VARIANTS, "muon": {}, "unused": {"freeze_unused": True}, "tensor rate": {"lr": torch.tensor(0.05)}}


def tokens(seed):
    return torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(seed))


def build(kind="gqa", dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    model = TinyModel(kind).to(dtype)
    return model, MuonClip(model, **{"lr": 0.05, "tau": 0.5, **options})


def train(model, optimizer, steps):
    for step in steps:
        model.loss(tokens(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def master(optimizer, parameter):
    return joined(parameter.detach(), errors_of(optimizer.state[parameter]))


def round_masters(weights, bits):
    """What is left of float32 weights, in place."""
    with torch.no_grad():
        for weight in weights:
            weight.copy_(rounded_to_24(weight.detach()) if bits == 24 else weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("variant", OPTIONS)
def test_a_step_of_muon_is_that_of_float32_weights(variant, bits):
    """By the same gradients; the weights are rounded to 24 bits after each step."""
    options = {"lr": 0.05, "ns_dtype": torch.float32, **OPTIONS[variant]}
    starts = [torch.tensor(normal(7, shape)).bfloat16() for shape, *_ in CASES.values()]
    narrow, wide = ([nn.Parameter(each.to(dtype)) for each in starts] for dtype in (torch.bfloat16, torch.float32))
    layouts = [layout for _, layout, _ in CASES.values()]
    ours = Muon([dict(params=narrow, layout=layouts)], master_weight_bits=bits, **options)
    theirs = Muon([dict(params=wide, layout=layouts)], **options)
    for step in range(6):
        for index, (p, q) in enumerate(zip(narrow, wide, strict=True)):
            p.grad = torch.tensor(normal(100 * step + index, p.shape)).bfloat16()
            if p.ndim == 3 and variant == "unused":
                p.grad[0] = 0
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        round_masters(wide, bits)
        for p, q in zip(narrow, wide, strict=True):
            assert torch.equal(master(ours, p), q.detach())
            assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])
    assert any(not torch.equal(p.detach().float(), q) for p, q in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("adamw", [{}, {"fused": True}, {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}])
def test_a_step_of_adamw_is_that_of_float32_weights(adamw, bits):
    shapes = (6,), (5, 4), (3, 2, 2)
    starts = [torch.tensor(normal(7, shape)).bfloat16() for shape in shapes]
    narrow, wide = ([nn.Parameter(each.to(dtype)) for each in starts] for dtype in (torch.bfloat16, torch.float32))
    ours = MuonClip([dict(params=narrow, use="adamw")], 0.05, qk_clip=None, adamw=adamw, master_weight_bits=bits)
    theirs = MuonClip([dict(params=wide, use="adamw")], 0.05, qk_clip=None, adamw=adamw)
    for step in range(6):
        for index, (p, q) in enumerate(zip(narrow, wide, strict=True)):
            p.grad = torch.tensor(normal(100 * step + index, p.shape)).bfloat16()
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        round_masters(wide, bits)
        for p, q in zip(narrow, wide, strict=True):
            assert torch.equal(master(ours, p), q.detach())
            for moment in ("exp_avg", "exp_avg_sq"):
                assert ours.state[p][moment].dtype == torch.float32
                assert torch.equal(ours.state[p][moment], theirs.state[q][moment])


def test_many_masters_are_updated_some_at_a_time(monkeypatch):
    import muonclip.torch.optimizer.adamw as module

    updated = []
    for at_once in (2**24, 9):
        monkeypatch.setattr(module, "_MASTERS_AT_ONCE", at_once)
        model, optimizer = build(master_weight_bits=24)
        train(model, optimizer, range(2))
        updated.append(list(model.parameters()))
    assert all(map(torch.equal, *updated))


def test_small_updates_add_up():
    """A bf16 weight alone would never move."""
    for bits, moved in ((None, 0.0), (24, 0.1), (32, 0.1)):
        parameter = nn.Parameter(torch.full((4, 4), 8.0).bfloat16())
        optimizer = Muon([parameter], lr=1e-3, weight_decay=0.0, master_weight_bits=bits)
        for _ in range(100):
            parameter.grad = torch.eye(4).bfloat16()
            optimizer.step()
        change = 8.0 - (master(optimizer, parameter) if bits else parameter.detach().float()).diagonal().mean().item()
        assert change == pytest.approx(moved, rel=0.3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["gqa", "mla", "fused_interleaved"])
def test_the_clip_scales_the_master_and_the_parameter_is_its_rounding(kind, bits):
    """At rate 0 only the clip acts, so the masters are the float32 weights that it would have scaled."""
    model, optimizer = build(kind, master_weight_bits=bits)
    train(model, optimizer, range(3))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    wide = copy.deepcopy(model).float()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        q.data.copy_(master(optimizer, p))
    before = {name: p.detach().clone() for name, p in wide.named_parameters()}
    with torch.no_grad():
        for rows in (*model.layers[0].qk_projection().query, *model.layers[0].qk_projection().query_facing_shared):
            for p, axis in rows.parameters():
                scaled = master(optimizer, p)
                rows.of(scaled, axis)[1] *= 1.7
                split_into(scaled, p.detach(), errors_of(optimizer.state[p]))
                for name, q in model.named_parameters():
                    if q is p:
                        before[name] = master(optimizer, p)
    train(model, optimizer, [3])
    report = optimizer.qk_clip.report()
    assert 0 < report.clipped_heads < 8
    changed = set()
    for name, p in model.named_parameters():
        now = master(optimizer, p)
        ratio = (now / before[name])[before[name] != 0]
        gammas = torch.cat(list(factors_of(report))).unique()
        off = (ratio[:, None] - torch.cat([gammas, torch.ones(1)])).abs().min(1).values
        assert off.max() <= (2.0**-23 if bits == 32 else 2.0**-15), name
        if not torch.equal(now, before[name]):
            changed.add(name)
        assert torch.equal(p.detach(), nearest(now))
    assert changed


def factors_of(report):
    for layer in report.layers.values():
        yield layer.gamma
        yield layer.gamma.sqrt()


def nearest(wide):
    weight = torch.empty_like(wide, dtype=torch.bfloat16)
    split_into(wide, weight, [torch.empty_like(wide, dtype=dtype) for dtype in (torch.int8, torch.uint8)])
    return weight


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_that_was_set_between_steps_is_what_the_next_step_starts_from(bits):
    """A master that is kept whole would write the old weights over those of another checkpoint, in silence."""
    model, optimizer = build(master_weight_bits=bits)
    train(model, optimizer, range(3))
    other, _ = build()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    model.load_state_dict(other.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.qk_clip.tau = float("inf")
    train(model, optimizer, [3])
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_were_swapped_out_and_in_again_have_their_masters(bits):
    model, optimizer = build(master_weight_bits=bits)
    straight, other = build(master_weight_bits=bits)
    for each in ((model, optimizer), (straight, other)):
        train(*each, range(3))
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(kept)
    train(model, optimizer, range(3, 5))
    train(straight, other, range(3, 5))
    assert all(map(torch.equal, model.parameters(), straight.parameters()))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16])
def test_resumes_to_the_bit(tmp_path, bits, momentum_dtype):
    options = dict(master_weight_bits=bits, momentum_dtype=momentum_dtype)
    straight, optimizer = build("mla", **options)
    train(straight, optimizer, range(6))
    model, other = build("mla", **options)
    train(model, other, range(3))
    torch.save((model.state_dict(), other.state_dict()), tmp_path / "checkpoint.pt")
    model, other = build("mla", **options, lr=0.9)
    for target, state in zip((model, other), torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        target.load_state_dict(state)
    train(model, other, range(3, 6))
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[q].keys() == other.state[p].keys()
        for name, value in optimizer.state[q].items():
            assert value.dtype == other.state[p][name].dtype
            assert torch.equal(value, other.state[p][name])


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_without_masters_begins_them_at_its_parameters(bits):
    model, optimizer = build()
    train(model, optimizer, range(3))
    again, other = build(master_weight_bits=bits)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert all(group["master_weight_bits"] == bits for group in other.param_groups)
    other.state_dict()
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(master(other, p), q.detach().float())
        moment = "momentum_buffer" if "momentum_buffer" in other.state[p] else "exp_avg"
        assert other.state[p][moment].dtype == torch.float32
        assert torch.equal(other.state[p][moment], optimizer.state[q][moment].float())
    train(again, other, range(3, 5))


def with_bits(saved, bits):
    """A saved state whose groups say so many bits."""
    return {**saved, "param_groups": [{**group, "master_weight_bits": bits} for group in saved["param_groups"]]}


@pytest.mark.parametrize("when", ["saved", "loaded"])
def test_masters_of_24_bits_go_on_with_32_as_they_are(when):
    model, optimizer = build("mla", master_weight_bits=24)
    train(model, optimizer, range(3))
    again, other = build("mla", master_weight_bits=32)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(with_bits(optimizer.state_dict(), 32 if when == "saved" else 24))
    for group in other.param_groups:
        group["master_weight_bits"] = 32
    if when == "loaded":
        other.state_dict()  # makes what is not there
    wide = copy.deepcopy(again).float()
    for p, q, r in zip(model.parameters(), again.parameters(), wide.parameters(), strict=True):
        assert not other.state[q]["weight_error_low"].any()
        assert torch.equal(master(other, q), master(optimizer, p))
        r.data.copy_(master(optimizer, p))
    train(again, other, [3])
    assert any(other.state[p]["weight_error_low"].any() for p in again.parameters())


def test_masters_of_32_bits_are_refused_by_24_and_those_of_float32_weights_are_left_out():
    model, optimizer = build(master_weight_bits=32)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    _, other = build(master_weight_bits=24)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"weight_error_low of 'layers.0.q.weight' in the checkpoint is of masters of 32 bits"
    ):
        other.load_state_dict(with_bits(saved, 24))
    assert str(other.state_dict()) == str(before)
    cut = with_bits(copy.deepcopy(saved), 24)
    for own in cut["state"].values():
        del own["weight_error_low"]
    again, other = build(master_weight_bits=24)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(cut)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(master(other, q), master(optimizer, p), rtol=2.0**-15, atol=0)
    for group in optimizer.param_groups:
        group["master_weight_bits"] = 24
    with pytest.raises(ValueError, match=r"its weight_error_low is torch.uint8"):
        train(model, optimizer, [2])
    wide, optimizer = build(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"layers.0.q.weight is torch.float32 here"):
        optimizer.load_state_dict(saved)
    train(wide, optimizer, range(2))
    assert not any("weight_error" in own for own in optimizer.state.values())


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("weight_error", lambda _: None, "no weight_error, whose last bits"),
        ("weight_error", lambda error: error.short(), "is torch.int16, not torch.int8"),
        ("weight_error_low", lambda error: error.char(), "is torch.int8, not torch.uint8"),
        ("weight_error_low", lambda error: error[:1], "weight_error_low"),
    ],
)
@pytest.mark.parametrize("use", ["muon", "adamw"])
def test_errors_that_are_not_as_they_were_made_are_refused(use, part, change, match):
    parameters = [("w", nn.Parameter(torch.randn(4, 6).bfloat16()))]
    optimizer = MuonClip([dict(params=parameters, use=use)], qk_clip=None, master_weight_bits=32)
    saved = optimizer.state_dict()
    value = change(saved["state"][0].pop(part))
    if value is not None:
        saved["state"][0][part] = value
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)


def test_wide_parameters_are_their_own_masters_and_float16_is_refused():
    same = []
    for options in ({}, {"master_weight_bits": 24}):
        model, optimizer = build(dtype=torch.float32, **options)
        train(model, optimizer, range(2))
        assert not any("weight_error" in own for own in optimizer.state.values())
        same.append(list(model.parameters()))
    assert all(map(torch.equal, *same))
    for use in ("muon", "adamw"):
        half = nn.Parameter(torch.randn(4, 6).half())
        with pytest.raises(ValueError, match=r"master_weight_bits=24, but head.weight is torch.float16"):
            MuonClip([dict(params=[("head.weight", half)], use=use)], qk_clip=None, master_weight_bits=24)
    model, optimizer = build(master_weight_bits=32)
    model.half()
    with pytest.raises(ValueError, match=r"is torch\.float16"):
        train(model, optimizer, range(1))


@pytest.mark.parametrize("bits", BITS)
def test_float32_weights_go_out_and_in(bits):
    model, optimizer = build(master_weight_bits=bits)
    train(model, optimizer, range(3))
    wide = optimizer.fp32_state_dict(model)
    assert wide.keys() == model.state_dict().keys()
    assert all(value.dtype == torch.float32 for value in wide.values())
    assert any(not torch.equal(value, model.state_dict()[name].float()) for name, value in wide.items())
    single, _ = build(dtype=torch.float32)
    single.load_state_dict(wide)
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        assert torch.equal(master(optimizer, p), q.detach())
    again, other = build(master_weight_bits=bits)
    other.load_fp32_state_dict(again, wide)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(master(other, q), master(optimizer, p))
    half, plain = build()
    assert all(map(torch.equal, plain.fp32_state_dict(half).values(), half.state_dict().values()))


@pytest.mark.parametrize("bits", [16, 23, 24.0, True, "24", "float32"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"master_weight_bits=.*; use 32 for float32 masters of bf16 parameters"):
        build(master_weight_bits=bits)


def test_a_group_may_have_its_own_and_without_them_nothing_is_saved_of_them():
    p, q = (nn.Parameter(torch.randn(4, 6).bfloat16()) for _ in range(2))
    optimizer = Muon([dict(params=[p], master_weight_bits=24), dict(params=[q])])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert [*optimizer.state[p]] == ["momentum_buffer", "weight_error"]
    assert [*optimizer.state[q]] == ["momentum_buffer"]
    assert "master_weight_bits" not in optimizer.state_dict()["param_groups"][1]


def test_the_plan_says_what_has_masters():
    model, optimizer = build(master_weight_bits=24)
    model.embed.float()
    _, plain = build()
    assert "master weights" not in str(plain.plan)
    model.embed.bfloat16()
    train(model, optimizer, [0])
    errors = [own["weight_error"].nbytes for own in optimizer.state.values()]
    said = (
        f"master weights of 24 bits: {len(errors)} bf16 parameters, weight_error {sum(errors) / 1024:.4g} KiB; 0 wider"
    )
    assert said in str(optimizer.plan)
    assert "master_weight_bits = 24" in str(optimizer.plan)
    _, wide = build(dtype=torch.float32, master_weight_bits=32)
    names = "weight_error and weight_error_low"
    assert f"of 32 bits: 0 bf16 parameters, {names} 0 B; {len(errors)} wider parameters are their own" in str(wide.plan)


def test_no_warning_is_given_of_weights_that_come_back():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = build(master_weight_bits=24, lr=0.2, tau=0.2)
        train(model, optimizer, range(10))
        assert optimizer.qk_clip.report().clipped_heads


@pytest.mark.slow
def test_sharded_masters_are_those_of_whole_weights_and_go_on_at_another_number_of_ranks(tmp_path):
    """Four ranks save and two load, with their states in host memory. Each gathers all, and loads it, to the bit."""
    for number, world in enumerate((4, 2)):
        run_ranks(world, WORKER, number, tmp_path)
        for rank in range(world):
            found = json.loads((tmp_path / f"{number}-{rank}.json").read_text())
            assert found["error"] < 2.0**-14
            assert found["offloaded"]
            assert found["sharded"]
            assert found["gathered"]
            assert found["scattered"]
            assert found.get("replicas", 0.0) < 1e-6  # matrices that iterate in other company
            assert found["clipped"]
            assert found["clipped alike"]
            assert found.get("loaded", True)
            assert found.get("resumed", 0.0) < 2.0**-14
