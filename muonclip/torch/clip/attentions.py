"""The attentions of one QK-Clip: those found in a model, or projections that were handed to it."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from muonclip.core.arguments import check_kind
from muonclip.core.parameter_roles import Use
from muonclip.core.tau_rules import check_patterns
from muonclip.torch.clip.errors import not_observed
from muonclip.torch.clip.found_weights import FoundWeights
from muonclip.torch.clip.monitor import AttentionMonitor
from muonclip.torch.clip.thresholds import Thresholds
from muonclip.torch.discover import NOTHING_FOUND, Inputs, if_unfilled, nothing_found
from muonclip.torch.heads import QKProjection, declared_qk_projections
from muonclip.torch.logits import MaxLogits, Unobservable
from muonclip.torch.mesh import check_engine, check_not_flattened, is_fsdp_module
from muonclip.torch.observe import DECLARED, AttentionKernel, LoadHooks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


_NOTHING: Mapping[str, Use] = {}


class ClipAttentions:
    """The projections by name, and the monitor that finds and observes them in `model`.

    There is neither model nor monitor where the projections were given. What is read from all parameters or modules is
    read again only where a weight of queries or keys was replaced, as engines do when they shard a model, or where an
    attention was found.
    """

    def __init__(
        self,
        projections: dict[str, QKProjection],
        model: nn.Module | None = None,
        monitor: AttentionMonitor | None = None,
    ) -> None:
        self.projections = projections
        self.model, self._monitor = model, monitor
        self._loads: LoadHooks | None = None  # the monitor has its own
        self._watch_loads()
        self._sharded: list[FSDPModule] = []
        self._found = FoundWeights(model)
        self.placement_version = 0
        self._resets = 0

    @property
    def version(self) -> int:
        """A number that grows with every attention found."""
        return 0 if self._monitor is None else self._monitor.version

    @property
    def to_come(self) -> str:
        """The reason why the search for attention is not over; "" when it is."""
        return "" if self._monitor is None else self._monitor.to_come

    @property
    def unchecked(self) -> str:
        """The reason why the attentions were checked in no forward of the training; "" where they were, or will be."""
        return "" if self._monitor is None else self._monitor.unchecked

    @property
    def shown(self) -> Mapping[str, Use]:
        """Return what forwards have shown of parameters, by name; the same mapping as long as nothing is new."""
        return _NOTHING if self._monitor is None else self._monitor.shown

    @property
    def has_nothing(self) -> bool:
        """True where a search has seen nothing to clip and nothing is required."""
        return self._monitor is not None and self._monitor.has_nothing

    @property
    def ignored(self) -> Collection[str]:
        """The names of the modules whose attention is left alone."""
        return () if self._monitor is None else self._monitor.ignored

    @property
    def without_logits(self) -> Mapping[str, str]:
        """Return by module how activations are mixed there without a softmax of queries and keys."""
        return {} if self._monitor is None else self._monitor.without_logits

    @property
    def device(self) -> torch.device:
        """The device of the weights of queries and keys."""
        of_model = () if self.model is None else self.model.parameters()  # which may have shown no attention yet
        weights = (weight for projection in self.projections.values() for weight in projection.qk_parameters())
        first = next(weights, None)
        first = next(iter(of_model), None) if first is None else first
        return torch.device("cpu") if first is None else first.device

    def states(self) -> list[MaxLogits]:
        """Return the statistics, in the order of the projections."""
        return [projection.max_logits for projection in self.projections.values()]

    @property
    def ran(self) -> bool:
        """True where the model was seen to run with gradients since the last step."""
        return self._monitor is not None and self._monitor.ran

    def forget(self) -> None:
        """Forget what was seen since the last step."""
        for state in self.states():
            state.reset()
        if self._monitor is not None:
            self._monitor.ran, self._monitor.left_out = False, None

    def take_left_out(self) -> dict[str, Unobservable]:
        """Return why forwards since the last step were not observed, by attention, and forget it."""
        left_out: dict[str, Unobservable] = {}
        for name, projection in self.projections.items():
            statistic = projection.max_logits
            if statistic.left_out is not None:
                left_out[name] = statistic.left_out
                statistic.left_out = None
        return left_out

    def leave(self) -> None:
        """Note that a step is over."""
        self._resets = self._all_resets()

    @property
    def are_as_left(self) -> bool:
        """True where nothing was forgotten since the last step, as it is when weights are loaded."""
        return self._resets == self._all_resets()

    def _all_resets(self) -> int:
        return sum(state.resets for state in self.states())

    def prove_again(self, names: Collection[str]) -> None:
        """Let the next forward show whether attentions, by name, can still be clipped as they are."""
        if self._monitor is not None:
            self._monitor.prove_again(names)

    def set_thresholds(self, thresholds: Thresholds) -> None:
        """Require maxima to be exact from these logits on, also those of attentions still to be found.

        Raises ValueError, and sets none, for an attention of which they say nothing.
        """
        each = {name: thresholds.exact_from(name) for name in self.projections}
        if self._monitor is not None:
            self._monitor.thresholds = thresholds
        for name, projection in self.projections.items():
            projection.max_logits.threshold = each[name]

    def names(self) -> list[str]:
        """Return the names that a pattern may fit: of the model's modules, or of the given projections."""
        return [*self.projections] if self.model is None else [name for name, _ in self.model.named_modules()]

    def kernels(self) -> dict[str, AttentionKernel]:
        """Return the kernel by which each attention is observed, by name; `DECLARED` where it fills its statistic."""
        sites = {} if self._monitor is None else self._monitor.sites
        kernels = {id(each.max_logits): site.kernel for site in sites.values() for each in site.projections}
        return {name: kernels.get(id(each.max_logits), DECLARED) for name, each in self.projections.items()}

    def unknown_calls(self) -> str:
        """Return what is wrong where attention ran in this step that is not known, or "".

        Raises RuntimeError where nothing is observed: the observers were removed, or no attention has run.
        """
        unknown = ""
        if self._monitor is not None:
            if self._monitor.removed:
                raise RuntimeError(f"QK-Clip observes nothing any more: {self._monitor.removed}.")
            unknown = self._monitor.finish_step()
            self._monitor.warn_of_nothing()
        if not self.projections and not self.has_nothing:
            if self.to_come == NOTHING_FOUND:
                raise RuntimeError(nothing_found(self.without_logits))
            left_out = None if self._monitor is None else self._monitor.left_out
            if left_out is not None and left_out.where:
                raise RuntimeError(f"QK-Clip has seen no forward with an attention: {not_observed(left_out.where)}")
            raise RuntimeError(
                f"QK-Clip has seen no forward with an attention, and waits for {self.to_come}. Call the model that it "
                "was given, or a part of it, with gradients enabled before each step."
            )
        return unknown

    @property
    def removed(self) -> bool:
        """True where the observers were taken off the model."""
        return self._monitor is not None and bool(self._monitor.removed)

    def remove(self) -> None:
        """Take the observers off the model."""
        if self._loads is not None:
            self._loads.take_off()
        if self._monitor is not None:
            self._monitor.remove("it was removed")

    def withdraw(self) -> None:
        """Leave a model, where what was to own these could not be made, as it was before they were."""
        if self._monitor is not None:
            self._monitor.withdraw()

    def refresh(self) -> None:
        """Put an optimizer's shards in place of the whole weights that FSDP may have left after a forward.

        Where weights were replaced, `placement_version` grows. Raises RuntimeError where something was changed since
        the attentions were found, and heads would not be clipped by it any more; ValueError for weights that an
        engine has flattened.
        """
        for module in self._sharded:
            module.reshard()
        if self._found.are_as_read(self.projections, self.version):
            for name, projection in self.projections.items():
                for weight in projection.qk_parameters():
                    check_not_flattened(f"a query or key weight of {name or 'the model'}", weight)
            return
        for root in self._roots():
            check_engine(root)
        self._sharded = [each for root in self._roots() for each in root.modules() if is_fsdp_module(each)]
        for module in self._sharded:
            module.reshard()
        self._watch_loads()
        self._found.read(self.projections, self.version, self._sites())
        self.placement_version += 1

    def parameters(self) -> Iterator[Tensor]:
        """Return all parameters of the model, or of the modules that hold the given projections."""
        for root in self._roots():
            yield from root.parameters()

    def if_unfilled(self) -> str:
        """Return a line that says which weights of the model hold no sensible numbers, or ""."""
        return "" if self.model is None else if_unfilled(self.model)

    def names_of(self, weights: Iterable[Tensor]) -> list[str]:
        """Name weights of queries and keys as the model does; without a model, by their attention and module."""
        wanted = {id(weight) for weight in weights}
        if self.model is not None:
            return [name for name, parameter in self.model.named_parameters() if id(parameter) in wanted]
        names: dict[int, str] = {}
        for attention, projection in self.projections.items():
            for _, rows in projection.parts():
                for parameter, _ in rows.parameters():
                    names.setdefault(id(parameter), f"{rows.name_of(parameter)} in {attention}")
        return [name for key, name in names.items() if key in wanted]

    def _sites(self) -> dict[str, list[str]]:
        """Return the names of the modules that call each attention, by its name."""
        sites = {} if self._monitor is None else self._monitor.sites
        callers: dict[str, list[str]] = {}
        for name, projection in self.projections.items():
            own = projection.max_logits
            callers[name] = [
                module for module, site in sites.items() if any(each.max_logits is own for each in site.projections)
            ]
        return callers

    def _roots(self) -> Iterable[nn.Module]:
        if self.model is not None:
            return (self.model,)
        return {rows.module: None for each in self.projections.values() for _, rows in each.parts()}

    def _watch_loads(self) -> None:
        """Let the statistics of given projections forget what they saw when their weights are loaded."""
        if self._monitor is None:
            self._loads = self._loads or LoadHooks()
            self._loads.watch((m, each.max_logits) for each in self.projections.values() for m in each.qk_modules())

    def __getstate__(self) -> dict[str, Any]:
        again = {"_found": FoundWeights(self.model), "_sharded": [], "_loads": None}  # read again in a copy
        return {**self.__dict__, **again}


