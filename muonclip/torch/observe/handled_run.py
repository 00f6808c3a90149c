"""Runs of a model or of a module in it, which handle the calls of attention that are made meanwhile."""

from __future__ import annotations

from typing import Any

from muonclip.torch.observe.attention_call import AttentionCall
from muonclip.torch.observe.eager import ScoreTracker
from muonclip.torch.observe.handlers import current_handler, graph_task


class HandledRun:
    """Handles calls of kernels and, between `follow_products` and `end`, attention that is written out."""

    def __init__(self) -> None:
        self.graph_task = graph_task()
        self._tracker: ScoreTracker | None = None

    def attention(self, call: AttentionCall) -> Any:
        """Make a call and return what it returned."""
        raise NotImplementedError

    def follow_products(self) -> None:
        """See attention that is written out, until `end`."""
        self._tracker = ScoreTracker(self._written_out)
        self._tracker.__enter__()

    def end(self) -> None:
        """Look no more."""
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self._tracker = None

    def _written_out(self, call: AttentionCall) -> None:
        if current_handler() is self:
            self.attention(call)
