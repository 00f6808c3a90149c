"""QK-Clip: after the optimizer's step, heads whose maximum logit passed τ have their query and key rows rescaled.

Kimi K2, arXiv 2507.20534, Algorithm 1, lines 8–14; the factors are `muonclip.core.clip_factors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from muonclip.core import ClipFactors, clip_factors
from muonclip.core.qk_clip import check_alpha, check_tau
from muonclip.torch.attention import HeadRows, QKProjection, declared_qk_projections, scale_heads
from muonclip.torch.max_logits import MaxLogits
from muonclip.torch.qk_clip_report import LayerReport, QKClipReport
from muonclip.torch.watch import NOTHING_FOUND, Watch


class QKClip:
    """The clip alone, after any optimizer.

        clip = QKClip(model, tau=100.0)
        loss.backward(); optimizer.step(); clip.step()

    If the optimizer's step was skipped, skip `clip.step()` too: the observation stays for the next one.

    model_or_projections: a model, in which the attentions are found (or that declare themselves, see `QKProjection`);
    or projections, by name or in a sequence, whose statistics you fill. `tau`: the largest logit a head may keep;
    infinity measures, always, and never clips. `alpha`: the query's share of γ where query and key are private to the
    head. `observe`: "needed" computes a maximum only where no bound shows that it is at most τ; "always" computes
    every one. `declare`: projections of attentions in the model, by module name, in the place of what would be
    found. `example_inputs`: what the model can be called with, a tensor, a tuple or a dict of keyword arguments; to
    find its attentions now, which `torch.compile` needs. `clip_gains`: after a QK-norm with a gain per head, scale the
    gain. `master_of`: for engines that keep an fp32 master copy of a low-precision parameter, parameter → master or
    None; both are scaled.

    A second QKClip on a model takes the place of the first. Raises ValueError for wrong arguments and for attention
    that is not understood, here or in the first forward.
    """

    def __init__(
        self,
        model_or_projections: nn.Module | Mapping[str, QKProjection] | Iterable[QKProjection],
        tau: float = 100.0,
        alpha: float = 0.5,
        observe: Literal["needed", "always"] = "needed",
        *,
        declare: Mapping[str, QKProjection] | None = None,
        example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
        clip_gains: bool = False,
        master_of: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        self._tau = check_tau(tau)
        self.alpha = check_alpha(alpha)
        if observe not in ("needed", "always"):
            raise ValueError(f"observe={observe!r}; use 'needed' or 'always'.")
        self.observe = observe
        self.master_of = master_of
        self.projections: dict[str, QKProjection] = {}
        self._watch: Watch | None = None
        self._steps = torch.zeros(2, dtype=torch.int64, device="cpu")  # taken; and the last that rescaled a head
        self._last: dict[str, LayerReport] = {}
        # [attentions, 2]: unobserved, non-finite; kept on a device that must not be waited for, a copy on its way here.
        self._errors = self._errors_on_host = torch.zeros(0, 2, device="cpu")
        if not isinstance(model_or_projections, nn.Module):
            if declare or example_inputs is not None:
                raise ValueError("declare and example_inputs go with a model, but QKClip was given projections.")
            self.projections = _named_projections(model_or_projections)
            self.tau = tau
            return
        model = _unwrapped(model_or_projections)
        self.projections.update(declared_qk_projections(model))
        for name, projection in (declare or {}).items():
            if name not in dict(model.named_modules()):
                raise ValueError(f"declare names {name!r}, which is no module of the model.")
            self.projections[name] = projection
        declared = bool(self.projections)
        self._watch = Watch(model, self.projections, clip_gains=clip_gains)
        self.tau = tau
        if example_inputs is not None:
            args, kwargs = _arguments(example_inputs)
            self._watch.look(args, kwargs)
            if not self.projections:
                raise ValueError(NOTHING_FOUND)
        elif not declared:
            self._watch.look_ahead()

    @property
    def tau(self) -> float:
        """The largest logit a head may keep; may be set between steps."""
        return self._tau

    @tau.setter
    def tau(self, tau: float) -> None:
        self._tau = check_tau(tau)
        # Without a finite τ nothing needs a maximum; who asks for that wants to see them.
        threshold = tau if self.observe == "needed" and tau < math.inf else -math.inf
        if self._watch is not None:
            self._watch.threshold = threshold
        for projection in self.projections.values():
            projection.max_logits.threshold = threshold

    @property
    def version(self) -> int:
        """Grows with every attention found."""
        return 0 if self._watch is None else self._watch.version

    @property
    def to_come(self) -> str:
        """What the search for attention waits for; "" when it is over."""
        return "" if self._watch is None else self._watch.to_come

    def sources(self) -> dict[str, str]:
        """Where the maxima of each attention come from, by name."""
        sites = {} if self._watch is None else self._watch.sites
        via = {id(p.max_logits): site.via for site in sites.values() for p in site.projections}
        return {
            name: _source(via.get(id(p.max_logits), "declared"), p, self.observe)
            for name, p in self.projections.items()
        }

    def remove(self) -> None:
        """Take the observers off the model, which is then as it was before. Happens by itself when this QKClip and its
        optimizer are gone."""
        if self._watch is not None:
            self._watch.remove("it was removed")

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
        if self._watch is not None:
            if self._watch.removed:
                raise RuntimeError(f"QK-Clip observes nothing any more: {self._watch.removed}.")
            self._watch.settle()
        if not self.projections:
            if self.to_come == NOTHING_FOUND:
                raise RuntimeError(NOTHING_FOUND)
            raise RuntimeError(
                f"QK-Clip has seen no forward with an attention, and waits for {self.to_come}. Call the model that it "
                "was given, or a part of it, with gradients enabled before each step."
            )
        _reduce_over_ranks(self._states(), self._device())
        self._check(before_update)
        # All heads of all attentions in one vector: many small layers would cost many small operations.
        states, device = self._states(), self._device()
        sizes = [state.num_heads for state in states]
        seen = torch.cat([state.maximum.to(device) for state in states])
        bound = torch.maximum(torch.cat([state.bound.to(device) for state in states]), seen)
        exact = bound <= seen
        if _may_wait_for(device) and bool((bound > torch.clamp(seen, min=self.tau)).any()):
            raise RuntimeError(
                f"tau was lowered to {self.tau:g} after a forward that was observed for a larger one: some maxima "
                "between the two were not computed. Set tau before the forward, or call qk_clip.reset() and repeat it."
            )
        factors = clip_factors(seen, self.tau, self.alpha, xp=torch)
        keeps = [
            not _clips(projection) for projection in self.projections.values() for _ in range(projection.num_heads)
        ]
        if any(keeps):
            left_alone = torch.tensor(keeps).to(device, non_blocking=True)
            factors = ClipFactors(*(factor.masked_fill(left_alone, 1.0) for factor in factors))
        seen = torch.where(exact, seen, math.nan)
        each = zip(*(vector.split(sizes) for vector in (seen, factors.gamma, exact, bound)), strict=True)
        self._last = {name: LayerReport(*layer) for name, layer in zip(self.projections, each, strict=True)}
        split = zip(*(vector.split(sizes) for vector in factors), strict=True)
        return {name: ClipFactors(*layer) for name, layer in zip(self.projections, split, strict=True)}

    def apply(self, factors: Mapping[str, ClipFactors]) -> None:
        """Scale the rows by the factors that `measure()` gave, and forget the observation."""
        device = self._device()
        gamma = torch.cat([factor.gamma.to(device) for factor in factors.values()])
        self._count((gamma < 1).any())
        if not _may_wait_for(device) or bool((gamma < 1).any()):
            for name, factor in factors.items():
                projection = self.projections[name]
                if not _clips(projection) or (_may_wait_for(device) and not bool((factor.gamma < 1).any())):
                    continue
                self._scale(projection.query, factor.query)
                self._scale(projection.key, factor.key)
                self._scale(projection.query_facing_shared, factor.gamma)
        self.reset()

    def _count(self, clipped: Tensor) -> None:
        """In place and without waiting, so that a replayed CUDA graph counts as well."""
        if self._steps.device != clipped.device:
            self._steps = self._steps.to(clipped.device)
        taken, last = self._steps[:1], self._steps[1:]
        taken += 1
        last.copy_(torch.where(clipped, taken, last))

    def _states(self) -> list[MaxLogits]:
        return [projection.max_logits for projection in self.projections.values()]

    def reset(self) -> None:
        """Forget what was observed since the last step."""
        for state in self._states():
            state.reset()

    def report(self) -> QKClipReport:
        """What the last `step()` saw and did. Waits for the device, and raises the errors it deferred."""
        self.raise_deferred(wait=True)
        return QKClipReport(self.tau, dict(self._last), *self._steps.tolist())

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
        if self._watch is not None and self._watch.removed:
            return False
        if not any(bool(projection.max_logits.observed) for projection in self.projections.values()):
            return True
        parameters = [p for projection in self.projections.values() for p in projection.qk_parameters()]
        return bool(parameters) and not any(p.grad is not None and bool(p.grad.any()) for p in parameters)

    def _check(self, before_update: bool) -> None:
        projections, states, device = list(self.projections.values()), self._states(), self._device()
        observed = torch.stack([state.observed.to(device) for state in states]) > 0
        nonfinite = torch.cat([state.nonfinite.to(device) for state in states]).any()
        if _may_wait_for(device) and bool(observed.all()) and not bool(nonfinite):
            return
        errors = torch.stack([_errors(projection).to(device) for projection in projections])
        if before_update:
            moves = [any(p.grad is not None for p in projection.qk_parameters()) for projection in projections]
            errors[:, 0] *= ~observed.any() | torch.tensor(moves).to(device, non_blocking=True)
        if _may_wait_for(errors.device):
            if bool(errors.any()):
                self._raise(errors)
            return
        if self._errors_on_host is self._errors or self._errors.shape != errors.shape:
            self._errors = torch.zeros_like(errors, device="cpu")
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
            "without it a head could explode unseen." + self._hint(unobserved)
        )

    def _hint(self, unobserved: list[str]) -> str:
        sources = self.sources()
        if any(sources[name].startswith(_SOURCES["written out"]) for name in unobserved):
            return (
                " This attention is written out as a product and a softmax, which cannot be followed in code that "
                "torch.compile made: let it call scaled_dot_product_attention or muonclip.torch.attention."
            )
        return ""

    def _device(self) -> torch.device:
        for projection in self.projections.values():
            for parameter in projection.qk_parameters():
                return parameter.device
        return torch.device("cpu")


def _clips(projection: QKProjection) -> bool:
    """Whether there is something to scale."""
    return bool(projection.scaled_parts()) and projection.trains()


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


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what torch wraps around a whole model."""
    while isinstance(model, DistributedDataParallel | OptimizedModule):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def _arguments(inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


_SOURCES = {
    "sdpa": "scaled_dot_product_attention",
    "flex": "FlexAttention",
    "interface": "Hugging Face attention interface",
    "written out": "product and softmax",
    "declared": "declared",
}


def _source(via: str, projection: QKProjection, observe: str) -> str:
    device = next((p.device.type for p in projection.qk_parameters()), "cpu")
    if device == "cuda":
        how = "max_scores of the kernel" if via == "flex" else "norm bound, then tiles"
    elif device == "cpu":
        how = (
            "row LSE or norm bound, then exact rows" if via in ("sdpa", "declared") else "norm bound, then exact tiles"
        )
    else:
        how = "exact tiles"
    return f"{_SOURCES[via]}: {how}" + (", always" if observe == "always" else "")


def _named_projections(
    model_or_projections: Mapping[str, QKProjection] | Iterable[QKProjection],
) -> dict[str, QKProjection]:
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
