"""The cluster on paper: `python -m benchmarks cluster`, a training step on 8 to 4096 accelerators that nobody here has.

`cluster_model` counts what a model asks, `cluster_step` what a step costs on a machine of `cluster_machines.toml`,
`cluster_plans` makes the optimizer's own plan for Kimi K2 on a fake process group, and `cluster_fit` measures how far
such a prediction is off where it can be tried: constants of 1, 2 and 4 processes against 8.

    --out DIR       all parts, or those of --parts, into DIR/cluster.json, four pages of tables and two pictures
    --layout …      one step alone, as a table; nothing is written
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.experiment.errors import UsageError
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.studies import cluster_fit, cluster_plans
from benchmarks.studies.cluster_model import IN_FP8, SELECTIVE, Weight, iteration_flops, units
from benchmarks.studies.cluster_plots import draw
from benchmarks.studies.cluster_step import Batch, Layout, Machine, Optimizer, Step, machines, predict, states
from benchmarks.studies.templates import render
from muonclip.core import MatrixLayout
from muonclip.models import MoEConfig

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
OPTIMIZERS: tuple[Optimizer, ...] = ("muonclip", "adamw", "gathering")
NVIDIA_ADAMW, NVIDIA_MUON, NVIDIA_ITERATION = 1051e12, 1029e12, 51e12
"""FLOP/s for each GPU of Kimi K2 on 256 GB300 in MXFP8, as NVIDIA published them; the last: Newton–Schulz's."""
_KEPT: dict[str, Any] = {"recompute": SELECTIVE, "fp8": IN_FP8}


def _llama() -> MoEConfig:
    """Make the sizes of Llama 3 70B (arXiv 2407.21783): all layers are dense, so that no expert is made."""
    return MoEConfig(
        vocab_size=128_256,
        hidden_size=8192,
        num_layers=80,
        max_seq_len=8192,
        attention="gqa",
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        num_dense_layers=80,
        intermediate_size=28_672,
        moe_intermediate_size=8,
        num_experts=2,
        num_experts_per_tok=2,
    )


def _k2_layout(ranks: int) -> Layout:
    """Divide Kimi K2 as its report does, from 256 ranks on; with fewer, expert parallelism is what is left."""
    pipeline = min(16, ranks)
    data = ranks // pipeline
    return Layout(pipeline, 4, min(16, data), data, 1, **_KEPT, offload=True, host_states=ranks <= 256)


def _moonlight_layout(ranks: int) -> Layout:
    return Layout(expert=8, data=ranks, **_KEPT)


