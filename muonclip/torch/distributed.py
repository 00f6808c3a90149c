"""What scripts on many ranks use besides the optimizers: gradient clipping over meshes, and the plan of the update."""

from muonclip.torch.mesh.clip_grad_norm import clip_grad_norm_
from muonclip.torch.update.execute import Work, execute
from muonclip.torch.update.plan import Distribution, Iteration, Mesh, Placed, plan

__all__ = ["Distribution", "Iteration", "Mesh", "Placed", "Work", "clip_grad_norm_", "execute", "plan"]
