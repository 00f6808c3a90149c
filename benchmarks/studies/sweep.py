"""The sweep: QK-Clip on tiny models of many public architectures, judged by a witness below autograd.

For each: τ is 0.6 of the largest true logit; one forward and backward, one `clip.step()`; then every attention is
repeated on its own inputs, and every head must end at min(S, τ). Figures are in units of τ:

    clip         max |S after − min(S before, τ)| / τ over the heads that are clipped
    statistic    max |S reported − S| / τ over all heads that are observed

To the witness an attention is a softmax over products of two activations that weighs a third. One whose module is not
in the plan was missed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.execution.train import make_folder
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.studies.softmax_witness import Attention, SoftmaxWitness
from benchmarks.studies.sweep_architectures import ARCHITECTURES
from benchmarks.studies.sweep_models import Architecture
from benchmarks.studies.templates import render
from benchmarks.training.timing import torch_threads
from muonclip.torch import QKClip, QKProjection

LIBRARIES = tuple(dict.fromkeys(each.library for each in ARCHITECTURES))
EXACT = 1e-4  # of τ, in float32


@dataclass(frozen=True, slots=True)
class Result:
    """Holds what became of one architecture: the `verdict`, and why.

    "found", "observed only", "no softmax", "refused", "failed", "not installed"; "inexact" where a head ends elsewhere
    than at min(S, τ), or the statistic is not S; "missed" where an attention is not in the plan. `clipped`, `observed`,
    `missed`: numbers of attentions.
    """

    name: str
    library: str
    verdict: str
    because: str = ""
    clipped: int = 0
    observed: int = 0
    missed: tuple[str, ...] = ()
    other_softmaxes: int = 0
    clip: float | None = None
    statistic: float | None = None
    kernels: tuple[str, ...] = field(default=())


def run(options: argparse.Namespace) -> None:
    """Sweep the architectures. Writes sweep.json and, what it also prints, the table sweep.md."""
    make_folder(options.out)
    known = {each.name: each for each in ARCHITECTURES}
    with torch_threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = []
        for name in options.models or known:
            results.append(judge(known[name]))
            print(results[-1].name, results[-1].verdict, results[-1].because, file=sys.stderr, flush=True)
    libraries = {name: _version(name) for name in LIBRARIES}
    made_with = environment() | {name: version for name, version in libraries.items() if version}
    written = {"environment": made_with, "exact": EXACT, "architectures": [asdict(each) for each in results]}
    atomic_files.write_json(options.out / "sweep.json", written)
    atomic_files.write_text(options.out / "sweep.md", table := read_sweep(written))
    print(table)


def read_sweep(written: Mapping[str, Any]) -> str:
    """Write the Markdown table, and what made it."""
    verdicts = Counter(each["verdict"] for each in written["architectures"])
    libraries = ", ".join(
        f"{name} {written['environment'][name]}" for name in LIBRARIES if name in written["environment"]
    )
    return render("sweep.md", **written, verdicts=verdicts.most_common(), remark=_remark, libraries=libraries)


def judge(architecture: Architecture) -> Result:
    """Clip a tiny model of the architecture once, and say what became of its attentions."""
    name, library = architecture.name, architecture.library
    try:
        model = architecture.build()
        arguments = architecture.arguments(model)
        positional = arguments.pop("*", ())

        def call() -> Any:
            torch.manual_seed(2)  # some draw which tokens they see
            return model(*positional, **arguments)

        witness = SoftmaxWitness(model, call)
        before = witness.attentions()
    except ImportError as error:
        return Result(name, library, "not installed", _said(error))
    except Exception as error:
        return Result(name, library, "failed", f"without the clip: {_said(error)}")
    others = len(witness.other_softmaxes)
    kernels = tuple(sorted({each.operator for each in before}))
    highest = max((each.maximum for each in before), default=0.0)
    tau = 0.6 * highest if 0 < highest < math.inf else 1.0
    try:
        clip = QKClip(model, tau=tau, observe="always")
        _loss(call()).backward()
        plan = Plan.of(clip)
        clip.step()
        report = clip.report()
    except (ValueError, RuntimeError) as error:
        nothing = not before and not witness.unread and "no attention was found" in str(error)
        verdict = "no softmax" if nothing else "refused"
        return Result(name, library, verdict, _said(error), other_softmaxes=others, kernels=kernels)
    except Exception as error:
        return Result(name, library, "failed", _said(error), other_softmaxes=others, kernels=kernels)
    clip.remove()
    reported = {of: layer.max_logits for of, layer in report.layers.items()}
    return compare(architecture, before, witness.attentions(), plan, reported, tau, others)


@dataclass(frozen=True, slots=True)
class Plan:
    """Knows the attentions of a clip: their projections by name, and by module those that it calls in order."""

    projections: Mapping[str, QKProjection]
    callers: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, clip: QKClip) -> Plan:
        names = {id(projection.max_logits): name for name, projection in clip.projections.items()}
        monitor: Any = clip.attentions._monitor
        callers = {
            module: [names[id(each.max_logits)] for each in site.projections] for module, site in monitor.sites.items()
        }
        return cls(dict(clip.projections), callers)

    def names_of(self, attentions: Sequence[Attention]) -> Iterator[str]:
        """Say for each attention of a run, in their order, which of the plan it is; "" where it is none."""
        turns = {module: itertools.cycle(names) for module, names in self.callers.items()}
        for each in attentions:
            parts = each.module.split(".") if each.module else []
            outwards = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
            module = next((name for name in outwards if name in turns), None)
            yield "" if module is None else next(turns[module])


def compare(
    architecture: Architecture,
    before: Sequence[Attention],
    after: Sequence[Attention],
    plan: Plan,
    reported: Mapping[str, Tensor],
    tau: float,
    other_softmaxes: int,
) -> Result:
    """Compare the true logits before and after a step with what the clip knew and reported."""
    names = list(plan.names_of(before))
    missed = tuple(each.module for each, name in zip(before, names, strict=True) if not name)
    missed += tuple(f"{name}, which the witness does not see" for name in plan.projections if name not in names)
    clip, statistic, reasons = 0.0, 0.0, dict[str, None]()
    for name in dict.fromkeys(filter(None, names)):
        projection = plan.projections[name]
        own = [index for index, other in enumerate(names) if other == name]
        of_name = [before[i] for i in own], [after[i] for i in own], projection.num_heads
        readings = list(_readings(*of_name))
        if projection.counts_added:  # products with a weight, of queries and positions, are not S to the witness
            readings += _readings(*of_name, with_added=True)
        if not readings:
            missed += (f"{name}: {projection.num_heads} heads do not fit {tuple(before[own[0]].statistic.shape)}",)
            continue
        errors = [_errors(old, new, reported[name], tau, projection) for old, new in readings]
        best = min(errors, key=sum)
        clip, statistic = max(clip, best[0]), max(statistic, best[1])
        if projection.reason:
            reasons[projection.reason] = None
    known = [plan.projections[name] for name in dict.fromkeys(filter(None, names))]
    clipped = sum(not each.reason for each in known)
    verdict = "found" if clipped else "observed only"
    if max(clip, statistic) > EXACT:
        verdict = "inexact"
    if missed:
        verdict = "missed"
    return Result(
        architecture.name, architecture.library, verdict, "; ".join(reasons), clipped, len(known) - clipped, missed,
        other_softmaxes, clip if clipped else None, statistic if known else None,
        tuple(sorted({each.operator for each in before})),
    )  # fmt: skip


def _errors(old: Tensor, new: Tensor, reported: Tensor, tau: float, projection: QKProjection) -> tuple[float, float]:
    """Return how far the heads are from where they should be, and from what was reported, in units of τ."""
    wanted = old if projection.reason else old.clamp(max=tau)
    seen = old.isfinite()
    return ((new - wanted)[seen].abs().max() / tau).item(), ((reported - old)[seen].abs().max() / tau).item()


def _readings(
    before: Sequence[Attention], after: Sequence[Attention], heads: int, *, with_added: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the maxima of the heads before and after, [heads], for each way in which the axes can hold them.
    `with_added`: of the logits with all that is added to them.

    Heads have an axis, share one with sequences or windows, or are two axes, of groups and heads in a group. Several
    ways fit where the sizes do; a clip that is wrong is wrong in each.
    """
    for ways in itertools.islice(itertools.product(*(_ways(each.maxima().shape, heads) for each in before)), 64):
        old, new = (
            torch.stack(
                [way.read(each.maxima(with_added=with_added), heads) for way, each in zip(ways, of, strict=True)]
            ).amax(0)
            for of in (before, after)
        )
        yield old, new


