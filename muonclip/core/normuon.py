"""NorMuon (arXiv 2510.05491): Muon whose rows have one size, over time.

    v ← β₂ v + (1−β₂) mean over columns of O²        one number for each row
    U = O / (√v + ε), in the Frobenius norm of O

v is of updates, so it depends neither on the weight nor on what the clip does to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from muonclip.core.matrix_state import MatrixState, per_row
from muonclip.core.newton_schulz import Array
from muonclip.core.update_rule import MatrixOperations, MuonRule, State


@dataclass(frozen=True)
class NorMuonRule(MuonRule):
    """Muon with each row of its update divided by the root of its mean square over past steps."""

    beta2: float = 0.95
    eps: float = 1e-8
    states: ClassVar[tuple[MatrixState, ...]] = (*MuonRule.states, MatrixState("row_squares", per_row, dtype="wide"))

    def apply(self, update: Array, state: State, operations: MatrixOperations) -> tuple[Array, State]:
        """Divide the rows, and give each matrix the norm that it had."""
        update = operations.wide(update)
        squares = self.beta2 * state["row_squares"] + (1 - self.beta2) * operations.mean_columns(update * update)
        scaled = update / (squares**0.5 + self.eps)
        before, after = operations.sum(update * update), operations.sum(scaled * scaled)
        size = (before / operations.xp.where(after > 0, after, 1.0)) ** 0.5
        return scaled * size, {**state, "row_squares": squares}
