"""Activations that are kept for the backward pass in FP8, in host memory, or both, as Kimi K2 keeps them.

K2 (arXiv 2507.20534, §2.4.3) stores the inputs of the up-projections of its experts and of SwiGLU in FP8-E4M3, with a
scale for each 1 × 128 entries, computes what follows from them again, and moves what remains to host memory. Nothing is
computed in FP8: forwards are what they are without, to the bit, and gradients see activations that were rounded.

Shapes: x [..., n] is stored as codes [..., n] and scales [..., ⌈n / 128⌉].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


class Float8Blocks(NamedTuple):
    """A tensor in FP8-E4M3: `codes · scale` of the block, in blocks of 128 along the last axis."""

    codes: Tensor  # float8_e4m3fn [..., n]
    scales: Tensor  # float32 [..., ⌈n / 128⌉]
    dtype: torch.dtype  # of the tensor that was stored

    @classmethod
    def from_tensor(cls, x: Tensor) -> Float8Blocks:
        """Store x [..., n] with the scale max |x| / 448 of each block, rounded to the nearest.

        A block that holds NaN or infinity is NaN when it is read.
        """
        blocks = _blocks(x.float())
        scales = blocks.abs().amax(-1) / _LARGEST
        codes = (blocks / scales.masked_fill(scales == 0, 1)[..., None]).to(torch.float8_e4m3fn)
        return cls(codes.flatten(-2)[..., : x.shape[-1]].contiguous(), scales, x.dtype)

    def to_tensor(self) -> Tensor:
        """Return what is stored, in the dtype that it had."""
        blocks = _blocks(self.codes.float()) * self.scales[..., None]
        return blocks.flatten(-2)[..., : self.codes.shape[-1]].to(self.dtype)


class KeptActivations:
    """Decides how activations are kept from the forward to the backward pass.

    Args:
        float8: Whether `only_input` keeps inputs in FP8.
        offload: Whether what is kept under `moved`, and by `only_input`, is in host memory, by
            `torch.autograd.graph.save_on_cpu`: pinned where there is CUDA, copied in the order of the other work of the
            stream. On a processor this changes nothing.
    """

    def __init__(self, *, float8: bool, offload: bool) -> None:
        self.float8, self.offload = float8, offload

    def only_input(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute `function(x)`; of what this makes x alone is kept, and the rest is made again from what was kept.

        Products of which nothing is needed but their input are not repeated.
        """
        move = save_on_cpu(pin_memory=x.device.type != "cpu")
        pack, unpack = (move.pack_hook, move.unpack_hook) if self.offload else (_same, _same)

        def store(tensor: Tensor) -> Any:
            if not self.float8 or not tensor.is_floating_point():
                return pack(tensor)
            codes, scales, dtype = Float8Blocks.from_tensor(tensor)
            return Float8Blocks(pack(codes), pack(scales), dtype)

        def read(stored: Any) -> Tensor:
            if not isinstance(stored, Float8Blocks):
                return unpack(stored)
            return Float8Blocks(unpack(stored.codes), unpack(stored.scales), stored.dtype).to_tensor()

        with saved_tensors_hooks(store, read):
            return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)

    def moved(
        self, function: Callable[..., Tensor], parameters: Callable[[], Iterable[Tensor]], x: Tensor, *args: Any
    ) -> Tensor:
        """Compute `function(x, *args)`; what is kept of it is in host memory where `offload` says so.

        `parameters`: what stays where it is, and all views of it.
        """
        if not self.offload:
            return function(x, *args)
        move = save_on_cpu(pin_memory=x.device.type != "cpu")

        def store(tensor: Tensor) -> Any:
            # Asked each time: FSDP has other tensors for parameters while a module computes.
            stays = any(_storage(each) == _storage(tensor) for each in parameters())
            return tensor if stays else move.pack_hook(tensor)

        def read(stored: Any) -> Tensor:
            return stored if isinstance(stored, Tensor) else move.unpack_hook(stored)

        with saved_tensors_hooks(store, read):
            return function(x, *args)


@torch.no_grad()
def _storage(tensor: Tensor) -> int:
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.untyped_storage().data_ptr()


def _blocks(x: Tensor) -> Tensor:
    """Cut x [..., n] into [..., blocks, 128], zeros after its end."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _same(x: Any) -> Any:
    return x
