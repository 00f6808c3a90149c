"""From what a rehearsal saw to `QKProjection`s: which part each row plays, and what is refused and why.

No name of a module, class or parameter decides anything here; names only say where a row stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from muonclip.torch.attention import HeadRows, QKProjection
from muonclip.torch.max_logits import MaxLogits
from muonclip.torch.provenance import Rows, Source
from muonclip.torch.rehearsal import Call, Rehearsal, feeds


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A module that calls attention, how, and the projections of its calls in order; one where all are the same."""

    module: str
    via: str
    projections: tuple[QKProjection, ...]


@dataclass(slots=True, eq=False)
class Findings:
    """What a search found. `projections` by name, `sites` in the order of their first call, `problems` by name."""

    projections: dict[str, QKProjection]
    sites: list[Site]
    problems: dict[str, tuple[Call, str]]


def search(
    model: nn.Module,
    rehearsal: Rehearsal,
    declared: Mapping[str, QKProjection],
    *,
    prefix: str = "",
    clip_gains: bool = False,
) -> Findings:
    """Read a rehearsal of `model`. `declared`: by module name; checked against what was seen, and taken in the place of
    what would be found. `prefix`: of the names. Raises ValueError where a declaration is wrong."""
    reader = _Reader(model, rehearsal, clip_gains)
    findings = Findings({}, [], {})
    by_signature: dict[object, QKProjection] = {}
    names: dict[int, str] = {}
    shared_keys = _keys_of_several(rehearsal.calls)
    scaled_by: dict[object, str] = {}  # which attention scales a row of a query
    runs: dict[str, dict[int, list[tuple[Call, QKProjection]]]] = {}
    for call in rehearsal.calls:
        name, own_name = (f"{prefix}{path}".removesuffix(".") for path in (reader.name_of(call), call.module))
        declaration = next((d for d in _outwards(own_name) if d in declared), None)
        if declaration is not None:
            projection = declared[declaration]
            reader.check(declaration, projection, call)
            name = declaration
        else:
            problem, projection = reader.read(call, shared_keys)
            signature = _signature(call)
            if projection is not None and projection.scaled_parts() and signature not in by_signature:
                rows = {
                    (id(r.parameter), r.axis, i)
                    for r in call.query.rows
                    for i in r.masks.any(0).nonzero()[:, 0].tolist()
                }
                other = next((scaled_by[row] for row in rows if row in scaled_by), None)
                if other is not None:
                    problem, projection = f"its queries also meet the keys of {other or 'the model'}", None
                scaled_by.update(dict.fromkeys(rows, name))
            if projection is None:
                findings.problems.setdefault(name, (call, problem))
                continue
            if not projection.scaled_parts():
                signature = call.module, len(runs.get(call.module, {}).get(call.run, []))
            projection = by_signature.setdefault(signature, projection)
        if id(projection) not in names:
            taken = name in findings.projections
            name = own_name if taken and own_name not in findings.projections else name
            number = 1
            while name in findings.projections:
                number += 1
                name = f"{own_name}#{number}"
            names[id(projection)] = name
            findings.projections[name] = projection
        runs.setdefault(call.module, {}).setdefault(call.run, []).append((call, projection))
    for module, of_runs in runs.items():
        first, *others = of_runs.values()
        sequence = [projection for _, projection in first]
        if len({id(p) for run in of_runs.values() for _, p in run}) == 1:
            sequence = sequence[:1]
        elif any([id(p) for _, p in other] != [id(p) for p in sequence] for other in others):
            problem = "it calls other attentions in one run than in another"
            findings.problems.setdefault(f"{prefix}{module}".removesuffix("."), (first[0][0], problem))
            continue
        findings.sites.append(Site(f"{prefix}{module}".removesuffix("."), first[0][0].via, tuple(sequence)))
    return findings


def refusal(model: nn.Module, problems: Mapping[str, tuple[Call, str]]) -> str:
    """Which attentions are not understood and why, and the declaration to write."""
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


