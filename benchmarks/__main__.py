"""`python -m benchmarks …`: the command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import torch

from benchmarks import nodes, summary
from benchmarks.arms import ARMS, DEFAULT_ARMS, SETTINGS, base_of, parse, with_settings
from benchmarks.clip_cost import PLANS, QUICK
from benchmarks.clip_cost import clip_cost as measure_clip_cost
from benchmarks.clip_cost_models import MODELS
from benchmarks.clip_cost_page import read_clip_cost, write_into
from benchmarks.data import Corpus, open_corpus
from benchmarks.errors import UsageError
from benchmarks.explosion import Execution, run_panels, train_panels
from benchmarks.nodes_run import Nodes
from benchmarks.panel import Framework, Panel, Training
from benchmarks.pilot import choose_rate, pilot_panel
from benchmarks.precision import PrecisionChoice
from benchmarks.presets import HOT, OWN_RATE, PRESETS
from benchmarks.runner import RunFailed
from benchmarks.sharded_learner import Layout
from benchmarks.stored import COMPARISON
from benchmarks.train import Checkpoints
from muonclip.models import MoEConfig
from muonclip.models.config import Attention
from muonclip.models.parallel import Parallelism

T = TypeVar("T")
ONLY_RANKS = ("shards", "replicas", "experts", "tensor", "accumulate", "recompute", "async_checkpoints")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run failed, 2 a wrong option, 130 interrupted."""
    parser, commands = _parser()
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
        options.command(options)
        return
    if options.name not in ("explosion", "scaling"):
        raise UsageError("command", f"{options.name} runs alone; explosion and scaling run under torchrun.")
    if options.name == "explosion" and options.framework == "jax":
        raise UsageError("--framework", "jax runs alone; take torchrun away, or --framework torch.")
    wanted = options.device or PRESETS[options.preset].device
    with nodes.joined(_device(wanted, "torch"), options.collective_timeout) as options.ranks:
        options.command(options)


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
    from benchmarks.evidence import evidence as run_evidence

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
    from benchmarks.optax_speed import optax_speed as measure_optax_speed

    print(measure_optax_speed(options.out, options.rounds))


def scaling(options: argparse.Namespace) -> None:
    """Training steps on more and more ranks: see `benchmarks.scaling`."""
    from benchmarks import scaling as measurement

    plan = measurement.Plan(options.arms, options.preset, options.batch_size, options.rounds)
    if options.ranks is not None:
        measurement.measure_ranks(plan, options.ranks, options.data, options.device, options.out)
        return
    print(measurement.scaling(plan, options.processes, options.data, options.device, options.out))


