"""The maxima of all attentions on all ranks: vectors over their heads, combined by one collective.

A maximum of maxima is exact, so neither the order of the ranks nor repetition matters. Everything from which an error
follows travels with them, so that all ranks raise it or none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.torch.clip.errors import Error
from muonclip.torch.heads import QKProjection
from muonclip.torch.logits import MaxLogits
from muonclip.torch.mesh import local_part

NOTHING_RAN, NO_GRADIENT, ZERO_GRADIENT = -1.0, 0.0, 1.0
FINITE_GRADIENT, NONFINITE_GRADIENT, UNKNOWN_ATTENTION = 2.0, 3.0, 4.0
"""Notes of a rank about an attention, of which the largest over the ranks counts. The first and the last are about the
whole model: nothing says that it ran, or attention ran that nobody observed."""

_SEEN = torch.finfo(torch.float32).min  # as a bound: observed, without any logit


@dataclass(frozen=True, slots=True, eq=False)
class JointMaxima:
    """The maxima of all attentions, as fp32 vectors.

    `maximum`, `bound`, `nonfinite`: of all heads, as in `MaxLogits`, one attention after the other. `observed` and
    `notes`: of each attention. Notes are None until they are needed.
    """

    sizes: tuple[int, ...]
    maximum: Tensor
    bound: Tensor
    nonfinite: Tensor
    observed: Tensor
    notes: Tensor | None = None

    @classmethod
    def from_states(cls, states: Sequence[MaxLogits], device: torch.device) -> JointMaxima:
        """Combine what this rank has seen."""
        return cls(
            tuple(state.num_heads for state in states),
            torch.cat([state.maximum.to(device) for state in states]),
            torch.cat([state.bound.to(device) for state in states]),
            torch.cat([state.nonfinite.to(device) for state in states]),
            torch.stack([state.observed.to(device) for state in states]),
        )

    @property
    def upper_bound(self) -> Tensor:
        """An upper bound of all logits, fp32 [heads of all]; equal to `maximum` where that is exact."""
        return torch.maximum(self.bound, self.maximum)

    def all_reduce(self, group: dist.ProcessGroup, notes: Tensor) -> JointMaxima:
        """Combine what all ranks of the group have seen, by one MAX all-reduce of sum(3 · heads + 1) numbers."""
        owner = _owners(self.sizes, self.maximum.device)
        # An attention was observed where its bounds are more than −inf, which leaves a place for its note.
        bound = torch.where(self.observed[owner] > 0, self.bound.clamp(min=_SEEN), self.bound)
        packed = torch.cat([self.maximum, bound, self.nonfinite, notes])
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)
        maximum, bound, nonfinite, notes = packed.split([len(owner)] * 3 + [len(self.sizes)])
        observed = self._any_of_each(bound > -math.inf)
        bound = bound.masked_fill(bound == _SEEN, -math.inf)
        return JointMaxima(self.sizes, maximum, bound, nonfinite, observed, notes)

    def with_notes(self, notes: Tensor) -> JointMaxima:
        """Add the notes of this rank, which is alone."""
        return self if self.notes is not None else replace(self, notes=notes)

    def are_fine(self, tau: float | Tensor) -> Tensor:
        """Tell whether there is certainly no error, whatever the notes say; bool []. `tau`: of all heads, or each."""
        return self.observed.all() & ~self.nonfinite.any() & ~self._left_open(tau).any()

    def errors(self, trains: Sequence[bool], tau: float | Tensor, *, before_update: bool) -> Tensor:
        """Return which `Error` each attention has in this step, bool [attentions, 4].

        An attention without a gradient, or with one of zero, on all ranks was not run: there is nothing to clip. That
        must not hide a step of which nothing was observed at all, `before_update`, or, after it, gradients that were
        discarded. A GradScaler skips the step when the gradients are not finite, and a non-finite logit makes them so.
        One seen together with finite gradients is therefore left from a step that was skipped, and not an error of
        this one.
        """
        assert self.notes is not None
        observed = self.observed > 0
        missing = ~observed & constant(tuple(trains), torch.bool, observed.device)
        unknown = self.notes == NOTHING_RAN
        if before_update:
            unknown &= ~observed.any()
        missing &= unknown | (self.notes >= FINITE_GRADIENT)
        is_of_this_step = (self.notes != ZERO_GRADIENT) & (self.notes != FINITE_GRADIENT)
        nonfinite = (self._any_of_each(self.nonfinite > 0) > 0) & is_of_this_step
        columns = {
            Error.UNKNOWN_ATTENTION: self.notes == UNKNOWN_ATTENTION,
            Error.NONFINITE: nonfinite,
            Error.UNOBSERVED: missing,
            Error.TAU_LOWERED: self._any_of_each(self._left_open(tau)) > 0,
        }
        return torch.stack([columns[kind] for kind in Error], dim=1)

    def _left_open(self, tau: float | Tensor) -> Tensor:
        """Tell, by head, whether a logit above τ may be larger than all that were computed; bool [heads of all]."""
        return self.upper_bound > self.maximum.clamp(min=tau)

    def _any_of_each(self, heads: Tensor) -> Tensor:
        """Return 1 for each attention of which a head is true in `heads` [heads of all]; fp32 [attentions]."""
        each = torch.zeros(len(self.sizes), dtype=torch.float32, device=heads.device)
        return each.scatter_reduce(0, _owners(self.sizes, heads.device), heads.float(), "amax")


def note_of(projection: QKProjection, device: torch.device, *, ran: bool) -> Tensor:
    """Make the note about the gradients that this rank has, fp32 []. `ran`: whether it is known that the model ran."""
    parameters = projection.qk_parameters()
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    sizes = [torch.linalg.vector_norm(gradient, math.inf) for gradient in gradients if gradient.numel()]
    if not sizes:  # nothing to scale, or nobody has asked for gradients yet
        note = (NO_GRADIENT if ran else NOTHING_RAN) if parameters else FINITE_GRADIENT
        return torch.full((), note, dtype=torch.float32, device=device)
    finite = torch.stack([size.isfinite().to(device) for size in sizes]).all()
    zero = torch.stack([(size == 0).to(device) for size in sizes]).all()
    return torch.where(finite, torch.where(zero, ZERO_GRADIENT, FINITE_GRADIENT), NONFINITE_GRADIENT).float()


def has_gradient(parameter: Tensor) -> bool:
    """Tell whether this rank has a gradient of the parameter other than zero; waits for the device."""
    return parameter.grad is not None and bool(local_part(parameter.grad).any())


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor that is copied to its device once."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Number the attention of each head: int64 [heads of all]."""
    owners = tuple(number for number, size in enumerate(sizes) for _ in range(size))
    return constant(owners, torch.int64, device)
