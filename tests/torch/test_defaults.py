"""State and statistics do not depend on torch's default dtype and device, which are the user's."""

from contextlib import contextmanager

import pytest
import torch
from tiny_attention import TinyModel, UndeclaredAttention
from torch import nn

from muonclip.core import MatrixLayout, orthogonalize
from muonclip.torch import Muon, MuonClip, QKClip, attention
from muonclip.torch.distributed import clip_grad_norm_
from muonclip.torch.update.matrix_views import row_index

DEFAULTS = [torch.bfloat16, torch.float64, torch.device("meta")]


@contextmanager
def default(given):
    before = torch.get_default_dtype()
    if isinstance(given, torch.dtype):
        torch.set_default_dtype(given)
    try:
        with given if isinstance(given, torch.device) else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


class Undeclared(TinyModel):
    """Its attention is found by a trace."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([UndeclaredAttention() for _ in range(2)])


def trained(make, given, steps=4):
    """What is left of a training, from the optimizer's construction on: weights, state and report."""
    torch.manual_seed(0)
    model = make()
    tokens = torch.randint(0, 13, (2, 9))
    with default(given):
        optimizer = MuonClip(model, lr=1e-2, qk_clip=QKClip(model, tau=0.05, observe="always"))
        norms = []
        for _ in range(steps):
            model.loss(tokens).backward()
            norms.append(clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
            optimizer.zero_grad()
        report = optimizer.qk_clip.report()
        state = optimizer.state_dict()
    assert report.clipped_heads
    return dict(weights=dict(model.state_dict()), state=state, report=report.to_dict(), norms=norms)


@pytest.mark.parametrize("given", DEFAULTS, ids=str)
@pytest.mark.parametrize("kind", ["gqa", "mla", "fused_interleaved", "undeclared"])
def test_a_training_is_the_same_to_the_bit(kind, given):
    def make():
        return Undeclared() if kind == "undeclared" else TinyModel(kind)

    expected, found = trained(make, torch.float32), trained(make, given)
    for part, value in expected.items():
        assert same(value, found[part]), part


@pytest.mark.parametrize("given", DEFAULTS, ids=str)
def test_certified_heads_and_given_masks_are_the_same(given):
    def observed(given):
        torch.manual_seed(0)
        model = TinyModel()
        clip = QKClip(model, tau=100.0)
        x, allowed = torch.randn(2, 40, 10), torch.ones(40, 40, dtype=torch.bool).tril(3)
        with default(given):
            y = [layer(x, attn_mask=allowed) for layer in model.layers]
            q, k, v = model.layers[0].qkv_of(x)
            y.append(attention(q, k, v, attn_mask=allowed, softcap=5.0))
            clip.before_update()
        layers = clip.last_layers.values()
        return [*y, *(part for each in layers for part in (each.bound, each.exact, each.gamma))]

    expected = observed(torch.float32)
    assert not bool(expected[4].all()), "some heads are certified"
    assert same(expected, observed(given))


@pytest.mark.parametrize("given", DEFAULTS, ids=str)
def test_rows_that_follow_no_stride_are_found_on_their_device(given):
    def weight(given):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(12, 6))
        parameter.grad = torch.randn(12, 6)
        with default(given):
            Muon([dict(params=[parameter], layout=MatrixLayout(blocks=(2, 4), repeats=2))]).step()
        return parameter.detach()

    expected = weight(torch.float32)
    row_index.cache_clear()
    assert torch.equal(weight(given), expected)


@pytest.mark.parametrize("given", DEFAULTS, ids=str)
def test_the_count_of_steps_goes_on_as_torch_s_does(given):
    def last(make):
        vector, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
        with default(given):
            optimizer = make(vector, matrix)
            for _ in range(260):
                vector.grad, matrix.grad = torch.full((3,), 0.1, dtype=torch.float32, device="cpu"), None
                optimizer.step()
        return vector.detach(), optimizer.state[vector]["step"]

    betas = (0.9, 0.999)
    ours, count = last(
        lambda vector, matrix: MuonClip(
            [dict(params=[vector], use="adamw"), dict(params=[matrix], use="muon")],
            lr=1e-3, weight_decay=0.0, qk_clip=None, adamw=dict(betas=betas),
        )
    )  # fmt: skip
    theirs, _ = last(lambda vector, _: torch.optim.AdamW([vector], lr=1e-3, weight_decay=0.0, betas=betas))
    assert (count, count.dtype, count.device.type) == (260, torch.float32, "cpu")
    assert torch.equal(ours, theirs)


def test_a_count_that_was_saved_in_bfloat16_goes_on():
    vector, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    optimizer = MuonClip([dict(params=[vector], use="adamw"), dict(params=[matrix], use="muon")], qk_clip=None)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(256.0, dtype=torch.bfloat16)
    optimizer.load_state_dict(saved)
    vector.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[vector]["step"] == 257


@pytest.mark.parametrize("given", DEFAULTS, ids=str)
def test_what_was_not_observed_is_named(given):
    model = TinyModel()
    clip = QKClip(model, tau=100.0)
    tokens = torch.randint(0, 13, (1, 9))
    with default(given):
        model.loss(tokens).backward()
        model.layers[1].max_logits.reset()
        with pytest.raises(RuntimeError, match=r"observed no forward of layers\.1 since"):
            clip.step()


def test_a_matrix_is_orthogonalised_on_its_own_device():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        found = orthogonalize(x, xp=torch, dtype=torch.bfloat16)
    assert found.device == x.device
    torch.testing.assert_close(found, orthogonalize(x, xp=torch, dtype=torch.bfloat16))
