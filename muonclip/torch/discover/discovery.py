"""The attentions of a model, from its traced forwards: their names, their projections, where each is called.

No name of a module, class or parameter decides anything here; names only say where a row is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from muonclip.torch.discover.attribution import CONSTANT
from muonclip.torch.discover.classify import ProjectionReader
from muonclip.torch.discover.parameter_paths import ParameterPaths
from muonclip.torch.discover.quantized_linears import with_fixed_scales
from muonclip.torch.discover.refusals import Refusal
from muonclip.torch.discover.trace import Trace, trace
from muonclip.torch.discover.tracer import MIXED, TracedCall
from muonclip.torch.discover.verify import check_declaration
from muonclip.torch.heads import QKProjection
from muonclip.torch.logits import outside_modes
from muonclip.torch.observe import DECLARED, UNREAD, AttentionKernel


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A module that calls attention, by which kernel, and the projections of its calls in order.

    One projection where all are the same. `calls`: how many it was seen to make in a run; empty where any number is
    of that projection. `head_axis`: of queries with more than four axes, from the end. `is_of_one_sequence`: no call
    has shown whether heads or sequences come first in their axis.
    """

    module: str
    kernel: AttentionKernel
    projections: tuple[QKProjection, ...]
    calls: frozenset[int]
    head_axis: int = -3
    is_of_one_sequence: bool = False


class NotTraced(Exception):
    """A copy of the model did not run: the type and first line of what it raised, which is the cause."""

    @classmethod
    def because(cls, error: Exception) -> NotTraced:
        """Make it of what the model has raised."""
        line = str(error).strip().partition("\n")[0].removesuffix(".")
        return cls(f"{type(error).__name__}: {line}")


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The arguments of a model, or of the part of it by the name `module`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str = ""

    def is_like(self, other: Inputs) -> bool:
        """Tell whether others are given in the same way: as many, by the same names, of the same kinds."""
        return self.module == other.module and _kinds_of(self) == _kinds_of(other)

    def filled(self) -> Inputs:
        """Return inputs that show attention, in the place of an empty batch, in which nothing is computed: the same
        kinds of tensors, with two entries along each axis that has none."""
        leaves, structure = tree_flatten((tuple(self.args), dict(self.kwargs)))
        first = next((each for each in leaves if isinstance(each, Tensor)), None)
        with torch._C.DisableTorchFunction():  # which whoever watches the model's functions would see
            if first is None or first.numel():
                return self
        full = [_filled(each) if isinstance(each, Tensor) and not each.numel() else each for each in leaves]
        args, kwargs = tree_unflatten(full, structure)
        return Inputs(args, kwargs, self.module)


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """The attentions of a model: `projections` by name, `sites` in the order of their first call, and `refusals`, by
    name, of those that are not understood. `others`: attentions of other rows that may be the ones, by name, where
    gradients alone do not tell. `traces`: what it was read from. `without_logits`: by module, what mixes activations
    there without a softmax of queries and keys."""

    projections: dict[str, QKProjection]
    others: dict[str, list[QKProjection]]
    sites: list[Site]
    refusals: dict[str, Refusal]
    traces: tuple[Trace, ...]
    without_logits: dict[str, str] = field(default_factory=dict[str, str])


def discover(
    model: nn.Module,
    inputs: Sequence[Inputs],
    declared: Mapping[str, QKProjection],
    *,
    ignored: Collection[str] = (),
    clip_gains: bool = False,
    training: bool = False,
    earlier: Sequence[Trace] = (),
) -> Discovery:
    """Find the attentions of a model by running a copy of it, or of its parts, on `inputs`. The model is as before.

    `declared`: projections by module name; they are checked against the traced calls, and replace what would be found.
    `ignored`: names of modules whose attention is left alone.
    `clip_gains`: as of `QKClip`. `training`: the mode of the copy; some attention runs in training only. `earlier`:
    traces to read as well, because attentions may have something in common.

    Raises NotTraced where a copy does not run, and ValueError where a declaration is wrong or weights of earlier traces
    are not where they were.
    """
    _check_places(model, earlier)
    traces = list(earlier)
    for each in inputs:
        module, prefix = model.get_submodule(each.module), f"{each.module}." if each.module else ""
        try:
            traces.append(trace(module, each.args, each.kwargs, prefix=prefix, training=training))
        except Exception as error:  # whatever the model raises
            raise NotTraced.because(error) from error
    with outside_modes():
        return _read(model, tuple(traces), declared, ignored, clip_gains=clip_gains)


