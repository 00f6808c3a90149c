"""Hooks that say which module of a model is running, and so whose attention is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from muonclip.torch.logits import is_exporting, unobservable
from muonclip.torch.observe.handlers import drop_handlers, of_thread
from muonclip.torch.observe.observer import Observer, ObserverRun

_OBSERVER = "_qk_observer"  # the attribute of a module that has its Observer


class Hooks:
    """A pair of hooks on any number of modules, under one key in all of them: compiled code asks for a hook's key, so
    with keys of their own layers could not share their code."""

    def __init__(self, key: int, before: Callable[..., Any], after: Callable[..., Any], *, with_kwargs: bool) -> None:
        self.key, self.before, self.after, self.with_kwargs = key, before, after, with_kwargs
        self.modules: dict[nn.Module, None] = {}

    def put_on(self, module: nn.Module) -> None:
        """Add the pair to a module; `after` is called even if the module raises."""
        self.modules[module] = None
        module._forward_pre_hooks[self.key] = self.before
        if self.with_kwargs:
            module._forward_pre_hooks_with_kwargs[self.key] = True
        module._forward_hooks[self.key] = self.after
        module._forward_hooks_always_called[self.key] = True

    def take_off(self, modules: Iterable[nn.Module] | None = None) -> None:
        """Remove the pair from some modules, or from all."""
        for module in [*self.modules] if modules is None else modules:
            for hooks in (
                module._forward_pre_hooks,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks,
                module._forward_hooks_always_called,
            ):
                hooks.pop(self.key, None)
            self.modules.pop(module, None)


class ObserverHooks(Hooks):
    """Hooks by which a module's observer handles the attention calls while the module runs."""

    def __init__(self) -> None:
        super().__init__(-2, enter, leave, with_kwargs=False)

    def attach(self, observers: Mapping[nn.Module, Observer]) -> None:
        """Let each observer see what its module calls, and no other. Runs that are under way go on."""
        gone = [module for module in self.modules if module not in observers]
        self.deactivate(gone)
        self.take_off(gone)
        for module, observer in observers.items():
            there = self.observer_of(module)
            if there is not None:
                there.become(observer)
                continue
            observer.owner = self
            module.__dict__[_OBSERVER] = observer
            self.put_on(module)

    def observer_of(self, module: nn.Module) -> Observer | None:
        """Return the observer of a module, if it is one of these."""
        observer = module.__dict__.get(_OBSERVER)
        return observer if observer is not None and observer.owner is self else None

    def drop(self) -> None:
        """End the runs in this thread that an interrupted forward has left."""
        for run in drop_handlers(self):
            assert isinstance(run, ObserverRun)
            run.end()

    def deactivate(self, modules: Iterable[nn.Module] | None = None) -> None:
        """Let the runs of modules that are under way, in other threads as well, observe nothing more."""
        for module in self.modules if modules is None else modules:
            observer = self.observer_of(module)
            if observer is not None:
                observer.active = False

    def take_off(self, modules: Iterable[nn.Module] | None = None) -> None:
        """Remove the observers from some modules, or from all, and end their runs in this thread."""
        if modules is None:
            self.drop()
        chosen = [*self.modules] if modules is None else [*modules]
        for module in chosen:
            observer = self.observer_of(module)
            if observer is not None:
                del module.__dict__[_OBSERVER]
                for run in [each for each in of_thread.handlers if isinstance(each, ObserverRun)]:
                    if run.observer is observer:
                        of_thread.handlers.remove(run)
                        run.end()
        super().take_off(chosen)


def enter(module: nn.Module, args: Any) -> None:
    """Begin a run of an observed module."""
    observer = module.__dict__.get(_OBSERVER)
    if observer is None or is_exporting():  # a copy of an observed module, or nothing to observe
        return
    # What counts is how the module is entered: an autograd.Function has gradients off for what it runs.
    trains = torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())
    reason = unobservable()
    if trains and reason is not None:
        for statistic in observer.statistics:
            statistic.leave_out(reason)
    run = ObserverRun(observer, observes=trains and reason is None)
    of_thread.handlers.append(run)
    # Compiled code cannot be followed: nothing is observed then.
    if observer.written_out and reason is None and not torch.compiler.is_compiling():
        run.follow_products()


def leave(module: nn.Module, args: Any, output: Any) -> None:
    """End a run of an observed module, if that was not done."""
    observer, handlers = module.__dict__.get(_OBSERVER), of_thread.handlers
    run = handlers[-1] if handlers else None
    if observer is None or not isinstance(run, ObserverRun) or run.observer is not observer:
        return
    handlers.pop()
    if not torch.compiler.is_compiling():
        run.end()
    if output is not None:  # as it is where the module has raised
        run.check_calls()
