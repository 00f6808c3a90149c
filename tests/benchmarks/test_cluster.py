"""The cluster on paper: its arithmetic against counts that were made another way, and against small real runs."""

import json
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torchrun import torchrun

from benchmarks.__main__ import main
from benchmarks.studies import cluster, cluster_fit
from benchmarks.studies.cluster_model import (
    IN_FP8,
    SELECTIVE,
    Unit,
    Weight,
    activation_bytes,
    activations,
    forward_flops,
    iteration_flops,
    recomputed_flops,
    units,
)
from benchmarks.studies.cluster_step import (
    Batch,
    Group,
    Layout,
    bubble_share,
    by_link,
    machines,
    memory_of,
    numel_of,
    parts_in_flight,
    predict,
    stages,
    states,
    update_plan,
)
from benchmarks.studies.product_times import ProductTimes
from muonclip.core import MatrixLayout
from muonclip.core.cost_model import flops
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

K2 = MoEConfig.k2()
K2_BATCH = Batch(67_108_864, 4096)
K2_LAYOUT = Layout(16, 4, 16, 16, 1, SELECTIVE, IN_FP8, offload=True, host_states=True)
TINY = MoEConfig.cpu(  # all widths differ, and a head's value is as wide as its query: nothing is padded
    num_layers=2,
    hidden_size=80,
    q_lora_rank=104,
    kv_lora_rank=72,
    qk_nope_head_dim=32,
    qk_rope_head_dim=24,
    v_head_dim=56,
    num_heads=5,
    num_kv_heads=5,
    intermediate_size=200,
    moe_intermediate_size=88,
    num_experts=6,
    num_experts_per_tok=3,
    vocab_size=97,
)


def total(of, **which):
    return sum(unit.numel(experts=experts) for unit in of for experts in which.get("experts", (False, True)))


def test_k2_has_the_parameters_that_its_sizes_make():
    """Written out for K2 alone, from the table of the report; which rounds to 1.04T, 32.6B active."""
    expert, d = 3 * 7168 * 2048, 7168
    attention = d * 1536 + 1536 + 1536 * 64 * 192 + d * (512 + 64) + 512 + 512 * 64 * 256 + 64 * 128 * d
    layer = attention + 2 * d
    others = 61 * layer + 3 * d * 18_432 + 60 * (384 * d + expert) + 2 * 163_840 * d + d
    assert total(units(K2), experts=[True]) == 60 * 384 * expert
    assert total(units(K2), experts=[False]) == others
    assert total(units(K2)) == pytest.approx(1.04e12, rel=0.015)
    assert others + 60 * 8 * expert == pytest.approx(32.6e9, rel=0.01)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_the_operations_are_those_that_torch_counts(attention):
    """Exactly, forward; causal attention counted by half; the products of the backward pass are twice those."""
    config = replace(TINY, attention=attention)
    aten, tokens = torch.ops.aten, torch.randint(97, (2, 64))
    products = {
        aten._grouped_mm: lambda a, b, *_, out_val=None, out_shape=None, **__: 2 * a[0] * a[1] * b[-1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v) // 2,
    }
    with FlopCounterMode(display=False, custom_mapping=products) as counted:
        loss = MoE(config).loss(tokens, tokens)
    ours = sum(forward_flops(config, unit) for unit in units(config))
    assert counted.get_total_flops() == ours * tokens.numel()
    with FlopCounterMode(display=False, custom_mapping=products) as backward:
        loss.backward()
    of = counted.get_flop_counts()["Global"]
    for kind, twice in backward.get_flop_counts()["Global"].items():
        assert twice == 2 * of[kind]


@pytest.mark.parametrize("dense", [0, 1])
def test_the_activations_are_those_that_autograd_keeps(dense):
    """The reference model keeps four things more, which fused kernels do not, and a few numbers for each token."""
    config = replace(TINY, num_layers=1, num_dense_layers=dense)
    model, tokens, kept = MoE(config), torch.randint(97, (2, 64)), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(tokens, tokens)
    seen = sum(size for where, size in kept.items() if where not in weights) / tokens.numel()
    c = config
    gates = c.intermediate_size if dense else (c.num_experts_per_tok + 1) * c.moe_intermediate_size
    normalised = 3 * c.hidden_size + c.q_lora_rank + c.kv_lora_rank
    more = 4 * (gates + normalised + c.num_heads * c.qk_nope_head_dim)  # silu(gate); x̂; k without position, twice
    ours = sum(activation_bytes(config, unit, width=4) for unit in units(config))
    assert ours + more <= seen <= 1.03 * (ours + more)


