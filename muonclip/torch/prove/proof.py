"""The proof of attentions that were found or declared: their rows are scaled in a copy as the clip would scale them.

    L' = γ_h S + C        for every head h, and nothing else of the model moves

The factors differ from head to head and are powers of two. Every attention returns what it did in an unscaled run, so
that each is tried by itself though all are scaled together, and what the model returns shows whether the rows feed
something else. Where that does not hold, an attention may be clipped by one side alone.

An attention that shows no call, because it is declared and computed out of sight, is proven by the gauge:

    query rows · 2^a, key rows · 2^−a        leave every bit of what the model returns
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from muonclip.core import ClipFactors
from muonclip.core.attention_mask import MASKED
from muonclip.core.head_parts import FACTOR_OF, Part, factors_of
from muonclip.torch.discover import Inputs, Site
from muonclip.torch.heads import QKProjection
from muonclip.torch.prove.attention_run import Recording, SeenCall
from muonclip.torch.prove.experiments import Experiments, Scaling
from muonclip.torch.prove.sample import Sample
from muonclip.torch.prove.ways import (
    AS_FOUND,
    CHANGES,
    OBSERVED_ONLY,
    Finding,
    Way,
    by_keys_alone,
    by_queries_alone,
)


def prove(
    model: nn.Module,
    inputs: Inputs,
    choices: Mapping[str, Sequence[QKProjection]],
    sites: Sequence[Site],
    *,
    declared: Collection[str] = (),
    training: bool = False,
) -> dict[str, Way | Finding]:
    """Try the clip of attentions, by name, in copies of the model. Returns the way in which each can be clipped, or why
    it cannot.

    `choices`: each as it was found, then with other rows that may be the right ones. `sites`: where each is called;
    those that a run on these inputs does not reach are not in the result. `declared`: the names of those that may be
    computed out of sight. `training`: the mode of the copies. Raises whatever the model raises.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return {}
    proof = _Proof(model, inputs, choices, sites, declared, training=training)
    try:
        return proof.ways()
    finally:
        proof.end()


def confirm(
    model: nn.Module,
    inputs: Inputs,
    choices: Mapping[str, Sequence[QKProjection]],
    sites: Sequence[Site],
    ways: Mapping[str, Way],
    *,
    training: bool = False,
) -> dict[str, Finding | None]:
    """Try attentions again in the ways in which they were proven. Returns what does not hold, of those that a run on
    these inputs reaches."""
    proof = _Proof(model, inputs, choices, sites, (), training=training)
    try:
        return proof.confirmed(ways)
    finally:
        proof.end()


