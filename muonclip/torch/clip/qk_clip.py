"""QK-Clip: after the optimizer's step, the query and key rows of heads whose maximum logit exceeded τ are rescaled.

Kimi K2, arXiv 2507.20534, Algorithm 1, lines 8–14; the factors are `muonclip.core.clip_factors`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from muonclip.core import ClipFactors
from muonclip.core.arguments import check_choice, check_flag, check_kind, check_whole, shown
from muonclip.core.qk_clip import DEFAULT_TAU, check_alpha
from muonclip.core.tau_rules import Tau, check_patterns, check_tau_rules, is_by_name, varies
from muonclip.torch.clip.agreement import Facts, check_agreement
from muonclip.torch.clip.attach import Attachment, attach_to
from muonclip.torch.clip.attentions import ClipAttentions, attentions_of_model, given_attentions
from muonclip.torch.clip.errors import DeferredErrors, Details, is_capturing, message, not_observed
from muonclip.torch.clip.frozen import FrozenWarning
from muonclip.torch.clip.optimizer_steps import OPTIMIZER_STEPS
from muonclip.torch.clip.ranks import ClipRanks
from muonclip.torch.clip.reduction import UNKNOWN_ATTENTION, JointMaxima, has_gradient, note_of
from muonclip.torch.clip.report import LayerReport, QKClipReport, StepCount
from muonclip.torch.clip.rescaling import decide, scale
from muonclip.torch.clip.returned_weights import ReturnedWeights
from muonclip.torch.clip.second_copies import SecondCopies, unnamed_copies
from muonclip.torch.clip.sources import describe
from muonclip.torch.clip.stuck_heads import StuckHeads
from muonclip.torch.clip.thresholds import Thresholds
from muonclip.torch.heads import QKProjection
from muonclip.torch.logits import Unobservable
from muonclip.torch.mesh import check_engine, replicas_of, unwrap


class QKClip:
    """The clip alone, after any optimizer.

        clip = QKClip(model, tau=100.0)
        loss.backward(); optimizer.step(); clip.step()

    If the optimizer's step was skipped, skip `clip.step()` too: the observation stays for the next one.
    `clip.attach(optimizer)` lets every `optimizer.step()` do both. A second QKClip on a model replaces the first.

    Args:
        model_or_projections: A model, in which the attentions are found (or that declare themselves, see
            `QKProjection`); or projections, by name or in a sequence, whose statistics you fill.
        tau: The largest logit a head may keep, after the softmax scale; infinity measures, always, and never clips.
            Or a function of the step, 0 at the first; or a dict with either for each pattern of attentions' names, of
            which the first that fits counts, `tau={"vision.*": 50.0, "*": 100.0}`.
        alpha: The query's share of γ where query and key are private to the head, from 0 to 1.
        observe: "needed" computes a maximum only where no bound shows that it is at most τ; "always" computes every
            one.
        clip_frozen: Scale frozen weights with the trained ones, as of a LoRA's base and adapter; `MuonClip.plan` lists
            those to save. By default a weight with `requires_grad=False` is never changed: the other side of its heads
            takes all of γ where all weights of that side are trained; else those above τ are reported and not clipped.
        ignore: Names of modules, or patterns as `"decoder.*.attn"`, whose attention is left alone: it is not clipped,
            and no error where it is not understood.
        declare: Projections of attentions in the model, by module name, instead of what would be found.
        example_inputs: What the model can be called with, a tensor, a tuple or a dict of keyword arguments; with them
            the attentions are found now, which `torch.compile` needs.
        clip_gains: After a QK-norm with a gain per head, scale the gain.
        required: No attention is an error. False trains a model in which a search sees none, and nothing that mixes
            activations by products of two projections, with one warning.
        master_of: For engines that keep a second copy of the weights where the clip cannot find it, parameter → copy or
            None; both are scaled. Those in the state of an optimizer are known by their names.
        process_group: Of all data-, context- and tensor-parallel ranks of this model; None: the ranks of the largest
            mesh on which its parameters are, else those of its DistributedDataParallel, else all that have the same
            attentions with the same weights, which all ranks of the job compare at the first step. Every one of them
            must take each step.

    Raises:
        ValueError: For wrong arguments and for attention that is not understood, here or in the first forward.
    """

    attentions: ClipAttentions
    """The attentions that are clipped: `projections` by name, and a `version` that grows with each found."""

    def __init__(
        self,
        model_or_projections: nn.Module | Mapping[str, QKProjection] | Iterable[QKProjection],
        tau: Tau = DEFAULT_TAU,
        alpha: float = 0.5,
        observe: Literal["needed", "always"] = "needed",
        *,
        clip_frozen: bool = False,
        ignore: Collection[str] = (),
        declare: Mapping[str, QKProjection] | None = None,
        example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
        clip_gains: bool = False,
        required: bool = True,
        master_of: Callable[[Tensor], Tensor | None] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_tau_rules(tau)
        self.alpha = check_alpha(alpha)
        check_choice("observe", observe, "needed", "always")
        self._thresholds = Thresholds(tau, always=observe == "always")
        check_flag("clip_frozen", clip_frozen)
        check_flag("clip_gains", clip_gains)
        check_flag("required", required)
        if example_inputs is not None:
            check_kind("example_inputs", example_inputs, (Tensor, tuple, Mapping), _INPUTS)
        if process_group is not None:
            check_kind("process_group", process_group, dist.ProcessGroup, "a process group, or None")
        if master_of is not None and not callable(master_of):
            raise TypeError(f"master_of={shown(master_of)}; give a function of a parameter, or None.")
        if declare is not None:
            check_kind("declare", declare, Mapping, "a dict with a QKProjection for each name of a module")
        self.observe = observe
        self.clip_frozen = clip_frozen
        self.master_of = master_of
        self._steps = StepCount()
        self._deferred = DeferredErrors()
        self._frozen_warning = FrozenWarning()
        self._stuck = StuckHeads()
        self._returned = ReturnedWeights(_unnamed_copies)
        OPTIMIZER_STEPS.listen(self._returned)
        self._left_out: dict[str, Unobservable] = {}  # why forwards of the last step were not observed
        self._warned_of_left_out = False
        self._unknown = ""  # what is wrong on this rank with attention that nobody observed
        self.last_layers: dict[str, LayerReport] = {}
        """What the last step saw and did, still on the device; `report` waits for it."""
        self._last_taus: dict[str, float] = {}  # of the last step, by name
        if isinstance(model_or_projections, nn.Module):
            check_engine(model_or_projections)
            model, replicated = unwrap(model_or_projections)
            self._ranks = ClipRanks(process_group, replicas_of(replicated))
            self.attentions = attentions_of_model(
                model, declare or {}, example_inputs, self._ranks.find_replicas,
                thresholds=self._thresholds, clip_gains=clip_gains, ignore=ignore, required=required,
            )  # fmt: skip
            return
        if declare or ignore or example_inputs is not None:
            raise ValueError("declare, ignore and example_inputs go with a model, but QKClip was given projections.")
        self._ranks = ClipRanks(process_group)
        self.attentions = given_attentions(model_or_projections)
        check_patterns(tau, self.attentions.names())
        self.attentions.set_thresholds(self._thresholds)

    @property
    def tau(self) -> Tau:
        """The largest logit a head may keep, as it was given; may be set between steps."""
        return self._thresholds.tau

    @tau.setter
    def tau(self, tau: Tau) -> None:
        check_tau_rules(tau)
        check_patterns(tau, self.attentions.names())
        self._set_thresholds(replace(self._thresholds, tau=tau))

    def tau_of(self, name: str) -> float:
        """Return τ of an attention in the next step.

        Args:
            name: The name of its module.
        """
        return self._thresholds.of(name)

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next step, which a τ that is a function depends on. `MuonClip` saves it itself."""
        return {"step": self._thresholds.step}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on at the step of a state.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: For a number that is not a step.
        """
        step = check_whole("step", state_dict.get("step"), 0)
        self._set_thresholds(replace(self._thresholds, step=step))

    def _set_thresholds(self, thresholds: Thresholds) -> None:
        self.attentions.set_thresholds(thresholds)
        self._thresholds = thresholds

    @property
    def projections(self) -> dict[str, QKProjection]:
        """The attentions by name, as far as they are known."""
        return self.attentions.projections

    def sources(self) -> dict[str, str]:
        """Return where the maxima of each attention come from, by name."""
        return {
            name: describe(kernel, self.projections[name], self.observe)
            for name, kernel in self.attentions.kernels().items()
        }

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Clip after each step of an optimizer, by torch's own step hooks; returns what `remove()` ends that with.

            clip = QKClip(model)
            clip.attach(torch.optim.AdamW(model.parameters()))

        Errors are raised before the optimizer has changed a weight. A step that a GradScaler skips is skipped here,
        too. Second copies of the weights that the optimizer, or one that it wraps, is known to keep are scaled with
        them.

        Args:
            optimizer: Any of torch that updates the model, or a wrapper around one.

        Raises:
            ValueError: For a `MuonClip`, which clips by itself, and where no steps run hooks.
        """
        return attach_to(self, optimizer)

    def remove(self) -> None:
        """Take the observers off the model, which is then as it was before.

        Happens by itself when this QKClip and its optimizer are gone.
        """
        self.attentions.remove()

    def step(self) -> None:
        """Scale the heads above τ, then forget the observation. Call it before the gradients are discarded.

        The host does not wait for an accelerator to learn of what is wrong: there such a head keeps its weights and the
        error is raised by the next `step()`, `report()` or `state_dict()` of the optimizer.

        Raises:
            RuntimeError: Before any weight is changed, where a trained attention has a gradient and was not observed
                since the last step, or saw a non-finite logit.
        """
        self.attentions.refresh()
        factors = self._measure(before_update=False)
        self._returned.before_clip_by_hand()
        self.after_update(factors)

    @torch.no_grad()
    def before_update(
        self, *, idle: bool = False, options: Callable[[], Facts] | None = None
    ) -> dict[str, ClipFactors]:
        """Return the factors of this step by attention, before the optimizer changes a weight.

        The maxima are those of all ranks, the gradients those that the optimizer will use. An attention that has no
        gradient, or one of zero, was not run and may be unobserved, if the model ran with gradients or another one was
        observed.

        Args:
            idle: The optimizer's rates are 0, as in the step by which checkpoint libraries make its state; the result
                is empty then where also nothing was observed or nothing has a gradient, on no rank.
            options: The optimizer's, in words by name, which must be the same on all ranks; asked for once.

        Raises:
            RuntimeError: As from `step`, and where ranks disagree.
        """
        self.attentions.refresh()
        if idle and not self.attentions.removed and not self._has_work():
            return {}
        return self._measure(before_update=True, options=options)

    @torch.no_grad()
    def after_update(self, factors: Mapping[str, ClipFactors]) -> None:
        """Scale the rows by the factors of this step, and forget the observation.

        Args:
            factors: What `before_update` returned.
        """
        if not factors:
            return
        device = self.attentions.device
        gamma = torch.cat([factor.gamma.to(device) for factor in factors.values()])
        clipped = (gamma < 1).any()
        self._steps.add(clipped)
        may_wait = _may_wait_for(device)
        may_clip = not may_wait or bool(clipped)
        try:
            self._returned.clip(
                self.projections, factors, clip_frozen=self.clip_frozen, may_clip=may_clip, may_wait=may_wait
            )
            if may_clip:
                copies = SecondCopies(OPTIMIZER_STEPS.optimizers(), self.master_of)
                scale(self.projections, factors, copies, clip_frozen=self.clip_frozen, skip_quiet=may_wait)
        finally:
            try:
                self.reset()
            except BaseException:  # in this, too: heads that are scaled must not get these factors a second time
                self.reset()
                raise
        self.attentions.leave()
        following = self._thresholds.following()
        if varies(self.tau):
            self.attentions.set_thresholds(following)
        self._thresholds = following
        self._returned.give(self.attentions.names_of, wait=may_wait)

    def reset(self) -> None:
        """Forget what was observed since the last step."""
        self.attentions.forget()

    def raise_deferred(self) -> None:
        """Raise the errors that steps on an accelerator left for later. Waits for the device."""
        self._raise_deferred(wait=True)

    def report(self) -> QKClipReport:
        """Return what the last `step()` saw and did. Waits for the device, and raises the errors it deferred."""
        self.raise_deferred()
        self._frozen_warning.give(wait=True)
        self._returned.give(self.attentions.names_of, wait=True)
        own = dict(self._last_taus) if is_by_name(self.tau) or callable(self.tau) else None
        tau = self._thresholds.of("") if own is None else own
        return QKClipReport(tau, dict(self.last_layers), *self._steps.read())

    @torch.no_grad()
    def _measure(self, *, before_update: bool, options: Callable[[], Facts] | None = None) -> dict[str, ClipFactors]:
        names, device = tuple(self.projections), self.attentions.device
        if not self.attentions.are_as_left:
            self._returned.forget()
            self._stuck.reset()
        group = self._group()
        self._raise_deferred(wait=self._deferred.names not in ((), names), on_all_ranks=group is not None)
        unknown = self.attentions.unknown_calls()
        self._left_out = self.attentions.take_left_out()
        if self.attentions.has_nothing:
            if unknown:
                raise RuntimeError(unknown)
            self.reset()
            return {}
        following = self._thresholds.following()
        for name in names if varies(self.tau) else ():
            following.of(name)  # raises now what would be wrong for the forwards after this step
        self._check_agreement(group, options)
        # All heads of all attentions in one vector: many small layers would cost many small operations.
        maxima = JointMaxima.from_states(self.attentions.states(), device)
        if group is not None:  # what is wrong on this rank only is raised behind the collective, where others wait
            notes = torch.full_like(maxima.observed, UNKNOWN_ATTENTION) if unknown else self._notes(before_update)
            maxima = maxima.all_reduce(group, notes)
        if unknown and (group is None or _may_wait_for(device)):
            raise RuntimeError(unknown)
        self._unknown = unknown  # raised with what the other ranks raise
        tau = self._thresholds.of_heads(names, maxima.sizes, device)
        self._check(maxima, tau, before_update)
        self._warn_of_left_out()
        factors, self.last_layers = decide(maxima, self.projections, tau, self.alpha, clip_frozen=self.clip_frozen)
        if is_by_name(self.tau) or callable(self.tau):
            self._last_taus = {name: self._thresholds.of(name) for name in names}
        self._frozen_warning.add(self.projections, self.last_layers, clip_frozen=self.clip_frozen)
        self._frozen_warning.give(wait=_may_wait_for(device))
        gamma = torch.cat([factor.gamma for factor in factors.values()])
        self._stuck.note(names, maxima.sizes, maxima.upper_bound, gamma)
        stuck = self._stuck.take(wait=_may_wait_for(device), on_all_ranks=group is not None)
        if stuck:
            self.attentions.prove_again(stuck)
        return factors

    def _check_agreement(self, group: dist.ProcessGroup | None, options: Callable[[], Facts] | None) -> None:
        """Raise RuntimeError on all ranks of a group where they disagree, before its first step."""
        if group is None or self._ranks.have_agreed or is_capturing(self.attentions.device):
            return
        heads = {f"heads of {name or 'the model'}": str(each.num_heads) for name, each in self.projections.items()}
        taus = {f"tau of {name or 'the model'}": str(self._thresholds.of(name)) for name in self.projections}
        taus = {"tau": min(taus.values())} if len({*taus.values()}) == 1 else taus
        own = {"alpha": str(float(self.alpha)), "clip_frozen": str(self.clip_frozen)}
        check_agreement({**heads, **taus, **own, **(options() if options else {})}, group, self.attentions.device)
        self._ranks.have_agreed = True

    def _has_work(self) -> bool:
        """Tell whether something was observed and a query or key has a gradient other than zero, on any rank.

        Waits for the device. All ranks must call it.
        """
        parameters = [p for projection in self.projections.values() for p in projection.qk_parameters()]
        observed = any(bool(state.observed) for state in self.attentions.states())
        moves = any(map(has_gradient, parameters)) or not parameters
        group = self._group()
        if group is not None:
            both = torch.tensor([observed, moves], dtype=torch.float32, device="cpu").to(self.attentions.device)
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
            observed, moves = map(bool, both.tolist())
        return observed and moves

    def _group(self) -> dist.ProcessGroup | None:
        """Return the group of the ranks that clip together; None for this one alone."""
        attentions = self.attentions
        searched_on = attentions.device if attentions.has_nothing else None
        return self._ranks.group(
            attentions.parameters(), self.projections, attentions.placement_version, searched_on=searched_on
        )

    def _notes(self, before_update: bool) -> Tensor:
        ran = self.attentions.ran if before_update else any(p.grad is not None for p in self.attentions.parameters())
        device = self.attentions.device
        return torch.stack([note_of(projection, device, ran=ran) for projection in self.projections.values()])

    def _check(self, maxima: JointMaxima, tau: float | Tensor, before_update: bool) -> None:
        """Raise on all ranks, or leave for later what an accelerator must not be waited for."""
        may_wait = _may_wait_for(maxima.maximum.device)
        if maxima.notes is None:
            if may_wait and bool(maxima.are_fine(tau)):
                return
            maxima = maxima.with_notes(self._notes(before_update))
        trains = [projection.trains() for projection in self.projections.values()]
        errors = maxima.errors(trains, tau, before_update=before_update)
        if not may_wait:
            self._deferred.add(errors, tuple(self.projections))
        elif bool(errors.any()):
            heads = zip(self.projections, maxima.nonfinite.split(maxima.sizes), strict=True)
            nonfinite = {name: own.nonzero().flatten().tolist() for name, own in heads}
            raise RuntimeError(message(errors, tuple(self.projections), self._details(nonfinite)))

    def _raise_deferred(self, *, wait: bool, on_all_ranks: bool = False) -> None:
        names = self._deferred.names
        errors = self._deferred.take(wait=wait, on_all_ranks=on_all_ranks)
        if errors is not None:
            raise RuntimeError(message(errors, names, self._details({})))

    def _details(self, nonfinite_heads: Mapping[str, list[int]]) -> Details:
        hints = {name: kernel.if_unobserved for name, kernel in self.attentions.kernels().items()}
        left_out = {name: each.where for name, each in self._left_out.items()}
        taus = {self._thresholds.of(name) for name in self.projections}
        tau = taus.pop() if len(taus) == 1 else None
        unfilled = "" if self.last_layers else self.attentions.if_unfilled()  # before the first step
        return Details(tau, self._unknown, nonfinite_heads, hints, left_out, unfilled)

    def _warn_of_left_out(self) -> None:
        """Warn once, where attentions were observed in this step, and also ran in a way that could not be."""
        if self._warned_of_left_out:
            return
        names = [
            name
            for name, reason in self._left_out.items()
            if reason.trains and any(p.grad is not None for p in self.projections[name].qk_parameters())
        ]
        if names:
            self._warned_of_left_out = True
            where = not_observed(self._left_out[names[0]].where)
            listed = ", ".join(name or "the model" for name in names)
            warnings.warn(f"QK-Clip observed not all forwards of {listed} in this step: {where}", stacklevel=2)


_INPUTS = "what the model is called with: a tensor, a tuple of its arguments, or a dict of them by name"


def _unnamed_copies(parameter: Tensor) -> list[Tensor]:
    return unnamed_copies(parameter, OPTIMIZER_STEPS.optimizers())


def _may_wait_for(device: torch.device) -> bool:
    """Tell whether reading a value delays nothing; on an accelerator it would drain the queue of kernels."""
    return device.type == "cpu"