def test_what_is_recomputed_or_stored_in_fp8_is_that_much_less():
    layer = units(K2)[2]
    kinds = {}
    for kind, size in activations(K2, layer):
        kinds[kind] = kinds.get(kind, 0) + size
    whole = activation_bytes(K2, layer)
    assert whole == 2 * sum(kinds.values())
    selective = activation_bytes(K2, layer, recompute=SELECTIVE)
    assert whole - selective == 2 * sum(kinds[kind] for kind in SELECTIVE)
    narrow = activation_bytes(K2, layer, recompute=SELECTIVE, fp8=IN_FP8)
    assert selective - narrow == pytest.approx(sum((2 - 1 - 4 / 128) * kinds[kind] for kind in IN_FP8))
    again = 1536 * 64 * 192 + 512 * 64 * 256 + 8 * 7168 * 2048
    assert recomputed_flops(K2, layer, SELECTIVE) == 2 * again
    assert recomputed_flops(K2, layer, ()) == 0


def test_the_states_of_a_real_run_are_as_large():
    model = MoE(TINY)
    optimizer = MuonClip(model, qk_clip=None)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    memory = memory_of(TINY, units(TINY), 0, Layout(), Batch(64, 64), "muonclip")
    tensors = [each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    assert memory["momentum"] == pytest.approx(sum(each.nbytes for each in tensors if each.numel() > 1))
    assert memory["gradients"] == sum(parameter.grad.nbytes for parameter in model.parameters())
    assert memory["parameters"] == sum(parameter.nbytes for parameter in model.to(torch.bfloat16).parameters())


def test_the_ranks_together_have_each_state_once_and_attention_on_all_data_ranks():
    batch = Batch(64 * 4 * 2, 64)
    layout = Layout(expert=3, data=6)
    with pytest.raises(ValueError, match="must be a multiple"):
        batch.micro_batches(layout)
    memory = memory_of(TINY, units(TINY), 0, layout, Batch(64 * 6, 64), "adamw")
    experts, others = (total(units(TINY), experts=[each]) for each in (True, False))
    assert 6 * memory["masters"] == pytest.approx(4 * (experts + others))
    assert 6 * memory["momentum"] == pytest.approx(8 * (experts + others))
    assert 6 * memory["parameters"] == pytest.approx(2 * (2 * experts + 6 * others))
    assert 6 * memory["gradients"] == pytest.approx(4 * (2 * experts + 6 * others))
    halved = memory_of(TINY, units(TINY), 0, replace(layout, tensor=2), Batch(64 * 6, 64), "adamw")
    assert all(2 * halved[name] == pytest.approx(memory[name]) for name in memory)


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (4, 1), (4, 2), (3, 5), (16, 4)])
def test_a_schedule_that_is_played_waits_as_long_and_holds_as_much(pipeline, virtual):
    """Each stage works through its order as soon as it can; a backward part takes twice as long as a forward one."""
    count = 2 * pipeline
    layout = Layout(pipeline, virtual)
    makespan, held = played(pipeline, virtual, count)
    work = 3 * count * virtual
    assert makespan == pytest.approx(work * (1 + bubble_share(layout, count)))
    assert held == [parts_in_flight(layout, stage, count) for stage in range(pipeline)]