class _Proof:
    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        choices: Mapping[str, Sequence[QKProjection]],
        sites: Sequence[Site],
        declared: Collection[str],
        *,
        training: bool,
    ) -> None:
        self._choices, self._declared = choices, set(declared)
        self._names = {id(each[0]): name for name, each in choices.items()}
        self._sites = {site.module: site for site in sites}
        around = {name for site in self._sites for name in around_of(site)}
        self._experiments = Experiments(model, inputs, self._heads_of, around, training=training)
        self._modules = dict(model.named_modules())

    def ways(self) -> dict[str, Way | Finding]:
        """Return the way in which each attention that was reached can be clipped, or why it cannot."""
        base = self._experiments.base
        clipped = {
            name: each
            for name, (each, *_) in self._choices.items()
            if each.scaled_parts() and all(map(self._experiments.reaches, each.scaled_parts()))
        }
        seen = {self._name_of(call) for call in base.calls}
        called = {name: each for name, each in clipped.items() if name in seen}
        unseen = {name: each for name, each in clipped.items() if name in base.ran & self._declared - seen}
        out_of_sight: dict[str, Way | Finding] = {
            name: AS_FOUND if finding is None else finding for name, finding in self._try_unseen(unseen).items()
        }
        return self._ways_of(called) | out_of_sight

    def end(self) -> None:
        """Forget what the runs showed."""
        self._experiments.end()

    def confirmed(self, ways: Mapping[str, Way]) -> dict[str, Finding | None]:
        """Return what does not hold of attentions in ways in which they were proven."""
        seen = {self._name_of(call) for call in self._experiments.base.calls}
        return self._try({name: each for name, each in self._in_their_ways(ways).items() if name in seen})

    def _ways_of(self, attentions: Mapping[str, QKProjection]) -> dict[str, Way | Finding]:
        findings = self._try(attentions)
        if not any(findings.values()):
            return dict.fromkeys(attentions, AS_FOUND)
        # One of each make and finding shows how all of them can be clipped.
        shown: dict[object, Way | Finding] = {}
        ways: dict[str, Way | Finding] = {}
        for name, each in attentions.items():
            make = findings[name], self._make_of(each)
            if make not in shown:
                shown[make] = self._way_of(name)
            ways[name] = shown[make]
        if not any(self._try(self._in_their_ways(ways)).values()):
            return ways
        ways = {name: self._way_of(name) for name in attentions}
        together = self._try(self._in_their_ways(ways))  # the clip of one may move the logits of another
        return ways | {name: finding for name, finding in together.items() if finding is not None}

    def _in_their_ways(self, ways: Mapping[str, Way | Finding]) -> dict[str, QKProjection]:
        """Return the attentions that can be clipped, in the way in which they can."""
        changed = {name: way.of(self._choices[name]) for name, way in ways.items() if not isinstance(way, Finding)}
        return {name: each for name, each in changed.items() if each is not None and each.scaled_parts()}

    def _way_of(self, name: str) -> Way | Finding:
        """Return the first way in which one attention can be clipped, or why it cannot be as it was found."""
        findings: list[Finding] = []
        for way in itertools.starmap(Way, itertools.product(CHANGES, range(len(self._choices[name])))):
            changed = way.of(self._choices[name])
            if changed is None or not all(map(self._experiments.reaches, changed.scaled_parts())):
                continue
            finding = self._try({name: changed})[name] if changed.scaled_parts() else Finding.NORMALISED
            if finding is None and way.change is by_keys_alone:
                finding = self._held_by_queries_alone(name, self._choices[name][way.choice])
            if finding is None:
                return way
            findings.append(finding)
        is_normalised = findings[0] is Finding.NORMALISED and name not in self._declared
        return OBSERVED_ONLY if is_normalised else findings[0]

    def _held_by_queries_alone(self, name: str, projection: QKProjection) -> Finding | None:
        """Tell whether what is added to the logits depends on the queries, so that the keys would not hold it down."""
        by_queries = by_queries_alone(projection)
        finding = None if by_queries is None else self._try({name: by_queries})[name]
        return finding if finding is Finding.MORE_THAN_PRODUCTS else None

    def _try(self, attentions: Mapping[str, QKProjection]) -> dict[str, Finding | None]:
        """Clip attentions in a copy, and return what does not hold of each."""
        findings: dict[str, Finding | None] = dict.fromkeys(attentions)
        if not attentions:
            return findings
        factors = {name: _factors(each.num_heads, index) for index, (name, each) in enumerate(attentions.items())}
        outcome = self._experiments.run(
            [pair for name, each in attentions.items() for pair in _clipped(each, factors[name])], replayed=True
        )
        for before, after in zip(self._experiments.base.calls, outcome.calls, strict=False):
            name = self._name_of(before)
            if name is None or name not in attentions or findings[name] is not None:
                continue
            if before.sample and after.sample:
                findings[name] = self._compare(before.sample, after.sample, attentions[name], factors[name].gamma)
        if not any(findings.values()) and self._moved(outcome) and self._gauge_moves(attentions):
            return dict.fromkeys(attentions, Finding.FEEDS_OTHERS)
        return findings

    def _try_unseen(self, attentions: Mapping[str, QKProjection]) -> dict[str, Finding | None]:
        """Try attentions by the gauge, and that what the model returns moves with them at all."""
        returned = self._experiments.base.returned
        if not attentions or any(bool(each.isnan().any()) for each in returned if each.is_floating_point()):
            return {}  # nothing can be told of such a model
        gauge = [pair for index, each in enumerate(attentions.values()) for pair in _gauge(each, index)]
        if gauge and self._moved(self._experiments.run(gauge)):
            return dict.fromkeys(attentions, Finding.NOT_BY_GAUGE)
        clipped = [
            pair for i, each in enumerate(attentions.values()) for pair in _clipped(each, _factors(each.num_heads, i))
        ]
        moved = self._moved(self._experiments.run(clipped), exactly=True)
        return dict.fromkeys(attentions, None if moved else Finding.NORMALISED)

    def _compare(self, before: Sample, after: Sample, projection: QKProjection, gamma: Tensor) -> Finding | None:
        differ, gamma = self._experiments.differ, gamma.to(before.scores)[:, None, None]
        if before.scores.shape != after.scores.shape:
            return Finding.FEEDS_OTHERS
        if not bool(before.scores.isfinite().all()):
            return None  # nothing can be told of such logits
        if self._experiments.scores_differ(before.scores * gamma, after.scores, before.dtype):
            return Finding.NORMALISED if _moved_alike(before.scores, after.scores, gamma) else Finding.NOT_SCALED
        if differ(before.values, after.values):
            return Finding.FEEDS_VALUES
        if projection.counts_added:
            if before.whole is None or after.whole is None:
                return Finding.MORE_THAN_PRODUCTS
            if before.logits is None:
                agree = not self._experiments.scores_differ(before.whole * gamma, after.whole, before.dtype)
            else:
                agree = self._agree(before.whole, after.whole, before.whole, before.dtype, gamma)
                agree = agree and not differ(before.others, after.others)
            return None if agree else Finding.MORE_THAN_PRODUCTS
        if before.by_pair:
            return Finding.FACTORS_OF_PAIRS
        if differ(before.added, after.added):
            return Finding.MORE_THAN_PRODUCTS
        if before.is_capped and differ(before.others, after.others):
            return Finding.MORE_THAN_PRODUCTS
        first, second, scores = before.logits, after.logits, before.scores
        if first is None or second is None:
            return None
        if not before.is_capped and before.others is not None and after.others is not None:
            first, second = torch.cat([first, before.others], -1), torch.cat([second, after.others], -1)
            scores = torch.cat([scores, torch.zeros_like(before.others)], -1)
        agree = self._agree(
            first, second, scores, before.dtype, gamma, up_to_queries=before.of_softmax and not before.is_capped
        )
        return None if agree else Finding.MORE_THAN_PRODUCTS

    def _agree(
        self,
        before: Tensor,
        after: Tensor,
        scores: Tensor,
        dtype: torch.dtype,
        gamma: Tensor,
        *,
        up_to_queries: bool = False,
    ) -> bool:
        """Tell whether (L − L') / (1 − γ) is S, at the pairs that count, where no mask is in L. `up_to_queries`: or is
        more by the same for all logits of a query, such as their maximum, which a softmax does not see."""
        away = (before - after) / (1 - gamma) - scores
        counts = away.isfinite() & (before > MASKED)  # a finite mask would hide everything in its rounding
        away = away.masked_fill(~counts, 0)
        if up_to_queries:
            of_queries = away.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
            away = (away - of_queries).masked_fill(~counts, 0)
        largest = before.masked_fill(~counts, 0).abs().amax((0, 2, 3))
        return self._experiments.is_rounding(away.abs().amax((0, 2, 3)), largest, dtype)

    def _moved(self, outcome: Recording, *, exactly: bool = False) -> bool:
        """Tell whether something that the model returns has moved; unless `exactly`, something else than queries and
        keys themselves, which a cache has. A cache does not come first."""
        base = self._experiments.base
        if len(base.returned) != len(outcome.returned) or len(base.calls) != len(outcome.calls):
            return True
        pairs = enumerate(zip(base.returned, outcome.returned, strict=True))
        return any(
            self._experiments.differ(one, other, by_powers_of_two=not exactly and index not in base.firsts)
            for index, (one, other) in pairs
        )

    def _gauge_moves(self, attentions: Mapping[str, QKProjection]) -> bool:
        """Tell whether the gauge, too, moves what the model returns, which may be logits that the clip has moved."""
        if any(each.query and not each.key for each in attentions.values()):
            return True  # it would not try them whole
        gauge = [
            pair
            for index, each in enumerate(attentions.values())
            for pair in (*_gauge(each, index), *_gauge_of_groups(each, index))
        ]
        return self._moved(self._experiments.run(gauge, replayed=True))

    def _name_of(self, call: SeenCall) -> str | None:
        """Return the name of the attention that a call is of."""
        return self._names.get(id(self._projection_of(call.module, call.number)))

    def _heads_of(self, module: str, number: int) -> tuple[int, int] | None:
        projection = self._projection_of(module, number)
        return None if projection is None else (projection.num_heads, self._sites[module].head_axis)

    def _projection_of(self, module: str, number: int) -> QKProjection | None:
        site = self._sites.get(module)
        return None if site is None else site.projections[min(number, len(site.projections) - 1)]

    def _make_of(self, projection: QKProjection) -> object:
        """Return what attentions have in common that are computed by the same code."""
        callers = [
            (type(self._modules[module]), site.kernel.name)
            for module, site in self._sites.items()
            if any(each is projection for each in site.projections)
        ]
        rows = [(part, r.num_heads, r.size, r.axis) for part in FACTOR_OF for r in getattr(projection, part)]
        return (*callers[:1], projection.kind, *rows)


