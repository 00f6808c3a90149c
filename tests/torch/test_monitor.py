"""What is watched: logits against a dense probe, matrices against linear algebra; nothing of the training changes."""

import contextlib
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import run_ranks
from torch import nn

from muonclip.torch import Monitor, MuonClip, QKClip

WIDTH, HEADS, LENGTH = 20, 4, 9


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * 6)
        self.out = nn.Linear(HEADS * 6, WIDTH)

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, 6)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.up = nn.Linear(WIDTH, 30)

    def forward(self, tokens):
        return self.up(self.blocks(self.embedding(tokens)))


def data(step):
    return torch.randint(32, (3, LENGTH), generator=torch.Generator().manual_seed(step))


def made(optimizer):
    torch.manual_seed(0)
    model = Model()
    if optimizer == "muonclip":
        return model, MuonClip(model, lr=1e-2, qk_clip=QKClip(model, tau=0.3, observe="always"))
    if optimizer == "no clip":
        return model, MuonClip(model, lr=1e-2, qk_clip=None)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer, number):
    model(data(number)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def largest_logits(model, tokens):
    x, found = model.embedding(tokens), {}
    for index, block in enumerate(model.blocks):
        q, k, _ = block.heads(x)
        logits = (q.double() @ k.double().mT / math.sqrt(6)).masked_fill(
            torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -math.inf
        )
        found[f"blocks.{index}"] = logits.amax((0, 2, 3)).float()
        x = block(x)
    return found


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw", "no clip"])
def test_watching_changes_no_bit(optimizer):
    results = []
    for watched in (False, True):
        model, own = made(optimizer)
        monitor = Monitor(model, own) if watched else None
        for number in range(4):
            step(model, own, number)
            if monitor:
                monitor.scalars()
        results.append((model.state_dict(), torch.get_rng_state()))
    (one, before), (other, after) = results
    assert torch.equal(before, after)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_logits_are_those_of_the_step(optimizer):
    model, own = made(optimizer)
    monitor = Monitor(model, own)
    for number in range(3):
        with torch.no_grad():
            expected = largest_logits(model, data(number))
        step(model, own, number)
        highest = max(each.max().item() for each in expected.values())
        assert monitor.scalars("")["max_logit"] == pytest.approx(highest, rel=1e-5)
    details = monitor.scalars("", details=True)
    assert details["bound/blocks.1"] == pytest.approx(expected["blocks.1"].max().item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw", "no clip"])
def test_matrices_are_those_of_linear_algebra(optimizer):
    model, own = made(optimizer)
    monitor = Monitor(model, own)
    for number in range(2):
        before = copy.deepcopy(model.state_dict())
        step(model, own, number)
    seen = monitor.matrices()
    assert seen.keys() == {name for name, p in model.named_parameters() if p.ndim > 1}
    state = own.state[model.blocks[0].qkv.weight]
    momentum = state["momentum_buffer"] if "momentum_buffer" in state else state["exp_avg"]
    for name, parts in (("blocks.0.qkv.weight", 3), ("up.weight", 1)):
        after = dict(model.named_parameters())[name].detach()
        if optimizer == "no clip" and "qkv" in name:
            parts = len(seen[name].update_rms)  # as much as shows without attention
        matrices = zip(before[name].chunk(parts), after.chunk(parts), strict=True)
        for index, (old, new) in enumerate(matrices):
            moved = new - old
            of = {field: getattr(seen[name], field)[index].item() for field in seen[name].__slots__}
            assert of["relative_update"] == pytest.approx((moved.norm() / old.norm()).item(), rel=1e-4)
            assert of["update_rms"] == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-4)
            for field, matrix in (("weight_spectral_norm", new), ("update_spectral_norm", moved)):
                sigma = torch.linalg.matrix_norm(matrix, 2).item()
                assert 0.85 * sigma < of[field] <= sigma * (1 + 1e-5)
            rank = (new.norm() / torch.linalg.matrix_norm(new, 2)).square().item()
            assert rank * (1 - 1e-4) <= of["stable_rank"] < 1.4 * rank
            if "qkv" in name:
                assert of["momentum_norm"] == pytest.approx(momentum.chunk(parts)[index].norm().item(), rel=1e-4)


def test_one_dict_of_plain_numbers():
    model, own = made("adamw")
    monitor = Monitor(model, own)
    assert monitor.scalars() == {}
    step(model, own, 0)
    values = monitor.scalars()
    assert all(type(value) is float and math.isfinite(value) for value in values.values())
    assert {"monitor/max_logit", "monitor/bound", "monitor/relative_update.max", "monitor/momentum_norm.median"} <= {
        *values
    }
    assert (
        monitor.scalars("", details=True)["update_rms/up.weight"] == monitor.matrices()["up.weight"].update_rms.item()
    )


def test_matrices_are_looked_at_as_often_as_asked():
    model, own = made("adamw")
    monitor = Monitor(model, own, every=3, logits=False)
    seen = []
    for number in range(5):
        step(model, own, number)
        seen.append(monitor.matrices()["up.weight"])
    assert seen[0] is seen[1] is seen[2]
    assert seen[3] is seen[4] is not seen[0]


def test_logits_of_an_evaluation():
    model, own = made("adamw")
    model.train()
    model.up.eval()
    monitor = Monitor(model, own)
    step(model, own, 0)
    with torch.no_grad():
        found, expected = monitor.evaluate(data(7)), largest_logits(model, data(7))
    for name, maxima in expected.items():
        torch.testing.assert_close(found[name], maxima, rtol=1e-5, atol=0)
    assert model.training
    assert not model.up.training
    step(model, own, 1)  # sees its own forward alone
    with torch.no_grad():
        model(data(2))
    model(data(2)).sum().backward()
    with pytest.raises(RuntimeError, match="a forward of the training was observed"):
        monitor.evaluate(data(7))


@pytest.mark.parametrize("raises", [False, True])
def test_an_evaluation_is_no_forward_of_the_training(raises):
    """The next step clips by its own forward alone, whatever the evaluation saw, and however it ended."""
    results = []
    for evaluated in (False, True):
        model, own = made("muonclip")
        step(model, own, 0)
        if evaluated:
            with torch.no_grad():
                model.embedding.weight.mul_(20)
                hook = model.up.register_forward_hook(lambda *_: 1 / 0) if raises else None
                with pytest.raises(ZeroDivisionError) if raises else contextlib.nullcontext():
                    Monitor(model, own).evaluate(data(5))
                if hook:
                    hook.remove()
                model.embedding.weight.div_(20)
        step(model, own, 1)
        results.append(own.qk_clip.report().to_dict()["layers"])
    for one, other in zip(*(each.values() for each in results), strict=True):
        assert one["max_logits"] == pytest.approx(other["max_logits"], rel=1e-5)
        assert one["gamma"] == pytest.approx(other["gamma"], rel=1e-5)


def test_a_clip_that_is_there_is_shown_and_goes_on():
    model, own = made("adamw")
    clip = QKClip(model, tau=0.2, observe="always")
    clip.attach(own)
    monitor = Monitor(model, own, clip=clip)
    step(model, own, 0)
    assert clip.report().clipped_heads
    assert monitor.scalars("")["max_logit"] == clip.report().max_logit
    monitor.remove()
    step(model, own, 1)
    assert clip.report().steps == 2


def test_weights_before_a_step_that_failed_are_not_compared_with_later_ones():
    model, own = made("adamw")
    monitor = Monitor(model, own, every=2, logits=False)
    failing = own.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, own, 0)
    failing.remove()
    step(model, own, 1)
    assert monitor.matrices() == {}
    step(model, own, 2)
    assert monitor.matrices()


