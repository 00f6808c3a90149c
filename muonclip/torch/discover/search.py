"""The attentions of a model, from its traced forwards: their names, their projections, where each is called.

No name of a module, class or parameter decides anything here; names only say where a row is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from muonclip.torch.discover.classify import ProjectionReader
from muonclip.torch.discover.parameter_paths import Places
from muonclip.torch.discover.trace import Rehearsal
from muonclip.torch.discover.tracer import Call
from muonclip.torch.discover.verify import check_declaration
from muonclip.torch.heads.qk_projection import QKProjection


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A module that calls attention, by which kernel, and the projections of its calls in order.

    One projection where all are the same. `calls`: how many it makes in a run; None where that varies.
    """

    module: str
    via: str
    projections: tuple[QKProjection, ...]
    calls: int | None


@dataclass(slots=True, eq=False)
class Findings:
    """The result of a search: `projections` by name, `sites` in the order of their first call, `problems` by name."""

    projections: dict[str, QKProjection]
    sites: list[Site]
    problems: dict[str, tuple[Call, str]]


def search(
    model: nn.Module, rehearsals: Sequence[Rehearsal], declared: Mapping[str, QKProjection], *, clip_gains: bool
) -> Findings:
    """Find the attentions in traced forwards of `model` and of its parts.

    `declared`: projections by module name; they are checked against the traced calls, and replace what would be found.
    `clip_gains`: as of `QKClip`. Raises ValueError where a declaration is wrong.
    """
    modules = dict(model.named_modules())
    places = Places(modules, {key: place for each in rehearsals for key, place in each.places.items()})
    calls = [(index, call) for index, rehearsal in enumerate(rehearsals) for call in rehearsal.calls]
    reader = ProjectionReader(places, [call for _, call in calls], clip_gains=clip_gains)
    findings = Findings({}, [], {})
    known: dict[object, QKProjection] = {}  # attentions of the same rows are one
    runs: dict[str, dict[object, list[tuple[Call, QKProjection]]]] = {}  # of each module
    for index, call in calls:
        name = _name_of(call, places)
        run = runs.setdefault(call.module, {}).setdefault((index, call.run), [])
        declaration = next((d for d in _outwards(call.module) if d in declared), None)
        if declaration is not None:
            projection = declared[declaration]
            check_declaration(declaration, projection, call, places)
            findings.projections[declaration] = projection
        else:
            projection = reader.read(call)
            if isinstance(projection, str):
                findings.problems.setdefault(name, (call, projection))
                continue
            rows = tuple(
                places.identity([*source.rows, *source.gains], call.num_heads) for source in (call.query, call.key)
            )
            projection = known.setdefault(rows if projection.scaled_parts() else (call.module, len(run)), projection)
            if not any(projection is each for each in findings.projections.values()):
                findings.projections[_free(name, call.module, findings.projections)] = projection
        run.append((call, projection))
    for module, of_runs in runs.items():
        seen = [run for run in of_runs.values() if run]
        if not seen:
            continue
        call = seen[0][0][0]
        sequence, *others = ([projection for _, projection in run] for run in seen)
        calls_per_run = len(sequence) if all(len(other) == len(sequence) for other in others) else None
        if len({id(projection) for each in (sequence, *others) for projection in each}) == 1:
            calls_per_run = calls_per_run if calls_per_run == 1 else None
            sequence = sequence[:1]
        elif any(list(map(id, other)) != list(map(id, sequence)) for other in others):
            findings.problems.setdefault(module, (call, "it calls other attentions in one run than in another"))
        findings.sites.append(Site(module, call.via, tuple(sequence), calls_per_run))
    _refuse_queries_of_several(findings, places, runs)
    return findings


def _refuse_queries_of_several(
    findings: Findings,
    places: Places,
    runs: Mapping[str, Mapping[object, Sequence[tuple[Call, QKProjection]]]],
) -> None:
    """Refuse rows behind the queries of two attentions, which would be scaled for both."""
    names = {id(projection): name for name, projection in findings.projections.items()}
    scaled_for: dict[object, QKProjection] = {}
    for call, projection in itertools.chain(*(run for of_runs in runs.values() for run in of_runs.values())):
        if not projection.scaled_parts():
            continue
        for rows in (*call.query.rows, *call.query.gains):
            for row in rows.masks.any(0).nonzero()[:, 0].tolist():
                first = scaled_for.setdefault((places.parameter(rows), rows.axis, row), projection)
                if first is not projection:
                    problem = f"its queries also meet the keys of {names[id(first)] or 'the model'}"
                    findings.problems.setdefault(names[id(projection)], (call, problem))


def refusal(model: nn.Module, problems: Mapping[str, tuple[Call, str]]) -> str:
    """Write which attentions are not understood and why, and the declaration to write."""
    lines = ["QK-Clip does not understand these attentions:"]
    lines += [f"  {name or 'the model'}: {problem}." for name, (_, problem) in problems.items()]
    name, (call, _) = next(iter(problems.items()))
    inside = dict(model.named_modules()).get(name.partition("#")[0], model)
    weights = [n for n, p in inside.named_parameters() if p.ndim == 2 and n.endswith(".weight")][:2]
    here = "model" if not name else f"model.get_submodule({name!r})"
    q, k = (f"attn.{n.removesuffix('.weight')}" for n in weights) if len(weights) == 2 else ("attn.…", "attn.…")
    lines += [
        "Say which weights make its queries and keys, with the right names in the place of q and k (.gqa, .mla or "
        "HeadRows for other kinds):",
        f"  attn = {here}",
        f"  projection = QKProjection.mha(q={q}, k={k}, num_heads={call.num_heads}, "
        f"max_logits=MaxLogits({call.num_heads}))",
        f"  QKClip(model, declare={{{name!r}: projection}})",
        'or leave its weights alone and only watch it, QKProjection("mha", '
        f'{call.num_heads}, MaxLogits({call.num_heads}), reason="…"); or switch the clip off with qk_clip=None.',
    ]
    return "\n".join(lines)


def _name_of(call: Call, places: Places) -> str:
    """Return the innermost module that holds both the call and the weights of its queries and keys.

    If that is the whole model, it is the module of the call.
    """
    rows = [*call.query.rows, *call.key.rows]
    paths = [path.split(".") for path in (call.module, *(places.of(each)[0] for each in rows if places.has(each)))]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common) or call.module


def _free(name: str, other: str, taken: Mapping[str, object]) -> str:
    """Return the first of name, other, other#2, other#3, … that is not taken."""
    candidates = itertools.chain((name, other), (f"{other}#{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _outwards(name: str) -> list[str]:
    """Return the name of a module and of those around it, innermost first."""
    path = name.split(".")
    return [".".join(path[:length]) for length in range(len(path), 0, -1)] + [""]