def played(pipeline, virtual, count):
    """Interleaved 1F1B: micro-batches in groups of `pipeline`, part after part; stage s has parts s, s + P, …"""
    forwards = [
        (part, group + at) for group in range(0, count, pipeline) for part in range(virtual) for at in range(pipeline)
    ]
    backwards = [(virtual - 1 - part, batch) for part, batch in forwards]
    orders, held = [], []
    for stage in range(pipeline):
        ahead = pipeline - stage - 1
        warm_up = min(len(forwards), ahead if virtual == 1 else 2 * ahead + (virtual - 1) * pipeline)
        order = [("F", *each) for each in forwards[:warm_up]]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            order += [("F", *forward), ("B", *backward)]
        orders.append(order + [("B", *each) for each in backwards[len(forwards) - warm_up :]])
        now = most = 0
        for kind, *_ in orders[-1]:
            now += 1 if kind == "F" else -1
            most = max(most, now)
        held.append(most)
    done, clocks, at = {}, [0] * pipeline, [0] * pipeline
    while any(at[stage] < len(orders[stage]) for stage in range(pipeline)):
        for stage in range(pipeline):
            while at[stage] < len(orders[stage]):
                kind, part, batch = orders[stage][at[stage]]
                step = part * pipeline + stage
                last = pipeline * virtual - 1
                before = ("F", step - 1, batch) if kind == "F" else ("B", step + 1, batch)
                if kind == "B" and step == last:
                    before = ("F", last, batch)
                if before not in done and step + (kind == "B") > 0 and not (kind == "F" and step == 0):
                    break
                clocks[stage] = max(clocks[stage], done.get(before, 0)) + (1 if kind == "F" else 2)
                done[kind, step, batch] = clocks[stage]
                at[stage] += 1
    return max(clocks), held


def test_the_stages_hold_every_unit_once_in_order():
    for pipeline, virtual in ((1, 1), (4, 4), (16, 4), (16, 1)):
        divided = stages(K2, Layout(pipeline, virtual))
        assert sorted(id(unit) for stage in divided for unit in stage) == sorted(map(id, units(K2)))
        assert divided[0][0].kind == "embedding"
        assert divided[-1][-1].kind == "head"
        assert max(map(len, divided)) - min(map(len, divided)) <= 2
    with pytest.raises(ValueError, match="too many for 61 layers"):
        stages(K2, Layout(16, 5))


