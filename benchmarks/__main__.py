"""`python -m benchmarks …`: the command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from benchmarks.execution import ranks as nodes
from benchmarks.execution.rank_runs import Nodes
from benchmarks.execution.train import Execution, run_panels, train_panels
from benchmarks.execution.workers import RunFailed
from benchmarks.experiment.arms import DEFAULT_ARMS, base_of, parse
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Framework, Panel, Training
from benchmarks.experiment.presets import HOT, OWN_RATE, PRESETS
from benchmarks.options import make_parser
from benchmarks.records import summary
from benchmarks.studies.clip_cost import PLANS, QUICK
from benchmarks.studies.clip_cost import clip_cost as measure_clip_cost
from benchmarks.studies.clip_cost_page import read_clip_cost, write_into
from benchmarks.studies.pilot import choose_rate, pilot_panel
from benchmarks.training.run import Checkpoints
from benchmarks.training.sharded_learner import Layout
from muonclip.models import MoEConfig
from muonclip.models.parallel import Parallelism

T = TypeVar("T")
ONLY_RANKS = ("shards", "replicas", "experts", "tensor", "accumulate", "recompute", "async_checkpoints")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run failed, 2 a wrong option, 130 interrupted."""
    parser, commands = make_parser()
    options = parser.parse_args(arguments)
    options.ranks = None  # of torchrun
    try:
        _run_command(options)
    except UsageError as error:
        if options.ranks is not None and not options.ranks.first:
            return 2  # the first rank says it
        commands[options.name].error(str(error))
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _run_command(options: argparse.Namespace) -> None:
    """Alone, or as one of the ranks that torchrun started. What only they understand is asked of nobody else."""
    if not nodes.launched():
        if options.name == "explosion" and (given := [name for name in ONLY_RANKS if getattr(options, name)]):
            option = "--" + given[0].replace("_", "-")
            raise UsageError(option, f"is for several processes: torchrun --nproc-per-node N -m benchmarks … {option}.")
        COMMANDS[options.name](options)
        return
    if options.name not in ("explosion", "scaling"):
        raise UsageError("command", f"{options.name} runs alone; explosion and scaling run under torchrun.")
    if options.name == "explosion" and options.framework == "jax":
        raise UsageError("--framework", "jax runs alone; take torchrun away, or --framework torch.")
    wanted = options.device or PRESETS[options.preset].device
    with nodes.joined(_device(wanted, "torch"), options.collective_timeout) as options.ranks:
        COMMANDS[options.name](options)


def explosion(options: argparse.Namespace) -> None:
    """One panel, by hand."""
    preset = PRESETS[options.preset]
    _check_framework(options)
    device = _device(options.device or preset.device, options.framework)
    ranks = options.ranks
    corpus = open_corpus(options.data) if ranks is None else ranks.on_each(lambda: open_corpus(options.data))
    training = preset.training
    for name in ("steps", "batch_size", "tau"):
        if getattr(options, name) is not None:
            training = replace(training, **{name: getattr(options, name)})
    rates = training.lr if options.lr is None else options.lr
    arms = list(dict.fromkeys(base_of(name) for name in options.arms if "lr" not in parse(name)[1]))
    if missing := [arm for arm in arms if arm not in rates and "" not in rates]:
        raise UsageError(
            "--lr", f"names no rate for {', '.join(missing)}; write one rate for all, or one for every arm."
        )
    training = replace(training, lr={arm: rates.get(arm, rates.get("")) for arm in arms})
    model = preset.model(attention=options.attention, vocab_size=corpus.vocab_size)
    title = "Attention logits" if options.framework == "torch" else "Attention logits, JAX"
    panel = replace(
        _panel("", title, options.arms, options.seeds or preset.seeds, model, training, corpus),
        framework=options.framework,
        device=device,
    )
    tried = options.pilot or (preset.pilot_rates if options.lr is None else ())
    piloted = [arm for arm in arms if not arm.startswith("adamw")]
    if tried and piloted:
        pilots = train_panels([pilot_panel(panel, tried)], corpus, _execution(options))
        rate, reason = _on_first(options, lambda: choose_rate(pilots[0]))
        if pilots:
            print(reason, file=sys.stderr)
        lr = {arm: rate if arm in piloted else panel.training.lr[arm] for arm in arms}
        panel = replace(panel, training=replace(panel.training, lr=lr))
    _run([panel], corpus, options)


def reproduce(options: argparse.Namespace) -> None:
    """The panels of the README: what explodes, and what a careful user gets."""
    corpus = open_corpus(options.data)
    model = PRESETS["cpu"].model(vocab_size=corpus.vocab_size)
    panels = [
        _panel("hot", "A hot rate", ("muon", "muonclip"), (0, 1), model, HOT, corpus),
        _panel("own-rate", "Each optimizer at its own best rate", DEFAULT_ARMS, (0,), model, OWN_RATE, corpus),
    ]
    _run(panels, corpus, options)