class _Reader:
    """Rows of copies → rows of the model."""

    def __init__(self, model: nn.Module, rehearsal: Rehearsal, clip_gains: bool) -> None:
        self.places = rehearsal.places
        self.modules = dict(model.named_modules())
        self.clip_gains = clip_gains

    def name_of(self, call: Call) -> str:
        """The innermost module that holds both the call and the weights of its queries and keys."""
        rows = [*call.query.rows, *call.key.rows]
        places = [self.places[id(r.parameter)][0] for r in rows if id(r.parameter) in self.places]
        paths = [path.split(".") if path else [] for path in (call.module, *places)]
        common = _common_start(paths)
        inside = call.module.split(".") if call.module else []
        return ".".join(common) if len(common) and len(common) < len(inside) else call.module

    def read(self, call: Call, shared_keys: Mapping[object, Tensor]) -> tuple[str, QKProjection | None]:
        """A projection, or the reason for none."""
        heads = call.num_heads
        statistic = MaxLogits(heads)
        query, key = call.query, call.key
        if call.problem:
            return call.problem, None
        if query.normalised:
            return self._normalised(call, statistic)
        if query.problem:
            return f"its queries {query.problem}", None
        queries = self._parts(query.rows)
        if isinstance(queries, str):
            return f"its queries {queries}", None
        if any(bool((rows.masks.sum(0) > 1).any()) for rows in query.rows):
            return "rows of its query projection feed several heads", None
        values = self._parts(call.value.rows) if call.value is not None else ()
        values = () if isinstance(values, str) else values
        if key.problem or key.normalised or not key.rows:
            why = "normalised" if key.normalised else "no linear projection of the head's own"
            return "", QKProjection(f"keys {why}", heads, statistic, query_facing_shared=queries, value=values)
        private, shared = _divide(key.rows, heads, shared_keys)
        private_parts, shared_parts = self._parts(private), self._parts(shared)
        if not private:
            shared_parts = () if isinstance(shared_parts, str) else shared_parts
            groups = max((rows.num_heads for rows in shared_parts), default=1)
            kind = "mqa" if groups == 1 else "gqa"
            kind = "mha" if groups == heads else kind  # of a key that several attentions share
            return "", QKProjection(
                kind, heads, statistic, query_facing_shared=queries, shared_key=shared_parts, value=values
            )
        if isinstance(private_parts, str):
            return "", QKProjection("keys irregular", heads, statistic, query_facing_shared=queries, value=values)
        if not shared:
            return "", QKProjection("mha", heads, statistic, query=queries, key=private_parts, value=values)
        shared_parts = () if isinstance(shared_parts, str) else shared_parts
        own, facing = self._parts(call.facing_private), self._parts(call.facing_shared)
        if isinstance(own, str) or isinstance(facing, str) or not own or not facing:
            everything = (*shared_parts, *private_parts)
            return "", QKProjection(
                "mla", heads, statistic, query_facing_shared=queries, shared_key=everything, value=values
            )
        return "", QKProjection(
            "mla",
            heads,
            statistic,
            query=own,
            key=private_parts,
            query_facing_shared=facing,
            shared_key=shared_parts,
            value=values,
        )

    def _normalised(self, call: Call, statistic: MaxLogits) -> tuple[str, QKProjection]:
        heads = call.num_heads
        norm = "QK-norm: scaling the projection would change nothing"
        own = [rows for rows in call.query.gains if bool((rows.masks.sum(0) <= 1).all())]
        gains = self._parts(own) if own and len(own) == len(call.query.gains) else "shared"
        if isinstance(gains, str):
            if call.query.gains and self.clip_gains:
                norm += "; its gain is shared by the heads and not clipped"
            return "", QKProjection("qk-norm", heads, statistic, reason=norm)
        if not self.clip_gains:
            norm += "; its gain is per head: clip_gains=True clips it"
            return "", QKProjection("qk-norm", heads, statistic, reason=norm)
        private, shared = _divide(call.key.gains, heads, {})
        keys = self._parts(private)
        if private and not shared and not isinstance(keys, str):
            return "", QKProjection("qk-norm gains", heads, statistic, query=gains, key=keys)
        return "", QKProjection("qk-norm gains", heads, statistic, query_facing_shared=gains)

    def _parts(self, rows: Sequence[Rows]) -> tuple[HeadRows, ...] | str:
        """The rows in the model, a bias with its weight; or what is wrong with them."""
        parts: list[HeadRows] = []
        vectors = [r for r in rows if r.parameter.ndim == 1]
        taken: set[int] = set()
        for each in sorted(rows, key=lambda r: r.parameter.ndim == 1):
            if id(each) in taken:
                continue
            masks = _distinct(each.masks)
            counts = masks.sum(1)
            if bool((counts != counts[0]).any()) or not bool(counts[0]):
                return "come from unequal numbers of rows"
            index = masks.nonzero()[:, 1].view(len(masks), -1)
            name, attribute = self.places[id(each.parameter)]
            bias = ""
            for vector in vectors:
                where, bias_attribute = self.places[id(vector.parameter)]
                if where == name and vector is not each and torch.equal(vector.masks, each.masks):
                    bias = bias_attribute
                    taken.add(id(vector))
                    break
            parts.append(HeadRows.at(index, self.modules[name], attribute, bias, each.axis))
        return tuple(parts)

    def check(self, name: str, projection: QKProjection, call: Call) -> None:
        """Raises ValueError unless the declared rows are the ones that feed each head, and scale it."""
        if projection.num_heads != call.num_heads:
            raise ValueError(
                f"QK-Clip: {name} declares {projection.num_heads} heads, but its attention was called with "
                f"{call.num_heads}."
            )
        if not projection.scaled_parts():
            return
        if call.query.normalised and not self._are_gains(projection, call):
            raise ValueError(
                f"QK-Clip: {name} normalises its queries after the projection (QK-norm): scaling the declared rows "
                'would change no logit and shrink them for ever. Declare it with a reason, QKProjection(…, reason="QK-'
                'norm"), and it is observed only.'
            )
        if call.query.problem or call.problem or call.query.normalised:
            return
        query = self._declared((*projection.query, *projection.query_facing_shared), call.num_heads)
        found = self._found(call.query, call.num_heads)
        wrong = _first_difference(query, found)
        if wrong is None and projection.key:
            key = self._declared(projection.key, call.num_heads)
            found = self._found(call.key, call.num_heads, only_own=True)
            wrong = _first_difference(key, found, may_lack=True)
        if wrong is not None:
            parameter, head, declared, actual = wrong
            raise ValueError(
                f"QK-Clip: the declaration of {name} is wrong. It gives head {head} the rows {_span(declared)} of "
                f"{self._called(parameter)}, but its queries or keys are made of the rows {_span(actual)}. Correct the "
                "number of heads, the start or the stride."
            )

    def _are_gains(self, projection: QKProjection, call: Call) -> bool:
        places = [self.places[id(gain.parameter)] for gain in (*call.query.gains, *call.key.gains)]
        gains = {id(getattr(self.modules[name], attribute)) for name, attribute in places}
        return all(id(next(rows.parameters())[0]) in gains for rows in projection.scaled_parts())

    def _declared(self, parts: Sequence[HeadRows], heads: int) -> dict[int, list[set[int]]]:
        """Parameter → the rows declared for each head."""
        rows: dict[int, list[set[int]]] = {}
        for part in parts:
            parameter, _ = next(part.parameters())
            per_head = rows.setdefault(id(parameter), [set() for _ in range(heads)])
            for head, index in enumerate(part.rows("cpu").tolist()):
                per_head[head].update(index)
        return rows

    def _found(self, source: Source, heads: int, *, only_own: bool = False) -> dict[int, list[set[int]]]:
        rows: dict[int, list[set[int]]] = {}
        for each in source.rows:
            if each.parameter.ndim == 1 or id(each.parameter) not in self.places:
                continue
            name, attribute = self.places[id(each.parameter)]
            masks = feeds(each.masks, heads)
            if only_own:
                masks = masks & (masks.sum(0) == 1)
            parameter = getattr(self.modules[name], attribute)
            rows[id(parameter)] = [set(mask.nonzero().flatten().tolist()) for mask in masks]
        return rows

    def _called(self, identity: int) -> str:
        for name, module in self.modules.items():
            for attribute, parameter in module.named_parameters(recurse=False):
                if id(parameter) == identity:
                    return f"{name}.{attribute}".lstrip(".")
        return "a weight of another module"


