"""The kernel that reads an added tensor says what the definition does.

It runs in Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when it is first imported.
"""

import importlib.util
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from masked_values import ADDED, added_tensors

from muonclip.core import attention_mask as core

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases():
    """Name, dtype -> tensor."""
    tensors = {}
    for dtype in DTYPES:
        for name in ADDED:
            added, _ = added_tensors(3, 2, 19, str(dtype).removeprefix("torch."))[name]
            tensors[name, dtype] = torch.from_numpy(added).to(dtype)
    torch.manual_seed(0)
    wide = torch.randn(3, 2, 150, 9) * 60
    wide[0, 0, 3, 4], wide[1, 1, 140], wide[2, 0, :, 2] = math.nan, -math.inf, -1e9
    tensors["wide", torch.float32], tensors["transposed", torch.float32] = wide.mT.contiguous(), wide.mT
    tensors["one sequence", torch.float32], tensors["row", torch.float32] = wide[:1], wide[1, 1, :, 0]
    tensors["five axes", torch.float32], tensors["a number", torch.float32] = wide[None], wide[1, 1, 3, 5]
    tensors["nothing finite", torch.float32] = torch.full((2, 1, 3, 3), -math.inf)
    return tensors


def serve():
    from triton.runtime import interpreter

    from muonclip.torch.logits.kernels.mask_levels import mask_levels

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_numpy_2_4(tensor, scope):
        """Triton 3.6 takes int() of arrays [1], which NumPy 2.4 refuses."""
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor_for_numpy_2_4
    np.seterr(all="ignore")  # infinities and NaN are part of the tests
    pickle.dump({case: mask_levels(added) for case, added in cases().items()}, sys.stdout.buffer)


@pytest.fixture(scope="module")
def levels():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return pickle.loads(subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=-1).stdout)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_kernel_says_what_the_definition_does(levels, case):
    added = cases()[case]
    expected = torch.stack(core.mask_levels(added.float() if case[1] != torch.float16 else added, xp=torch)).float()
    assert (torch.stack(levels[case]).isinf() == expected.isinf()).all()
    rounding = 0 if case[1] != torch.float16 else torch.finfo(case[1]).eps
    torch.testing.assert_close(torch.stack(levels[case]), expected, rtol=rounding, atol=1e3 * rounding)
    judged = [
        core.highest_masked(each, case[1], xp=torch) for each in (levels[case], core.mask_levels(added, xp=torch))
    ]
    assert torch.equal(added <= judged[0], added <= judged[1])


@pytest.mark.parametrize("of_sequences", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compiles_without_a_gpu(dtype, of_sequences, tmp_path, monkeypatch):
    """The compiler refuses some of what the interpreter takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from muonclip.torch.logits.kernels.mask_levels import _mask_levels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = dict(UNREACHABLE=-1e8, OF_SEQUENCES=of_sequences, BETWEEN_VALUES=-25.0, BETWEEN_GROUPS=-8985.6)
    constants |= dict(BLOCK_ROWS=8, BLOCK_COLUMNS=128)
    types = dict(added=f"*{dtype}", levels="*fp32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(_mask_levels, {name: types.get(name, "i32") for name in _mask_levels.arg_names}, constants)
    assert "st.global" in compile_kernel(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


if __name__ == "__main__":
    serve()