def test_what_passes_which_link_is_what_ranks_send_to_each_other():
    machine = machines()["h800"]
    for size, stride in ((16, 1), (4, 2), (8, 16), (3, 4)):
        group = Group(size, stride, machine)
        ranks = [stride * at for at in range(size)]
        near = sum(rank // 8 == 0 for rank in ranks)
        both = group.all_to_all("", 1.0)
        assert both.sent["nvlink"] == pytest.approx((near - 1) / size)
        assert both.sent["network"] == pytest.approx((size - near) / size)
        (moved,) = group.ring("", 1.0).sent.values()
        assert moved == pytest.approx((size - 1) / size)
        assert ("network" in group.ring("", 1.0).sent) == (near < size)


def test_the_links_share_out_what_the_plan_sends():
    """The sum of both is the plan's; counted for every pair of ranks, a matrix at a time, they are the same."""
    layout = MatrixLayout()
    weights = tuple(Weight(f"w{i}", shape, layout, False) for i, shape in enumerate([(24, 40), (7, 30)] * 3))
    decided = update_plan(weights, Layout(data=6))
    links = by_link(decided, 4)
    planned = decided.sent()
    for rank in range(6):
        assert sum(links[rank].values()) == sum(by_rank.get(rank, 0) for by_rank in planned.values())
    expected = {rank: {"nvlink": 0, "network": 0} for rank in range(6)}
    owners = decided.owners()
    for weight in weights:
        (owner,) = owners[weight.name][0]
        rows = -(-weight.shape[0] // 6)
        for rank in range(6):
            held = max(0, min(rows, weight.shape[0] - rank * rows)) * weight.shape[1] * 2
            if rank != owner:
                link = "nvlink" if rank // 4 == owner // 4 else "network"
                expected[rank][link] += held
                expected[owner][link] += held
    assert links == expected


def test_the_iteration_is_counted_by_form():
    unit = Unit("dense", (Weight("w", (3, 10, 40), MatrixLayout(batch_ndim=1), True),))
    assert unit.weights[0].matrices() == [(3, 10, 40)]
    assert iteration_flops(unit.weights, "standard") == 3 * 5 * (4 * 10**2 * 40 + 2 * 10**3)
    assert iteration_flops(unit.weights, "gram") == 3 * flops(10, 40, "gram", "jordan", None, wide=False)
    half = 2 * 10 * 10 * 40 / 2 + 10**3 + 2 * 10 * 10 * 40  # XXᵀ and A² by half, and the product with X
    assert iteration_flops(unit.weights, "symmetric") == 3 * 5 * half


def test_the_published_figures_of_k2_come_out():
    """6 TB on 256 GPUs; about 30 GB of states for each."""
    assert 6 * total(units(K2)) == pytest.approx(6e12, rel=0.03)
    step = predict(K2, machines()["h800"], K2_LAYOUT, K2_BATCH)
    assert step.layout.ranks == 256
    assert K2_BATCH.micro_batches(step.layout) == 1024
    assert states(step) == pytest.approx(30e9, rel=0.06)
    assert step.fits
    everywhere = predict(K2, machines()["h800"], replace(K2_LAYOUT, data=256, host_states=False), K2_BATCH)
    assert states(everywhere) == pytest.approx(30e9, rel=0.06)


def test_optimizers_differ_in_the_update_alone():
    of = {
        optimizer: predict(K2, machines()["h800"], replace(K2_LAYOUT, data=64, host_states=False), K2_BATCH, optimizer)
        for optimizer in ("adamw", "muonclip", "gathering")
    }
    assert of["adamw"].seconds < of["muonclip"].seconds < of["gathering"].seconds
    assert of["adamw"].compute == of["muonclip"].compute == of["gathering"].compute
    muon, gathering = of["muonclip"].update_flops, of["gathering"].update_flops
    assert 4 <= gathering / muon < 64  # each expert is on four ranks, attention on 64
    assert of["muonclip"].memory["momentum"] < of["adamw"].memory["momentum"]
    for step in of.values():
        assert step.mfu == pytest.approx(step.model_flops / (step.seconds * 1024 * 989.5e12))
        assert step.seconds == pytest.approx(step.compute + step.bubble + step.update + step.exposed)


def test_experts_divide_over_expert_parallel_ranks_and_nothing_else_does():
    stage = stages(K2, K2_LAYOUT)[3]
    assert numel_of(stage, K2_LAYOUT) == (
        total(stage, experts=[True]) / 16,
        total(stage, experts=[False]),
    )


def test_what_others_published_is_met_or_its_difference_is_known():
    found = cluster.published()
    for row in found["ratios"]:  # Moonlight's (1, 1.25]; 2 bytes there and back of 1 / ways, next to 4 + 4
        assert 1 < row["moonlight"] < row["llama"] <= 1.25
    assert found["ratios"][1]["llama"] == pytest.approx(1 + 4 / 8 / 4, abs=0.01)
    few, many = found["gb300"]
    assert few["published_slower"] == pytest.approx(-0.021, abs=5e-4)
    assert few["iteration_fused"] == pytest.approx(few["published_iteration"], rel=0.05)
    assert many["slower_fused"] == pytest.approx(many["published_slower"], rel=0.1)
    assert few["slower_fused"] < few["slower"] < 0


def test_one_step_is_printed_in_decimal_gigabytes(capsys):
    assert main(["cluster", "--layout", "16,4,16,16,1"]) == 0
    said = capsys.readouterr().out
    assert "Kimi K2 on 256 × h800" in said
    assert "| parameters, GB | 9.6 | 9.6 | 9.6 |" in said
    with pytest.raises(SystemExit):
        main(["cluster", "--layout", "16,4,3,16,1"])
    assert "expert=3 must divide data=16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cluster"])
    assert "--out: is needed" in capsys.readouterr().err


def test_machines_say_where_their_figures_are_from():
    for name, machine in machines().items():
        assert machine.sources, name
        assert machine.fp8 == 2 * machine.bf16
        assert machine.nvlink > machine.network


def test_constants_are_found_again_and_are_not_negative():
    features = [[n, n * n % 7, 1.0] for n in range(1, 9)]
    times = [3 * n + 0.5 * (n * n % 7) + 2 for n in range(1, 9)]
    assert cluster_fit.fitted(features, times) == pytest.approx([3, 0.5, 2])
    falling = cluster_fit.fitted(features, [50 - n for n in range(1, 9)])
    assert min(falling) >= 0
    assert falling[2] > 40


RATES = {"64 × 96": 2.0, "32 × 64": 3.0, "4 × 8": 3.0}
"""Milliseconds for a GFLOP; the last shape does so little that it shares the rate of the one before."""


