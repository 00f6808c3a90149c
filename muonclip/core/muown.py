"""Muown (arXiv 2605.10797): rows as magnitude times direction, W = g · V / ‖V‖, each with its own optimizer.

    u = W / g,   ∂g = Σ over columns of ∂W · u,   ∂V = (g / ‖V‖) (∂W − u ∂g)
    V ← V − η · scale · O(∂V)          Muon, by the momentum of ∂V
    g ← g (1 − η λ) − η Adam(∂g)       with Adam's correction of the bias
    W = g · V / ‖V‖

It begins with V = W. g is read from the weight, up to its sign, so that rows which something else has scaled, as
QK-Clip does with heads above τ, go on with their new size. A row that begins at zero stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from muonclip.core.adam_defaults import ADAM_BETAS, ADAM_EPS
from muonclip.core.matrix_state import MatrixState, per_row
from muonclip.core.newton_schulz import Array
from muonclip.core.update_rule import MatrixOperations, Motion, MuonRule, State


@dataclass(frozen=True)
class MuownRule(MuonRule):
    """Muon on the directions of rows, Adam and the decay on their magnitudes.

    `direction_norms` is ‖V‖ with the sign of g, 0 before the first step.
    """

    betas: tuple[float, float] = ADAM_BETAS
    eps: float = ADAM_EPS
    states: ClassVar[tuple[MatrixState, ...]] = (
        *MuonRule.states,
        *(
            MatrixState(name, per_row, dtype="wide")
            for name in ("direction_norms", "magnitude_mean", "magnitude_squares", "magnitude_steps")
        ),
    )

    def pull_back(
        self, gradient: Array, weight: Array, state: State, operations: MatrixOperations
    ) -> tuple[Array, State]:
        """Return the gradient of the directions; that of the magnitudes enters their moments."""
        gradient, (unit, magnitude, norms) = operations.wide(gradient), self._parts(weight, state, operations)
        of_magnitude = operations.sum_columns(gradient * unit)
        ratio = magnitude / operations.xp.where(norms > 0, norms, 1.0)
        (beta1, beta2), mean, squares = self.betas, state["magnitude_mean"], state["magnitude_squares"]
        moments = {
            "magnitude_mean": beta1 * mean + (1 - beta1) * of_magnitude,
            "magnitude_squares": beta2 * squares + (1 - beta2) * of_magnitude * of_magnitude,
            "magnitude_steps": state["magnitude_steps"] + 1,
        }
        return ratio * (gradient - unit * of_magnitude), {**state, **moments}

    def move(
        self, weight: Array, update: Array, state: State, motion: Motion, operations: MatrixOperations
    ) -> tuple[Array, State]:
        """Move directions and magnitudes, and put them together."""
        where, (unit, magnitude, norms) = operations.xp.where, self._parts(weight, state, operations)
        direction = unit * norms - motion.lr * motion.scale * operations.wide(update)
        beta1, beta2 = self.betas
        steps = where(state["magnitude_steps"] > 0, state["magnitude_steps"], 1.0)
        mean, squares = (
            state[name] / (1 - beta**steps) for name, beta in (("magnitude_mean", beta1), ("magnitude_squares", beta2))
        )
        adam = mean / (squares**0.5 + self.eps)
        magnitude = magnitude * (1 - motion.lr * motion.weight_decay) - motion.lr * adam
        norms = operations.sum_columns(direction * direction) ** 0.5
        moved = magnitude * (direction / where(norms > 0, norms, 1.0))
        return moved, {**state, "direction_norms": where(magnitude < 0, -norms, norms)}

    def _parts(self, weight: Array, state: State, operations: MatrixOperations) -> tuple[Array, Array, Array]:
        """Return u [rows, columns], g and ‖V‖ [rows, 1] of each matrix."""
        weight, where, signed = operations.wide(weight), operations.xp.where, state["direction_norms"]
        size = operations.sum_columns(weight * weight) ** 0.5
        magnitude = where(signed < 0, -size, size)
        unit = weight / where(size > 0, magnitude, 1.0)
        return unit, magnitude, where(signed == 0, size, abs(signed))