def report(options: argparse.Namespace) -> None:
    """Pictures and pages of finished runs: see `benchmarks.redraw`."""
    from benchmarks.redraw import redraw

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


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Evidence on real text, by one command.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")

    by_hand = commands.add_parser("explosion", help="train arms side by side and draw their attention logits")
    by_hand.set_defaults(command=explosion)
    by_hand.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="model and training (default: cpu)")
    by_hand.add_argument(
        "--arms",
        type=_arms,
        default=DEFAULT_ARMS,
        metavar="A,B",
        help=f"of {', '.join(ARMS)}; qk-norm and softcap also change the model (default: {','.join(DEFAULT_ARMS)}). "
        f"An arm may have settings of its own, as in muonclip@tau=10@weight_decay=0: {', '.join(SETTINGS)}",
    )
    by_hand.add_argument("--seeds", type=_seeds, metavar="N,M", help="default: 0,1; presets gpu and node: 0")
    by_hand.add_argument("--attention", choices=get_args(Attention), default="mla", help="default: mla")
    by_hand.add_argument("--tau", type=_positive, metavar="LOGIT", help="threshold of the clip, and the soft cap")
    by_hand.add_argument("--lr", type=_rates, metavar="RATE", help="one rate for all arms, or arm=rate,arm=rate")
    by_hand.add_argument(
        "--pilot",
        type=_pilot_rates,
        metavar="RATE,RATE",
        help="first train Muon briefly at each of these, and take the lowest at which logits pass 100 "
        "(presets gpu and node do so unless --lr is given)",
    )
    by_hand.add_argument(
        "--framework", choices=get_args(Framework), default="torch", help="default: torch; jax: on the CPU, in fp32"
    )
    by_hand.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")
    by_hand.add_argument("--steps", type=_count, metavar="N")
    by_hand.add_argument("--batch", type=_count, dest="batch_size", metavar="WINDOWS", help="windows per step")

    _add_rank_options(by_hand)

    both = commands.add_parser(
        "reproduce", help="the README's figures: logits under a hot rate and under each one's own"
    )
    both.set_defaults(command=reproduce)

    long = commands.add_parser(
        "evidence", help="rate sweep, token efficiency, the cost of clipping, all arms: 40 minutes on two cores at most"
    )
    long.set_defaults(command=evidence)

    for command in (by_hand, both, long):
        command.add_argument(
            "--data",
            type=Path,
            metavar="PATH",
            help="text file, folder, or token file (.bin and .u16: uint16, .u32: uint32; little-endian); "
            "default: the sources of this Python's standard library",
        )
        command.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="results; an interrupted command goes on there"
        )
        command.add_argument(
            "--jobs", type=_count, metavar="N", help="runs side by side (default: one per core; on a GPU one)"
        )
        command.add_argument(
            "--precision", choices=get_args(PrecisionChoice), default="auto", help="default: bf16 where measured faster"
        )
        command.add_argument("--checkpoint-seconds", type=_seconds, default=20.0, metavar="S", help="default: 20")
        command.add_argument(
            "--checkpoint-every", type=_count, metavar="STEPS", help="by steps and not by seconds, whatever the time"
        )
    cost = commands.add_parser(
        "clip-cost", help="the time of whole training steps with QK-Clip and without: 25 minutes on two cores"
    )
    cost.set_defaults(command=clip_cost)
    cost.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets cpu.json or cuda.json")
    cost.add_argument("--models", type=_models, default=tuple(MODELS), metavar="A,B", help=f"of {', '.join(MODELS)}")
    cost.add_argument("--device", choices=sorted(PLANS), default="cpu", help="default: cpu")
    cost.add_argument("--threads", type=_count, metavar="N", help="default: what torch takes")
    cost.add_argument("--quick", action="store_true", help="few steps of tiny models, to see that all of it works")
    cost.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="measure nothing; write what DIR holds into this page, between its marks",
    )

    speed = commands.add_parser(
        "optax-speed", help="Muon's update in JAX beside Optax's own: three minutes on two cores"
    )
    speed.set_defaults(command=optax_speed)
    speed.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets cpu.json and cpu.md, or gpu")
    speed.add_argument("--rounds", type=_count, default=31, metavar="N", help="timed calls of each (default: 31)")

    more = commands.add_parser(
        "scaling", help="time training steps on more and more processes: alone for --processes, or under torchrun"
    )
    more.set_defaults(command=scaling)
    more.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets scaling.json and scaling.md")
    more.add_argument(
        "--processes", type=_counts, default=(1, 2, 4), metavar="N,M", help="of this machine (default: 1,2,4)"
    )
    more.add_argument(
        "--arms", type=_arms, default=("adamw", "muonclip"), metavar="A,B", help="default: adamw,muonclip"
    )
    more.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="the model (default: cpu)")
    more.add_argument(
        "--batch",
        type=_count,
        dest="batch_size",
        default=8,
        metavar="WINDOWS",
        help="per process (weak scaling), or per step for each process of the most (strong scaling) (default: 8)",
    )
    more.add_argument("--rounds", type=_count, default=15, metavar="N", help="timed steps (default: 15)")
    more.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")
    more.add_argument("--data", type=Path, metavar="PATH", help="default: the sources of this Python's library")
    more.add_argument("--collective-timeout", type=_positive, default=nodes.DEFAULT_TIMEOUT, metavar="S")

    again = commands.add_parser(
        "report", help="draw finished runs again, without training; several folders also side by side"
    )
    again.set_defaults(command=report)
    again.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="the --out of an earlier command, finished or still running",
    )
    again.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"the page of all folders together (default: ./{COMPARISON} where there are several)",
    )
    again.add_argument("--tensorboard", action="store_true", help="also write DIR/tensorboard, events for TensorBoard")
    return parser, {
        "explosion": by_hand,
        "reproduce": both,
        "evidence": long,
        "clip-cost": cost,
        "optax-speed": speed,
        "scaling": more,
        "report": again,
    }


