"""Calls of attention by modules that no search has seen to call it.

For a call that nobody claims the forward is traced, amid it, in a copy; if that shows who calls, it is observed as any
other. What remains is left for the step to say.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from muonclip.torch.logits import Unobservable
from muonclip.torch.observe.attention_call import AttentionCall
from muonclip.torch.observe.handled_run import HandledRun
from muonclip.torch.observe.handlers import AttentionCallHandler


class Searcher(Protocol):
    """Searches the forward that this thread is in, while it runs."""

    def search_again(self) -> bool | None:
        """Search it in a way that was not tried yet. Returns False where there is none left, and None where it is not
        known what it began with."""
        ...

    def run_of(self, call: AttentionCall) -> AttentionCallHandler | None:
        """Return the run of the module that makes a call, where it is known to call attention."""
        ...


class Unclaimed:
    """The calls of a model that no module makes which is known to call attention, and what else the next step has to
    say of its forwards: `problem`, the first, in a sentence, or "". `searcher`: who may find out more."""

    def __init__(self, searcher: Searcher | None = None) -> None:
        self.calls = 0
        self.left_out: Unobservable | None = None
        self.problem = ""
        self._searcher = weakref.ref(searcher) if searcher is not None else lambda: None

    def note(self, problem: str) -> None:
        """Leave a problem to the next step."""
        self.problem = self.problem or problem

    def search_again(self) -> bool | None:
        """Search the forward that this thread is in once more, as `Searcher` does."""
        searcher = self._searcher()
        return None if searcher is None else searcher.search_again()

    def claim(self, call: AttentionCall) -> AttentionCallHandler | None:
        """Return the run of the module that makes a call, which a search may show; None if it does not."""
        searcher = self._searcher()
        if searcher is None:
            return None
        run = searcher.run_of(call)
        while run is None and searcher.search_again():
            run = searcher.run_of(call)
        return run


class UnclaimedRun(HandledRun):
    """One forward of a model, or of a module in it that no search has reached, whose calls nobody has claimed."""

    observes = True

    def __init__(self, owner: Unclaimed) -> None:
        super().__init__()
        self.owner: object = owner
        self.unclaimed = owner

    def attention(self, call: AttentionCall) -> Any:
        """Make a call."""
        # Compiled code stays as it is: such a call is only counted.
        run = None if torch.compiler.is_compiling() else self.unclaimed.claim(call)
        if run is not None:  # without gradients it is not trained, or computed again with them
            return run.attention(call) if torch.is_grad_enabled() else call.run()
        self.unclaimed.calls += 1
        return call.run()

    def leave_out(self, reason: Unobservable) -> None:
        """Remember why a call was not observed, if gradients may come from it."""
        if reason.trains:
            self.unclaimed.left_out = reason
            self.unclaimed.calls += 1
