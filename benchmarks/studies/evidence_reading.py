"""What `make evidence` found, in sentences made from its numbers, as Markdown.

Every sentence has a branch for the number that speaks against it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.experiment.arms import label
from benchmarks.records.intervals import Interval, interval
from muonclip.models import MoEConfig

Json = Mapping[str, Any]


def read_evidence(figures: Mapping[str, Json]) -> str:
    """The sections, from the objects that `sweep.json`, `efficiency.json`, `clip-cost.json` and `hot.json` hold."""
    sections = {
        "The usable range of rates": read_sweep(figures["sweep"]),
        "Token efficiency": read_efficiency(figures["efficiency"]),
        "The cost of clipping where nothing explodes": read_cost(figures["clip-cost"]),
        "A hot rate": [*read_hot(figures["hot"]), "", *hot_table(figures["hot"])],
    }
    pictures = {
        "The usable range of rates": ["sweep.png"],
        "Token efficiency": ["efficiency.png"],
        "The cost of clipping where nothing explodes": ["clip-cost.png"],
        "A hot rate": ["hot.png", "heads.png"],
    }
    parts = ["# What the runs show", "", _made_with(figures["sweep"]), ""]
    for title, lines in sections.items():
        parts += [f"## {title}", "", *lines, ""]
        parts += [f"![{title}]({name})" for name in pictures[title]] + [""]
    return "\n".join(parts).strip() + "\n"


def read_sweep(sweep: Json) -> list[str]:
    arms, unit, tau = sweep["arms"], sweep["unit"], sweep["tau"]
    lines = [
        f"{_runs(sweep)} Each optimizer was trained at each of its rates; what counts is the final validation loss."
    ]
    lines.append("")
    for entry in arms.values():
        best = _at(entry, entry["best_lr"])
        rates = [rate["lr"] for rate in entry["rates"]]
        low, high = entry["usable"]
        edge = "" if min(rates) < entry["best_lr"] < max(rates) else " This is the edge of what was tried."
        lines.append(
            f"- **{entry['label']}** is best at {entry['best_lr']:g} with {_mean(best['loss'])} {unit}.{edge} Within "
            f"{sweep['usable_margin']:g} of it lie the rates {low:g} to {high:g}, a factor of {high / low:g}. "
            f"The peak logit at the best rate is {max(best['peak_logit']):.0f}."
        )
    muon, clipped = arms["muon"], arms["muonclip"]
    loud = [rate["lr"] for rate in muon["rates"] if max(rate["peak_logit"]) > tau]
    best_peak = max(_at(muon, muon["best_lr"])["peak_logit"])
    lines.append("")
    if not loud:
        lines.append(f"No rate made Muon's logits pass τ = {tau:g}: this sweep shows nothing about the clip.")
        return lines
    lines.append(
        f"Muon's logits pass τ = {tau:g} from the rate {min(loud):g} on, with a peak of "
        f"{max(_at(muon, max(loud))['peak_logit']):.0f} at {max(loud):g}; "
        + (
            "at its best rate they do not, so at this size the clip has nothing to do there."
            if best_peak <= tau
            else f"at its best rate too ({best_peak:.0f})."
        )
    )
    lines.append("")
    for lr in loud:
        difference = _difference(_at(clipped, lr)["loss"], _at(muon, lr)["loss"])
        lines.append(f"- At {lr:g} MuonClip's loss is {_signed(difference)} from Muon's, {_verdict(difference)}.")
    lines.append("")
    if clipped["usable"] == muon["usable"]:
        lines.append("The usable range, as defined above, is the same with the clip.")
    else:
        lines.append(
            f"With the clip the usable range ends at {clipped['usable'][1]:g} instead of {muon['usable'][1]:g}."
        )
    return lines


def read_efficiency(efficiency: Json) -> list[str]:
    share, unit, reference = efficiency["share"], efficiency["unit"], efficiency["reference"]
    adamw, budgets = efficiency["adamw"], efficiency["muon"]["budgets"]
    lines = [
        f"AdamW at its best rate, {adamw['lr']:g}, ends at {_mean(adamw['loss'])} {unit} after {adamw['steps']} steps. "
        f"Muon at its own, {efficiency['muon']['lr']:g}, was trained anew with the whole schedule on "
        f"{', '.join(format(budget['share'], '.0%') for budget in budgets)} of these steps. The rate was not tuned "
        "again for the shorter runs, which favours AdamW."
    ]
    if share is None:
        reached = statistics.fmean(budgets[-1]["loss"]) <= statistics.fmean(adamw["loss"])
        lines.append(
            "In some seed the smallest of these budgets already reaches AdamW's loss: no share can be given."
            if reached
            else "Muon does not reach AdamW's loss within these budgets in every seed: no share can be given."
        )
        return lines
    lines.append(
        f"It reaches AdamW's loss with **{share['mean']:.2f}** of the tokens ({efficiency['confidence']:.0%} interval "
        f"over {len(share['per_seed'])} seeds: {share['low']:.2f} to {share['high']:.2f})."
    )
    if share["low"] <= reference <= share["high"]:
        lines.append(
            f"Moonlight's figure, {reference:g} of the training FLOPs at its sizes, lies inside that interval."
        )
    else:
        side = "more" if share["mean"] > reference else "less"
        lines.append(
            f"That is {side} than Moonlight's {reference:g} of the training FLOPs, which comes from a scaling law "
            "over far larger models."
        )
    return lines


def read_cost(cost: Json) -> list[str]:
    baseline = cost["baseline"]
    lines = [
        f"At Muon's best rate, {baseline['lr']:g}, with thresholds so low that the clip acts though nothing explodes. "
        f"Muon alone ends at {_mean(baseline['loss'])} {cost['unit']}. Differences from it, paired by seed, with the "
        f"{cost['confidence']:.0%} interval:",
        "",
    ]
    for arm in cost["arms"]:
        difference = Interval(*(arm["difference"][key] for key in ("mean", "low", "high")))
        ever = statistics.fmean(arm["heads_ever_clipped"])
        if not any(arm["clipped_head_steps"]):
            same = all(value == 0 for value in arm["difference"]["per_seed"])
            lines.append(
                f"- **{arm['label']}**: no head was clipped"
                + ("; the losses are the same to the bit." if same else ".")
            )
            continue
        lines.append(
            f"- **{arm['label']}**: {_signed(difference)}, {_verdict(difference)}; {ever:.0%} of the heads were "
            "clipped at some step."
        )
    return lines


def read_hot(hot: Json) -> list[str]:
    tau = hot["config"]["training"]["tau"]
    runs = {name: list(seeds.values()) for name, seeds in hot["arms"].items()}
    steps = hot["config"]["training"]["steps"]
    peak = max(run["max_logit_peak"] for run in runs["muon"])
    held = statistics.fmean(run["max_logit_median_last_quarter"] for run in runs["muonclip"])
    lines = [
        f"{_runs(hot)} The rate is {hot['config']['training']['lr']['muon']:g} where the name says no other, constant "
        f"after the warm-up, for {steps} steps. Norms are the largest over heads; `benchmarks/metrics.py` defines what "
        "is measured.",
        "",
        f"- Muon's largest logit reaches {peak:.0f}. MuonClip's median over the last quarter is {held:.0f} at τ = "
        f"{tau:g}" + (": held, but for what one step adds." if held <= 1.5 * tau else ": not held."),
    ]
    lines.append(f"- {_compare(runs, 'muonclip', 'muon')}")
    rescued = statistics.fmean(run["max_logit_median_last_quarter"] for run in runs["rescue"])
    lines.append(
        f"- Switched on midway in an exploded run, the clip brings the logits to {rescued:.0f} in the last quarter. "
        + _compare(runs, "rescue", "muon")
        + " "
        + _compare(runs, "rescue", "muonclip")
    )
    lines.append(
        f"- {_compare(runs, 'qk-norm', 'muonclip')} QK-norm is another model, and not one that MLA's inference allows."
    )
    for attention in ("gqa", "mha"):
        pair = [f"{arm}@attention={attention}" for arm in ("muon", "muonclip")]
        peaks = [max(run["max_logit_peak"] for run in runs[name]) for name in pair]
        lines.append(
            f"- {attention.upper()}: peaks {peaks[0]:.0f} without the clip, {peaks[1]:.0f} with it. "
            + _compare(runs, pair[1], pair[0])
        )
    spikes = {name: sum(run["loss_spikes"] for run in runs[name]) for name in ("muon", "muonclip")}
    infinite = [
        name for name, several in runs.items() if any(not math.isfinite(run["final_val_loss"]) for run in several)
    ]
    lines.append(
        f"- Steps with a loss spike, over all seeds: Muon {spikes['muon']}, MuonClip {spikes['muonclip']}. "
        + (
            f"Losses that are not finite: {', '.join(map(label, infinite))}."
            if infinite
            else "No loss became infinite or NaN."
        )
    )
    last = [run["last_clipped_step"] for run in runs["muonclip"]]
    ever = statistics.fmean(run["heads_ever_clipped"] for run in runs["muonclip"])
    ends = max(step or 0 for step in last)
    lines.append(
        f"- Under MuonClip {ever:.0%} of the heads were clipped at some step"
        + (
            f", and none after step {ends}: the clip falls silent, as in K2."
            if ends < 0.9 * steps
            else ", up to the end. At a constant hot rate the clip does not fall silent as it did in K2 (12.7 % of the "
            "heads, none after 30 % of the steps)."
        )
    )
    return lines


def hot_table(hot: Json) -> list[str]:
    """Means over seeds; the spread is that of the loss over seeds."""
    lines = [
        "| arm | loss, bits | spread | peak logit | last quarter | clipped | entropy | W_q | W_k | update | spikes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in hot["arms"].items():
        runs = list(seeds.values())
        loss = [run["final_val_loss"] / math.log(2) for run in runs]
        mean = lambda key, runs=runs: statistics.fmean(run[key] for run in runs)  # noqa: E731
        lines.append(
            f"| {label(name)} | {statistics.fmean(loss):.3f} | {max(loss) - min(loss):.3f} | "
            f"{max(run['max_logit_peak'] for run in runs):.0f} | {mean('max_logit_median_last_quarter'):.0f} | "
            f"{mean('heads_ever_clipped'):.0%} | {mean('attention_entropy'):.2f} | {mean('query_norm'):.1f} | "
            f"{mean('key_norm'):.1f} | {mean('update_rms'):.2f} | {sum(run['loss_spikes'] for run in runs)} |"
        )
    return lines


def _compare(runs: Mapping[str, list[Any]], one: str, other: str) -> str:
    losses = [[run["final_val_loss"] / math.log(2) for run in runs[name]] for name in (one, other)]
    difference = _difference(*losses)
    return f"{label(one)} ends {_signed(difference)} bits from {label(other)}, {_verdict(difference)}."


def _difference(own: list[float], other: list[float]) -> Interval:
    return interval([a - b for a, b in zip(own, other, strict=True)])


def _verdict(difference: Interval) -> str:
    if not math.isfinite(difference.mean):
        return "which cannot be compared: a loss is not finite"
    if difference.mean == difference.low == difference.high == 0:
        return "the same to the bit"
    if not math.isfinite(difference.low):
        return "from one seed, so no spread is known"
    if not difference.excludes_zero:
        return "which the seeds do not tell from zero"
    return "better beyond the spread of the seeds" if difference.mean < 0 else "worse beyond the spread of the seeds"


def _signed(difference: Interval) -> str:
    """Mean and interval; lower is better."""
    if difference.low == difference.high or not math.isfinite(difference.low):
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def _made_with(frame: Json) -> str:
    """One paragraph: the model, the data, the machine."""
    environment, config = frame["environment"], frame["config"]
    sizes = MoEConfig(**config["model"])
    return (
        f"Made by `{environment['command']}` on {environment['date'][:10]}: {environment['cores']} cores of "
        f"{environment['cpu']}, Python {environment['python']}, PyTorch {environment['torch']}, muonclip "
        f"{environment['muonclip']}. The model is the reference MoE: {sizes.num_parameters() / 1e6:.1f}M parameters "
        f"({sizes.attention.upper()}, width {sizes.hidden_size}, {sizes.num_layers} layers, {sizes.num_heads} heads), "
        f"the text {config['data']['title']}. These sentences are written by the same command, from the numbers in "
        "the JSON files beside the pictures. Losses are on held-out files; lower is better."
    )


def _at(entry: Json, lr: float) -> Json:
    return next(rate for rate in entry["rates"] if rate["lr"] == lr)


def _mean(losses: list[float]) -> str:
    return f"{statistics.fmean(losses):.3f}"


def _runs(frame: Json) -> str:
    config = frame["config"]
    return f"{len(config['arms'])} settings, {len(config['seeds'])} seeds each."
