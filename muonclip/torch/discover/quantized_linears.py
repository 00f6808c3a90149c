"""Linears that multiply by rounded values (float8, MX, fake-quantised): the copy multiplies by the values themselves.

They round their input and their weight in each forward, and train the weight in high precision. Which rows feed which
heads shows without rounding, exactly; the training observes queries and keys as the rounded products make them.
Rounding to scales that are found anew in each forward commutes with scaling, but for the rounding itself. Where the
scales of a weight are fixed or learned it does not, and no factor of its rows would be one of its heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from muonclip.torch.heads import QKProjection

_LINEARS = frozenset(
    (
        "torchao.float8.float8_linear.Float8Linear",
        "torchao.prototype.float8nocompile.float8nocompile_linear.Float8LinearNoCompile",
        "torchao.prototype.blockwise_fp8_training.linear.Float8BlockwiseLinear",
        "torchao.prototype.moe_training.mxfp8_linear.MXFP8Linear",
        "torchao.prototype.moe_training.nvfp4_training.nvfp4_training.NVFP4Linear",
        "torchao.prototype.quantized_training.int8_mixed_precision.Int8MixedPrecisionTrainingLinear",
        "torchao.prototype.qat.mx.MXFakeQuantizedLinear",
        "torchao.prototype.qat.nvfp4.NVFP4FakeQuantizedLinear",
        "torchao.quantization.qat.linear.FakeQuantizedLinear",
    )
)
"""Classes by their full names, of which no module is imported for this."""


class UnroundedLinear(nn.Linear):
    """In the place of a linear that rounds: multiplies by the weight in the dtype of the input, as those do."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.T + bias, [..., out]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def unrounded_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class for the copies of modules of a class: the same, unless it is a linear that rounds."""
    rounds = issubclass(kind, nn.Linear) and any(_full_name(each) in _LINEARS for each in kind.__mro__)
    return UnroundedLinear if rounds else kind


def with_fixed_scales(projection: QKProjection) -> str:
    """Say which weight of a projection is rounded by scales that are fixed or learned; "" where none is.

    In words for a refusal, without its end.
    """
    for rows in projection.scaled_parts():
        kind, quantizer = type(rows.module).__name__, getattr(rows.module, "weight_fake_quantizer", None)
        if not getattr(getattr(quantizer, "config", None), "is_dynamic", True):
            return (
                f"its projection, a {kind}, rounds its weight by scales that are fixed or learned, so what it "
                "multiplies by does not follow the weight when rows are scaled; fake-quantise it with is_dynamic=True, "
                "or leave it out of quantize_"
            )
    return ""


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