def _add_rank_options(command: argparse.ArgumentParser) -> None:
    """Options that need torchrun, but for the last."""
    degrees = command.add_argument_group("under torchrun, which trains one run after the other on all processes")
    degrees.add_argument("--shards", type=_count, metavar="N", help="FSDP (default: all processes)")
    degrees.add_argument("--replicas", type=_count, metavar="N", help="HSDP: copies of the shards (default: 1)")
    degrees.add_argument("--experts", type=_count, metavar="N", help="ranks that share the experts out (default: 1)")
    degrees.add_argument("--tensor", type=_count, metavar="N", help="ranks that share heads and widths (default: 1)")
    degrees.add_argument("--accumulate", type=_count, metavar="N", help="micro-batches per step (default: 1)")
    degrees.add_argument("--recompute", action="store_true", help="activations are computed again, not kept")
    degrees.add_argument("--async-checkpoints", action="store_true", help="written beside the training")
    degrees.add_argument(
        "--collective-timeout",
        type=_positive,
        default=nodes.DEFAULT_TIMEOUT,
        metavar="S",
        help=f"a rank that waits longer for others ends (default: {nodes.DEFAULT_TIMEOUT:g})",
    )


def _arms(text: str) -> tuple[str, ...]:
    try:
        parsed = [parse(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return _distinct(tuple(with_settings(base, **settings) for base, settings in parsed))


def _models(text: str) -> tuple[str, ...]:
    models = tuple(text.split(","))
    if unknown := [model for model in models if model not in MODELS]:
        raise argparse.ArgumentTypeError(f"unknown model {unknown[0]!r}; known: {', '.join(MODELS)}")
    return _distinct(models)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers from 0, such as 0,1")
    return _distinct(seeds)


def _counts(text: str) -> tuple[int, ...]:
    return _distinct(tuple(_count(part) for part in text.split(",")))


def _distinct(items: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(items)) < len(items):
        raise argparse.ArgumentTypeError(f"{','.join(map(str, items))} names something twice")
    return items


def _pilot_rates(text: str) -> tuple[float, ...]:
    return _distinct(tuple(_positive(part) for part in text.split(",")))


def _rates(text: str) -> dict[str, float]:
    """By arm; under "" the rate for all."""
    if "=" not in text:
        return {"": _positive(text)}
    rates: dict[str, float] = {}
    for part in text.split(","):
        arm, equals, rate = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text!r} is neither one rate nor arm=rate,arm=rate")
        if arm not in ARMS:
            raise argparse.ArgumentTypeError(f"unknown arm {arm!r}; known: {', '.join(ARMS)}")
        if arm in rates:
            raise argparse.ArgumentTypeError(f"{arm} has two rates in {text!r}")
        rates[arm] = _positive(rate)
    return rates


def _positive(text: str) -> float:
    return _number(text, float, lambda x: 0 < x < math.inf, "a positive number")


def _seconds(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < math.inf, "a number of seconds, zero or more")


def _count(text: str) -> int:
    return int(_number(text, int, lambda x: x >= 1, "an integer of at least 1"))


def _number(text: str, kind: Callable[[str], float], holds: Callable[[float], bool], meaning: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
    return value


if __name__ == "__main__":
    sys.exit(main())
