"""Steps on gradients that are drawn by step and position, the same on shards as on whole parameters."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def train(model, optimizer, steps, draw=torch.float32):
    """Step on gradients that are drawn in the dtype `draw` and have that of their parameter."""
    for step in steps:
        for index, parameter in enumerate(model.parameters()):
            seed = torch.Generator().manual_seed(1000 * step + index)
            gradient = torch.randn(parameter.shape, generator=seed, dtype=draw).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