def _read(
    model: nn.Module,
    traces: tuple[Trace, ...],
    declared: Mapping[str, QKProjection],
    ignored: Collection[str],
    *,
    clip_gains: bool,
) -> Discovery:
    modules = dict(model.named_modules())
    paths = ParameterPaths(modules, {key: path for each in traces for key, path in each.paths.items()})
    calls = [(index, call) for index, each in enumerate(traces) for call in each.calls]
    calls = _with_cached_keys([each for each in calls if not _is_within(each[1].module, ignored)], paths)
    reader = ProjectionReader(paths, [call for _, call in calls], clip_gains=clip_gains)
    findings = Discovery({}, {}, [], {}, traces)
    known: dict[object, QKProjection] = {}  # attentions of the same rows are one
    runs: dict[str, dict[object, list[tuple[TracedCall, QKProjection]]]] = {}  # of each module
    for index, call in calls:
        name = _name_of(call, paths)
        run = runs.setdefault(call.module, {}).setdefault((index, call.run), [])
        declaration = next((d for d in _outwards(call.module) if d in declared), None)
        if declaration is not None:
            projection = declared[declaration]
            check_declaration(declaration, projection, call, paths)
            findings.projections[declaration] = projection
        else:
            projection = reader.read(call)
            if not isinstance(projection, str):
                projection = with_fixed_scales(projection) or projection
            if isinstance(projection, str):
                findings.refusals.setdefault(name, Refusal(call.num_heads, projection, is_read=not _unread(call)))
                continue
            rows = tuple(
                paths.identity([*source.rows, *source.gains], call.num_heads) for source in (call.query, call.key)
            )
            projection = known.setdefault(rows if projection.scaled_parts() else (call.module, len(run)), projection)
            if not any(projection is each for each in findings.projections.values()):
                name = _free(name, call.module, findings.projections)
                findings.projections[name], findings.others[name] = projection, reader.others(call)
        run.append((call, projection))
    for module, of_runs in runs.items():
        seen = [run for run in of_runs.values() if run]
        if not seen:
            continue
        call = seen[0][0][0]
        sequences = sorted(([projection for _, projection in run] for run in seen), key=len)
        sequence, counts = sequences[-1], frozenset(map(len, sequences))
        if len({id(projection) for each in sequences for projection in each}) == 1:
            counts = counts if counts == {1} else frozenset[int]()
            sequence = sequence[:1]
        elif any(list(map(id, each)) != list(map(id, sequence[: len(each)])) for each in sequences):
            problem = "it calls other attentions in one run than in another"
            findings.refusals.setdefault(module, Refusal(call.num_heads, problem))
        axes = {axis for run in of_runs.values() for call, _ in run if (axis := call.head_axis) is not None}
        if len(axes) > 1:
            problem = "the heads of its queries are on several axes"
            findings.refusals.setdefault(module, Refusal(call.num_heads, problem))
        called = [each for run in seen for each, _ in run]
        kernel = next((each.kernel for each in called if each.kernel.written_out), call.kernel)
        unread = next(filter(None, map(_unread, called)), "")
        if _fills_itself(sequence, traces):
            kernel = DECLARED
        elif unread:  # as it was declared
            kernel = UNREAD
            if any(each.scaled_parts() for each in sequence):
                findings.refusals.setdefault(module, Refusal(call.num_heads, unread, is_read=False))
        of_one = all(each.is_of_one_sequence for each in called)
        findings.sites.append(Site(module, kernel, tuple(sequence), counts, max(axes, default=-3), of_one))
    _refuse_queries_of_several(findings, paths, runs)
    for each in (seen for one in traces for seen in one.unclaimed):
        if not _is_within(each.module, ignored) and not _is_within(each.module, declared):
            problem = f"it {each.what}, which is not observed"
            findings.refusals.setdefault(each.module, Refusal(1, problem, is_seen=False))
    for each in (seen for one in traces for seen in one.without_logits):
        if each.module not in runs:
            findings.without_logits.setdefault(each.module, each.what)
    return findings


def _kinds_of(inputs: Inputs) -> object:
    """Return the structure of arguments, with the dtypes and numbers of axes of tensors, and plain values."""
    leaves, structure = tree_flatten((tuple(inputs.args), dict(inputs.kwargs)))
    plain = bool, int, float, str, type(None)
    return structure, [
        (type(each), each.dtype, each.ndim)
        if isinstance(each, Tensor)
        else (type(each), each if isinstance(each, plain) else id(each))
        for each in leaves
    ]


