"""Runs of benchmarks for tests: trained ones read back, and results made of records that no run has left."""

import math
from dataclasses import replace

from benchmarks.experiment.arms import ARMS, choices
from benchmarks.records import metrics
from benchmarks.records.atomic_files import write_json
from benchmarks.records.folders import CONFIG, METRICS, RESULT, run_folder
from benchmarks.records.run_records import run_records
from benchmarks.records.summary import Results, summarise

LAYERS = ("layers.0.attn", "layers.1.attn")


def steps_of(folder):
    """The records of a run, but for their speed."""
    every = metrics.read(folder / METRICS)
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in every]


def trained(run, until=None):
    """The run, trained to the end or until so many updates are done."""
    run.train(stopping=lambda: run.done == until)
    return run


def with_arms(experiment, *names, **training):
    """The experiment with these arms and changes of its training; every arm has a rate."""
    lr = dict.fromkeys(ARMS, 1e-2) | dict(experiment.training.lr)
    own = replace(experiment.training, **{"lr": lr, **training})
    return replace(experiment, chosen=choices(*names), training=own)


def growing(steps, top, *, measured=True, diverges=False):
    """Records whose largest logit grows to `top`, in head 2 of the second layer."""
    made = []
    for step in range(1, steps + 1):
        logits = {LAYERS[0]: [0.1] * 4, LAYERS[1]: [0.2, 0.3, top * step / steps, -1.0]}
        made.append({"step": step, "loss": 3 + top * 1e-6, "grad_norm": 1.0, "max_logits": logits, "clipped_heads": 0})
        if step % 4 == 0 or step == steps:
            made[-1]["val_loss"] = 2.0
            if measured:
                heads = {name: [1.0, 2.0, 3.0, 4.0] for name in LAYERS}
                made[-1] |= dict.fromkeys(("attention_entropy", "query_norms", "key_norms"), heads)
                made[-1]["update_rms"] = 0.2
    if diverges:
        made[-1] |= {"loss": math.nan, "max_logits": {}, "val_loss": math.nan}
    return made


def logit(layer, head, step):
    return 1.0 + layer + 0.1 * head + 0.01 * step


def heads(steps, layers=2, count=4, clipped=(), at=None):
    """Records with `logit` everywhere but where `at` has {(layer, head, step): value}."""
    return [
        {
            "step": step,
            "loss": 2.0,
            "max_logits": {
                f"layers.{layer}.attn": [
                    (at or {}).get((layer, head, step), logit(layer, head, step)) for head in range(count)
                ]
                for layer in range(layers)
            },
            "clipped_heads": 1 if step in clipped else 0,
        }
        for step in range(1, steps + 1)
    ]


def ended(records, **changes):
    """The result of a run that left these records."""
    diverged = not math.isfinite(records[-1]["loss"])
    final = records[-1].get("val_loss", math.nan)
    seconds = {"wall_seconds": 1.0, "train_seconds": 1.0}
    return {"steps": len(records), "diverged": diverged, "final_val_loss": final} | seconds | changes


def results_of(experiment, runs, environment=None):
    """Results of records by arm and seed; the experiment has these arms."""
    experiment = replace(experiment, chosen=choices(*runs))
    records = {name: {seed: run_records(of) for seed, of in by_seed.items()} for name, by_seed in runs.items()}
    summaries = {
        name: {
            seed: summarise(experiment, experiment.arm(name), records[name][seed], ended(of))
            for seed, of in own.items()
        }
        for name, own in runs.items()
    }
    return Results(experiment, records, summaries, environment or {})


def store(folder, experiment, runs, unfinished=(), environment=None):
    """A folder as a command leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = environment or {"torch": "2.13"}
    write_json(folder / CONFIG, {"config": experiment.to_json(), "environment": made})
    for name, by_seed in runs.items():
        for seed, records in by_seed.items():
            run = run_folder(folder, name, seed)
            run.mkdir(parents=True)
            log = metrics.MetricsLog(run / METRICS)
            for record in records:
                log.append(record)
            if (name, seed) not in unfinished:
                write_json(run / RESULT, metrics.to_json(ended(records)))
