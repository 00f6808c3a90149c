"""The reference model over ranks: the same losses and gradients as of the whole model on the whole batch."""

import json
import math
from pathlib import Path

import pytest
from forked_ranks import run_ranks

from muonclip.models import MoEConfig
from muonclip.models.parallel import Parallelism

WORKER = Path(__file__).parents[1] / "support" / "parallel_worker.py"

GQA = {"attention": "gqa", "qk_norm": True}
CASES = {
    2: {
        "shards 2": {"degrees": {"shards": 2}},
        "experts 2 of 2": {"degrees": {"shards": 2, "experts": 2}},
        "experts 2 of 2, fp32": {"degrees": {"shards": 2, "experts": 2}, "dtype": "float32"},
        "a rank without tokens": {"degrees": {"shards": 2, "experts": 2}, "one_expert": True},
        "a rank without tokens, fp32": {"degrees": {"shards": 2, "experts": 2}, "one_expert": True, "dtype": "float32"},
        "replicas 2": {"degrees": {"replicas": 2, "experts": 2}},
        "tensor 2": {"degrees": {"tensor": 2}},
        "tensor 2, fp32": {"degrees": {"tensor": 2}, "dtype": "float32"},
        "tensor 2, gqa": {"degrees": {"tensor": 2}, "config": GQA},
        "tensor 2, direct queries, normed": {
            "degrees": {"tensor": 2},
            "config": {"q_lora_rank": None, "qk_norm": True},
        },
        "tensor 2, mha, none shared": {
            "degrees": {"tensor": 2},
            "config": {"attention": "mha", "num_shared_experts": 0},
        },
        "bf16": {"degrees": {"shards": 2, "experts": 2}, "dtype": "float32", "mixed_precision": True},
        "bf16, recomputed": {
            "degrees": {"tensor": 2},
            "dtype": "float32",
            "mixed_precision": True,
            "recompute": True,
        },
        "recompute": {"kind": "recompute", "degrees": {"shards": 2, "experts": 2}},
        "recompute, tensor": {"kind": "recompute", "degrees": {"tensor": 2}, "config": GQA},
        "offload": {
            "kind": "stored",
            "degrees": {"shards": 2, "experts": 2},
            "options": {"offload_activations": True},
        },
        "float8, offload": {
            "kind": "stored",
            "degrees": {"shards": 2, "experts": 2},
            "options": {"store_activations": "float8", "offload_activations": True},
        },
        "float8, tensor": {
            "kind": "stored",
            "degrees": {"tensor": 2},
            "options": {"store_activations": "float8"},
        },
        "fill": {"kind": "fill", "degrees": {"shards": 2, "experts": 2}},
    },
    3: {"tensor 3": {"degrees": {"tensor": 3}, "config": {"num_heads": 6, "moe_intermediate_size": 24}}},
    4: {
        "shards 4, gqa": {"degrees": {"shards": 4}, "config": GQA},
        "hsdp 2 × 2": {"degrees": {"shards": 2, "replicas": 2}},
        "hsdp 2 × 2, experts 2": {"degrees": {"shards": 2, "replicas": 2, "experts": 2}, "config": GQA},
        "hsdp 2 × 2, experts 4": {"degrees": {"shards": 2, "replicas": 2, "experts": 4}},
        "experts 2 of 4": {"degrees": {"shards": 4, "experts": 2}},
        "experts 4 of 4": {"degrees": {"shards": 4, "experts": 4}},
        "experts 2 of 4, uneven": {"degrees": {"shards": 4, "experts": 2}, "config": {"num_experts": 6}},
        "shards 2 × tensor 2": {"degrees": {"shards": 2, "tensor": 2}},
        "shards 2 × tensor 2, gqa": {"degrees": {"shards": 2, "tensor": 2}, "config": GQA},
        "shards 2 × tensor 2, experts 2": {"degrees": {"shards": 2, "tensor": 2, "experts": 2}},
        "tensor 4": {"degrees": {"tensor": 4}, "config": {"moe_intermediate_size": 32}},
        "fill": {"kind": "fill", "degrees": {"shards": 2, "tensor": 2, "experts": 2}, "config": GQA},
        "checkpoint": {"kind": "checkpoint", "degrees": {"shards": 2, "tensor": 2, "experts": 2}},
    },
    8: {
        "shards 8": {"degrees": {"shards": 8}},
        "shards 8, experts 4": {"degrees": {"shards": 8, "experts": 4}, "config": GQA},
        "shards 4 × tensor 2, experts 2": {"degrees": {"shards": 4, "tensor": 2, "experts": 2}},
        "shards 4 × tensor 2, experts 2, uneven": {
            "degrees": {"shards": 4, "tensor": 2, "experts": 2},
            "config": {**GQA, "num_experts": 6},
        },
        "hsdp 2 × 2 × tensor 2, experts 2": {"degrees": {"shards": 2, "replicas": 2, "tensor": 2, "experts": 2}},
        "recompute": {"kind": "recompute", "degrees": {"shards": 4, "tensor": 2, "experts": 2}},
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By number of ranks and case; each number of ranks is started once, when first asked for."""
    made = {}

    def of(ranks, case):
        if ranks not in made:
            made[ranks] = {}  # of a failure, not to try again
            folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
            run_ranks(ranks, WORKER, folder, json.dumps(CASES[ranks]))
            made[ranks] = json.loads((folder / "0.json").read_text())
        return made[ranks][case]

    return of


def cases(*kinds):
    return [
        pytest.param(ranks, name, id=f"{ranks} ranks: {name}")
        for ranks, by_name in CASES.items()
        for name, case in by_name.items()
        if ("bf16" if case.get("mixed_precision") else case.get("kind", "compare")) in kinds
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), cases("compare"))
def test_losses_and_every_gradient_are_those_of_the_whole_model(results, ranks, case):
    found = results(ranks, case)
    single = CASES[ranks][case].get("dtype") == "float32"
    assert found["losses"] == pytest.approx(found["expected_losses"], abs=2e-6 if single else 1e-12)
    assert found["gradients"][0] <= (1e-5 if single else 1e-12)
    assert max(found["gradients"]) <= (1e-4 if single else 1e-10)  # after steps that are large on purpose
    assert found["expected_losses"][-1] < found["expected_losses"][0] - 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), cases("compare", "bf16"))
def test_ranks_agree_to_the_bit_and_begin_with_the_weights_they_were_given(results, ranks, case):
    found = results(ranks, case)
    assert found["weights"] == 0
    assert found["alike"]
    assert found["names"][0] == found["names"][1]
    assert all(found["bias"]) or "bf16" in case


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), cases("bf16"))
def test_mixed_precision_stays_near(results, ranks, case):
    found = results(ranks, case)
    assert found["losses"][0] != found["expected_losses"][0]
    assert found["losses"] == pytest.approx(found["expected_losses"], rel=0.02)
    assert found["all_gradients"][0] < 0.1  # a token near a tie meets another expert


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), cases("recompute"))
def test_recomputation_changes_no_bit_and_repeats_no_product_of_attention(results, ranks, case):
    found = results(ranks, case)
    assert found["equal"]
    calls = found["calls"]
    assert calls["_scaled_dot_product_flash_attention_for_cpu"] == [2, 2]
    assert calls["silu"][1] == 2 * calls["silu"][0] == 6  # dense, shared, routed
    assert calls["topk"] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), cases("stored"))
def test_stored_activations_change_no_loss_and_only_float8_changes_gradients(results, ranks, case):
    found = results(ranks, case)
    assert found["same_loss"]
    if "float8" not in case:
        assert found["equal"]
    else:
        assert 0 < found["angle"] < 0.06
        assert found["calls"]["topk"] == [1, 1]  # routed once


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), cases("fill"))
def test_a_model_from_the_meta_device_is_filled_as_a_whole_one(results, ranks, case):
    found = results(ranks, case)
    assert found["alike"]
    assert found["gains"]
    assert found["repeated"] < 0.02 * sum(found["elements"].values())  # parts are not copies of each other
    for name, deviation in found["deviations"].items():
        expected = 0.02 / (2 if "o_proj" in name or "down_proj" in name else 1)
        assert deviation == pytest.approx(expected, rel=5 / math.sqrt(2 * found["elements"][name])), name
    assert found["loss"] == pytest.approx(math.log(96), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), cases("checkpoint"))
def test_a_distributed_checkpoint_has_the_whole_model(results, ranks, case):
    assert all(results(ranks, case)["equal"].values())


@pytest.mark.slow
def test_where_parameters_lie(results):
    def lies(ranks, case, name):
        return tuple(results(ranks, case)["placements"][name])

    gate_up, queries = "layers.1.mlp.experts.gate_up_proj", "layers.1.attn.q_b_proj.weight"
    assert lies(4, "hsdp 2 × 2", queries) == (["Replicate()", "Shard(dim=0)"], {"replicas": 2, "shards": 2})
    assert lies(4, "experts 2 of 4", gate_up)[1] == {"expert_shards": 2, "experts": 2}
    assert lies(4, "experts 2 of 4, uneven", gate_up)[0] == ["Shard(dim=1)", "Shard(dim=0)"]
    placements, mesh = lies(8, "shards 4 × tensor 2, experts 2", queries)
    assert (placements[1], mesh) == ("Shard(dim=0)", {"shards": 4, "tensor": 2})
    placements, mesh = lies(8, "shards 4 × tensor 2, experts 2", gate_up)
    assert (len(placements), mesh) == (3, {"expert_shards": 2, "experts": 2, "tensor": 2})
    assert lies(8, "shards 4 × tensor 2, experts 2", "norm.weight") == (["Shard(dim=0)"], {"shards": 4})


@pytest.mark.parametrize(
    ("degrees", "world", "config", "named"),
    [
        ({"shards": 0}, 1, {}, "shards=0"),
        ({"tensor": True}, 1, {}, "tensor=True"),
        ({"shards": 2}, 8, {}, "Set shards=8"),
        ({"shards": 4, "experts": 3}, 4, {}, "experts=3 must divide replicas · shards = 4"),
        ({"shards": 16, "experts": 16}, 16, {}, "experts=16 must divide num_experts=8"),
        ({"tensor": 8}, 8, {}, "tensor=8 must divide num_heads=4"),
        ({"tensor": 4}, 4, {"attention": "gqa"}, "tensor=4 must divide num_kv_heads=2"),
        ({"tensor": 2}, 2, {"intermediate_size": 257}, "tensor=2 must divide intermediate_size=257"),
        (
            {"tensor": 4},
            4,
            {"moe_intermediate_size": 48},
            "tensor=4 must divide moe_intermediate_size=48 into multiples",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_named(degrees, world, config, named):
    with pytest.raises(ValueError, match=named):
        Parallelism(**degrees).check(MoEConfig.cpu(**config), world)


def test_degrees_that_fit():
    Parallelism(shards=4, replicas=2, experts=8, tensor=2).check(MoEConfig.cpu(), 16)
    assert Parallelism(shards=4, replicas=2, tensor=2).data == 8