def _filled(empty: Tensor) -> Tensor:
    shape = [size or 2 for size in empty.shape]
    if empty.is_floating_point():
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
        return noise.to(empty)
    return torch.arange(math.prod(shape), device=empty.device).remainder(2).reshape(shape).to(empty.dtype)


def _check_places(model: nn.Module, earlier: Sequence[Trace]) -> None:
    modules = dict(model.named_modules()) if earlier else {}
    for name, attribute in itertools.chain(*(each.paths.values() for each in earlier)):
        if not hasattr(modules.get(name), attribute):
            raise ValueError(
                f"QK-Clip: {name}.{attribute} is not in the model any more, where new attention is to be found. Make "
                "the optimizer and its clip anew after such a change."
            )


def _with_cached_keys(calls: list[tuple[int, TracedCall]], paths: ParameterPaths) -> list[tuple[int, TracedCall]]:
    """Return the calls; those whose keys are all from a cache get the keys that the same queries met in another run."""

    def queries(call: TracedCall) -> object:
        known = all(map(paths.has, call.query.rows))
        return (call.module, paths.identity(call.query.rows, call.num_heads)) if known else None

    computed = {queries(call): call for _, call in reversed(calls) if call.query.rows and call.key.rows}
    completed: list[tuple[int, TracedCall]] = []
    for index, call in calls:
        other = computed.get(queries(call)) if call.query.rows and call.key.problem == CONSTANT else None
        if other is not None:
            facing = dict(facing_private=other.facing_private, facing_shared=other.facing_shared)
            call = replace(call, key=other.key, **facing)
        completed.append((index, call))
    return completed


def _fills_itself(projections: Sequence[QKProjection], traces: Sequence[Trace]) -> bool:
    """Tell whether an attention is declared, and hands its statistic to `muonclip.torch.attention`."""
    statistics = [id(projection.max_logits) for projection in projections]
    copies = [each.statistics.get(key) for each in traces for key in statistics]
    return any(copied is not None and bool(copied.observed) for copied in copies)


def _unread(call: TracedCall) -> str:
    """Return why the logits of a call cannot be read, or ""; those that are written out can be, by known heads."""
    return "" if call.kernel.written_out and call.problem != MIXED else call.problem


def _refuse_queries_of_several(
    findings: Discovery,
    paths: ParameterPaths,
    runs: Mapping[str, Mapping[object, Sequence[tuple[TracedCall, QKProjection]]]],
) -> None:
    """Refuse rows behind the queries of two attentions, which would be scaled for both."""
    names = {id(projection): name for name, projection in findings.projections.items()}
    scaled_for: dict[object, QKProjection] = {}
    for call, projection in itertools.chain(*(run for of_runs in runs.values() for run in of_runs.values())):
        if not projection.scaled_parts():
            continue
        for rows in (*call.query.rows, *call.query.gains):
            parameter = paths.parameter(rows)
            for row in rows.masks.any(0).nonzero()[:, 0].tolist():
                first = scaled_for.setdefault((parameter, rows.axes, row), projection)
                if first is not projection:
                    problem = f"its queries also meet the keys of {names[id(first)] or 'the model'}"
                    findings.refusals.setdefault(names[id(projection)], Refusal(call.num_heads, problem))


def _name_of(call: TracedCall, paths: ParameterPaths) -> str:
    """Return the innermost module that holds both the call and the weights of its queries and keys.

    If that is the whole model, it is the module of the call.
    """
    rows = [*call.query.rows, *call.key.rows]
    names = [name.split(".") for name in (call.module, *(paths.path(each)[0] for each in rows if paths.has(each)))]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return ".".join(parts[0] for parts in common) or call.module


def _free(name: str, other: str, taken: Mapping[str, object]) -> str:
    """Return the first of name, other, other#2, other#3, … that is not taken."""
    candidates = itertools.chain((name, other), (f"{other}#{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _is_within(module: str, names: Collection[str]) -> bool:
    return bool(names) and any(each in names for each in _outwards(module))


def _outwards(name: str) -> list[str]:
    """Return the name of a module and of those around it, innermost first."""
    path = name.split(".")
    return [".".join(path[:length]) for length in range(len(path), 0, -1)] + [""]
