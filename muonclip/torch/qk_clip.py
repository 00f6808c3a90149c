"""QK-Clip: after the optimizer's step, heads whose maximum logit passed τ have their query and key rows rescaled.

Kimi K2, arXiv 2507.20534, Algorithm 1, lines 8–14; the factors are `muonclip.core.clip_factors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip.core import ClipFactors, clip_factors
from muonclip.core.qk_clip import check_alpha, check_tau
from muonclip.torch.attention import HeadRows, QKProjection, find_qk_projections, scale_heads
from muonclip.torch.max_logits import MaxLogits


@dataclass(frozen=True, slots=True, eq=False)
class LayerReport:
    """One attention in the last step; every field [heads].

    `max_logits`: the largest finite logit seen (−inf: none). `gamma`: the factor its logits were scaled by.
    `exact`: whether `max_logits` is the maximum itself. `bound`: what the maximum cannot exceed.
    """

    max_logits: Tensor
    gamma: Tensor
    exact: Tensor
    bound: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QKClipReport:
    """What the last `QKClip.step()` saw and did; `layers` by module name."""

    tau: float
    layers: dict[str, LayerReport]

    @property
    def max_logit(self) -> float:
        """The largest maximum over all layers and heads; −inf before the first step."""
        return max((layer.max_logits.max().item() for layer in self.layers.values()), default=-math.inf)

    @property
    def clipped_heads(self) -> int:
        """How many heads were rescaled."""
        return sum(int((layer.gamma < 1).sum()) for layer in self.layers.values())

    def __str__(self) -> str:
        total = sum(layer.gamma.numel() for layer in self.layers.values())
        lines = [f"QK-Clip: {self.clipped_heads} of {total} heads clipped at tau = {self.tau:g}"]
        for name, layer in self.layers.items():
            logits = " ".join(f"{value:8.2f}" for value in layer.max_logits.tolist())
            gammas = " ".join(f"{value:8.3f}" for value in layer.gamma.tolist())
            lines += [f"  {name}", f"    max logit {logits}", f"    gamma     {gammas}"]
        return "\n".join(lines)


class QKClip:
    """The clip alone, after any optimizer.

        clip = QKClip(model, tau=100.0)
        loss.backward(); optimizer.step(); clip.step()

    If the optimizer's step was skipped, skip `clip.step()` too: the observation stays for the next one.

    model_or_projections: a model whose attentions declare themselves (see `QKProjection`), or the projections, by
    name or in a sequence. `tau`: the largest logit a head may keep; infinity measures and never clips. `alpha`: the
    query's share of γ where query and key are private to the head. `observe`: "always" measures every maximum exactly;
    "needed" allows a head to be certified by a bound instead, which no source here does yet. `master_of`: for engines
    that keep an fp32 master copy of a low-precision parameter, parameter → master or None; both are scaled.

    Raises ValueError for wrong arguments and for a model whose attention is not understood.
    """

    def __init__(
        self,
        model_or_projections: nn.Module | Mapping[str, QKProjection] | Iterable[QKProjection],
        tau: float = 100.0,
        alpha: float = 0.5,
        observe: Literal["needed", "always"] = "always",
        *,
        master_of: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        self.tau = check_tau(tau)
        self.alpha = check_alpha(alpha)
        if observe not in ("needed", "always"):
            raise ValueError(f"observe={observe!r}; use 'needed' or 'always'.")
        self.observe = observe
        self.projections = _named_projections(model_or_projections)
        self.master_of = master_of
        self._last: dict[str, LayerReport] = {}
        # [attentions, 2]: unobserved, non-finite; kept on a device that must not be waited for, a copy on its way here.
        self._errors = self._errors_on_host = torch.zeros(len(self.projections), 2, device="cpu")

    def step(self) -> None:
        """Scale the heads above τ, then forget the observation.

        Raises RuntimeError, before any weight is touched, where a trained attention was not observed since the last
        step or saw a non-finite logit. An accelerator is not made to wait for that: there such a head keeps its
        weights and the error comes at the next `step()`, `report()` or `state_dict()` of the optimizer.
        """
        self.apply(self.measure())

    def measure(self, *, before_update: bool = False) -> dict[str, ClipFactors]:
        """The factors of this step by attention, from the maxima of all ranks. No weight is touched.

        `before_update`: the optimizer's step is still to come, with the gradients that it will use; an attention that
        has none will not move and may be unobserved, as long as another one is observed.
        """
        self.raise_deferred(wait=False)
        _reduce_over_ranks([projection.max_logits for projection in self.projections.values()], self._device())
        self._check(before_update)
        factors: dict[str, ClipFactors] = {}
        for name, projection in self.projections.items():
            seen = projection.max_logits.maximum.clone()
            tau = self.tau if projection.scaled_parts() and projection.trains() else math.inf
            factors[name] = clip_factors(seen, tau, self.alpha, xp=torch)
            exact = torch.ones_like(seen, dtype=torch.bool)
            self._last[name] = LayerReport(max_logits=seen, gamma=factors[name].gamma, exact=exact, bound=seen)
        return factors

    def apply(self, factors: Mapping[str, ClipFactors]) -> None:
        """Scale the rows by the factors that `measure()` gave, and forget the observation."""
        for name, factor in factors.items():
            projection = self.projections[name]
            if not projection.scaled_parts() or not projection.trains():
                continue
            if _may_wait_for(factor.gamma.device) and not bool((factor.gamma < 1).any()):
                continue
            self._scale(projection.query, factor.query)
            self._scale(projection.key, factor.key)
            self._scale(projection.query_facing_shared, factor.gamma)
        self.reset()

    def reset(self) -> None:
        """Forget what was observed since the last step."""
        for projection in self.projections.values():
            projection.max_logits.reset()

    def report(self) -> QKClipReport:
        """What the last `step()` saw and did. Waits for the device, and raises the errors it deferred."""
        self.raise_deferred(wait=True)
        return QKClipReport(self.tau, dict(self._last))

    def raise_deferred(self, *, wait: bool) -> None:
        """Raise what an accelerator's step could not; without `wait`, only what has reached the host by now."""
        errors = (self._errors.cpu() if wait else self._errors_on_host).clone()
        if bool(errors.any()):
            self._errors.zero_()
            self._errors_on_host.zero_()
            self._raise(errors)

    def _scale(self, parts: tuple[HeadRows, ...], factors: Tensor) -> None:
        for rows in parts:
            for parameter, axis in rows.parameters():
                master = self.master_of(parameter) if self.master_of else None
                for weight in (parameter,) if master is None else (parameter, master):
                    scale_heads(rows, weight, axis, factors.to(weight.device))

    def has_nothing_to_do(self) -> bool:
        """Whether nothing was observed, or no query or key has a gradient other than zero; waits for the device."""
        if not any(bool(projection.max_logits.observed) for projection in self.projections.values()):
            return True
        parameters = [p for projection in self.projections.values() for p in projection.qk_parameters()]
        return not any(p.grad is not None and bool(p.grad.any()) for p in parameters)

    def _check(self, before_update: bool) -> None:
        projections, device = self.projections.values(), self._device()
        errors = torch.stack([_errors(projection).to(device) for projection in projections])
        if before_update:
            moves = [any(p.grad is not None for p in projection.qk_parameters()) for projection in projections]
            nothing_seen = torch.stack([p.max_logits.observed.to(device) for p in projections]).max() == 0
            errors[:, 0] *= nothing_seen | torch.tensor(moves).to(device, non_blocking=True)
        if _may_wait_for(errors.device):
            if bool(errors.any()):
                self._raise(errors)
            return
        if self._errors_on_host is self._errors:
            self._errors = self._errors.to(errors.device)
            self._errors_on_host = torch.zeros_like(errors, device="cpu", pin_memory=errors.device.type == "cuda")
        self._errors.copy_(torch.maximum(self._errors, errors))
        self._errors_on_host.copy_(self._errors, non_blocking=True)

    def _raise(self, errors: Tensor) -> None:
        unobserved = [name for name, seen in zip(self.projections, errors[:, 0].tolist(), strict=True) if seen]
        nonfinite = [name for name, seen in zip(self.projections, errors[:, 1].tolist(), strict=True) if seen]
        if nonfinite:
            heads = {
                name: self.projections[name].max_logits.nonfinite.nonzero().flatten().tolist() for name in nonfinite
            }
            where = ", ".join(
                (name or "the model") + (f" (heads {heads[name]})" if heads[name] else "") for name in nonfinite
            )
            raise RuntimeError(
                f"QK-Clip saw non-finite attention logits in {where}. No factor can be taken from them and none was. "
                "Skip the step as for a non-finite loss, lower the rate, and call qk_clip.reset() to go on."
            )
        raise RuntimeError(
            f"QK-Clip observed no forward of {', '.join(name or 'the model' for name in unobserved)} since the last "
            "step. Run the forward with gradients enabled and `max_logits=` handed to its attention before each step; "
            "without it a head could explode unseen."
        )

    def _device(self) -> torch.device:
        for projection in self.projections.values():
            for parameter in projection.qk_parameters():
                return parameter.device
        return torch.device("cpu")