def a_row(processes, rank):
    """One row as it would be measured where the rates are the truth: the large matrices are on the first ranks."""
    large = {1: 3, 2: 2 - rank}.get(processes, int(rank < 3))
    flops = {"64 × 96": int(large * 5e10), "32 × 64": int(6.4e11 / processes) + rank * 10**9, "4 × 8": 10**8}
    row = {"processes": processes, "rank": rank, "flops": flops, "elements": int(6.4e7 / processes)}
    row |= {"counted_bytes": 10**6 * processes, "planned_bytes": 10**6 * processes, "collectives": 17 * (processes > 1)}
    products = sum(RATES[shape] * each / 1e9 for shape, each in flops.items())
    compute = products + 2.0 * row["elements"] / 1e6 + 30.0
    moved = 0.5 * processes + 0.25 * row["collectives"] + 4.0
    times = {"compute_ms": compute, "products_ms": products, "communication_ms": moved, "wall_ms": 2 * compute}
    return row | {name: [3 * time, time, 2 * time] for name, time in times.items()}  # others were at work, but for once


def all_rows():
    return [a_row(processes, rank) for processes in (1, 2, 4, 8) for rank in range(processes)]


def test_ranks_are_predicted_by_the_rates_of_their_shapes_and_the_size_of_their_shards():
    said = cluster_fit.prediction(all_rows())
    assert list(said["rates"]) == ["64 × 96", "32 × 64"]
    assert [*said["rates"].values()] == pytest.approx([2.0, 3.0])
    assert said["else_constants"] == pytest.approx([2.0, 30.0])
    assert said["communication_constants"] == pytest.approx([0.5, 0.25, 4.0])
    for part in ("compute", "products", "else", "communication"):
        assert said[part]["worst_error"] == pytest.approx(0, abs=1e-9)


def test_what_is_predicted_is_never_fitted():
    rows = all_rows()
    for row in rows[-8:]:
        row |= {name: [10 * time for time in row[name]] for name in cluster_fit.TIMES}
    said, before = cluster_fit.prediction(rows), cluster_fit.prediction(all_rows())
    for name in ("rates", "else_constants", "communication_constants"):
        assert said[name] == before[name]
    assert said["compute"]["error"] == pytest.approx(-0.9)


def test_each_repeat_is_predicted_by_itself():
    rows = all_rows()
    slow = [row | {"compute_ms": [time * (1 + (row["processes"] == 8)) for time in row["compute_ms"]]} for row in rows]
    said = cluster_fit.repeated([*rows, *slow], 2)
    assert said["errors"]["compute"] == pytest.approx([0.0, -0.5])
    assert said["compute"]["error"] == pytest.approx(0.0)


def test_products_alone_are_timed():
    a = torch.randn(256, 256)
    with ProductTimes() as others:
        (a.square().sqrt() + a.exp()).sum()
    assert others.seconds == 0.0
    begun = time.thread_time()
    with ProductTimes() as products:
        a @ a
        torch.baddbmm(a[None], a[None], a[None])
    assert 0.0 < products.seconds < time.thread_time() - begun


def test_operations_by_shape_are_those_of_the_plan():
    weights = tuple(Weight(f"w{i}", shape, MatrixLayout(), False) for i, shape in enumerate([(24, 40), (7, 30)] * 3))
    decided = update_plan(weights, Layout(data=4))
    for rank, total_of_rank in decided.flops().items():
        by_shape = cluster_fit.flops_by_shape(decided, rank)
        assert [*by_shape] == ["24 × 40", "7 × 30"]
        assert sum(by_shape.values()) == total_of_rank


def test_k2_is_planned_for_4096_ranks_within_seconds():
    """A part of a range is found without all others: they made it quadratic in the ranks, a quarter of a minute."""
    weights = tuple(weight for unit in units(K2) for weight in unit.weights if weight.layout is not None)
    begun = time.process_time()
    decided = update_plan(weights, Layout(expert=16, data=4096))
    assert time.process_time() - begun < 5
    assert sum(each.count for each in decided.rounds) == 69_729
    assert sum(decided.flops().values()) == iteration_flops(weights, "standard")


@pytest.mark.slow
def test_a_real_step_of_two_ranks_sends_what_is_planned(tmp_path):
    torchrun(2, "-m", "benchmarks.studies.cluster_fit", tmp_path / "rows.json", 1)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["rank"] for row in rows] == [0, 1]
    for row in rows:
        assert row["planned_bytes"] == row["counted_bytes"] > 0
        assert 0 < min(row["products_ms"]) < max(row["compute_ms"])