@pytest.mark.slow
def test_matrices_that_ranks_share_are_seen_whole(tmp_path):
    """FSDP2 and tensor parallelism on two ranks: rows, columns, uneven rows and a stack of experts."""
    run_ranks(2, Path(__file__).parents[1] / "support" / "monitor_worker.py", tmp_path)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert one == other
    for case, (matrices, scalars, collectives) in one.items():
        whole_matrices, whole_scalars, _ = one[f"{case.partition(',')[0]}, whole"]
        assert collectives == ([] if "whole" in case else ["allreduce_"] * 18)
        assert scalars == pytest.approx(whole_scalars, rel=1e-3)
        assert matrices.keys() == whole_matrices.keys()
        for name, fields in matrices.items():
            for field, values in fields.items():
                assert values == pytest.approx(whole_matrices[name][field], rel=1e-3), (case, name, field)
    assert len(one["adamw, fsdp"][0]["experts"]["stable_rank"]) == 3


def test_parameters_that_an_engine_flattened_are_refused_before_anything_is_put_on():
    model, own = made("adamw")
    model.embedding.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"embedding\.weight is sharded by DeepSpeed"):
        Monitor(model, own)
    assert not own._optimizer_step_pre_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_removed_it_leaves_nothing():
    model, own = made("adamw")
    monitor = Monitor(model, own)
    step(model, own, 0)
    seen = monitor.matrices()["up.weight"]
    monitor.remove()
    step(model, own, 1)
    assert monitor.matrices()["up.weight"] is seen
    assert not own._optimizer_step_pre_hooks
    assert not own._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda model, own: dict(model=3, optimizer=own), TypeError, "model=3 is a int"),
        (lambda model, own: dict(model=model, optimizer=model), TypeError, "a torch optimizer"),
        (lambda model, own: dict(model=model, optimizer=own, every=0), ValueError, "every=0"),
        (lambda model, own: dict(model=model, optimizer=own, logits="x"), TypeError, "logits='x'"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    model, own = made("adamw")
    with pytest.raises(error, match=message):
        Monitor(**arguments(model, own))