def attentions_of_model(
    model: nn.Module,
    declare: Mapping[str, QKProjection],
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None,
    on_forward: Any,
    *,
    thresholds: Thresholds,
    clip_gains: bool,
    ignore: Collection[str] = (),
    required: bool = True,
) -> ClipAttentions:
    """Make the attentions that a model declares, those declared for it, and those found in it.

    They are found now, or at the first forward. `ignore`: names or patterns of modules to leave alone. Raises
    ValueError for a declaration or a name without its module and where no attention is found, if it is `required`.
    """
    projections = declared_qk_projections(model)
    for name, projection in declare.items():
        if name not in dict(model.named_modules()):
            raise ValueError(f"declare names {name!r}, which is not a module of the model.")
        check_kind(f"declare of {name!r}", projection, QKProjection, "a QKProjection")
        projections[name] = projection
    declared = bool(projections)
    ignored = _modules_named(model, ignore)
    both = [name for name in ignored if name in projections]
    if both:
        raise ValueError(f"{both[0] or 'the model'} is declared, and named by ignore, too. Leave one of them out.")
    monitor = AttentionMonitor(
        model, projections, on_forward, clip_gains=clip_gains, ignored=ignored, required=required
    )
    attentions = ClipAttentions(projections, model, monitor)
    check_patterns(thresholds.tau, attentions.names())
    monitor.thresholds = thresholds
    try:
        monitor.start()
        _discover(monitor, example_inputs, declared=declared)
    except BaseException:
        monitor.withdraw()
        raise
    return attentions


