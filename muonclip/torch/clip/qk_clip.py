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
from torch.distributed.fsdp import FSDPModule

from muonclip.core import ClipFactors, clip_factors
from muonclip.core.qk_clip import check_alpha, check_tau
from muonclip.torch.clip.errors import DeferredErrors
from muonclip.torch.clip.ranks import ClipRanks
from muonclip.torch.clip.reduction import UNKNOWN_ATTENTION, JointMaxima, constant, has_gradient, note_of
from muonclip.torch.clip.report import LayerReport, QKClipReport
from muonclip.torch.discover.monitor import NOTHING_FOUND, Watch
from muonclip.torch.heads.head_rows import HeadRows, scale_heads
from muonclip.torch.heads.qk_projection import QKProjection, declared_qk_projections
from muonclip.torch.logits.max_logits import MaxLogits
from muonclip.torch.mesh.wrappers import replicas_of, unwrap


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
    None; both are scaled. `process_group`: of all data-, context- and tensor-parallel ranks of this model; None: the
    ranks of the largest mesh on which its parameters lie, else those of its DistributedDataParallel, else all that have
    the same attentions with the same weights, which all ranks of the job compare at the first step. Every one of them
    must take each step.

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
        process_group: dist.ProcessGroup | None = None,
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
        self._deferred = DeferredErrors()  # [attentions, 3]: unobserved, non-finite, unknown
        self._unknown = ""
        self._ranks = ClipRanks(process_group)
        if not isinstance(model_or_projections, nn.Module):
            if declare or example_inputs is not None:
                raise ValueError("declare and example_inputs go with a model, but QKClip was given projections.")
            self.projections = _named_projections(model_or_projections)
            self.tau = tau
            return
        model, replicated = unwrap(model_or_projections)
        self._ranks = ClipRanks(process_group, replicas_of(replicated))
        self.projections.update(declared_qk_projections(model))
        for name, projection in (declare or {}).items():
            if name not in dict(model.named_modules()):
                raise ValueError(f"declare names {name!r}, which is no module of the model.")
            self.projections[name] = projection
        declared = bool(self.projections)
        self._watch = Watch(model, self.projections, self._ranks.look_around, clip_gains=clip_gains)
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

    @torch.no_grad()
    def measure(self, *, before_update: bool = False) -> dict[str, ClipFactors]:
        """The factors of this step by attention, from the maxima of all ranks. No weight is touched.

        `before_update`: the optimizer's step is still to come, with the gradients that it will use; an attention that
        has none will not move and may be unobserved, as long as another one is observed.
        """
        self.show_shards()
        group, device = self._group(), self._device()
        self.raise_deferred(wait=False, alike=group is not None)
        unknown = ""
        if self._watch is not None:
            if self._watch.removed:
                raise RuntimeError(f"QK-Clip observes nothing any more: {self._watch.removed}.")
            unknown = self._watch.settle()
        if not self.projections:
            if self.to_come == NOTHING_FOUND:
                raise RuntimeError(NOTHING_FOUND)
            raise RuntimeError(
                f"QK-Clip has seen no forward with an attention, and waits for {self.to_come}. Call the model that it "
                "was given, or a part of it, with gradients enabled before each step."
            )
        # All heads of all attentions in one vector: many small layers would cost many small operations.
        maxima = JointMaxima.of(self._states(), device)
        if group is not None:  # what is wrong on this rank only is raised behind the collective, where others wait
            notes = torch.full_like(maxima.observed, UNKNOWN_ATTENTION) if unknown else self._notes()
            maxima = maxima.over(group, notes)
        if unknown and (group is None or _may_wait_for(device)):
            raise RuntimeError(unknown)
        self._unknown = unknown  # raised with what the other ranks raise
        self._check(maxima, before_update)
        sizes = maxima.sizes
        seen, bound = maxima.maximum, torch.maximum(maxima.bound, maxima.maximum)
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
            left_alone = constant(tuple(keeps), torch.bool, device)
            factors = ClipFactors(*(factor.masked_fill(left_alone, 1.0) for factor in factors))
        seen = torch.where(exact, seen, math.nan)
        each = zip(*(vector.split(sizes) for vector in (seen, factors.gamma, exact, bound)), strict=True)
        self._last = {name: LayerReport(*layer) for name, layer in zip(self.projections, each, strict=True)}
        split = zip(*(vector.split(sizes) for vector in factors), strict=True)
        return {name: ClipFactors(*layer) for name, layer in zip(self.projections, split, strict=True)}

    @torch.no_grad()
    def apply(self, factors: Mapping[str, ClipFactors]) -> None:
        """Scale the rows by the factors that `measure()` gave, and forget the observation. Each rank scales the rows
        that it has, without communication."""
        self.show_shards()
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

    def raise_deferred(self, *, wait: bool, alike: bool = False) -> None:
        """Raise what an accelerator's step could not; without `wait`, only what has reached the host by now. `alike`:
        what the last step has copied, so that all ranks raise at the same time."""
        errors = self._deferred.take(wait=wait, alike=alike)
        if errors is not None:
            self._raise(errors)

    def _scale(self, parts: tuple[HeadRows, ...], factors: Tensor) -> None:
        for rows in parts:
            for parameter, axis in rows.parameters():
                master = self.master_of(parameter) if self.master_of else None
                for weight in (parameter,) if master is None else (parameter, master):
                    scale_heads(rows, weight, axis, factors.to(weight.device))

    def has_nothing_to_do(self) -> bool:
        """Whether nothing was observed, or no query or key has a gradient other than zero, on no rank; waits for the
        device. All ranks must call it."""
        if self._watch is not None and self._watch.removed:
            return False
        self.show_shards()
        parameters = [p for projection in self.projections.values() for p in projection.qk_parameters()]
        observed = any(bool(state.observed) for state in self._states())
        moves = any(map(has_gradient, parameters)) or not parameters
        group = self._group()
        if group is not None:
            both = torch.tensor([observed, moves], dtype=torch.float32, device="cpu").to(self._device())
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
            observed, moves = map(bool, both.tolist())
        return not (observed and moves)

    def show_shards(self) -> None:
        """After a forward FSDP may still have whole weights in the place of the shards that the optimizer updates."""
        if self._watch is not None:
            for module in self._watch.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _group(self) -> dist.ProcessGroup | None:
        """Of the ranks that clip together; None for this one alone."""
        if self._watch is not None:
            return self._ranks.group(self._watch.model.parameters(), self.projections)
        parts = [rows for projection in self.projections.values() for _, rows in projection.parts()]
        return self._ranks.group((p for rows in parts for p in rows.module.parameters()), self.projections)

    def _notes(self) -> Tensor:
        return torch.stack([note_of(projection, self._device()) for projection in self.projections.values()])

    def _check(self, maxima: JointMaxima, before_update: bool) -> None:
        """Raise, on all ranks alike, or leave for later what an accelerator must not be waited for."""
        fine = maxima.observed.all() & ~maxima.nonfinite.any()
        if maxima.notes is None:
            if _may_wait_for(maxima.maximum.device) and bool(fine):
                return
            maxima = maxima.with_notes(self._notes())
        trains = [projection.trains() for projection in self.projections.values()]
        errors = maxima.errors(trains, before_update=before_update)
        if not _may_wait_for(errors.device):
            self._deferred.add(errors)
        elif bool(errors.any()):
            self._raise(errors, maxima.nonfinite)

    def _raise(self, errors: Tensor, nonfinite_heads: Tensor | None = None) -> None:
        unobserved, nonfinite, unknown = (
            [name for name, wrong in zip(self.projections, column, strict=True) if wrong]
            for column in errors.T.tolist()
        )
        if unknown:
            raise RuntimeError(
                self._unknown
                or "QK-Clip: on another rank attention was called by modules that no rehearsal saw call it; see there."
            )
        if nonfinite:
            states = self._states()
            if nonfinite_heads is None:
                nonfinite_heads = torch.cat([state.nonfinite.to(errors.device) for state in states])
            each = nonfinite_heads.split([state.num_heads for state in states])
            heads = {name: own.nonzero().flatten().tolist() for name, own in zip(self.projections, each, strict=True)}
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
        if self._watch is not None:  # that has found no attention yet
            for parameter in self._watch.model.parameters():
                return parameter.device
        return torch.device("cpu")


def _clips(projection: QKProjection) -> bool:
    """Whether there is something to scale."""
    return bool(projection.scaled_parts()) and projection.trains()


def _may_wait_for(device: torch.device) -> bool:
    """Whether reading a value stalls nobody; on an accelerator it would drain the queue of kernels."""
    return device.type == "cpu"


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