def evidence(options: argparse.Namespace) -> None:
    """The long version: see `benchmarks.evidence`."""
    from benchmarks.studies.evidence import evidence as run_evidence

    corpus = open_corpus(options.data)
    model = PRESETS["cpu"].model(vocab_size=corpus.vocab_size)
    corpus.require(model.max_seq_len)
    run_evidence(model, corpus, _execution(options))


def clip_cost(options: argparse.Namespace) -> None:
    """The time of training steps with QK-Clip and without: see `benchmarks.clip_cost`."""
    written = options.out / f"{options.device}.json"
    if options.page is not None:
        if not written.exists():
            raise UsageError("--page", f"needs {written}, which the same command without --page measures.")
        write_into(options.page, json.loads(written.read_text()))
        return
    plan = QUICK if options.quick else PLANS[options.device]
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        result = measure_clip_cost(options.out, models=options.models, device=options.device, plan=plan)
    finally:
        torch.set_num_threads(threads)
    print(read_clip_cost(result))
    print(f"figures  {written}", file=sys.stderr)


def optax_speed(options: argparse.Namespace) -> None:
    """Muon's update in JAX beside Optax's own: see `benchmarks.optax_speed`."""
    _check_jax("optax-speed")
    from benchmarks.studies.optax_speed import optax_speed as measure_optax_speed

    print(measure_optax_speed(options.out, options.rounds))


def scaling(options: argparse.Namespace) -> None:
    """Training steps on more and more ranks: see `benchmarks.scaling`."""
    from benchmarks.studies import scaling as measurement

    plan = measurement.Plan(options.arms, options.preset, options.batch_size, options.rounds)
    if options.ranks is not None:
        measurement.measure_ranks(plan, options.ranks, options.data, options.device, options.out)
        return
    print(measurement.scaling(plan, options.processes, options.data, options.device, options.out))


def report(options: argparse.Namespace) -> None:
    """Pictures and pages of finished runs: see `benchmarks.redraw`."""
    from benchmarks.report.redraw import redraw

    redraw(options.folders, options.out, events=options.tensorboard)


def _check_framework(options: argparse.Namespace) -> None:
    if options.framework == "torch":
        return
    _check_jax("--framework")
    if options.precision == "bf16":
        raise UsageError("--precision", "--framework jax runs in fp32.")


def _check_jax(wanted_by: str) -> None:
    if missing := [package for package in ("jax", "optax") if importlib.util.find_spec(package) is None]:
        raise UsageError(wanted_by, f'jax needs {" and ".join(missing)}: pip install ".[jax]".')


def _device(name: str, framework: Framework) -> str:
    if name == "cuda" and framework == "jax":
        raise UsageError("--device", "--framework jax runs on the CPU alone: take --device cpu.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device",
            f"torch {torch.__version__} sees no CUDA device. --preset cpu is made for this machine; --device cpu runs "
            "any preset on it, slowly.",
        )
    return name


def _panel(
    name: str,
    title: str,
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    model: MoEConfig,
    training: Training,
    corpus: Corpus,
) -> Panel:
    corpus.require(model.max_seq_len)
    bases = dict.fromkeys(base_of(arm) for arm in arms)
    training = replace(training, lr={arm: training.lr[arm] for arm in bases if arm in training.lr})
    return Panel(
        name=name,
        title=title,
        arms=arms,
        seeds=seeds,
        model=model,
        training=training,
        data=corpus.record(),
    )


def _on_first(options: argparse.Namespace, decide: Callable[[], T]) -> T:
    return decide() if options.ranks is None else options.ranks.on_first(decide)


def _run(panels: list[Panel], corpus: Corpus, options: argparse.Namespace) -> None:
    results = run_panels(panels, corpus, _execution(options))
    if options.ranks is not None and not options.ranks.first:
        return
    for result in results:
        print(f"\n{result.panel.heading}\n{result.panel.subject}\n\n{summary.table(result)}")
    print(f"\npage     {options.out / 'report.html'}")
    print(f"pictures {options.out / 'curves.png'}, {options.out / 'heads.png'}")
    for panel in panels:
        print(f"figures  {options.out / panel.name / 'summary.json'}")


def _execution(options: argparse.Namespace) -> Execution:
    checkpoints = Checkpoints(options.checkpoint_seconds, options.checkpoint_every)
    together = None
    if options.ranks is not None:
        layout = Layout(_parallelism(options, options.ranks.size), options.accumulate or 1, options.recompute)
        together = Nodes(options.ranks, layout, options.async_checkpoints)
    return Execution(options.out, options.jobs, options.precision, checkpoints, together)


def _parallelism(options: argparse.Namespace, world_size: int) -> Parallelism:
    """By default every rank that is no replica and no part of a tensor is a shard."""
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


COMMANDS = {
    "explosion": explosion,
    "reproduce": reproduce,
    "evidence": evidence,
    "clip-cost": clip_cost,
    "optax-speed": optax_speed,
    "scaling": scaling,
    "report": report,
}


if __name__ == "__main__":
    sys.exit(main())