def _discover(
    monitor: AttentionMonitor, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None, *, declared: bool
) -> None:
    if example_inputs is not None:
        if isinstance(example_inputs, Mapping):
            monitor.discover(Inputs((), dict(example_inputs)))
        else:
            monitor.discover(Inputs(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}))
        if monitor.to_come == NOTHING_FOUND:
            raise ValueError(nothing_found(monitor.without_logits))
        monitor.warn_of_nothing()
    elif not declared:
        monitor.discover_ahead()


def _modules_named(model: nn.Module, patterns: Collection[str]) -> list[str]:
    """Return the names of the modules that one of the patterns fits. Raises ValueError for one that fits none."""
    if isinstance(patterns, str):
        raise ValueError(f"ignore={patterns!r} is one name; give a tuple of them, ignore=({patterns!r},).")
    check_kind("ignore", patterns, (list, tuple, Set), "a tuple of names of modules, or patterns")
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not isinstance(pattern, str) or not fnmatch.filter(names, pattern):
            raise ValueError(f"ignore names {pattern!r}, which is not a module of the model.")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def given_attentions(projections: Mapping[str, QKProjection] | Iterable[QKProjection]) -> ClipAttentions:
    """Make attentions of projections by name or in a sequence, whose statistics the caller fills.

    Raises ValueError for anything else.
    """
    if isinstance(projections, Mapping):
        named = list(cast("Mapping[str, object]", projections).items())
    else:
        given = projections if isinstance(projections, Iterable) else (projections,)
        named = [(str(index), projection) for index, projection in enumerate(given)]
    found = {name: projection for name, projection in named if isinstance(projection, QKProjection)}
    wrong = [name for name, _ in named if name not in found]
    if wrong or not named:
        raise ValueError(
            "QKClip needs a model or QKProjections"
            + (f"; {len(wrong)} of the items, {wrong[0]!r} first, are neither." if wrong else "; it got none.")
            + " To clip a model's parameters, pass the model itself, not model.parameters()."
        )
    return ClipAttentions(found)
