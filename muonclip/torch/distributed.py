"""Functions for scripts on many ranks: gradient clipping over meshes, and the plan of the update."""

from muonclip.torch.mesh.clip_grad_norm import clip_grad_norm_
from muonclip.torch.mesh.mesh import Mesh
from muonclip.torch.update.execute import ParameterStep, execute
from muonclip.torch.update.plan import NewtonSchulzConfig, PlacedParameter, UpdatePlan, plan

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