@dataclass(frozen=True, slots=True)
class _Way:
    """Heads are on `axis`: alone, as the "inner" or "outer" part of it, or with the next axis as a "pair"."""

    axis: int
    how: str

    def read(self, maxima: Tensor, heads: int) -> Tensor:
        if self.how == "pair":
            maxima = maxima.flatten(self.axis, self.axis + 1)
        elif self.how in ("inner", "outer"):
            maxima = maxima.unflatten(self.axis, (-1, heads) if self.how == "inner" else (heads, -1))
        axis = self.axis + (self.how == "inner")
        return maxima.movedim(axis, 0).flatten(1).amax(1)


def _ways(shape: Sequence[int], heads: int) -> Iterator[_Way]:
    exact = [_Way(axis, "alone") for axis, size in enumerate(shape) if size == heads]
    yield from exact
    if any(way.axis < len(shape) - 1 for way in exact):  # the last one may be that of the queries
        return
    for axis, size in enumerate(shape):
        if size % heads == 0:
            yield from (_Way(axis, "inner"), _Way(axis, "outer"))
        if axis + 1 < len(shape) and size * shape[axis + 1] == heads:
            yield _Way(axis, "pair")


def _loss(outputs: Any) -> Tensor:
    """Return a loss that every output with a gradient is part of."""
    return sum(
        (each.float().square().mean() for each in _tensors(outputs) if each.requires_grad), start=torch.zeros(())
    )


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for each in outputs.values():
            yield from _tensors(each)
    elif isinstance(outputs, list | tuple):
        for each in outputs:
            yield from _tensors(each)
    elif hasattr(outputs, "sample"):
        yield from _tensors(outputs.sample)


def _remark(result: Mapping[str, Any]) -> str:
    """Return what a row of the table says: the first of the attentions that are refused, and why."""
    if result["missed"]:
        return "not in the plan: " + ", ".join(result["missed"])
    if result["verdict"] == "no softmax":
        return ""
    words = result["because"].partition(" Say which weights")[0]
    words = words.partition("understand these attentions: ")[2] or words.partition(". It sees ")[0]
    return words.partition(". ")[0].removesuffix(".").replace("|", "\\|")


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
