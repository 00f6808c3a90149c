"""The ways in which an attention may be clipped: as it was found, by one side of its heads alone, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import NamedTuple

from muonclip.torch.heads import QKProjection

Change = Callable[[QKProjection], QKProjection | None]
"""Changes an attention, or returns None where it has no such way."""


class Way(NamedTuple):
    """Clip an attention with a change, and with the rows of one of its choices."""

    change: Change
    choice: int = 0

    def of(self, choices: Sequence[QKProjection]) -> QKProjection | None:
        """Return the attention in this way; the statistic is that of the first choice."""
        if self.choice >= len(choices):
            return None
        return self.change(replace(choices[self.choice], max_logits=choices[0].max_logits))


class Finding(Enum):
    """Why an attention cannot be clipped in a certain way, in words that stand behind its name."""

    NORMALISED = "its logits do not move with its rows: queries and keys are normalised behind the projection"
    NOT_SCALED = (
        "its logits are not multiplied by the factors of its heads when its rows are: something between the projection "
        "and the logits does not scale with it, such as a norm or a factor that is detached, or the rows are other "
        "heads'"
    )
    MORE_THAN_PRODUCTS = (
        "its logits hold more than the products of queries and keys that moves with these, such as relative positions "
        "that depend on the query, or the logits of another layer"
    )
    FACTORS_OF_PAIRS = (
        "its logits are multiplied by a factor of each pair of query and key, and something is added to them that does "
        "not move with queries and keys: leave masked pairs out by masked_fill, in place of a factor"
    )
    FEEDS_VALUES = "the rows of its queries or keys make its values, too"
    FEEDS_OTHERS = (
        "the rows of its queries or keys feed something else than its logits, too, such as a gate or another layer"
    )
    NOT_BY_GAUGE = (
        "the model returns something else when its query rows are multiplied by powers of two and its key rows by the "
        "reciprocals, which leaves every logit that is a product of the two. Where its keys feed something else, too, "
        "declare them as shared_key, and its queries as query_facing_shared"
    )


def as_found(projection: QKProjection) -> QKProjection | None:
    """Let each part take the factor of its kind."""
    return projection


def by_queries_alone(projection: QKProjection) -> QKProjection | None:
    """Let the queries take all of γ, of heads with keys of their own."""
    if not projection.key or projection.fixed:
        return None
    queries = (*projection.query, *projection.query_facing_shared)
    keys = (*projection.shared_key, *projection.key)
    return replace(projection, query=(), key=(), query_facing_shared=queries, shared_key=keys)


def by_keys_alone(projection: QKProjection) -> QKProjection | None:
    """Let the keys take all of γ, of heads with keys of their own."""
    if not projection.key or projection.query_facing_shared or projection.fixed:
        return None
    return replace(projection, fixed=("query",))


def with_added(projection: QKProjection) -> QKProjection | None:
    """Let S count what is added to the products and has the same degree in queries and keys, as in −‖q_i − k_j‖²."""
    return replace(projection, counts_added=True) if projection.key and not projection.counts_added else None


def by_queries_with_added(projection: QKProjection) -> QKProjection | None:
    """Let the queries take all of γ, and S count what is added to the products, such as positions q_i · r_ij."""
    if projection.fixed or projection.counts_added:
        return None
    return replace(by_queries_alone(projection) or projection, counts_added=True)


def observed_only(projection: QKProjection) -> QKProjection | None:
    """Scale nothing: a norm behind the projection undoes it."""
    return replace(projection, reason="QK-norm: scaling the projection would change nothing")


CHANGES: tuple[Change, ...] = (as_found, with_added, by_queries_alone, by_queries_with_added, by_keys_alone)
"""Those that are tried, in this order."""
AS_FOUND, OBSERVED_ONLY = Way(as_found), Way(observed_only)
