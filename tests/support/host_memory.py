"""Host memory that torch does not count, so that on a processor too one can see what an offload leaves behind."""

import torch
from torch.autograd.graph import saved_tensors_hooks


class HostMemory(saved_tensors_hooks):
    """Stands where `torch.autograd.graph.save_on_cpu` does, and keeps tensors in NumPy's memory."""

    bytes = 0

    def __init__(self, pin_memory=False):
        super().__init__(self._pack, self._unpack)

    @staticmethod
    def _pack(tensor):
        HostMemory.bytes += tensor.nbytes
        flat = tensor.contiguous().flatten().view(torch.uint8).numpy().copy()
        return flat, tensor.dtype, tensor.shape

    @staticmethod
    def _unpack(packed):
        flat, dtype, shape = packed
        return torch.from_numpy(flat.copy()).view(dtype).view(shape)