def _common_start(paths: Sequence[Sequence[str]]) -> list[str]:
    return [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]


def _outwards(name: str) -> list[str]:
    path = name.split(".")
    return [".".join(path[:length]) for length in range(len(path), 0, -1)] + [""]


def _first_difference(
    declared: Mapping[int, list[set[int]]], found: Mapping[int, list[set[int]]], *, may_lack: bool = False
) -> tuple[int, int, set[int], set[int]] | None:
    for parameter in declared.keys() | (set() if may_lack else found.keys()):
        nothing: list[set[int]] = [set()] * max(len(declared.get(parameter, [])), len(found.get(parameter, [])))
        pairs = zip(declared.get(parameter, nothing), found.get(parameter, nothing), strict=True)
        for head, (one, other) in enumerate(pairs):
            if one != other:
                return parameter, head, one, other
    return None


def _span(rows: set[int]) -> str:
    if not rows:
        return "none"
    ordered = sorted(rows)
    if ordered[-1] - ordered[0] + 1 == len(ordered):
        return f"{ordered[0]} to {ordered[-1]}"
    return f"{', '.join(map(str, ordered[:4]))}{', …' if len(ordered) > 4 else ''}"


def _divide(rows: Sequence[Rows], heads: int, shared_keys: Mapping[object, Tensor]) -> tuple[list[Rows], list[Rows]]:
    """Rows behind keys that a query head has to itself, and rows behind keys that several meet."""
    private, shared = [], []
    for each in rows:
        many = feeds(each.masks, heads).sum(0) > 1
        others = shared_keys.get((id(each.parameter), each.axis))
        many = many if others is None else many | others
        for part, chosen in ((private, ~many), (shared, many)):
            masks = each.masks & chosen
            if masks.any():
                part.append(replace(each, masks=masks))
    return private, shared


