"""The forwards of a model that is trained, from begin to end: what in them is new is watched, and searched amid them.

A module that no search has reached carries hooks until it runs for the first time; one that holds matrices which no
search has seen in use carries them for good. While it runs, all of its calls of attention are looked at, which costs
nothing where there are none. For a call that nobody claims the forward is traced at once, in a copy with the same
inputs; what that finds is observed from this call on. So nothing is missed, and nobody pays for what is known.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from muonclip.torch.discover import Inputs, NotTraced, is_experiment
from muonclip.torch.logits import unobservable
from muonclip.torch.mesh import is_compiled_module, is_dtensor
from muonclip.torch.observe import (
    AttentionCall,
    Hooks,
    Observer,
    ObserverHooks,
    ObserverRun,
    Unclaimed,
    UnclaimedRun,
    drop_handlers,
    graph_task,
    of_thread,
)


class Searcher(Protocol):
    """Knows a model and searches it. `version` grows with what is found."""

    model: nn.Module
    version: int

    def search(self, inputs: Inputs, *, training: bool) -> None:
        """Find the attentions that the model reaches with these inputs. Raises as `discover` does."""
        ...

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module begins to run."""
        ...

    def name_of(self, module: nn.Module) -> str | None:
        """Return the name of a module in the model, if it is there."""
        ...


class _Watch(NamedTuple):
    """A module that runs for the first time, or None to the end of the forward; how it is watched, and how many calls
    nobody had claimed before."""

    module: nn.Module | None
    run: UnclaimedRun
    calls: int


class _Forward(threading.local):
    """The forward that a thread is in: how many modules with hooks it is inside of, what the outermost one was called
    with if it is trained, and in which modes it was not searched yet; runs of modules that were found too late for
    their hooks; what is watched, and what has run for the first time meanwhile."""

    def __init__(self) -> None:
        self.modules = 0
        self.begun: tuple[Any, Any, str] | None = None
        self.untried: list[bool] | None = None
        self.late: dict[Observer, ObserverRun] = {}
        self.watch: _Watch | None = None
        self.reached: list[nn.Module] = []


