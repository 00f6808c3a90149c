"""Hyperball (MuonH; Wen et al. 2025, arXiv 2606.16899): Muon on weights whose norm is held.

    W ← R · N(W − η R · N(U))        N(x) = x / ‖x‖_F,   R = ‖W₀‖_F of each logical matrix

Each step turns a matrix by about η radians, whatever the size of its update. R is read from the weight, which every
step leaves on its sphere: so it needs no state, and a weight that something else has scaled, as QK-Clip does with heads
above τ, goes on with its new norm. A matrix of zeros stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from muonclip.core.newton_schulz import Array
from muonclip.core.update_rule import MatrixOperations, Motion, MuonRule, State


@dataclass(frozen=True)
class HyperballRule(MuonRule):
    """Muon that turns each matrix and holds its Frobenius norm; there is no decay, and no scale of updates."""

    def move(
        self, weight: Array, update: Array, state: State, motion: Motion, operations: MatrixOperations
    ) -> tuple[Array, State]:
        """Step along the normalised update, relative to the norm, and return to the sphere."""
        weight, update = operations.wide(weight), operations.wide(update)
        where, radius = operations.xp.where, _norm(weight, operations)
        length = _norm(update, operations)
        moved = weight - update * (motion.lr * radius / where(length > 0, length, 1.0))
        size = _norm(moved, operations)
        return moved * (radius / where(size > 0, size, 1.0)), state


def _norm(x: Array, operations: MatrixOperations) -> Array:
    return operations.sum(x * x) ** 0.5
