"""The options of `python -m benchmarks …`: each command's, and what they are when not given."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from pathlib import Path
from typing import get_args

from benchmarks import option_values as values
from benchmarks.execution import ranks as nodes
from benchmarks.experiment.arms import ARMS, DEFAULT_ARMS, SETTINGS
from benchmarks.experiment.experiment import Framework
from benchmarks.experiment.presets import PRESETS
from benchmarks.records.load_results import COMPARISON
from benchmarks.studies.clip_cost import PLANS
from benchmarks.studies.clip_cost_models import MODELS
from benchmarks.training.precision import PrecisionChoice
from muonclip.models.config import Attention


def make_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """That of the whole command line, which stores the command as `name`; and those of the commands, by name."""
    parser = ArgumentParser(prog="python -m benchmarks", description="Evidence on real text, by one command.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    made: dict[str, ArgumentParser] = {}
    for name, (meaning, add_options) in _COMMANDS.items():
        made[name] = commands.add_parser(name, help=meaning)
        add_options(made[name])
    return parser, made


def _explosion(command: ArgumentParser) -> None:
    command.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="model and training (default: cpu)")
    command.add_argument(
        "--arms",
        type=values.arms,
        default=DEFAULT_ARMS,
        metavar="A,B",
        help=f"of {', '.join(ARMS)}; qk-norm and softcap also change the model (default: {','.join(DEFAULT_ARMS)}). "
        f"An arm may have settings of its own, as in muonclip@tau=10@weight_decay=0: {', '.join(SETTINGS)}",
    )
    command.add_argument("--seeds", type=values.seeds, metavar="N,M", help="default: 0,1; presets gpu and node: 0")
    command.add_argument("--attention", choices=get_args(Attention), default="mla", help="default: mla")
    command.add_argument("--tau", type=values.positive, metavar="LOGIT", help="threshold of the clip, and the soft cap")
    command.add_argument("--lr", type=values.rates, metavar="RATE", help="one rate for all arms, or arm=rate,arm=rate")
    command.add_argument(
        "--pilot",
        type=values.distinct_rates,
        metavar="RATE,RATE",
        help="first train Muon briefly at each of these, and take the lowest at which logits pass 100 "
        "(presets gpu and node do so unless --lr is given)",
    )
    command.add_argument(
        "--framework", choices=get_args(Framework), default="torch", help="default: torch; jax: on the CPU, in fp32"
    )
    _device(command)
    command.add_argument("--steps", type=values.count, metavar="N")
    command.add_argument("--batch", type=values.count, dest="batch_size", metavar="WINDOWS", help="windows per step")
    _ranks(command)
    _training(command)


def _ranks(command: ArgumentParser) -> None:
    """Options that need torchrun, but for the last."""
    group = command.add_argument_group("under torchrun, which trains one run after the other on all processes")
    group.add_argument("--shards", type=values.count, metavar="N", help="FSDP (default: all processes)")
    group.add_argument("--replicas", type=values.count, metavar="N", help="HSDP: copies of the shards (default: 1)")
    group.add_argument("--experts", type=values.count, metavar="N", help="ranks sharing the experts (default: 1)")
    group.add_argument("--tensor", type=values.count, metavar="N", help="ranks sharing heads and widths (default: 1)")
    group.add_argument("--accumulate", type=values.count, metavar="N", help="micro-batches per step (default: 1)")
    group.add_argument("--recompute", action="store_true", help="activations are computed again, not kept")
    group.add_argument("--async-checkpoints", action="store_true", help="written beside the training")
    _timeout(group)


def _training(command: ArgumentParser) -> None:
    """Data, results, and how runs are executed."""
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
        "--jobs", type=values.count, metavar="N", help="runs side by side (default: one per core; on a GPU one)"
    )
    command.add_argument(
        "--precision", choices=get_args(PrecisionChoice), default="auto", help="default: bf16 where measured faster"
    )
    command.add_argument("--checkpoint-seconds", type=values.seconds, default=20.0, metavar="S", help="default: 20")
    command.add_argument(
        "--checkpoint-every", type=values.count, metavar="STEPS", help="by steps and not by seconds, whatever the time"
    )


def _clip_cost(command: ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets cpu.json or cuda.json")
    command.add_argument(
        "--models", type=values.models, default=tuple(MODELS), metavar="A,B", help=f"of {', '.join(MODELS)}"
    )
    command.add_argument("--device", choices=sorted(PLANS), default="cpu", help="default: cpu")
    command.add_argument("--threads", type=values.count, metavar="N", help="default: what torch takes")
    command.add_argument("--quick", action="store_true", help="few steps of tiny models, to see that all of it works")
    command.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="measure nothing; write what DIR holds into this page, between its marks",
    )


def _optax_speed(command: ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets cpu.json and cpu.md, or gpu")
    command.add_argument("--rounds", type=values.count, default=31, metavar="N", help="timed calls (default: 31)")


def _scaling(command: ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets scaling.json and scaling.md")
    command.add_argument(
        "--processes", type=values.counts, default=(1, 2, 4), metavar="N,M", help="of this machine (default: 1,2,4)"
    )
    command.add_argument(
        "--arms", type=values.arms, default=("adamw", "muonclip"), metavar="A,B", help="default: adamw,muonclip"
    )
    command.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="the model (default: cpu)")
    command.add_argument(
        "--batch",
        type=values.count,
        dest="batch_size",
        default=8,
        metavar="WINDOWS",
        help="per process (weak scaling), or per step for each process of the most (strong scaling) (default: 8)",
    )
    command.add_argument("--rounds", type=values.count, default=15, metavar="N", help="timed steps (default: 15)")
    _device(command)
    command.add_argument("--data", type=Path, metavar="PATH", help="default: the sources of this Python's library")
    _timeout(command)


def _report(command: ArgumentParser) -> None:
    command.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="the --out of an earlier command, finished or still running",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"the page of all folders together (default: ./{COMPARISON} where there are several)",
    )
    command.add_argument(
        "--tensorboard", action="store_true", help="also write DIR/tensorboard, events for TensorBoard"
    )


def _device(command: ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")


def _timeout(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--collective-timeout",
        type=values.positive,
        default=nodes.DEFAULT_TIMEOUT,
        metavar="S",
        help=f"a rank that waits longer for others ends (default: {nodes.DEFAULT_TIMEOUT:g})",
    )


_COMMANDS = {
    "explosion": ("train arms side by side and draw their attention logits", _explosion),
    "reproduce": ("the README's figures: logits under a hot rate and under each one's own", _training),
    "evidence": (
        "rate sweep, token efficiency, the cost of clipping, all arms: 40 minutes on two cores at most",
        _training,
    ),
    "clip-cost": ("the time of whole training steps with QK-Clip and without: 25 minutes on two cores", _clip_cost),
    "optax-speed": ("Muon's update in JAX beside Optax's own: three minutes on two cores", _optax_speed),
    "scaling": (
        "time training steps on more and more processes: alone for --processes, or under torchrun",
        _scaling,
    ),
    "report": ("draw finished runs again, without training; several folders also side by side", _report),
}
