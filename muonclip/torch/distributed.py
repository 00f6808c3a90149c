"""Functions for scripts on many ranks: gradient clipping over meshes, and the plan of the update."""

from muonclip.torch.mesh import Mesh, clip_grad_norm_
from muonclip.torch.update import NewtonSchulzConfig, ParameterStep, PlacedParameter, UpdatePlan, execute, plan

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
