"""Keeps the attentions of a model observed for one `QKClip`: hooks on, hooks off, and when to ask for attentions again.

Three moments. When it is built the model is traced on inputs that it names, or that are guessed, where that works: the
plan is complete then. At the first forward with gradients it is traced on the real inputs: that finds what is still
missing and checks what was declared. From then on observers see the calls of attention, and what is new is searched
amid the forward that reaches it (`live_forwards.py`).
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]; imports the compiler when called

from muonclip.core.parameter_roles import Use
from muonclip.torch.clip.live_forwards import LiveForwards
from muonclip.torch.clip.thresholds import Thresholds
from muonclip.torch.discover import (
    NOTHING_FOUND,
    Discovery,
    Inputs,
    NotTraced,
    Site,
    Trace,
    discover,
    guess_inputs,
    has_a_foreign_forward,
    holds_a_state_space,
    if_unfilled,
    is_experiment,
    joint_uses,
    message,
    not_checked,
    nothing_found,
    nothing_to_clip,
    parameter_names,
)
from muonclip.torch.heads import QKProjection
from muonclip.torch.logits import MaxLogits, Unobservable, outside_modes, unobservable
from muonclip.torch.mesh import check_engine
from muonclip.torch.observe import (
    DECLARED,
    PATCHES,
    UNREAD,
    Hooks,
    LoadHooks,
    Observer,
    ObserverHooks,
    enter,
    graph_task,
    leave,
)
from muonclip.torch.prove import ProvenWays, Reach, reached_beside_known

_MOST_TRACES = 4  # of the model in its first step, whose micro-batches may differ in what they reach
_monitors: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttentionMonitor]] = weakref.WeakKeyDictionary()


class AttentionMonitor:
    """`projections`, shared with its owner, grows as attentions are found. `sites`: where each is called and how it is
    observed. `on_forward` is called inside each forward with gradients, which sets `ran`. `to_come`: why nothing was
    found yet, or "". `unchecked`: why no forward of the training was traced, or "". `version` counts findings.
    `ignored`: modules whose attention is left alone. `without_logits`: modules that mix activations without a softmax
    of queries and keys, and by what. `required`: no attention is an error; else `has_nothing` says that a search has
    seen none, and nothing that mixes activations by products. `shown`: what forwards have shown of parameters, by name.
    Nothing happens to the model before `start`."""

    def __init__(
        self,
        model: nn.Module,
        projections: dict[str, QKProjection],
        on_forward: Callable[[], None],
        *,
        clip_gains: bool,
        ignored: Collection[str] = (),
        required: bool = True,
    ) -> None:
        self.required, self.has_nothing = required, False
        self.model, self.projections, self.on_forward, self.clip_gains = model, projections, on_forward, clip_gains
        self.ignored = tuple(ignored)
        self.without_logits: dict[str, str] = {}
        self.thresholds = Thresholds(math.inf)  # of the statistics, those to come too
        self.declared = dict(projections)
        self.sites: dict[str, Site] = {}
        self.to_come = "the first forward with gradients"
        self.unchecked = ""
        self.removed = ""
        self.version = 0
        self.ran = False
        self.left_out: Unobservable | None = None  # why a forward since the last step was not observed
        self._traces: tuple[Trace, ...] = ()
        self.shown: dict[str, Use] = {}
        self._ways = ProvenWays()
        self._traced: dict[str, int] = {}  # how often, by the name of the module that a forward began with
        self._prepare()

    def _prepare(self) -> None:
        entry = _Entry(self)
        self._observers = ObserverHooks()
        self._loads = LoadHooks()
        self._root, self._entries = (Hooks(-1, entry.before, entry.after, with_kwargs=True) for _ in range(2))
        self._live = LiveForwards(self, self._observers, self._entries)
        self._names: dict[nn.Module, str] = {}
        self._parts: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # with which forwards have begun
        self._guess: Inputs | None = None  # with which attention was found before the first forward
        self._names_at_guess: dict[str, str] = {}  # of its parameters, see parameter_names
        self._is_first_step = True
        self._end: Callable[[], object] = _nothing  # takes down what `start` has put up
        self._replaced: list[weakref.ref[AttentionMonitor]] = []  # that observed the model before
        self._before: list[tuple[MaxLogits, float]] = []  # declared statistics and their thresholds before
        self._warned_of_compiled = self._warned_of_nothing = self._warned_of_unchecked = False

    def start(self) -> None:
        """Put the patches and the hooks in place; those of another monitor of these modules are removed."""
        thresholds = [self.thresholds.exact_from(name) for name in self.projections]
        known = {monitor() for module in self.model.modules() if (monitor := _monitors.get(module)) is not None}
        others = [other for other in known if other is not None and other is not self and not other.removed]
        self._replaced = [weakref.ref(other) for other in others]
        for other in others:
            other.remove("another QKClip was made for the same model, and observes it now")
        self._before = [(each.max_logits, each.max_logits.threshold) for each in self.projections.values()]
        for (statistic, _), threshold in zip(self._before, thresholds, strict=True):
            statistic.threshold = threshold
        PATCHES.add_user(self.model)
        hooks = self._observers, self._loads, self._root, self._entries
        self._end = weakref.finalize(self, _take_down, self._live, *hooks)
        self._root.put_on(self.model)
        for module in self.model.modules():
            _monitors[module] = weakref.ref(self)
            if module is not self.model:
                self._entries.put_on(module)
        self._observe()

    def remove(self, why: str) -> None:
        """Take every hook away; the model is as before. `why`: for whoever goes on using the owner."""
        if not self.removed:
            self._end()
        self.removed = why

    def withdraw(self) -> None:
        """Undo `start` where a construction has failed: the model is observed as it was before, or not at all."""
        self.remove("its construction failed")
        for statistic, threshold in self._before:
            statistic.threshold = threshold
        for other in [there for each in self._replaced if (there := each()) is not None]:
            other.__setstate__(other.__getstate__() | {"removed": ""})

    @outside_modes()
    def _wait_for_weights(self) -> bool:
        """Tell whether the model has no numbers yet, as on the meta device, so that nothing can be found in it."""
        parameters = list(self.model.parameters())
        waits = bool(parameters) and all(each.is_meta for each in parameters)
        if waits and not self.projections:
            self.to_come = "the first forward with gradients after to_empty: the model is on the meta device"
        return waits

    def discover(self, inputs: Inputs) -> None:
        """Find the attentions that the model reaches with these inputs, and observe them.

        Raises ValueError where one is not understood, and RuntimeError where a copy of the model does not run and no
        attention is known.
        """
        if self._wait_for_weights() or self._is_as_guessed(inputs):
            return
        try:
            self._take(self._ask(inputs), inputs)
            if self.model.get_submodule(inputs.module).training and not self._is_known(inputs, training=True):
                with suppress(NotTraced):  # what does not run in training mode has run in evaluation mode
                    self._take(self._ask(inputs, training=True), inputs)
        except NotTraced as error:
            if self.projections:
                self._go_on_untraced(error)
                return
            raise RuntimeError(
                if_unfilled(self.model)
                + f"QK-Clip could not trace {inputs.module or 'the model'} to find its attention: {error}. "
                "Give inputs that a copy of it runs with, QKClip(model, example_inputs=…), or declare the attentions, "
                "QKClip(model, declare={name: QKProjection…})."
            ) from error

    def _go_on_untraced(self, error: NotTraced) -> None:
        """Clip what is known as it is; the step warns, once, where a forward of the training was not traced."""
        if self.ran:
            self.to_come, self.unchecked = "", str(error)
        else:
            self.to_come = f"the first forward with gradients (not traced so far: {error})"

    def _is_as_guessed(self, inputs: Inputs) -> bool:
        """Tell whether inputs are like those that were guessed, and reach no attention, nor what may be one, that these
        have not shown; and whether the model's parameters are still those, tied as they were."""
        guess, self._guess = self._guess, None
        modules = set(self.model.modules())
        replaced = any(each not in modules for found in self.projections.values() for each in found.qk_modules())
        if replaced or self._names_at_guess != parameter_names(self.model):
            return False
        training = self.model.get_submodule(inputs.module).training
        return guess is not None and guess.is_like(inputs) and self._is_known(inputs, training=training, anew=True)

    @outside_modes()
    def _is_known(self, inputs: Inputs, *, training: bool, anew: bool = False) -> bool:
        """Tell whether a forward would reach no attention but those that were found. `anew`: these inputs have not been
        traced, so that nothing may be reached either that could be attention which is not understood."""
        if not self.sites:
            return False
        try:
            reached = reached_beside_known(self.model, inputs, self.sites, training=training)
        except Exception:  # whatever the model raises; tracing it says more
            return False
        if reached is None or (anew and not self._was_traced(reached)):
            return False
        self._live.expect(reached.modules)
        return True

    def _was_traced(self, reach: Reach) -> bool:
        """Tell whether traces have shown all by which something may be weighed."""
        traced = frozenset[tuple[str, str]]().union(*(each.operators_of_weights for each in self._traces))
        return reach.operators_of_weights <= traced

    def search(self, inputs: Inputs, *, training: bool) -> None:
        """Find attentions in a forward that is under way, in one mode. Raises as `discover`, and NotTraced."""
        self._take(self._ask(inputs, training=training), inputs)

    def discover_ahead(self) -> None:
        """Find attentions with inputs that the model names or that are guessed; where none fits, the first forward will
        tell. Raises ValueError where an attention is not understood, or where there is none."""
        for inputs in () if self._wait_for_weights() else guess_inputs(self.model):
            try:
                with _warnings_of_what_runs():
                    self._take(self._ask(inputs), inputs)
            except NotTraced as error:
                self.to_come = f"the first forward with gradients (no inputs could be guessed: {error})"
                continue
            if not self.projections:
                with suppress(NotTraced):  # what runs in training alone
                    self._take(self._ask(inputs, training=True), inputs)
            if self.to_come == NOTHING_FOUND:
                raise ValueError(if_unfilled(self.model) + nothing_found(self.without_logits))
            self._guess, self._names_at_guess = inputs, parameter_names(self.model)
            self.warn_of_nothing()
            return

    def warn_of_nothing(self) -> None:
        """Warn once where a search has seen nothing to clip."""
        if self.has_nothing and not self._warned_of_nothing:
            self._warned_of_nothing = True
            warnings.warn(nothing_to_clip(self.without_logits), stacklevel=2)

    def finish_step(self) -> str:
        """End the forwards of a step. Returns what is wrong where attention ran that is not known, or ""."""
        unclaimed = self._live.unclaimed
        unknown, unclaimed.calls = unclaimed.calls, 0
        left_out, unclaimed.left_out = unclaimed.left_out, None
        problem, unclaimed.problem = unclaimed.problem, ""
        if problem:
            return problem
        if unknown and left_out:
            return (
                f"QK-Clip: attention was called {left_out.where} within the forwards of this step: its heads were "
                "neither observed nor clipped. Call it outside, with tensors that have the axis of the batch."
            )
        if unknown:
            self._traced.clear()  # the next forward shows what it was
            return (
                f"QK-Clip: attention was called {unknown} times in this step by modules that were not seen to call it: "
                "its heads were neither observed nor clipped. Show the search inputs that reach it, QKClip(model, "
                "example_inputs=…). The next forward is traced anew."
            )
        self._warn_of_compiled()
        if self.unchecked and not self._warned_of_unchecked:
            self._warned_of_unchecked = True
            warnings.warn(not_checked(self.unchecked, self.declared), stacklevel=2)
        self._trace_after_unseen()
        if self._is_first_step and (self._traced or self._parts):
            self._is_first_step = False
            self._entries.take_off([module for module in self._entries.modules if module not in self._parts])
        return ""

    def _warn_of_compiled(self) -> None:
        """Warn of the first module that no search has reached and that ran in compiled code."""
        module = self._live.new_modules.compiled
        name = None if self._warned_of_compiled or module is None else self.name_of(module)
        if name is not None:
            self._warned_of_compiled = True
            warnings.warn(
                f"QK-Clip: {name} ran for the first time, in code that torch.compile made, where attention that is "
                "written out is not seen. If there is any, give example_inputs that reach it.",
                stacklevel=2,
            )

    def _trace_after_unseen(self) -> None:
        """Trace the next forward where weights were used in this step that no search has seen in use."""
        names = [name for each in self._live.trained_unseen() if (name := self.name_of(each))]
        if names and self._live.new_modules.compiled is None:  # else they may have run there
            self._traced.clear()
            warnings.warn(
                f"QK-Clip: the weights of {', '.join(sorted(names))} have gradients, though no such module has run. "
                "Attention that is written out with them was not observed in this step; the next forward is traced.",
                stacklevel=2,
            )

    def prove_again(self, names: Collection[str]) -> None:
        """Prove attentions anew in the next forward, which is an error where they cannot be clipped as they were."""
        self._ways.prove_again(names)
        self._traced.clear()

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module begins to run; trace it where that is due."""
        if module is self.model:
            self._observers.drop()  # what a forward that was interrupted has left
            self._live.end()
        if self._live.enter() > 1 or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return
        name = self.name_of(module)
        if name is None:
            return
        is_due = self._is_to_be_traced(module, name)
        if is_due and self._wait_for_weights():
            return
        if is_due:
            check_engine(self.model)  # which may have come since the clip was made
        self._live.look_for_more()
        self.on_forward()
        self.ran = True
        if graph_task() < 0 or not name:  # else a part is computed again
            self._live.begin(args, kwargs, name)
            if name:
                self._parts.add(module)
        if not is_due:
            return
        self._traced[name] = self._traced.get(name, 0) + 1
        observed = module in self._observers.modules
        search = functools.partial(self.discover, Inputs(args, kwargs, name).filled())
        if self._is_first_step:
            search()
        else:  # what is wrong is said by the step
            self._live.attempt(search)
        if module in self._observers.modules and not observed:  # its hooks came too late for this run
            enter(module, args)

    def begin_compiled(self) -> None:
        """Count what nobody claims in a forward that is compiled as a whole, where nothing can be searched."""
        self._live.begin_compiled()

    def end_compiled(self) -> None:
        """End such a forward."""
        self._live.end_compiled()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that a module has run, or has raised; `output` is None then."""
        if module in self._observers.modules:  # whose hooks are behind this one
            leave(module, args, output)
        self._live.leave(whole=module is self.model)

    def _is_to_be_traced(self, module: nn.Module, name: str) -> bool:
        """Tell whether a forward that begins with this module is traced.

        The model: each forward of the first step, up to a few. A part that is called by itself: once, if it holds no
        attention that is known. (Recomputation under activation checkpointing calls parts, too.)
        """
        if module is self.model:
            return self._traced.get(name, 0) < (_MOST_TRACES if self._is_first_step else 1)
        return not self._traced.get(name) and not any(f"{site}.".startswith(f"{name}.") for site in self.sites)

    def name_of(self, module: nn.Module) -> str | None:
        """Return the name of a module in the model; None where it was removed from the model since the hooks were put
        on it."""
        if module is self.model:
            return ""
        name = self._names.get(module)
        if name is None or not _leads_to(self.model, name, module):
            self._names = {each: name for name, each in self.model.named_modules()}
            name = self._names.get(module)
        return name

    def _ask(self, inputs: Inputs, *, training: bool = False) -> Discovery:
        """Discover attentions; earlier traces are read again, since what attentions share may show itself late."""
        return discover(
            self.model,
            [inputs],
            self.declared,
            ignored=self.ignored,
            clip_gains=self.clip_gains,
            training=training,
            earlier=self._traces,
        )

    @outside_modes()
    def _take(self, discovery: Discovery, inputs: Inputs) -> None:
        if discovery.refusals:
            raise ValueError(message(self.model, discovery.refusals))
        self._traces, self.without_logits = discovery.traces, discovery.without_logits
        shown = joint_uses(each.shown for each in self._traces)
        self.shown = self.shown if shown == self.shown else shown
        projections = self._ways.proven(
            self.model,
            inputs,
            self.declared | discovery.projections,
            discovery.others,
            discovery.sites,
            declared=self.declared,
        )
        found = {
            name: each if name in self.declared else _with_statistic_of(self.projections.get(name), each)
            for name, each in projections.items()
        }
        order = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        found = dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))  # on all ranks
        names = {id(projection): name for name, projection in discovery.projections.items()}
        sites = {
            site.module: replace(site, projections=tuple(found[names[id(p)]] for p in site.projections))
            for site in discovery.sites
        }
        thresholds = {name: self.thresholds.exact_from(name) for name in found}
        self.version += found.keys() != self.projections.keys() or sites.keys() != self.sites.keys()
        self.projections.clear()
        self.projections.update(found)
        self.sites = sites
        by_products = [name for name in self.without_logits if not holds_a_state_space(self.model.get_submodule(name))]
        self.has_nothing = not (self.projections or self.required or by_products)
        self.to_come, self.unchecked = "" if self.projections or self.has_nothing else NOTHING_FOUND, ""
        for name, projection in self.projections.items():
            projection.max_logits.threshold = thresholds[name]
        self._observe()
        self._live.expect(self._traces[-1].reached, self._traces[-1].idle, inputs.module)

    def _observe(self) -> None:
        """Let what each site's attention shows go to its statistics, which forget it when weights are loaded."""
        self._loads.watch(
            (module, each.max_logits) for each in self.projections.values() for module in each.qk_modules()
        )
        self._observers.attach(
            {
                self.model.get_submodule(site.module): Observer(
                    [projection.max_logits for projection in site.projections],
                    calls=site.calls,
                    written_out=site.kernel.written_out,
                    whole=[each.counts_added for each in site.projections],
                    head_axis=site.head_axis,
                    of_one_sequence=site.is_of_one_sequence,
                    reads=site.kernel != UNREAD,
                    unclaimed=self._live.unclaimed,
                )
                for site in self.sites.values()
                if site.kernel != DECLARED
            }
            | {
                self.model.get_submodule(name): Observer((), calls=(), written_out=False, reads=False)
                for name in self.ignored
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name in _SAVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Observe the model that was restored with it."""
        self.__dict__.update(state)
        self._traces, self._ways, self.left_out = (), ProvenWays(), None
        self._prepare()
        if not self.removed:
            self.start()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionMonitor:
        """Copy it with the model and the owner: the copy observes the copy."""
        other = memo[id(self)] = object.__new__(AttentionMonitor)
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other


_SAVED = (
    *("projections", "declared", "sites", "model", "on_forward", "thresholds", "clip_gains"),
    *("required", "has_nothing", "shown"),
    *("to_come", "unchecked", "removed", "version", "ran", "_traced", "ignored", "without_logits"),
)


def _leads_to(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Tell whether a name is still that of the module."""
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


def _with_statistic_of(earlier: QKProjection | None, projection: QKProjection) -> QKProjection:
    """Keep the statistic of a projection that is read anew."""
    if earlier is None or earlier.num_heads != projection.num_heads:
        return projection
    return replace(projection, max_logits=earlier.max_logits)


class _Entry:
    """Hooks on every module: the outermost one that runs is where a forward begins. One whose `forward` an engine has
    replaced for a while (Lightning) runs something else; what it calls begins there. A copy in an experiment, and what
    cannot be observed, is not a forward of the training."""

    def __init__(self, monitor: AttentionMonitor) -> None:
        self.monitor = weakref.ref(monitor)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        monitor = self.monitor()
        if monitor is None or is_experiment() or has_a_foreign_forward(module):
            return
        reason = unobservable()
        if reason is not None:
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                monitor.left_out = reason
            return
        if torch.compiler.is_compiling():
            if monitor.to_come:
                raise RuntimeError(
                    "QK-Clip has not seen this model's attention yet, and cannot find it while torch.compile traces. "
                    "Give inputs that the model runs with, QKClip(model, example_inputs=…), or run one forward with "
                    "gradients before you compile."
                )
            if module is monitor.model and torch.is_grad_enabled():
                monitor.begin_compiled()
            return
        _begin(monitor, module, args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        monitor = self.monitor()
        if monitor is None or is_experiment() or has_a_foreign_forward(module):
            return
        if unobservable() is not None:
            return
        if not torch.compiler.is_compiling():
            monitor.end(module, args, output)
        elif module is monitor.model:
            monitor.end_compiled()

    def __deepcopy__(self, memo: object) -> _Entry:
        return _NoEntry()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_NoEntry, ())


_begin: Any = _disable_dynamo(AttentionMonitor.begin)
"""A trace between two graphs is not compiled."""


class _NoEntry(_Entry):
    """In a copy of the model, which its own optimizer observes."""

    def __init__(self) -> None:
        self.monitor = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_NoEntry, ())


@contextmanager
def _warnings_of_what_runs() -> Iterator[None]:
    """Give the warnings of a model that is tried with guessed inputs, unless they do not fit."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for each in caught:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _nothing() -> None:
    """Take down nothing: there was nothing to put up yet."""


def _take_down(live: LiveForwards, *hooks: Hooks | LoadHooks) -> None:
    live.take_off()
    for each in hooks:
        if isinstance(each, ObserverHooks):
            each.deactivate()
        each.take_off()
    PATCHES.remove_user()
