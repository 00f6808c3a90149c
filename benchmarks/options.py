"""The options of `python -m benchmarks …`: each command's, their defaults, and how their text is read."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.execution import ranks
from benchmarks.experiment.arms import ARMS, DEFAULT_ARMS, SETTINGS, Choice, choices, number
from benchmarks.experiment.presets import PRESETS
from benchmarks.experiment.settings import Framework
from benchmarks.report.redraw import COMPARISON
from benchmarks.studies import spikes
from benchmarks.studies.clip_cost_bench import MODELS, PLANS
from benchmarks.studies.speed import PARTS
from benchmarks.studies.sweep_architectures import ARCHITECTURES
from benchmarks.training.precision import PrecisionChoice
from muonclip.models.config import Attention
from muonclip.models.recompute import StoreActivations


def make_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Make the parser of the whole command line, and those of the commands, by name.

    The former stores the command as `name`.
    """
    parser = ArgumentParser(prog="python -m benchmarks", description="Evidence on real text, by one command.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    made: dict[str, ArgumentParser] = {}
    for name, (meaning, own, shared) in _COMMANDS.items():
        made[name] = commands.add_parser(name, help=meaning)
        for option, how in (own | {option: _SHARED[option] for option in shared}).items():
            made[name].add_argument(option, **how)
    return parser, made


def arm(text: str) -> Choice:
    try:
        return choices(text)[0]
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def rates(text: str) -> dict[str, float]:
    """Read one rate for all arms, or rates by arm."""
    if "=" not in text:
        return {name: positive(text) for name in ARMS}
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    by_arm = {one_of(ARMS, "arm")(name): positive(rate) for name, rate in pairs}
    if len(by_arm) < len(pairs):
        raise ArgumentTypeError(f"{text} gives an arm two rates")
    return by_arm


def one_of(known: Iterable[str], what: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"unknown {what} {text!r}; known: {', '.join(known)}")
        return text

    return read


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Read values with commas between them, each of them once."""

    def read(text: str) -> tuple[Any, ...]:
        items = tuple(kind(part) for part in text.split(","))
        if any(items.count(item) > 1 for item in items):
            raise ArgumentTypeError(f"{text} names something twice")
        return items

    return read


def value(kind: Callable[[str], Any], meaning: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not {meaning}") from None

    return read


positive = value(number(float, 1e-300), "a positive number")
seconds = value(number(float, 0), "a number of seconds, zero or more")
count = value(number(int, 1), "an integer of at least 1")
seed = value(number(int, 0), "an integer of at least 0")


def degrees(text: str) -> tuple[int, ...]:
    """Read five degrees of parallelism with commas between them."""
    items = tuple(count(part) for part in text.split(","))
    if len(items) != 5:
        raise ArgumentTypeError(f"{text} has {len(items)} numbers; give five: PP,VPP,EP,DP,TP")
    return items


def _of(kind: Callable[[str], Any], metavar: str, meaning: str, default: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": kind, "metavar": metavar, "help": meaning, "default": default, **more}


def _one_of(values: Sequence[str], default: str | None, meaning: str = "") -> dict[str, Any]:
    return {"choices": values, "default": default, "help": meaning or f"default: {default}"}


def _flag(meaning: str) -> dict[str, Any]:
    return {"action": "store_true", "help": meaning}


_OWN = f"an arm may have settings of its own, as in muonclip@tau=10@weight_decay=0: {', '.join(SETTINGS)}"
_LIBRARY = "default: the sources of this Python's standard library"
_TEXT = f"text file, folder, or token file (.bin, .u16: uint16, .u32: uint32; little-endian); {_LIBRARY}"
_RANKS = "under torchrun, which trains one run after the other on all processes: "
_SHARED: dict[str, dict[str, Any]] = {
    "--preset": _one_of(sorted(PRESETS), "cpu", "model and training (default: cpu)"),
    "--device": _one_of(("cpu", "cuda"), None, "default: the preset's"),
    "--data": _of(Path, "PATH", _TEXT),
    "--out": _of(Path, "DIR", "results; an interrupted command goes on there", required=True),
    "--jobs": _of(count, "N", "runs side by side (default: one per core; on a GPU one)"),
    "--precision": _one_of(get_args(PrecisionChoice), "auto", "default: bf16 where measured a fifth faster"),
    "--checkpoint-seconds": _of(seconds, "S", "default: 20", 20.0),
    "--checkpoint-every": _of(count, "STEPS", "by steps and not by seconds, whatever the time"),
    "--async-checkpoints": _flag("written during the training"),
    "--collective-timeout": _of(
        positive, "S", f"a rank that waits longer ends (default: {ranks.DEFAULT_TIMEOUT:g})", ranks.DEFAULT_TIMEOUT
    ),
}
_FIGURES = ("--data", "--out", "--jobs", "--checkpoint-seconds", "--checkpoint-every")
_TRAINING = (*_FIGURES, "--precision")
_SAME = {"--precision": _one_of(get_args(PrecisionChoice), "fp32", "default: fp32, the same on every machine")}
_EXPLOSION = {
    "--arms": _of(
        several(arm), "A,B", f"of {', '.join(ARMS)} (default: {','.join(DEFAULT_ARMS)}); {_OWN}", choices(*DEFAULT_ARMS)
    ),
    "--seeds": _of(several(seed), "N,M", "default: 0,1; presets gpu and node: 0"),
    "--attention": _one_of(get_args(Attention), "mla"),
    "--tau": _of(positive, "LOGIT", "threshold of the clip, and the soft cap"),
    "--lr": _of(rates, "RATE", "one rate for all arms, or arm=rate,arm=rate"),
    "--pilot": _of(
        several(positive), "RATE,RATE", "first train Muon briefly at each of these, take the lowest at which logits "
        "pass 100 (presets gpu and node do so unless --lr is given)",
    ),
    "--framework": _one_of(get_args(Framework), "torch", "default: torch; jax: on the CPU, in fp32"),
    "--steps": _of(count, "N", "default: the preset's"),
    "--batch": _of(count, "WINDOWS", "windows per step", dest="batch_size"),
    "--shards": _of(count, "N", f"{_RANKS}FSDP (default: all processes)"),
    "--replicas": _of(count, "N", "HSDP: copies of the shards (default: 1)"),
    "--experts": _of(count, "N", "ranks sharing the experts (default: 1)"),
    "--tensor": _of(count, "N", "ranks sharing heads and widths (default: 1)"),
    "--accumulate": _of(count, "N", "micro-batches per step (default: 1)"),
    "--recompute": _flag("activations are computed again, not kept"),
    "--store-activations": _one_of(get_args(StoreActivations), None, "with --recompute: of the MLPs, in FP8"),
    "--offload-activations": _flag("with --recompute: what is kept of them is in host memory"),
}  # fmt: skip
_SPIKES = {
    "--arms": _of(several(arm), "A,B", f"the same in all cases (default: each case's own); {_OWN}"),
    "--seeds": _of(several(seed), "N,M", "default: 0,1,2; of the search: 0"),
    "--cases": _of(
        several(one_of(spikes.CASES, "case")),
        "A,B",
        f"of {', '.join(spikes.CASES)} (default: all)",
        tuple(spikes.CASES),
    ),
    "--search": _flag("disturb nothing, and look for spikes of Muon's own: ten minutes on one core"),
}
_CLIP_COST = {
    "--models": _of(several(one_of(MODELS, "model")), "A,B", f"of {', '.join(MODELS)}", tuple(MODELS)),
    "--device": _one_of(sorted(PLANS), "cpu"),
    "--threads": _of(count, "N", "default: what torch takes"),
    "--quick": _flag("few steps of tiny models, to see that all of it works"),
    "--host": _flag("measure the host's time and the first step anew, in what DIR holds"),
    "--imports": _flag("measure what the imports take anew, in what DIR holds"),
    "--page": _of(Path, "FILE", "measure nothing; write what DIR holds into this page, between its marks"),
}
_SPEED = {
    "--parts": _of(several(one_of(PARTS, "part")), "A,B", f"of {', '.join(PARTS)} (default: all)", tuple(PARTS)),
    "--threads": _of(several(count), "N,M", "steps: the first of these (default: 1,2)", (1, 2)),
    "--rounds": _of(count, "N", "timed steps of each (default: 9)", 9),
    "--long": _flag("also what takes hours: large models and batches, and peers that compile, at the other shapes"),
    "--quick": _flag("tiny shapes, to see that all of it works"),
    "--page": _of(Path, "FILE", "measure nothing; write what DIR holds into this page, between its marks"),
}
_SCALING = {
    "--processes": _of(several(count), "N,M", "of this machine (default: 1,2,4)", (1, 2, 4)),
    "--arms": _of(several(arm), "A,B", "default: adamw,muonclip", choices("adamw", "muonclip")),
    "--batch": _of(count, "WINDOWS", "per process; strong case: of the most (default: 8)", 8, dest="batch_size"),
    "--rounds": _of(count, "N", "timed steps (default: 15)", 15),
}
_CLUSTER = {
    "--parts": _of(several(one_of(("paper", "plans", "fit"), "part")), "A,B", "of paper, plans, fit (default: all)",
                   ("paper", "plans", "fit")),
    "--rounds": _of(count, "N", "timed steps (default: 9)", 9),
    "--repeats": _of(count, "N", "times that all numbers of processes are measured in turn (default: 3)", 3),
    "--layout": _of(degrees, "PP,VPP,EP,DP,TP", "one step alone, with these degrees; nothing is written"),
    "--model": _one_of(("k2", "moonlight", "llama"), "k2", "of --layout (default: k2)"),
    "--machine": _one_of(("h800", "h200", "gb300"), "h800", "of --layout (default: h800)"),
    "--out": _of(Path, "DIR", "results; parts that are not made anew are kept"),
}  # fmt: skip
_KILL_TRIALS = {
    "--trials": _of(count, "N", "default: 20", 20),
    "--processes": _of(count, "N", "default: 4", 4),
    "--arm": _of(str, "ARM", "default: muonclip", "muonclip"),
    "--seed": _of(int, "N", "of the draws (default: 0)", 0),
    "--experts": _of(count, "N", "ranks sharing the experts (default: 1)", 1),
    "--all-ranks": _flag("every second trial kills all ranks at once"),
    "--out": _of(Path, "FILE.jsonl", "gets a line per trial", required=True),
}
_SWEEP = {
    "--models": _of(several(one_of([each.name for each in ARCHITECTURES], "architecture")), "A,B", "default: all", ())
}
_REFEREE = {
    "--arms": _of(
        several(arm), "A,B", "default: adamw,torch-muon,muonclip", choices("adamw", "torch-muon", "muonclip")
    ),
    "--quick": _flag("a few steps of tiny models, to see that all of it works"),
}
_GPU_CHECK = {"--dry-run": _flag("on a CPU: small shapes, Triton's interpreter")}
_REPORT = {
    "folders": {"type": Path, "nargs": "+", "metavar": "DIR", "help": "the --out of a command, finished or running"},
    "--out": _of(Path, "DIR", f"the page of all folders together (default: ./{COMPARISON} where there are several)"),
    "--tensorboard": _flag("also write DIR/tensorboard, events for TensorBoard"),
}
_COMMANDS: dict[str, tuple[str, dict[str, dict[str, Any]], Sequence[str]]] = {
    "explosion": (
        "train arms side by side and draw their attention logits", _EXPLOSION,
        ("--preset", "--device", *_TRAINING, "--async-checkpoints", "--collective-timeout"),
    ),
    "reproduce": ("the README's figures: logits under a hot rate and under each one's own", _SAME, _FIGURES),
    "evidence": ("rates, token efficiency, cost of clipping, all arms: 45 minutes on two cores", _SAME, _FIGURES),
    "spikes": (
        "disturb runs, and measure what is left of it: half an hour on one core", _SAME | _SPIKES, _FIGURES,
    ),
    "clip-cost": ("time whole training steps with QK-Clip and without: 25 minutes", _CLIP_COST, ["--out"]),
    "optax-speed": (
        "Muon's update in JAX next to Optax's own: three minutes on two cores",
        {"--rounds": _of(count, "N", "timed calls (default: 31)", 31)}, ["--out"],
    ),
    "optax-collectives": ("count what JAX sends in an update of sharded matrices, next to others", {}, ["--out"]),
    "speed": ("time updates and training steps next to every other Muon that is installed", _SPEED, ["--out"]),
    "scaling": (
        "time training steps on more and more processes: alone for --processes, or under torchrun", _SCALING,
        ("--preset", "--device", "--data", "--out", "--collective-timeout"),
    ),
    "cluster": (
        "predict a step on 8 to 4096 GPUs, plan Kimi K2's, and measure the error on processes: a quarter of an hour",
        _CLUSTER,
        (),
    ),
    "weight-broadcast": (
        "send new weights from two trainers to two ranks that infer, in chunks of several sizes: two minutes",
        {"--rounds": _of(count, "N", "updates for each size (default: 7)", 7)}, ["--out"],
    ),
    "gpu-check": ("what only a GPU can settle, most important first: nine minutes", _GPU_CHECK, ["--out"]),
    "kill-trials": ("does a run survive kill -9? ranks killed at random", _KILL_TRIALS, ["--async-checkpoints"]),
    "ownership": ("draw which ranks hold and iterate the matrices of a layer", {}, ["--out"]),
    "referee": ("steps to a target loss, each optimizer tuned by as many runs", _REFEREE, ("--out", "--jobs")),
    "gram-accuracy": (
        "where the Gram form may run: its error on saved momenta, half a minute",
        {"--train": _flag("train the momenta anew, and save them in the repository")}, ["--out"],
    ),
    "primer": ("draw what Muon does to gradients, singular values and logits: one minute", {}, ["--out"]),
    "coordinate-check": (
        "see whether a rate carries over to other widths, for three scales of the update: three minutes on one core",
        {"--quick": _flag("two widths and one seed, to see that all of it works")}, ["--out"],
    ),
    "grad-clipping": (
        "clip all gradients, AdamW's alone, or none: five runs on three seeds, ten minutes",
        {"--quick": _flag("two steps of each, to see that all of it works")}, ["--out"],
    ),
    "variants": (
        "train MuonClip's variants and polynomials by one protocol: an hour on one core",
        {"--quick": _flag("two steps of each, to see that all of it works")}, ("--out", "--jobs"),
    ),
    "fine-tuning": (
        "tune a trained model on other text, all weights or LoRA: AdamW, Muon, both; a quarter of an hour",
        {"--quick": _flag("two steps of each, to see that all of it works")}, ["--out"],
    ),
    "momentum-dtype": (
        "store the momentum in float32, bf16 or int8: five runs on three seeds, half an hour",
        {"--quick": _flag("two steps of each, to see that all of it works")}, ("--out", "--jobs"),
    ),
    "master-weights": (
        "train bf16 weights with and without masters: five runs on three seeds, fifteen minutes",
        {"--quick": _flag("two steps of each, to see that all of it works")}, ["--out"],
    ),
    "k2-training": (
        "store activations in FP8, train experts in INT4: three runs on three seeds, three minutes",
        {"--quick": _flag("a few steps of each, to see that all of it works")}, ["--out"],
    ),
    "long-context": (
        "extend the context of a trained model by YaRN, the clip going on: two stages, three seeds, three minutes",
        {"--quick": _flag("a few steps of each, to see that all of it works")}, ["--out"],
    ),
    "sweep": ("clip public architectures once, judged by a witness below autograd: five minutes", _SWEEP, ["--out"]),
    "report": ("draw finished runs again, without training; several folders also side by side", _REPORT, ()),
}  # fmt: skip