def _distinct(masks: Tensor) -> Tensor:
    """Key heads repeated for their queries, once each."""
    keep = [0] + [i for i in range(1, len(masks)) if not torch.equal(masks[i], masks[i - 1])]
    return masks[keep]


def _keys_of_several(calls: Sequence[Call]) -> dict[object, Tensor]:
    """(parameter, axis) → the rows behind keys of calls whose queries differ: keys shared between attentions."""
    seen: dict[object, list[tuple[object, Tensor]]] = {}
    for call in calls:
        queries = _identity(call.query.rows)
        for rows in call.key.rows:
            seen.setdefault((id(rows.parameter), rows.axis), []).append((queries, rows.masks.any(0)))
    shared = {}
    for place, uses in seen.items():
        by_query: dict[object, Tensor] = {}
        for queries, mask in uses:
            by_query[queries] = by_query[queries] | mask if queries in by_query else mask
        count = torch.stack([mask.long() for mask in by_query.values()]).sum(0)
        if bool((count > 1).any()):
            shared[place] = count > 1
    return shared


def _signature(call: Call) -> object:
    return tuple(_identity([*source.rows, *source.gains]) for source in (call.query, call.key))


def _identity(rows: Sequence[Rows]) -> object:
    return frozenset((id(r.parameter), r.axis, tuple(r.masks.flatten().nonzero().flatten().tolist())) for r in rows)
