"""Functions for scripts on many ranks: gradient clipping over meshes, and the plan of the update."""

from muonclip.torch.mesh.clip_grad_norm import clip_grad_norm_
from muonclip.torch.mesh.mesh import Mesh
from muonclip.torch.update.execute import execute
from muonclip.torch.update.plan import UpdatePlan, plan
from muonclip.torch.update.rounds import NewtonSchulzConfig, PlacedParameter
from muonclip.torch.update.stages import ParameterStep

__all__ = [
    "Mesh",
    "NewtonSchulzConfig",
    "ParameterStep",
    "PlacedParameter",
    "UpdatePlan",
    "clip_grad_norm_",
    "execute",
    "plan",
]