def around_of(module: str) -> list[str]:
    """Return the name of a module and of those around it, but not of the whole model."""
    path = module.split(".")
    return [".".join(path[:length]) for length in range(len(path), 0, -1)]


def _factors(heads: int, offset: int) -> ClipFactors:
    """Return factors of each head, γ and its root for each side."""
    root = torch.tensor([2.0 ** -(1 + (head + offset) % 3) for head in range(heads)], dtype=torch.float32, device="cpu")
    return ClipFactors(gamma=root * root, query=root, key=root)


def _clipped(projection: QKProjection, factors: ClipFactors) -> Scaling:
    parts: list[Part] = [part for part in FACTOR_OF if getattr(projection, part)]
    return [
        (rows, getattr(factors, factor))
        for part, factor in factors_of(parts, projection.fixed).items()
        for rows in getattr(projection, part)
    ]


def _gauge(projection: QKProjection, offset: int) -> Scaling:
    """Multiply the queries of heads by powers of two, and the keys that they have to themselves by the reciprocals."""
    powers = torch.tensor(
        [(2.0, 0.25, 8.0, 0.5)[(head + offset) % 4] for head in range(projection.num_heads)],
        dtype=torch.float32,
        device="cpu",
    )
    if not projection.key:
        return []
    return [(rows, powers) for rows in projection.query] + [(rows, 1 / powers) for rows in projection.key]


