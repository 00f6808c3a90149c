"""The numbers in a checkpoint's states: none that nothing can go on from.

A momentum or a mean of squares that is not finite makes its weight NaN at the next step, or never lets it move again;
a mean of squares below zero has no root.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from muonclip.core.state_storage import absmax_of
from muonclip.core.update_rule import MuonRule
from muonclip.torch.mesh import local_part
from muonclip.torch.optimizer.loading import SavedParameter


@torch.no_grad()
def check_saved_values(saved: Iterable[SavedParameter], rule: MuonRule) -> None:
    """Raise ValueError, naming parameter and state, for one that holds such a number. Each state is read once.

    Each rank looks at its own shards and waits for no other: only some may be loading.
    """
    of_muon = {each.name for each in rule.states}
    absmax = {absmax_of(name) for name in of_muon}
    together: defaultdict[tuple[torch.device, torch.dtype], list[tuple[str, str, Tensor]]] = defaultdict(list)
    for each in saved:
        for part in {"muon": of_muon | absmax, "adamw": ("exp_avg", "exp_avg_sq")}.get(each.use, ()):
            if part in each.state:
                value = local_part(each.state[part]).detach()
                value = value.float() if value.dtype.itemsize < 2 else value
                if value.numel():
                    together[value.device, value.dtype].append((each.name, part, value))
    for held in together.values():
        extremes = [torch.stack(torch.aminmax(value)) for *_, value in held]  # NaN where there is one
        for (name, part, _), (low, high) in zip(held, torch.stack(extremes).tolist(), strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                found = low if not math.isfinite(low) else high
                raise ValueError(
                    f"{part} of {name!r} in the checkpoint holds {found}: it is of a run that had diverged. Nothing "
                    f"was loaded. {_INSTEAD}"
                )
            if part == "exp_avg_sq" and low < 0:
                raise ValueError(
                    f"{part} of {name!r} in the checkpoint holds {low}, and is a mean of squares. Nothing was loaded. "
                    f"{_INSTEAD}"
                )
            if part in absmax and low < 0:
                raise ValueError(
                    f"{part} of {name!r} in the checkpoint holds {low}, and is a largest absolute value. Nothing was "
                    f"loaded. {_INSTEAD}"
                )


_INSTEAD = (
    "Load an earlier checkpoint; or, if the weights are sound, take the state of this parameter out of the checkpoint, "
    "and it begins anew."
)
