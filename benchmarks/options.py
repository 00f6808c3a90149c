"""The options of `python -m benchmarks …`: each command's, what they are when not given, and how their text is read."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from benchmarks.execution import ranks
from benchmarks.experiment.arms import ARMS, DEFAULT_ARMS, SETTINGS, Choice, choices
from benchmarks.experiment.presets import PRESETS
from benchmarks.experiment.settings import Framework
from benchmarks.report.redraw import COMPARISON
from benchmarks.studies.clip_cost import PLANS
from benchmarks.studies.clip_cost_models import MODELS
from benchmarks.training.precision import PrecisionChoice
from muonclip.models.config import Attention

T = TypeVar("T")
Options = Callable[[ArgumentParser], None]


def make_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """That of the whole command line, which stores the command as `name`; and those of the commands, by name."""
    parser = ArgumentParser(prog="python -m benchmarks", description="Evidence on real text, by one command.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    made: dict[str, ArgumentParser] = {}
    for name, (meaning, add_options) in _COMMANDS.items():
        made[name] = commands.add_parser(name, help=meaning)
        add_options(made[name])
    return parser, made


def arms(text: str) -> tuple[Choice, ...]:
    try:
        chosen = choices(*text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    _distinct([choice.name for choice in chosen])
    return chosen


def models(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise ArgumentTypeError(f"unknown model {unknown[0]!r}; known: {', '.join(MODELS)}")
    return _distinct(names)


def seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ArgumentTypeError(f"{text!r} is not a list of integers from 0, such as 0,1")
    return _distinct(numbers)


def counts(text: str) -> tuple[int, ...]:
    return _distinct([count(part) for part in text.split(",")])


def distinct_rates(text: str) -> tuple[float, ...]:
    return _distinct([positive(part) for part in text.split(",")])


def rates(text: str) -> dict[str, float]:
    """By arm; under "" the rate for all."""
    if "=" not in text:
        return {"": positive(text)}
    by_arm: dict[str, float] = {}
    for part in text.split(","):
        arm, equals, rate = part.partition("=")
        if not equals:
            raise ArgumentTypeError(f"{text!r} is neither one rate nor arm=rate,arm=rate")
        if arm not in ARMS:
            raise ArgumentTypeError(f"unknown arm {arm!r}; known: {', '.join(ARMS)}")
        if arm in by_arm:
            raise ArgumentTypeError(f"{arm} has two rates in {text!r}")
        by_arm[arm] = positive(rate)
    return by_arm


def positive(text: str) -> float:
    return _number(text, float, lambda x: 0 < x < math.inf, "a positive number")


def seconds(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < math.inf, "a number of seconds, zero or more")


def count(text: str) -> int:
    return int(_number(text, int, lambda x: x >= 1, "an integer of at least 1"))


def _distinct(items: list[T]) -> tuple[T, ...]:
    if len(set(items)) < len(items):
        raise ArgumentTypeError(f"{','.join(map(str, items))} names something twice")
    return tuple(items)


def _number(text: str, kind: Callable[[str], float], holds: Callable[[float], bool], meaning: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        raise ArgumentTypeError(f"{text!r} is not {meaning}")
    return value


def _explosion(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--preset", choices=sorted(PRESETS), default="cpu", help="model and training (default: cpu)")
    add(
        "--arms",
        type=arms,
        default=choices(*DEFAULT_ARMS),
        metavar="A,B",
        help=f"of {', '.join(ARMS)}; qk-norm and softcap also change the model (default: {','.join(DEFAULT_ARMS)}). "
        f"An arm may have settings of its own, as in muonclip@tau=10@weight_decay=0: {', '.join(SETTINGS)}",
    )
    add("--seeds", type=seeds, metavar="N,M", help="default: 0,1; presets gpu and node: 0")
    add("--attention", choices=get_args(Attention), default="mla", help="default: mla")
    add("--tau", type=positive, metavar="LOGIT", help="threshold of the clip, and the soft cap")
    add("--lr", type=rates, metavar="RATE", help="one rate for all arms, or arm=rate,arm=rate")
    pilot = "first train Muon briefly at each of these, and take the lowest at which logits pass 100 "
    pilot += "(presets gpu and node do so unless --lr is given)"
    add("--pilot", type=distinct_rates, metavar="RATE,RATE", help=pilot)
    frameworks = "default: torch; jax: on the CPU, in fp32"
    add("--framework", choices=get_args(Framework), default="torch", help=frameworks)
    _device(command)
    add("--steps", type=count, metavar="N")
    add("--batch", type=count, dest="batch_size", metavar="WINDOWS", help="windows per step")
    _ranks(command)
    _training(command)


def _ranks(command: ArgumentParser) -> None:
    """Options that need torchrun, but for the last."""
    group = command.add_argument_group("under torchrun, which trains one run after the other on all processes")
    for name, meaning in {
        "--shards": "FSDP (default: all processes)",
        "--replicas": "HSDP: copies of the shards (default: 1)",
        "--experts": "ranks sharing the experts (default: 1)",
        "--tensor": "ranks sharing heads and widths (default: 1)",
        "--accumulate": "micro-batches per step (default: 1)",
    }.items():
        group.add_argument(name, type=count, metavar="N", help=meaning)
    group.add_argument("--recompute", action="store_true", help="activations are computed again, not kept")
    group.add_argument("--async-checkpoints", action="store_true", help="written during the training")
    _timeout(group)


def _training(command: ArgumentParser) -> None:
    """Data, results, and how runs are executed."""
    add = command.add_argument
    tokens = "text file, folder, or token file (.bin and .u16: uint16, .u32: uint32; little-endian); "
    _data(command, tokens)
    _out(command, "results; an interrupted command goes on there")
    add("--jobs", type=count, metavar="N", help="runs side by side (default: one per core; on a GPU one)")
    measured = "default: bf16 where measured faster"
    add("--precision", choices=get_args(PrecisionChoice), default="auto", help=measured)
    add("--checkpoint-seconds", type=seconds, default=20.0, metavar="S", help="default: 20")
    add("--checkpoint-every", type=count, metavar="STEPS", help="by steps and not by seconds, whatever the time")


def _clip_cost(command: ArgumentParser) -> None:
    add = command.add_argument
    _out(command, "gets cpu.json or cuda.json")
    add("--models", type=models, default=tuple(MODELS), metavar="A,B", help=f"of {', '.join(MODELS)}")
    add("--device", choices=sorted(PLANS), default="cpu", help="default: cpu")
    add("--threads", type=count, metavar="N", help="default: what torch takes")
    add("--quick", action="store_true", help="few steps of tiny models, to see that all of it works")
    page = "measure nothing; write what DIR holds into this page, between its marks"
    add("--page", type=Path, metavar="FILE", help=page)


def _optax_speed(command: ArgumentParser) -> None:
    _out(command, "gets cpu.json and cpu.md, or gpu")
    _rounds(command, 31, "timed calls")


def _scaling(command: ArgumentParser) -> None:
    add = command.add_argument
    _out(command, "gets scaling.json and scaling.md")
    add("--processes", type=counts, default=(1, 2, 4), metavar="N,M", help="of this machine (default: 1,2,4)")
    add("--arms", type=arms, default=choices("adamw", "muonclip"), metavar="A,B", help="default: adamw,muonclip")
    add("--preset", choices=sorted(PRESETS), default="cpu", help="the model (default: cpu)")
    windows = "per process (weak scaling), or per step for each process of the most (strong scaling) (default: 8)"
    add("--batch", type=count, dest="batch_size", default=8, metavar="WINDOWS", help=windows)
    _rounds(command, 15, "timed steps")
    _device(command)
    _data(command)
    _timeout(command)


def _kill_trials(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--trials", type=count, default=20, metavar="N", help="default: 20")
    add("--processes", type=count, default=4, metavar="N", help="default: 4")
    add("--async-checkpoints", action="store_true", help="written during the training")
    add("--arm", default="muonclip", help="default: muonclip")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--out", type=Path, required=True, metavar="FILE.jsonl")


def _report(command: ArgumentParser) -> None:
    add, together = command.add_argument, "the page of all folders together (default: "
    earlier = "the --out of an earlier command, finished or still running"
    add("folders", type=Path, nargs="+", metavar="DIR", help=earlier)
    add("--out", type=Path, metavar="DIR", help=f"{together}./{COMPARISON} where there are several)")
    add("--tensorboard", action="store_true", help="also write DIR/tensorboard, events for TensorBoard")


def _out(command: ArgumentParser, meaning: str) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help=meaning)


def _data(command: ArgumentParser, kinds: str = "") -> None:
    meaning = f"{kinds}default: the sources of this Python's standard library"
    command.add_argument("--data", type=Path, metavar="PATH", help=meaning)


def _device(command: ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")


def _rounds(command: ArgumentParser, default: int, meaning: str) -> None:
    command.add_argument("--rounds", type=count, default=default, metavar="N", help=f"{meaning} (default: {default})")


def _timeout(command: Any) -> None:
    default = ranks.DEFAULT_TIMEOUT
    meaning = f"a rank that waits longer for others ends (default: {default:g})"
    command.add_argument("--collective-timeout", type=positive, default=default, metavar="S", help=meaning)


_COMMANDS: dict[str, tuple[str, Options]] = {
    "explosion": ("train arms side by side and draw their attention logits", _explosion),
    "reproduce": ("the README's figures: logits under a hot rate and under each one's own", _training),
    "evidence": ("rates, token efficiency, cost of clipping, all arms: at most 40 minutes on two cores", _training),
    "clip-cost": ("the time of whole training steps with QK-Clip and without: 25 minutes on two cores", _clip_cost),
    "optax-speed": ("Muon's update in JAX next to Optax's own: three minutes on two cores", _optax_speed),
    "scaling": ("time training steps on more and more processes: alone for --processes, or under torchrun", _scaling),
    "kill-trials": ("does a run survive kill -9? ranks killed at random, and what the runs end with", _kill_trials),
    "ownership": ("draw which ranks hold and iterate the matrices of a layer", lambda command: _out(command, "a PNG")),
    "report": ("draw finished runs again, without training; several folders also side by side", _report),
}  # fmt: skip
