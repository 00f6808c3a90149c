"""The optimizers: who updates each parameter, as which matrices, with which options; their state and their step.

`Muon` and `MuonClip` are `MatrixOptimizer`s. How matrices travel and are iterated is `update`'s; how logits are
measured and heads scaled, `clip`'s.
"""

from muonclip.torch.optimizer.layouts import default_layout
from muonclip.torch.optimizer.muonclip import Muon, MuonClip
from muonclip.torch.optimizer.plan import Plan, PlannedParameter, plan_module

__all__ = [
    "Muon",
    "MuonClip",
    "Plan",
    "PlannedParameter",
    "default_layout",
    "plan_module",
]
