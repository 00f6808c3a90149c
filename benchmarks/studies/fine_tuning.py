"""Fine-tuning on text of another kind: after which optimizer, with which, and which half takes the factors of LoRA.

The reference mixture of experts is trained on Python's sources by AdamW and by MuonClip, then tuned on English prose,
the help texts of the Python language, which the first text lacks. What tuning costs on the first text is forgetting
(arXiv 2605.06654). For LoRA (arXiv 2106.09685; B A added to each weight of attention and of the MLPs that are not
experts) Muon has both factors, none, or B alone (arXiv 2508.17901). Every way has the same number of rates to choose
from, by its loss on the prose on the first seed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import choices, resolve
from benchmarks.experiment.data import VALIDATION_SHARE, Corpus, from_files, open_corpus
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.experiment.settings import Precision, Training
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment, made_with
from benchmarks.records.intervals import interval
from benchmarks.studies.grad_clipping import validation_loss
from benchmarks.training.timing import torch_threads
from benchmarks.training.torch_learner import make_optimizer
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

Way = Literal["adamw", "muonclip", "lora-adamw", "lora-muon", "lora-split"]

HELP = "pydoc_data/topics.py"
PRETRAINING = replace(OWN_RATE, validation_batches=4)
TUNING = replace(PRETRAINING, steps=100, warmup_steps=10, decay_share=0.9)
SEEDS = (0, 1, 2)
BEFORE = ("adamw", "muonclip")
RATES: dict[Way, tuple[float, ...]] = {
    "adamw": (1e-4, 3e-4, 1e-3, 3e-3),
    "muonclip": (3e-4, 1e-3, 3e-3, 1e-2),
    "lora-adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora-muon": (3e-3, 1e-2, 3e-2, 1e-1),
    "lora-split": (3e-3, 1e-2, 3e-2, 1e-1),
}
WORDS: dict[str, str] = {
    "adamw": "AdamW",
    "muonclip": "MuonClip",
    "lora-adamw": "A and B by AdamW",
    "lora-muon": "A and B by Muon",
    "lora-split": "A by AdamW, B by Muon",
}
RANK = 16
ADAPTED = r".*\.(q_proj|q_a_proj|q_b_proj|kv_a_proj|kv_b_proj|k_rope_proj|o_proj|gate_up_proj|down_proj)"


def run(options: argparse.Namespace) -> None:
    """Train and tune all ways. Writes fine_tuning.json as rows come and, what it also prints, fine_tuning.md."""
    make_folder(options.out)
    with torch_threads(1):
        made = environment() | {"threads": 1}
        shared = {"steps": TUNING.steps, "pretraining_steps": PRETRAINING.steps, "batch_size": TUNING.batch_size}
        figures: dict[str, Any] = {"environment": made, "training": shared, "rows": []}
        for row in measure(quick=options.quick):
            figures["rows"].append(row)
            print(row, file=sys.stderr, flush=True)
            atomic_files.write_json(options.out / "fine_tuning.json", figures)
    atomic_files.write_text(options.out / "fine_tuning.md", text := table(figures))
    print(text)


def measure(*, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each run: `before`, `way`, `seed`, `rate`, and losses in bits per byte before and after it."""
    short = {"steps": 2, "validation_batches": 1, "batch_size": 2, "validation_batch_size": 2}
    pretraining, tuning = (replace(each, **short if quick else {}) for each in (PRETRAINING, TUNING))
    first, second = texts()
    best: dict[tuple[str, Way], float] = {}
    for seed in SEEDS[: 1 if quick else None]:
        for before in BEFORE:
            model = pretrained(before, seed, first, pretraining)
            known = {"code_before": validation_loss(model, first, pretraining)}
            known |= {"prose_before": validation_loss(model, second, pretraining)}
            for way, rates in RATES.items():
                tried: dict[float, float] = {}
                for rate in [best[before, way]] if (before, way) in best else rates[: 1 if quick else None]:
                    tuned = tune(copy.deepcopy(model), way, rate, seed, second, tuning)
                    after = {"code": validation_loss(tuned, first, tuning)}
                    after |= {"prose": validation_loss(tuned, second, tuning)}
                    tried[rate] = after["prose"]
                    yield {"before": before, "way": way, "seed": seed, "rate": rate} | known | after
                best[before, way] = min(tried, key=tried.__getitem__)