def _llama_layout(ranks: int) -> Layout:
    pipeline = min(4, ranks // 8)
    return Layout(pipeline, 4 if pipeline > 1 else 1, 1, ranks // 8 // pipeline, 8, **_KEPT)


MODELS: dict[str, tuple[str, Callable[[], MoEConfig], Batch, Callable[[int], Layout]]] = {
    "k2": ("Kimi K2", MoEConfig.k2, Batch(67_108_864, 4096), _k2_layout),
    "moonlight": ("Moonlight 16B-A3B", MoEConfig.moonlight, Batch(33_554_432, 8192), _moonlight_layout),
    "llama": ("Llama 3 70B", _llama, Batch(16_777_216, 8192), _llama_layout),
}
PARTS = ("paper", "plans", "fit")
PAGES = ("fit", "published", "plans", "tables")


def run(options: argparse.Namespace) -> None:
    """Predict, plan and measure, or print one step."""
    if options.layout is not None:
        print(_one_step(options))
        return
    if options.out is None:
        raise UsageError("--out", "is needed for all parts; or give --layout for one step.")
    kept = options.out / "cluster.json"
    result: dict[str, Any] = atomic_files.read_record(kept, "environments") if kept.exists() else {"environments": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    made = {"paper": paper, "plans": cluster_plans.plans, "fit": lambda: _fit(options)}
    for part in options.parts:
        result[part] = made[part]()
        result["environments"][part] = environment()
        atomic_files.write_json(kept, result)
    if missing := [part for part in PARTS if part not in result]:
        raise UsageError("--parts", f"{', '.join(missing)} was never made in {options.out}; leave --parts out.")
    written = tables(result)
    for name, text in written.items():
        atomic_files.write_text(options.out / f"{name}.md", text)
    for name, dark in (("cluster.png", False), ("cluster-dark.png", True)):
        draw(result, options.out / name, dark=dark)
    print("\n".join(written.values()))


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Write the tables in Markdown, by the name of their page. Sizes are decimal: a GB is 1e9 bytes."""
    return {name: render("cluster.md", page=name, **result).strip() + "\n" for name in PAGES}


def _fit(options: argparse.Namespace) -> dict[str, Any]:
    rounds, repeats = options.rounds, options.repeats
    rows = cluster_fit.measure(options.out, rounds, repeats)
    return {"rounds": rounds, "repeats": repeats, "rows": rows} | cluster_fit.repeated(rows, repeats)


def paper() -> dict[str, Any]:
    """Predict all steps of the page; numbers alone, no process is started."""
    known = machines()
    scaling = {name: [_across(name, ranks, known["h800"]) for ranks in RANKS] for name in MODELS}
    _, k2, batch, layout = MODELS["k2"]
    config, at = k2(), layout(256)
    return {
        "titles": {name: title for name, (title, *_) in MODELS.items()},
        "tokens": {name: of[2].tokens for name, of in MODELS.items()},
        "machines": {name: _of_machine(each) for name, each in known.items()},
        "scaling": scaling,
        "memory": _memory(config, known["h800"], at, batch),
        "collectives": _collectives(predict(config, known["h800"], layout(1024), batch)),
        "forms": _forms(),
        "on_machines": [_on(config, name, each, layout(1024), batch) for name, each in known.items()],
        "published": published(),
    }


def _across(name: str, ranks: int, machine: Machine) -> dict[str, Any]:
    _, make, batch, layout = MODELS[name]
    config, at = make(), layout(ranks)
    steps = {optimizer: predict(config, machine, at, batch, optimizer) for optimizer in OPTIMIZERS}
    ours = steps["muonclip"]
    return {
        "ranks": ranks,
        "layout": f"{at.pipeline} × {at.virtual} · {at.expert} · {at.data} · {at.tensor}",
        "memory": ours.memory,
        "states": states(ours),
        "fits": ours.fits,
        "seconds": ours.seconds,
        "bubble": ours.bubble / ours.seconds,
        "mfu": ours.mfu,
        "shares": {optimizer: step.update_share for optimizer, step in steps.items()},
        "slower": {optimizer: step.seconds / steps["adamw"].seconds - 1 for optimizer, step in steps.items()},
        "communication": _communication_ratio(ours),
        "update_bytes": _sent(ours, "update"),
    }


def _sent(step: Step, begins: str) -> float:
    return sum(sum(each.sent.values()) for each in step.collectives if each.name.startswith(begins))


def _communication_ratio(step: Step) -> float | None:
    """Return what distributed Muon sends next to distributed AdamW, whose gathered parameters are in fp32.

    That is how Moonlight counts: 4 bytes for a gradient, 4 for a parameter. None where neither sends anything.
    """
    adamw = 2 * _sent(step, "gradients")
    return 1 + _sent(step, "update") / adamw if adamw else None


def _of_machine(machine: Machine) -> dict[str, Any]:
    names = ("bf16", "fp8", "memory", "memory_bandwidth", "node", "nvlink", "network", "efficiency", "sources")
    return {name: getattr(machine, name) for name in names}


def _memory(config: MoEConfig, machine: Machine, at: Layout, batch: Batch) -> list[dict[str, Any]]:
    """Predict the memory of 256 ranks for each way to keep what the backward pass needs."""
    ways: dict[str, dict[str, Any]] = {
        "all kept": {"recompute": frozenset(), "fp8": frozenset(), "offload": False, "host_states": False},
        "selective recomputation": {"recompute": SELECTIVE, "fp8": frozenset(), "offload": False, "host_states": False},
        "and FP8 storage": {**_KEPT, "offload": False, "host_states": False},
        "and offload of activations": {**_KEPT, "offload": True, "host_states": False},
        "and of masters and momentum": {**_KEPT, "offload": True, "host_states": True},
    }
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        step = predict(config, machine, replace(at, **way), batch)
        rows.append({"way": name, "memory": step.memory, "fits": step.fits, "compute": step.compute})
    return rows


def _collectives(step: Step) -> dict[str, Any]:
    rows = [
        {"name": each.name, **{link: each.sent.get(link, 0.0) for link in ("nvlink", "network")}}
        | {"seconds": each.seconds, "hidden": each.hidden}
        for each in step.collectives
    ]
    return {"ranks": step.layout.ranks, "compute": step.compute, "rows": rows}


def _forms() -> list[dict[str, Any]]:
    """Count the iteration of each model, in all forms."""
    rows: list[dict[str, Any]] = []
    for title, make, batch, _ in MODELS.values():
        config = make()
        weights = [weight for unit in units(config) for weight in unit.weights]
        step = predict(config, machines()["h800"], Layout(data=batch.tokens // batch.length), batch)
        forms = {form: iteration_flops(weights, form) for form in ("standard", "gram", "symmetric")}
        rows.append({"title": title, "model_flops": step.model_flops} | forms)
    return rows


def _on(config: MoEConfig, name: str, machine: Machine, at: Layout, batch: Batch) -> dict[str, Any]:
    steps = {form: predict(config, machine, at, batch, form=form) for form in ("standard", "symmetric")}
    plain = steps["standard"]
    return {
        "machine": name,
        "ranks": at.ranks,
        "seconds": plain.seconds,
        "mfu": plain.mfu,
        "fits": plain.fits,
        "share": plain.update_share,
        "symmetric_share": steps["symmetric"].update_share,
        "gathering_share": predict(config, machine, at, batch, "gathering").update_share,
    }


def published() -> dict[str, Any]:
    """Compute the figures that others published, of Kimi K2 and Moonlight."""
    _, k2, batch, layout = MODELS["k2"]
    config, known = k2(), machines()
    near, far = (predict(config, known["h800"], layout(ranks), batch) for ranks in (256, 4096))
    of_units = units(config)
    experts, others = (sum(unit.numel(experts=each) for unit in of_units) for each in (True, False))
    return {
        "parameters": config.num_parameters(),
        "active": config.num_active_parameters(),
        "once": 6 * (experts + others),
        "on_256": 6 * (experts + 16 * others),
        "states_near": states(near),
        "states_far": states(far),
        "ratios": [_pair(ways) for ways in (2, 4, 8, 16, 64)],
        "moonlight_shares": [_moonlight_shares(tokens) for tokens in (33_554_432, 4_194_304)],
        "gb300": [_gb300(config, known["gb300"], sequences) for sequences in (2048, 4096)],
    }


def _moonlight_shares(tokens: int) -> dict[str, Any]:
    """Predict the update's share of Moonlight's steps on 64 to 512 GPUs, for so many tokens a step."""
    _, make, batch, layout = MODELS["moonlight"]
    config, machine, of = make(), machines()["h800"], replace(batch, tokens=tokens)
    shares = [predict(config, machine, layout(ranks), of).update_share for ranks in (64, 128, 256, 512)]
    return {"tokens": tokens, "least": min(shares), "most": max(shares)}


def _pair(ways: int) -> dict[str, Any]:
    """Count what is sent where states are divided over so many ranks, and nothing else is."""
    steps = {
        name: predict(MODELS[name][1](), machines()["h800"], Layout(data=ways), MODELS[name][2])
        for name in ("moonlight", "llama")
    }
    return {"ways": ways} | {name: _communication_ratio(step) for name, step in steps.items()}


def _gb300(config: MoEConfig, machine: Machine, sequences: int) -> dict[str, Any]:
    """Predict NVIDIA's measurement: 256 GB300, PP 4 × VPP 4, DP 64, EP 64, two sequences of 4096 tokens at once.

    The efficiency is set so that AdamW's rate is NVIDIA's; how much slower Muon is, is the prediction. `fused`: gate
    and up are iterated as one matrix, as Megatron stores them.
    """
    at, batch = Layout(4, 4, 64, 64, recompute=frozenset(["up-projection"])), Batch(sequences * 4096, 4096, 2)
    efficiency, target = 0.25, NVIDIA_ADAMW / machine.fp8
    for _ in range(20):
        adamw = predict(config, machine, at, batch, "adamw", rate="fp8", efficiency=efficiency)
        efficiency *= target / adamw.mfu
    muon = predict(config, machine, at, batch, "muonclip", rate="fp8", efficiency=efficiency)
    weights = [weight for unit in units(config) for weight in unit.weights]
    split, fused = iteration_flops(weights, "standard"), iteration_flops([*map(_fused, weights)], "standard")
    adamw = predict(config, machine, at, batch, "adamw", rate="fp8", efficiency=efficiency)
    iteration = muon.update_flops / (machine.bf16 * machine.efficiency)
    as_fused = muon.seconds + iteration * (fused / split - 1)
    return {
        "sequences": sequences,
        "efficiency": efficiency,
        "published_iteration": NVIDIA_ITERATION / NVIDIA_MUON,
        "published_slower": NVIDIA_MUON / NVIDIA_ADAMW - 1,
        "iteration": split / muon.model_flops,
        "iteration_fused": fused / muon.model_flops,
        "slower": adamw.seconds / muon.seconds - 1,
        "slower_fused": adamw.seconds / as_fused - 1,
        "needed_efficiency": _needed(adamw, iteration * fused / split, as_fused, machine),
    }


def _needed(adamw: Step, iteration: float, as_fused: float, machine: Machine) -> float:
    """Return the share of the peak at which the fused iteration takes as long as NVIDIA's figures leave for it."""
    left = adamw.seconds * NVIDIA_ADAMW / NVIDIA_MUON - (as_fused - iteration)
    return machine.efficiency * iteration / left


def _fused(weight: Weight) -> Weight:
    if weight.layout is None or "gate_up" not in weight.name:
        return weight
    return replace(weight, layout=MatrixLayout(batch_ndim=weight.layout.batch_ndim))


def _one_step(options: argparse.Namespace) -> str:
    """Write one step, for the degrees of --layout, as a table."""
    title, make, batch, _ = MODELS[options.model]
    machine = machines()[options.machine]
    try:
        at = Layout(*options.layout, **_KEPT)
        steps = [predict(make(), machine, at, batch, optimizer) for optimizer in OPTIMIZERS]
    except ValueError as error:
        raise UsageError("--layout", str(error)) from error
    lines = [f"{title} on {at.ranks} × {options.machine}", "", f"| | {' | '.join(OPTIMIZERS)} |", "|---|---|---|---|"]
    lines += [_line(f"{name}, GB", (f"{step.memory[name] / 1e9:.1f}" for step in steps)) for name in steps[0].memory]
    lines += [_line("fits", ("yes" if step.fits else "no" for step in steps))]
    times = {"compute": "products", "bubble": "bubble", "update": "update", "exposed": "collectives, waited for"}
    for name, words in (times | {"seconds": "step"}).items():
        lines.append(_line(f"{words}, s", (f"{getattr(step, name):.4g}" for step in steps)))
    lines += [_line("MFU", (f"{step.mfu:.1%}" for step in steps))]
    lines += [_line("update / forward and backward", (f"{step.update_share:.2%}" for step in steps))]
    return "\n".join(lines)


def _line(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"
