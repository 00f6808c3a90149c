"""The errors of a step of QK-Clip, and how those that an accelerator found reach the host without a wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Error(IntEnum):
    """The columns of an error tensor [attentions, 4], the gravest first."""

    UNKNOWN_ATTENTION = 0
    """Attention ran that nobody observed; a fact about the whole model."""
    NONFINITE = 1
    """A logit was NaN or +inf."""
    UNOBSERVED = 2
    """No forward was observed that had to be."""
    TAU_LOWERED = 3
    """τ is below the threshold that the forwards were observed for: maxima between the two were not computed."""


@dataclass(frozen=True, slots=True)
class Details:
    """The details of the messages, in addition to the names of attentions.

    `tau`: None where attentions have their own. `unknown`: what is wrong on this rank with attention that was not
    observed. `hints`: for attentions that were not observed, by name. `left_out`: where forwards ran that could not be
    observed, by name. `if_unfilled`: which weights were not filled before the first step.
    """

    tau: float | None
    unknown: str = ""
    nonfinite_heads: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    hints: Mapping[str, str] = field(default_factory=dict[str, str])
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    if_unfilled: str = ""


def message(errors: Tensor, names: Sequence[str], details: Details) -> str:
    """Write the message of the gravest error among [attentions, 4], of attentions with these names."""
    wrong = {kind: [name for name, each in zip(names, errors[:, kind].tolist(), strict=True) if each] for kind in Error}
    kind = next(kind for kind in Error if wrong[kind])
    listed = ", ".join(name or "the model" for name in wrong[kind])
    if kind is Error.UNKNOWN_ATTENTION:
        return (
            details.unknown
            or "QK-Clip: on another rank attention was called by modules that were not seen to call it; see there."
        )
    if kind is Error.NONFINITE:
        heads = {name: list(details.nonfinite_heads.get(name, ())) for name in wrong[kind]}
        where = ", ".join((name or "the model") + (f" (heads {own})" if own else "") for name, own in heads.items())
        return details.if_unfilled + (
            f"QK-Clip saw non-finite attention logits in {where}. No factor can be taken from them and none was. "
            "Skip the step as for a non-finite loss, lower the rate, and call qk_clip.reset() to go on."
        )
    if kind is Error.UNOBSERVED:
        where = next(filter(None, (details.left_out.get(name) for name in wrong[kind])), "")
        if where:
            return f"QK-Clip observed no forward of {listed} since the last step: {not_observed(where)}"
        hint = next(filter(None, (details.hints.get(name) for name in wrong[kind])), "")
        return (
            f"QK-Clip observed no forward of {listed} since the last step or load_state_dict. Run the forward with "
            "gradients enabled before each step, with `max_logits=` handed to the attention where you declared it with "
            "one; without it a head could explode unseen." + hint
        )
    to = "" if details.tau is None else f" to {details.tau:g}"
    return (
        f"tau was lowered{to} after a forward that was observed for a larger one: some maxima of "
        f"{listed} between the two were not computed. Set tau before the forward, or call qk_clip.reset() and repeat "
        "it."
    )


def not_observed(where: str) -> str:
    """Say in which way a model ran that is not observed, and what to do."""
    return (
        f"the model ran {where}, where nothing is observed. If this step has gradients of it, a head could explode "
        "unseen: run a forward with the same batch outside, with gradients enabled, before each step."
    )


class DeferredErrors:
    """Errors of an accelerator, counted there and copied to the host after each step, without waiting for the copy.

    The counts only grow, on the device and in the copy; the host keeps the number that it has raised. So a copy that
    arrives late, or a replayed CUDA graph that copies without the host's knowledge, brings no error a second time.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        """The attentions that the rows count for."""
        self._counts = self._on_host = self._taken = torch.zeros(0, len(Error), dtype=torch.int64, device="cpu")
        self._copied: torch.cuda.Event | None = None

    def add(self, errors: Tensor, names: tuple[str, ...]) -> None:
        """Count the errors [attentions, kinds] of one step, other than 0 where there is one.

        Take what was counted for other attentions before: their counts end here.
        """
        if self.names != names or self._counts.device != errors.device:
            taken = torch.zeros(errors.shape, dtype=torch.int64, device="cpu")
            on_host = torch.zeros_like(taken, pin_memory=errors.device.type == "cuda")
            self._counts = taken.to(errors.device, copy=True)
            self._taken, self._on_host, self.names = taken, on_host, names  # behind what an interrupt may come into
        self._counts.add_(errors != 0)
        copy_to_host(self._on_host, self._counts)
        if errors.device.type == "cuda" and not is_capturing(errors.device):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def take(self, *, wait: bool, on_all_ranks: bool = False) -> Tensor | None:
        """Return the errors counted since they were last taken, by kind, or None.

        Without `wait`, only where some have reached the host by now. `on_all_ranks`: wait for what the last step has
        copied, so that all ranks take it at the same time.
        """
        capturing = is_capturing(self._counts.device)
        if on_all_ranks and self._copied is not None and not capturing:
            self._copied.synchronize()
        counts = (self._counts if wait else self._on_host).to("cpu", copy=True)
        if not bool((counts > self._taken).any()):
            return None
        if not capturing:  # an error stops the run in any case, so it may wait for those that follow it
            counts = self._counts.to("cpu", copy=True)
        new = counts > self._taken
        self._taken = counts
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copied": None}  # an event of the device; the counts themselves are there


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, in which the host must not wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def copy_to_host(host: Tensor, device: Tensor) -> None:
    """Start a copy into pinned memory, which arrives some time later."""
    host.copy_(device, non_blocking=True)
