"""Times matrix products below all of torch's interfaces."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class ProductTimes(TorchDispatchMode):
    """Sums the processor time that this thread spends in operations whose FLOPs torch counts: matrix products.

    The mode itself takes time around every operation, which is not in `seconds`; so what else is done is to be timed in
    another run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._overloadpacket not in flop_registry:
            return func(*args, **(kwargs or {}))
        begun = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.seconds += time.thread_time() - begun
        return result