def _gauge_of_groups(projection: QKProjection, offset: int) -> Scaling:
    """Multiply the queries that share a key by one power of two, and the key by the reciprocal."""
    heads, counts = projection.num_heads, {rows.num_heads for rows in projection.shared_key}
    groups = min(counts) if len(counts) == 1 and heads % min(counts) == 0 else 1
    powers = torch.tensor([(2.0, 0.25, 8.0, 0.5)[(g + offset) % 4] for g in range(groups)], device="cpu")
    queries = [(rows, powers.repeat_interleave(heads // groups)) for rows in projection.query_facing_shared]
    keys = [(rows, (1 / powers).repeat_interleave(rows.num_heads // groups)) for rows in projection.shared_key]
    return queries + keys


def _moved_alike(before: Tensor, after: Tensor, gamma: Tensor) -> bool:
    """Tell whether the logits of all heads have moved by one factor at most, whatever those of their rows, γ, and by
    none of these, which would be of one head that is taken for others; of one head that is none."""
    size = before.square().sum()
    factor = (before * after).sum() / size if before.shape[1] > 1 else torch.ones_like(size)
    if bool(((factor - gamma).abs() < 1e-3 * gamma).any()):
        return False
    return bool(size > 0) and bool((after - factor * before).square().sum() <= 1e-6 * size)
