"""The commands: from the values of their options to experiments and studies."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from dataclasses import replace

import torch

from benchmarks.execution.rank_runs import Team
from benchmarks.execution.train import Execution, train
from benchmarks.experiment.arms import ARMS, DEFAULT_ARMS, choices
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import HOT, OWN_RATE, PRESETS
from benchmarks.studies import spikes as study_of_spikes
from benchmarks.training.run import Alone, Schedule
from benchmarks.training.sharded_learner import Layout
from muonclip.models.parallel import Parallelism


def explosion(options: argparse.Namespace) -> None:
    """Train one experiment, as the options say."""
    preset, ranks = PRESETS[options.preset], options.ranks or Alone()
    device = device_of(options)
    corpus = ranks.on_each(lambda: open_corpus(options.data))
    rates = preset.training.lr if options.lr is None else options.lr
    entries = list(dict.fromkeys(choice.entry for choice in options.arms if "lr" not in choice.settings))
    if missing := [entry for entry in entries if entry not in rates]:
        message = f"names no rate for {', '.join(missing)}; write one rate for all, or one for every arm."
        raise UsageError("--lr", message)
    if options.framework == "jax" and any(ARMS[choice.entry].optimizer == "torch-muon" for choice in options.arms):
        raise UsageError("--arms", "torch-muon is PyTorch's own Muon: take it away, or --framework torch.")
    given = {name: getattr(options, name) for name in ("steps", "batch_size", "tau")}
    given = {name: value for name, value in given.items() if value is not None}
    training = replace(preset.training, lr={entry: rates[entry] for entry in entries}, **given)
    experiment = Experiment.on(
        corpus,
        name="",
        title="Attention logits" if options.framework == "torch" else "Attention logits, JAX",
        chosen=options.arms,
        seeds=options.seeds or preset.seeds,
        model=preset.model(attention=options.attention, vocab_size=corpus.vocab_size),
        training=training,
        framework=options.framework,
        device=device,
    )
    tried = options.pilot or (preset.pilot_rates if options.lr is None else ())
    piloted = [entry for entry in entries if not entry.startswith("adamw")]
    if tried and piloted:
        from benchmarks.studies.pilot import choose_rate, pilot_experiment

        pilots = train([pilot_experiment(experiment, tried)], corpus, _execution(options))
        rate, reason = ranks.on_first(lambda: choose_rate(pilots[0]))
        if ranks.first:
            print(reason, file=sys.stderr)
        lr = dict(training.lr) | dict.fromkeys(piloted, rate)
        experiment = replace(experiment, training=replace(training, lr=lr))
    _run([experiment], corpus, options)


def reproduce(options: argparse.Namespace) -> None:
    """Train the experiments of the README: at a rate that explodes, and at rates that a careful user would choose."""
    corpus = open_corpus(options.data)
    of = {"corpus": corpus, "model": PRESETS["cpu"].model(vocab_size=corpus.vocab_size)}
    hot = {"name": "hot", "title": "A hot rate", "chosen": choices("muon", "muonclip"), "seeds": (0, 1)}
    own = {"name": "own-rate", "title": "Each optimizer at its own best rate", "chosen": choices(*DEFAULT_ARMS)}
    experiments = [Experiment.on(training=HOT, **hot, **of), Experiment.on(training=OWN_RATE, seeds=(0,), **own, **of)]
    _run(experiments, corpus, options)


def evidence(options: argparse.Namespace) -> None:
    """Train the long version: see `benchmarks.studies.evidence`."""
    from benchmarks.studies.evidence import evidence as run_evidence

    corpus = open_corpus(options.data)
    run_evidence(PRESETS["cpu"].model(vocab_size=corpus.vocab_size), corpus, _execution(options))


def spikes(options: argparse.Namespace) -> None:
    """Disturb runs, or search for spikes of Muon's own: see `benchmarks.studies.spikes`."""
    corpus, execution = open_corpus(options.data), _execution(options)
    model = PRESETS["cpu"].model(vocab_size=corpus.vocab_size)
    if options.search:
        study_of_spikes.search(model, corpus, execution, seeds=options.seeds or (0,))
    else:
        chosen = {"arms": options.arms, "seeds": options.seeds or study_of_spikes.SEEDS, "cases": options.cases}
        study_of_spikes.spikes(model, corpus, execution, **chosen)


