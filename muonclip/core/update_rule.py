"""The stages of an update, on stacks of logical matrices and for every adapter:

    G, S ← pull_back(G, W, S) the gradient of what is moved, where that is not the weight itself
    S ← advance(G, S)         the gradient enters the state
    X = direction(G, S)       what is orthogonalised
    O = orthogonalize(X)      Newton–Schulz; the adapter's, for it batches matrices and moves them between ranks
    U, S ← apply(O, S)        what the weight moves by, before its scale, the rate and the decay
    W, S ← move(W, U, S)      the weight itself; by default W − η (scale · U + λ W), which adapters do in place

A variant of Muon is a subclass of `MuonRule` that declares its states and overrides the stages in which it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from muonclip.core.matrix_state import MatrixState
from muonclip.core.newton_schulz import Array

State: TypeAlias = Mapping[str, Array]
"""By the name of a `MatrixState`: its array [..., rows, columns], like the matrices'."""


@dataclass(frozen=True, slots=True)
class MatrixOperations:
    """The operations of an adapter on its matrices, of which a device may hold a part.

    `lerp(a, b, w)`: a + w (b − a). `average`: the same, and may write into `a`. `wide`: in float32, or float64 for
    float64. `mean_columns`, `sum_columns`: over the columns of the whole matrix, for each row. `sum`: over the whole
    matrix, in a shape that broadcasts. `xp`: the array namespace.
    """

    lerp: Callable[[Array, Array, Any], Array]
    average: Callable[[Array, Array, Any], Array]
    wide: Callable[[Array], Array]
    mean_columns: Callable[[Array], Array]
    sum_columns: Callable[[Array], Array]
    sum: Callable[[Array], Array]
    xp: Any


@dataclass(frozen=True, slots=True)
class Momentum:
    """The momentum of one step: β, and how the gradient enters what is orthogonalised.

    `count`: the number of the step, from 1; only "bias_corrected", which is Optax's, needs it. `used`: 1 for matrices
    whose state moves in this step, 0 for others; None: all.
    """

    beta: Any
    nesterov: bool | Literal["bias_corrected"]
    count: Any = None
    used: Array = None


@dataclass(frozen=True, slots=True)
class Motion:
    """The motion of the weights in one step: η, λ, and the scale of an update by the shape of its matrix.

    `scale`: a number, or an array that broadcasts over matrices of several shapes.
    """

    lr: Any
    weight_decay: Any
    scale: Any


def agree(update: Array, weight: Array) -> Array:
    """Tell, entry by entry, whether an update takes a weight towards zero: where cautious decay decays.

    By signs: the product of two small numbers may be zero. (Cautious weight decay, arXiv 2510.12402.)
    """
    return ((update > 0) & (weight > 0)) | ((update < 0) & (weight < 0))


@dataclass(frozen=True)
class MuonRule:
    """Muon as PyTorch has it: M ← β M + (1−β) G; X = (1−β) G + β M with Nesterov, else M; U = O."""

    states: ClassVar[tuple[MatrixState, ...]] = (MatrixState("momentum_buffer"),)

    def pull_back(
        self, gradient: Array, weight: Array, state: State, operations: MatrixOperations
    ) -> tuple[Array, State]:
        """Return the gradient of what is orthogonalised, from that of the weight."""
        del weight, operations
        return gradient, state

    def advance(self, gradient: Array, state: State, momentum: Momentum, operations: MatrixOperations) -> State:
        """Add the gradient to the state; return the new state."""
        weight = 1 - momentum.beta if momentum.used is None else (1 - momentum.beta) * momentum.used
        return {**state, "momentum_buffer": operations.average(state["momentum_buffer"], gradient, weight)}

    def direction(self, gradient: Array, state: State, momentum: Momentum, operations: MatrixOperations) -> Array:
        """Return what is orthogonalised, after `advance`."""
        buffer = state["momentum_buffer"]
        if not momentum.nesterov:
            return buffer
        if momentum.nesterov == "bias_corrected":
            buffer = operations.wide(buffer) / (1 - momentum.beta ** (momentum.count + 1))
            gradient = operations.wide(gradient) / (1 - momentum.beta**momentum.count)
        return operations.lerp(gradient, buffer, momentum.beta)

    def apply(self, update: Array, state: State, operations: MatrixOperations) -> tuple[Array, State]:
        """Return what the weight moves by, from the orthogonalised matrices."""
        del operations
        return update, state

    def move(
        self, weight: Array, update: Array, state: State, motion: Motion, operations: MatrixOperations
    ) -> tuple[Array, State]:
        """Return the new weight and state, from what `apply` returned; the weight may be returned wide."""
        weight, update = operations.wide(weight), operations.wide(update)
        return weight - motion.lr * (motion.scale * update + motion.weight_decay * weight), state

    def rescale(self, state: State, factors: Array) -> State:
        """Follow the weight, of which the clip has multiplied each row by a factor [..., rows, 1]; most states do not.

        Only rules that override this are called. Momentum is not rescaled (Kimi K2, arXiv 2507.20534, Algorithm 1).
        """
        del factors
        return state
