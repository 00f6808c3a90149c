"""QK-Clip: maximum attention logits and τ → the factors that bring heads above τ back to τ.

    γ_h = τ / S_h   where S_h > τ,   else 1            (Kimi K2, arXiv 2507.20534, Algorithm 1)

A logit is bilinear in query and key. Parts private to a head share γ between the two sides, γ^α and γ^(1−α); a query
part facing a key that heads share takes all of γ, because the shared key cannot be scaled for one head alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from muonclip.core.arguments import POSITIVE, SHARE, check_array, check_number, is_array
from muonclip.core.newton_schulz import Array


class ClipFactors(NamedTuple):
    """Factors of each head, with `query · key == gamma`; exactly 1 where S ≤ τ.

    Attributes:
        gamma: The factor of the logits, [heads].
        query: The factor of the query's rows, [heads].
        key: The factor of the key's rows, [heads].
    """

    gamma: Array
    """γ: for a query part facing a shared key."""
    query: Array
    """γ^α, for a query part facing the head's own key."""
    key: Array
    """γ^(1−α), for the head's own key part."""


DEFAULT_TAU = 100.0
"""The largest logit that a head may keep where nobody says another (Kimi K2)."""


def clip_factors(max_logits: Array, tau: float | Array, alpha: float | Array = 0.5, *, xp: Any) -> ClipFactors:
    """Return the factors of each head, from its maximum logit.

    Heads with S ≤ τ (negative and −inf included) are selected, not multiplied by a rounded τ/τ. NaN stays NaN and
    +inf becomes NaN: neither is ever a factor to use. τ and α may be traced arrays; as numbers they are checked.

    Args:
        max_logits: [heads], after the softmax scale; the factors are computed and returned in its dtype.
        tau: The largest logit a head may keep.
        alpha: The query's share of the exponent, from 0 to 1.
        xp: The array namespace: `numpy`, `torch` or `jax.numpy`.

    Raises:
        ValueError: For τ ≤ 0 and α outside [0, 1].
    """
    check_array("max_logits", max_logits)
    if not is_array(tau):
        check_tau(tau)
    if not is_array(alpha):
        check_alpha(alpha)
    quiet = max_logits <= tau
    loud = xp.where(quiet, 1.0, xp.where(max_logits < math.inf, max_logits, math.nan))
    one = xp.ones_like(max_logits)
    gamma = xp.where(quiet, one, tau / loud)
    key = xp.where(quiet, one, gamma ** (1 - alpha))
    return ClipFactors(gamma=gamma, query=xp.where(quiet, one, gamma / key), key=key)


def check_tau(tau: float) -> float:
    """Return τ. Raises ValueError unless it is positive, TypeError unless it is a number; infinity measures without
    clipping."""
    check_number("tau", tau, POSITIVE, "it is the largest attention logit a head may keep (K2: 100).")
    return tau


def check_alpha(alpha: float) -> float:
    """Return α. Raises ValueError outside [0, 1], TypeError unless it is a number."""
    check_number("alpha", alpha, SHARE, "the query takes γ^α, the key γ^(1−α).")
    return alpha
