"""Twenty steps of the reference model, the clip firing, under torch's engines: the single process' curve."""

import json
from pathlib import Path

import pytest
from forked_ranks import run_ranks
from parallel_training import make_model, make_optimizer, train

WORKER = Path(__file__).parents[1] / "support" / "engines_update_worker.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone():
    model = make_model()
    return train(model, make_optimizer(model), 20)


@pytest.fixture(scope="module", params=[2, 4, 8])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    run_ranks(request.param, WORKER, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_the_curves_are_the_single_process_s(alone, ranks):
    losses, norms, clipped = alone
    assert sum(clipped) > 50
    assert len(ranks[0]) == (3 if len(ranks) == 2 else 5)
    for engine, first in ranks[0].items():
        assert first["losses"] == pytest.approx(losses, rel=1e-4), engine
        assert first["norms"] == pytest.approx(norms, rel=1e-3), engine
        assert first["clipped"] == clipped, engine
        assert all(rank[engine]["alike"] for rank in ranks), engine


def test_each_matrix_is_iterated_once_and_the_bytes_are_the_plan_s(ranks):
    world, width = len(ranks), 4
    for engine, first in ranks[0].items():
        total = 0
        for rank in ranks:
            sent = dict(rank[engine]["sent"])
            del sent["allreduce_"]  # the clip's maxima
            if engine == "three ways":
                continue  # Gram matrices may be summed by all-reduces as well
            assert rank[engine]["calls"]["allreduce_"] == 1
            assert sum(sent.values()) == rank[engine]["planned"], engine
            total += sum(sent.values())
        cut = first["elements"] * (world - 1) / world * width
        most = {
            "ddp": cut * world,
            "fsdp": 2 * cut,
            "hsdp": (2 * (world / 2 - 1) / (world / 2) + 1) * first["elements"] * width,
        }
        assert total <= most.get(engine.partition(",")[0], 0) * 1.0001, engine
        if engine == "three ways":
            continue
        flops = [rank[engine]["flops"] for rank in ranks]
        assert sum(flops) == sum(rank["fsdp"]["flops"] for rank in ranks), engine
    assert "replicas" in ranks[0]["ddp"]["plan"]
    assert "shards" in ranks[0]["fsdp"]["plan"]