def _may_wait_for(device: torch.device) -> bool:
    """Whether reading a value stalls nobody; on an accelerator it would drain the queue of kernels."""
    return device.type == "cpu"


def _errors(projection: QKProjection) -> Tensor:
    """fp32 [2]: whether a needed observation is missing, and whether a non-finite logit was seen in this step.

    A GradScaler skips the step when the gradients are not finite, and a non-finite logit makes them so. One seen
    beside finite gradients is therefore left from a step that was skipped, and no error of this one.
    """
    state = projection.max_logits
    missing = state.observed == 0 if projection.trains() else torch.zeros_like(state.observed, dtype=torch.bool)
    nonfinite = state.nonfinite.any()
    if not _may_wait_for(nonfinite.device) or bool(nonfinite):
        nonfinite = nonfinite & ~_gradients_are_finite(projection).to(nonfinite.device)
    return torch.stack((missing, nonfinite)).float()


def _gradients_are_finite(projection: QKProjection) -> Tensor:
    parameters = projection.qk_parameters()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:  # there is nothing to scale, or nobody has asked for gradients yet
        return torch.tensor(not parameters)
    return torch.stack([gradient.sum(dtype=torch.float32).isfinite() for gradient in gradients]).all()


def _reduce_over_ranks(states: list[MaxLogits], device: torch.device) -> None:
    """One packed MAX all-reduce over all ranks; a maximum of maxima is exact, so order and repetition do not matter."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    packed = torch.cat([state.packed.to(device) for state in states])
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    for state, reduced in zip(states, packed.split([state.packed.numel() for state in states]), strict=True):
        state.packed = state.packed.to(device)
        state.packed.copy_(reduced)


def _named_projections(
    model_or_projections: nn.Module | Mapping[str, QKProjection] | Iterable[QKProjection],
) -> dict[str, QKProjection]:
    if isinstance(model_or_projections, nn.Module):
        return find_qk_projections(model_or_projections)
    if isinstance(model_or_projections, Mapping):
        named = list(cast("Mapping[str, object]", model_or_projections).items())
    else:
        named = [(str(index), projection) for index, projection in enumerate(model_or_projections)]
    projections = {name: projection for name, projection in named if isinstance(projection, QKProjection)}
    wrong = [name for name, _ in named if name not in projections]
    if wrong or not named:
        raise ValueError(
            "QKClip needs a model or QKProjections"
            + (f"; {len(wrong)} of the items, {wrong[0]!r} first, are neither." if wrong else "; it got none.")
            + " To clip a model's parameters, pass the model itself, not model.parameters()."
        )
    return projections
