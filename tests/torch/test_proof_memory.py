"""What the proof holds in memory, and that what it leaves out is not missed."""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from muonclip.torch import QKClip
from muonclip.torch.discover import Inputs
from muonclip.torch.prove import attention_run
from muonclip.torch.prove.attention_run import no_heads
from muonclip.torch.prove.experiments import Experiments
from muonclip.torch.prove.thinned import Thinned

BATCH, HEADS, LENGTH, HEAD = 2, 3, 72, 4
WIDTH = HEADS * HEAD


class Eager(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x):
        return (each(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for each in (self.q, self.k, self.v))

    def forward(self, x):
        q, k, v = self.heads(x)
        logits = (q @ k.mT / 2).tanh() * 5
        return x + (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Kernel(Eager):
    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.heads(x))
        return x + y.transpose(1, 2).view(*x.shape)  # by the strides that the kernel leaves


class Gated(Kernel):
    def forward(self, x):
        return super().forward(x) * self.q(x).sigmoid()


def bytes_in(value):
    if dataclasses.is_dataclass(value):
        return sum(bytes_in(getattr(value, each.name)) for each in dataclasses.fields(value))
    leaves = [each for each in tree_leaves(value) if each is not value]
    return value.nbytes if isinstance(value, torch.Tensor) else sum(map(bytes_in, leaves))


def test_a_run_keeps_a_few_positions_of_every_attention_and_only_for_later_ones():
    model, x = nn.Sequential(*(Eager() for _ in range(6))), torch.randn(BATCH, LENGTH, WIDTH)
    probabilities = 4 * BATCH * HEADS * LENGTH * LENGTH
    experiments = Experiments(model, Inputs((x,), {}), no_heads, (), training=False)
    results = [call.result for call in experiments.base.calls]
    assert len(results) == 6
    assert 0 < max(map(bytes_in, results)) < probabilities / 4
    for replayed in (True, False):
        again = experiments.run((), replayed=replayed)
        assert [call.result for call in again.calls] == [None] * 6
        assert not again.caps
        assert all(map(torch.equal, again.returned, experiments.base.returned))


@pytest.mark.parametrize("kind", [Eager, Kernel])
def test_nothing_of_a_proof_waits_for_the_garbage_collector(kind, monkeypatch):
    kept = []

    class Counted(Thinned):
        @classmethod
        def of(cls, value):
            thinned = Thinned.of(value)
            kept.append(weakref.ref(thinned.rows))
            return thinned

    monkeypatch.setattr(attention_run, "Thinned", Counted)
    gc.collect()
    gc.disable()
    try:
        QKClip(nn.Sequential(kind(), kind()).eval(), example_inputs=torch.randn(BATCH, LENGTH, WIDTH))
        assert len(kept) >= 2
        assert not [each for each in kept if each() is not None]
    finally:
        gc.enable()


def test_positions_stand_for_those_behind_them_in_the_memory_format_of_the_result():
    whole = torch.randn(2, 40, 3, 5).transpose(1, 2)
    thinned = Thinned.of(whole)
    assert thinned.whole().shape == whole.shape
    assert thinned.whole().stride() == whole.stride()
    starts = [index * 40 // 16 for index in range(16)]
    expected = torch.tensor([max(start for start in starts if start <= t) for t in range(40)])
    assert torch.equal(thinned.whole(), whole[:, :, expected])
    few = whole[:, :, :16]
    assert torch.equal(Thinned.of(few), few)
    padded = whole.clone()
    padded[0, :, 0] = torch.nan  # would spread
    assert Thinned.of(padded).data_ptr() == padded.data_ptr()
    count = torch.ones(2, 40, 3, dtype=torch.long)
    assert torch.equal(Thinned.of(count), count)


def test_what_is_proven_of_long_sequences_is_what_holds():
    x = torch.randn(BATCH, LENGTH, WIDTH)
    clip = QKClip(nn.Sequential(Kernel(), Gated(), Eager()), example_inputs=x)
    assert [each.fixed for each in clip.projections.values()] == [(), ("query",), ()]


def test_the_rows_behind_an_output_that_only_the_last_position_shows_are_refused():
    class Leaking(Kernel):
        def forward(self, x):
            y = super().forward(x)
            return torch.cat([y[:, :-1], y[:, -1:] * (self.q(x) + self.k(x))[:, -1:].sigmoid()], 1)

    with pytest.raises(ValueError, match="feed something else"):
        QKClip(Leaking(), example_inputs=torch.randn(BATCH, LENGTH, WIDTH))
