"""Sequences divided between ranks whose keys pass in a ring: the maximum over steps and ranks is that of the whole."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from muonclip.torch import MaxLogits, QKClip, QKProjection, attention
from muonclip.torch.clip.ranks import ClipRanks
from muonclip.torch.logits import (
    AttentionMask,
    DividedHeads,
    heads_divided,
    is_context_parallel,
    measure_max_logits,
    run_ring,
    seen_in_steps,
)

WORKER = Path(__file__).parents[1] / "support" / "context_parallel_worker.py"


# One process


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield DeviceMesh("cpu", range(2))
    finally:
        dist.destroy_process_group()


def ring(mesh):
    return context_parallel(mesh, buffers=[torch.zeros(8, 12)], buffer_seq_dims=[0])


class ByFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_clip_that_comes_too_late_is_refused(mesh, no_other_patches):
    with ring(mesh), pytest.raises(ValueError, match="before you enter context_parallel"):
        QKClip(ByFunctional())
    clip = QKClip(ByFunctional())
    with ring(mesh):
        QKClip(ByFunctional()).remove()  # for what is there already, it is not too late
    clip.remove()


def test_masks_are_refused_where_torch_takes_none(mesh):
    q = torch.randn(2, 4, 4, 6)
    with ring(mesh), pytest.raises(ValueError, match="window was given within context_parallel"):
        attention(q, q, q, is_causal=True, window=2)


def test_a_ring_of_which_no_step_is_seen_is_an_error():
    with pytest.raises(ValueError, match="saw none of the steps"):
        run_ring(lambda: torch.zeros(2), lambda step: None)


def test_steps_are_shown_to_whoever_runs_the_ring_alone(mesh):
    """Each step with the queries, the keys and the mask that the kernel gets; what the kernel returns is returned."""
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)

    def two_steps(group, seq_dim, op, query, key, value, is_causal, **options):
        return [
            op(query, key, value, is_causal=is_causal, **options),
            op(query[:, :, 3:], key, value, is_causal=False, **options),
        ]

    def kernel(query, key, value, is_causal, scale):
        return query.shape, is_causal, scale

    patched, seen = seen_in_steps(two_steps), []
    call = lambda: patched(mesh.get_group(), 2, kernel, q, k, k, is_causal=True, scale=0.5)  # noqa: E731
    expected = [(q.shape, True, 0.5), (q[:, :, 3:].shape, False, 0.5)]
    assert run_ring(call, seen.append) == call() == expected
    assert [(each.q.shape, each.k.shape, each.is_causal, each.ranks) for each in seen] == [
        (q.shape, k.shape, True, {0, 1}),
        (q[:, :, 3:].shape, k.shape, False, {0, 1}),
    ]


def test_compiled_code_asks_anew_where_attention_is_replaced(monkeypatch):
    asked = torch.compile(lambda x: x + 1 if is_context_parallel() else x, backend="eager", fullgraph=True)
    assert asked(torch.zeros(())) == 0

    def replaced(*args):
        raise NotImplementedError

    replaced.__module__ = "torch.distributed.tensor.experimental"
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", replaced)
    assert asked(torch.zeros(())) == 1


class Shared(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.q, self.k = nn.Linear(6, heads * 3), nn.Linear(6, heads * 3)
        parts = dict(q=self.q, k=self.k, v=nn.Linear(6, heads * 3), num_heads=heads, max_logits=MaxLogits(heads))
        self.projection = QKProjection.mha(**parts)


def test_divided_heads_fill_their_own_part_of_the_statistic():
    statistic = Shared(8).projection.max_logits
    q, k = torch.randn(3, 8, 5, 3), torch.randn(3, 8, 5, 3)
    mask = AttentionMask(5, 5, is_causal=True)
    for rank in (3, 1):
        own = slice(2 * rank, 2 * rank + 2)
        with heads_divided(DividedHeads(rank, 4, frozenset(range(4)))):
            statistic.observe(q[:, own], k[:, own], scale=0.7, mask=mask)
    expected = measure_max_logits(q, k, scale=0.7, mask=mask)
    assert statistic.maximum[[2, 3, 6, 7]].tolist() == expected[[2, 3, 6, 7]].tolist()
    assert statistic.maximum[[0, 1, 4, 5]].tolist() == [-torch.inf] * 4


def test_heads_that_nobody_says_are_divided_are_not_taken_for_sequences():
    """Two sequences of half of the heads are as many rows as one sequence of all."""
    module = Shared(8)
    statistic = module.projection.max_logits
    heads = statistic.heads_in(torch.randn(2, 4, 5, 3))
    with pytest.raises(ValueError, match="called with 4 query heads"):
        statistic.first_of(heads)


def test_ranks_that_share_sequences_have_to_clip_together(mesh):
    projection = Shared(4).projection
    ranks, parameters = ClipRanks(), [DTensor.from_local(torch.ones(2), mesh, [Shard(0)])]
    projection.max_logits.sequence_ranks = frozenset((0, 1))
    assert ranks.group(parameters, {"layer": projection}).size() == 2
    projection.max_logits.sequence_ranks = frozenset((0, 2))
    with pytest.raises(ValueError, match=r"layer are divided between the ranks \[0, 2\], and of these only \[0\]"):
        ranks.group(parameters, {"layer": projection})
    projection.max_logits.reset()
    assert ranks.group(parameters, {"layer": projection}).size() == 2


# Four ranks: two that share each sequence, and two such pairs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Scenario → what each rank saw."""
    folder = tmp_path_factory.mktemp("context_parallel")
    run_ranks(4, WORKER, folder, timeout=600)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.slow
class TestOnRanks:
    def test_training_is_that_of_one_process(self, results):
        trained = {name: ranks for name, ranks in results.items() if "error" in ranks[0]}
        assert len(trained) == 9
        for name, ranks in trained.items():
            for each in ranks:
                assert each["found"], name
                assert each["error"] < 1e-9, name
                for ours, expected in each["seen"]:
                    for what in ("max_logits", "gamma"):
                        assert ours[what] == pytest.approx(expected[what], rel=1e-6), name
                assert sum(gamma < 1 for ours, _ in each["seen"] for gamma in ours["gamma"]) >= 8, name

    def test_heads_are_certified_by_the_bounds_of_the_steps(self, results):
        for each in results["certified"]:
            assert not each["exact"]
            assert each["slack"] > 0
            assert each["gamma"] == [[1.0] * 4] * 2

    def test_ranks_that_would_clip_by_their_part_alone_are_refused(self, results):
        for rank, each in enumerate(results["left out"]):
            pair = [rank - rank % 2, rank - rank % 2 + 1]
            assert f"divided between the ranks {pair}, and of these only [{rank}] clip together" in each["message"]