class LiveForwards:
    """Follows the forwards of the model of a searcher. `entries`: hooks on modules with which forwards may begin."""

    def __init__(self, searcher: Searcher, observers: ObserverHooks, entries: Hooks) -> None:
        self.unclaimed = Unclaimed(self)
        self._searcher, self._observers, self._entries = weakref.ref(searcher), observers, entries
        self._forward = _Forward()
        self.new_modules = NewModuleHooks(self)
        self._new = Hooks(-3, self.new_modules.before, self.new_modules.after, with_kwargs=True)
        self._reached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._names: set[str] = set()  # of modules that were reached, some of which others may be in the place of now
        self._idle: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # with matrices that no search has seen in use
        self._accounted: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that have run, or whose matrices were in use
        self._children: list[dict[str, Any]] = []
        self._sum = 0
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def enter(self) -> int:
        """Note that a module with hooks begins to run. Returns how many do now."""
        self._forward.modules += 1
        return self._forward.modules

    def begin(self, args: Any, kwargs: Any, name: str) -> None:
        """Begin a forward that is trained, of the model or of the part with this name."""
        self._forward.begun, self._forward.untried = (args, kwargs, name), None
        of_thread.handlers.append(UnclaimedRun(self.unclaimed))

    def begin_compiled(self) -> None:
        """Count the calls that nobody claims in a forward that is compiled as a whole, where nothing is searched."""
        of_thread.handlers.append(UnclaimedRun(self.unclaimed))

    def end_compiled(self) -> None:
        """End such a forward."""
        drop_handlers(self.unclaimed)

    def leave(self, *, whole: bool) -> None:
        """Note that a module with hooks has run, or has raised; `whole`: the model."""
        self._forward.modules = 0 if whole else max(self._forward.modules - 1, 0)
        if not self._forward.modules:
            self.end()

    def end(self) -> None:
        """End a forward, also one that was interrupted, and keep nothing of it."""
        forward = self._forward
        forward.modules = 0
        if forward.watch is not None:  # to the end, or interrupted
            self._end_watch(forward.watch)
            self._observers.drop()
        if forward.begun is not None:
            forward.begun = forward.untried = None
            forward.late.clear()
            forward.reached.clear()
        drop_handlers(self.unclaimed)

    def search_again(self) -> bool | None:
        """Search the forward that this thread is in, in a mode that was not tried yet. Returns False where there is
        none, and None where this cannot be done: other ranks would not know of it, shards are whole just now, or
        nothing is known of how the forward began."""
        forward, searcher = self._forward, self._searcher()
        if forward.begun is None or searcher is None or not _is_alone(searcher.model):
            return None
        args, kwargs, name = forward.begun
        if forward.untried is None:
            forward.untried = [True, False] if searcher.model.get_submodule(name).training else [False]
        if not forward.untried:
            return False
        inputs, training = Inputs(args, kwargs, name), forward.untried.pop(0)
        self.attempt(functools.partial(searcher.search, inputs, training=training))
        return True

    def attempt(self, search: Callable[[], None]) -> None:
        """Search; what is not understood is left to the next step."""
        try:
            search()
        except NotTraced:  # the step says what was called, if it was
            return
        except (ValueError, RuntimeError) as error:
            self.unclaimed.note(str(error))

    def run_of(self, call: AttentionCall) -> ObserverRun | None:
        """Return the run of the module that makes a call, where it is known to call attention."""
        for module in _running_modules():
            observer = self._observers.observer_of(module)
            if observer is not None and (not call.kernel.written_out or observer.written_out):
                return self._run_of(observer)
            if not call.kernel.written_out and not isinstance(module, torch.jit.ScriptModule):
                return None
        return None

    def _run_of(self, observer: Observer) -> ObserverRun:
        for handler in reversed(of_thread.handlers):
            if isinstance(handler, ObserverRun) and handler.observer is observer:
                return handler
        if observer not in self._forward.late:
            self._forward.late[observer] = ObserverRun(observer, observes=True)
        return self._forward.late[observer]

    # Modules that no search has reached

    def expect(self, reached: Iterable[str], idle: Collection[str] | None = None, part: str = "") -> None:
        """Watch the modules that no search has reached. `reached`: the names of those that the last one has; `idle`: of
        all with matrices that it has not seen in use, if it has looked, in the `part` of the model that it has run."""
        searcher = self._searcher()
        assert searcher is not None
        modules, reached = dict(searcher.model.named_modules()), set(reached)
        ran = {modules[name] for name in reached if name in modules}
        if idle is not None:
            holders = {modules[name] for name in idle if name in modules}
            still = {each for each in holders & ran if each in self._idle or each not in self._reached}
            self._idle.difference_update(ran)
            self._idle.update(still)
            inside = f"{part}." if part else ""
            searched = {each for name, each in modules.items() if f"{name}.".startswith(inside)}
            self._accounted.update(searched - holders)
        self._accounted.update(ran)
        self._names |= reached
        self._reached.update(ran)
        running = set(self._forward.reached)  # whose hooks end what they have begun
        self._new.take_off([each for each in self._new.modules if self._is_known(each) and each not in running])
        for module in modules.values():
            if not self._is_known(module):
                self._new.put_on(module)
        self._remember(modules.values())

    def _is_known(self, module: nn.Module) -> bool:
        """Tell whether a search has reached a module and seen its matrices in use."""
        return module in self._reached and module not in self._idle

    def trained_unseen(self) -> list[nn.Module]:
        """Return the modules that have not run and have gradients all the same, for the first time: what runs has used
        their weights."""
        waiting = [each for each in self._new.modules if each not in self._accounted]
        found = [each for each in waiting if any(map(_is_trained, each.parameters(recurse=False)))]
        self._accounted.update(found)
        return found

    def look_for_more(self) -> None:
        """Watch modules that were put into the model since it was searched. Costs a sum over the modules there are."""
        searcher = self._searcher()
        if searcher is None or not self._children or self._sum == self._sum_of_modules():
            return
        modules = list(searcher.model.modules())
        for module in modules:
            if module not in self._known:
                self._new.put_on(module)
        self._remember(modules)

    def _remember(self, modules: Iterable[nn.Module]) -> None:
        self._known = weakref.WeakSet(modules)
        # TorchScript has another kind of mapping, to which nothing is added.
        self._children = [each for module in self._known if isinstance(each := module._modules, dict)]
        self._sum = self._sum_of_modules()

    def _sum_of_modules(self) -> int:
        return sum(map(id, itertools.chain.from_iterable(map(dict.values, self._children))))

    def take_off(self) -> None:
        """Remove all hooks, and what is left of a forward."""
        self.end()
        self._new.take_off()

    def before_new(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Watch a module that runs for the first time in a forward that is trained."""
        self._accounted.add(module)
        forward, searcher = self._forward, self._searcher()
        if forward.begun is None and searcher is not None and not forward.modules:
            if not torch.is_grad_enabled() or torch.is_inference_mode_enabled() or graph_task() >= 0:
                return
            self._entries.put_on(module)  # it is called by itself
            searcher.begin(module, args, kwargs)
        if forward.begun is None or any(
            isinstance(each, ObserverRun) and not each.observer.reads for each in of_thread.handlers
        ):  # in a module that is left alone
            return
        if forward.watch is None:
            self._watch(module)
        forward.reached.append(module)

    def after_new(self, module: nn.Module) -> None:
        """End the watch of a module. It need not be watched again where no call has remained unclaimed."""
        forward = self._forward
        watch = forward.watch
        if watch is None or watch.module is not module:
            return
        self._end_watch(watch)
        if self.unclaimed.calls == watch.calls:
            self._new.take_off([each for each in forward.reached if each not in self._idle])
            if forward.untried is None and self._may_make_queries(module):
                self._search_around()
        forward.reached.clear()

    def _search_around(self) -> None:
        """Search a forward in which a module around a new one may call attention; if it does, watch to the end."""
        searcher = self._searcher()
        version = None if searcher is None else searcher.version
        if self.search_again() and searcher is not None and searcher.version != version:
            self._watch(None)

    def _may_make_queries(self, module: nn.Module) -> bool:
        """Tell whether a new module is a part of one that has run without it, in no other's place, and has matrices."""
        searcher = self._searcher()
        name = None if searcher is None else searcher.name_of(module)
        if (
            searcher is None
            or not name
            or name in self._names
            or all(parameter.ndim < 2 for parameter in module.parameters())
        ):
            return False
        return searcher.model.get_submodule(name.rpartition(".")[0]) in self._reached

    def _watch(self, module: nn.Module | None) -> None:
        run = UnclaimedRun(self.unclaimed)
        self._forward.watch = _Watch(module, run, self.unclaimed.calls)
        of_thread.handlers.append(run)
        searcher = self._searcher()
        if searcher is not None and not _is_compiled_in(module or searcher.model):
            run.follow_products()

    def _end_watch(self, watch: _Watch) -> None:
        self._forward.watch = None
        watch.run.end()
        of_thread.handlers[:] = [each for each in of_thread.handlers if each is not watch.run]


class NewModuleHooks:
    """Hooks on modules that no search has reached, until they run. A copy of the model has none that do anything.

    `compiled`: one that ran in compiled code, where nothing is found. (That is only written there, for code would be
    compiled anew with whatever it reads.)
    """

    def __init__(self, forwards: LiveForwards | None) -> None:
        self._forwards: Callable[[], LiveForwards | None] = (
            weakref.ref(forwards) if forwards is not None else lambda: None
        )
        self.compiled: nn.Module | None = None

    def before(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Hook before the forward; without `kwargs` where another hook of this forward has taken it off."""
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self.compiled = module
            return
        if kwargs is None:
            return
        forwards = self._forwards()
        if forwards is not None and not is_experiment() and unobservable() is None:
            forwards.before_new(module, args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook after the forward."""
        if torch.compiler.is_compiling():
            return
        forwards = self._forwards()
        if forwards is not None and not is_experiment():
            forwards.after_new(module)

    def __deepcopy__(self, memo: object) -> NewModuleHooks:
        return NewModuleHooks(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (NewModuleHooks, (None,))


def _is_alone(model: nn.Module) -> bool:
    """Tell whether no other rank trains the model, and no shard is whole amid a forward."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return False
    return not any(is_dtensor(parameter) for parameter in model.parameters())


def _is_trained(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter has a gradient; on the CPU, one that is not zero, as wrappers give what is not used."""
    gradient = parameter.grad
    return gradient is not None and (gradient.device.type != "cpu" or bool(gradient.any()))


def _is_compiled_in(module: nn.Module) -> bool:
    """Tell whether a module or one in it is compiled, so that its code would be compiled anew where it is followed."""
    compiled = (getattr(each, "_compiled_call_impl", None) is not None for each in module.modules())
    return any(compiled) or any(is_compiled_module(each) for each in module.modules())


_CALL = nn.Module._call_impl.__code__


def _running_modules() -> Iterator[nn.Module]:
    """Yield the modules that this thread is inside of, the innermost first. The stack knows, and no module pays."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back