def report(options: argparse.Namespace) -> None:
    """Draw pictures and pages of finished runs: see `benchmarks.report.redraw`."""
    from benchmarks.report.redraw import redraw

    redraw(options.folders, options.out, events=options.tensorboard)


def study(options: argparse.Namespace) -> None:
    """Run the study of the command's name."""
    if options.name.startswith("optax-"):
        _check_jax(options.name)
    importlib.import_module(f"benchmarks.studies.{options.name.replace('-', '_')}").run(options)


COMMANDS = {"explosion": explosion, "reproduce": reproduce, "evidence": evidence, "spikes": spikes, "report": report}
_STUDIES = (
    "clip-cost",
    "optax-speed",
    "optax-collectives",
    "speed",
    "scaling",
    "cluster",
    "weight-broadcast",
    "kill-trials",
    "ownership",
    "referee",
    "gram-accuracy",
    "primer",
    "coordinate-check",
    "grad-clipping",
    "variants",
    "fine-tuning",
    "master-weights",
    "k2-training",
    "long-context",
    "momentum-dtype",
    "sweep",
)
COMMANDS |= dict.fromkeys((*_STUDIES, "gpu-check"), study)


def device_of(options: argparse.Namespace) -> str:
    """Return the device of the runs. Raises UsageError where the framework or this machine cannot run on it."""
    device = options.device or PRESETS[options.preset].device
    if vars(options).get("framework") == "jax":
        _check_jax("--framework")
        if device == "cuda":
            raise UsageError("--device", "--framework jax runs on the CPU alone: take --device cpu.")
        if options.precision == "bf16":
            raise UsageError("--precision", "--framework jax runs in fp32.")
    if device == "cuda" and not torch.cuda.is_available():
        why = (
            f"torch {torch.__version__} sees no CUDA device. --preset cpu is made for this machine; --device cpu runs "
        )
        raise UsageError("--device", f"{why}any preset on it, slowly.")
    return device


def parallelism(options: argparse.Namespace, world_size: int) -> Parallelism:
    """Read the degrees of parallelism.

    By default every rank that is neither a replica nor a part of a tensor is a shard.
    """
    others = (options.replicas or 1) * (options.tensor or 1)
    if options.shards is None and world_size % others:
        name = "--replicas" if options.replicas else "--tensor"
        raise UsageError(name, f"replicas · tensor = {others} must divide the {world_size} processes.")
    return Parallelism(
        shards=options.shards or world_size // others,
        replicas=options.replicas or 1,
        experts=options.experts or 1,
        tensor=options.tensor or 1,
    )


def _check_jax(wanted_by: str) -> None:
    if missing := [package for package in ("jax", "optax") if importlib.util.find_spec(package) is None]:
        raise UsageError(wanted_by, f'jax needs {" and ".join(missing)}: pip install ".[jax]".')


def _run(experiments: list[Experiment], corpus: Corpus, options: argparse.Namespace) -> None:
    """Train, then draw all in `out`, and print the tables."""
    results = train(experiments, corpus, _execution(options))
    if not results:
        return
    from benchmarks.report import redraw, tables  # what they import costs seconds, and only who draws should pay

    redraw.draw(results, options.out)
    for result in results:
        print(f"\n{result.experiment.heading}\n{result.experiment.subject}\n\n{tables.runs_text(result)}")
    print(f"\npage     {options.out / 'report.html'}")
    print(f"pictures {options.out / 'curves.png'}, {options.out / 'heads.png'}")
    for experiment in experiments:
        print(f"figures  {options.out / experiment.name / 'summary.json'}")


def _execution(options: argparse.Namespace) -> Execution:
    checkpoints = Schedule(options.checkpoint_seconds, options.checkpoint_every)
    team = None
    if options.ranks is not None:
        divided = parallelism(options, options.ranks.size)
        kept = options.recompute, options.store_activations, options.offload_activations
        team = Team(options.ranks, Layout(divided, options.accumulate or 1, *kept), options.async_checkpoints)
    return Execution(options.out, options.jobs, options.precision, checkpoints, team)