def texts() -> tuple[Corpus, Corpus]:
    """Return Python's sources without the help texts, and those."""
    whole, root = open_corpus(), Path(sysconfig.get_path("stdlib"))
    code = [path for name, path in whole.files.items() if name != HELP]
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    prose = np.frombuffer("\n\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    cut = len(prose) - len(prose) // VALIDATION_SHARE
    return (
        from_files("Python standard library without its help texts, bytes", None, root, code),
        Corpus("help texts of Python, bytes", None, "bytes", {HELP: root / HELP}, prose[:cut], prose[cut:]),
    )


def pretrained(by: str, seed: int, corpus: Corpus, training: Training) -> MoE:
    """Return the model that this arm trains on a text, in evaluation mode."""
    (arm,) = resolve(choices(by), MoEConfig.cpu(vocab_size=corpus.vocab_size), training)
    torch.manual_seed(seed)
    model = MoE(arm.model)
    optimizer, clip = make_optimizer(model, arm, Precision())
    return _trained(model, optimizer, arm.lr, seed, corpus, training, clip.remove)


def tune(model: MoE, way: Way, rate: float, seed: int, corpus: Corpus, training: Training) -> MoE:
    """Train the model further on a text, or adapters of its weights; return it in evaluation mode."""
    if way in BEFORE:
        (arm,) = resolve(choices(f"{way}@lr={rate!r}"), model.config, training)
        optimizer, clip = make_optimizer(model, arm, Precision())
        return _trained(model, optimizer, rate, seed, corpus, training, clip.remove)
    torch.manual_seed(seed)
    return _trained(model, lora(model, way, rate, training), rate, seed, corpus, training)


def lora(model: MoE, way: Way, rate: float, training: Training) -> torch.optim.Optimizer:
    """Put adapters into the model, which alone are trained then; return what trains them, A and B as the way says."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ADAPTED)
    peft.inject_adapter_in_model(config, model)
    factors: dict[str, list[nn.Parameter]] = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factors["A" if "lora_A" in name else "B"].append(parameter)
    if way == "lora-adamw":
        return torch.optim.AdamW(factors["A"] + factors["B"], rate, training.betas, weight_decay=training.weight_decay)
    halves = {"A": "muon" if way == "lora-muon" else "adamw", "B": "muon"}
    groups = [{"params": factors[factor], "use": use} for factor, use in halves.items()]
    decay = training.weight_decay
    adamw = {"betas": training.betas, "weight_decay": decay}
    return MuonClip(groups, lr=rate, weight_decay=decay, adamw=adamw, qk_clip=None, ns_dtype=torch.float32)


def _trained(
    model: MoE,
    optimizer: torch.optim.Optimizer,
    rate: float,
    seed: int,
    corpus: Corpus,
    training: Training,
    finish: Callable[[], None] = lambda: None,
) -> MoE:
    model.train()
    hook = optimizer.register_step_post_hook(model.step_hook)
    windows: dict[str, Any] = {"seed": seed, "batch_size": training.batch_size, "length": model.config.max_seq_len}
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * training.schedule(step)
        optimizer.zero_grad()
        tokens = torch.from_numpy(corpus.batch(step=step, **windows))
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
    hook.remove()
    finish()
    return model.eval()


def table(figures: Mapping[str, Any]) -> str:
    """Write what each way reaches on the new text and loses on the old one, next to AdamW on the same seeds."""
    rows, of = figures["rows"], figures["training"]
    lines: list[str] = []
    for ways, title in ((BEFORE, "All weights"), (tuple(RATES)[2:], f"LoRA, rank {RANK}")):
        lines += [
            f"| {title} | trained before by | rate | prose | difference to AdamW | forgotten | difference to AdamW |",
            "|---|---|---|---|---|---|---|",
        ]
        for before in BEFORE:
            control = best_rows(rows, before, ways[0])
            for way in ways:
                own = best_rows(rows, before, way)
                rate = f"{own[0]['rate']:g}" + (" (the edge)" if _at_edge(own, rows) else "")
                prose, forgotten = _column(own, "prose"), forgetting(own)
                apart = ["", ""]
                if way != ways[0]:
                    pairs = ((prose, _column(control, "prose")), (forgotten, forgetting(control)))
                    apart = [str(interval([a - b for a, b in zip(*pair, strict=True)])) for pair in pairs]
                cells = (WORDS[way], WORDS[before], rate, f"{fmean(prose):.3f}", apart[0])
                lines.append(f"| {' | '.join([*cells, f'{fmean(forgotten):.3f}', apart[1]])} |")
        lines.append("")
    seeds = sorted({row["seed"] for row in rows})
    started = (
        f"{WORDS[before]}'s {fmean(_column(own, 'prose_before')):.3f} on prose, "
        f"{fmean(_column(own, 'code_before')):.3f} on sources"
        for before in BEFORE
        for own in [best_rows(rows, before, BEFORE[0])]
    )
    lines += [
        f"Bits per byte after {of['steps']} steps on prose that follow {of['pretraining_steps']} on Python's sources; "
        f"{of['batch_size']} windows a step, {len(seeds)} seeds. *Forgotten*: what the loss on sources has risen by. "
        f"Before, the models have, {'; '.join(started)}. Each way has four rates to choose from on the first seed. "
        "Differences are paired, with their 95 % intervals.",
        f"Made with {made_with(figures['environment'])}.",
        "",
    ]
    return "\n".join(lines)


def best_rows(rows: Sequence[Mapping[str, Any]], before: str, way: str) -> list[Mapping[str, Any]]:
    """Return the rows of a way at the rate that is best on the first seed, by seed."""
    own = [row for row in rows if (row["before"], row["way"]) == (before, way)]
    first = min(row["seed"] for row in own)
    best = min((row for row in own if row["seed"] == first), key=lambda row: row["prose"])["rate"]
    return sorted((row for row in own if row["rate"] == best), key=lambda row: row["seed"])


def forgetting(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["code"] - row["code_before"] for row in rows]


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _at_edge(own: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the rate is the smallest or the largest of those that were tried."""
    before, way, rate = own[0]["before"], own[0]["way"], own[0]["rate"]
    tried = {row["rate"] for row in rows if (row["before"], row["way"]) == (before, way)}
    return len(tried) > 1 and rate in (min(tried), max(tried))
