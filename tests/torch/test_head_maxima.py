"""The kernel against a dense float64 probe: exact where it computes, certified where it does not.

It runs in Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when it is first imported.
"""

import importlib.util
import math
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_values import ADDED, FORBIDDING, LOWEST_BIAS, added_tensors
from tiny_attention import dense_max_logits

from muonclip.torch import AttentionMask, measure_max_logits

INF, NAN = math.inf, math.nan
SCALE = 0.3
BLOCKS = dict(_BLOCK_ROWS=64, _BLOCK_COLUMNS=32, _BLOCK_WIDTH=16)
SHAPES = {  # B, H, G, Tq, Tk, d, dtype
    "mha": (2, 3, 3, 17, 17, 5, torch.float32),
    "gqa": (1, 4, 2, 70, 70, 24, torch.float16),
    "mqa": (2, 3, 1, 33, 47, 64, torch.bfloat16),
    "one query": (2, 4, 2, 1, 21, 16, torch.float32),
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def serve():
    """What the process with the interpreter runs: calls in, results or errors out."""
    from triton.runtime import interpreter

    from muonclip.torch.logits.kernels import head_maxima as module

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_numpy_2_4(tensor, scope):
        """Triton 3.6 takes int() of arrays [1], which NumPy 2.4 refuses."""
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor_for_numpy_2_4
    vars(module).update(BLOCKS)
    warnings.simplefilter("error")
    np.seterr(all="ignore")  # infinities and NaN are part of the tests
    while True:
        try:
            q, k, mask, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            mask = AttentionMask(q.shape[-2], k.shape[-2], **mask)
            result = module.head_maxima(q, k, mask=mask, **arguments)
        except Exception as error:
            result = error
        pickle.dump(result, sys.stdout.buffer)
        sys.stdout.flush()


@pytest.fixture(scope="module")
def head_maxima():
    """(q, k, scale, floor, **mask) -> maximum, bound as float64 NumPy arrays."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:

        def call(q, k, *, scale=SCALE, floor=-INF, bounds=None, **mask):
            floor = torch.as_tensor(floor, dtype=torch.float32).expand(q.shape[1])
            pickle.dump((q, k, mask, dict(scale=scale, floor=floor, bounds=bounds)), process.stdin)
            process.stdin.flush()
            result = pickle.load(process.stdout)
            if isinstance(result, Exception):
                raise result
            assert all(part.dtype == torch.float32 for part in result)
            return [part.double().numpy() for part in result]

        yield call
        process.stdin.close()


def exact_maxima(q, k, allowed=True, scale=SCALE):
    """[H] in float64, head by head. `allowed`: broadcastable to [B, H, Tq, Tk]."""
    batch, heads, rows, _ = q.shape
    allowed = np.broadcast_to(allowed, (batch, heads, rows, k.shape[2]))
    keys = [h // (heads // k.shape[1]) for h in range(heads)]
    parts = [(q[:, [h]].double(), k[:, [g]].double(), allowed[:, h], scale) for h, g in enumerate(keys)]
    return np.concatenate([dense_max_logits(*part) for part in parts])


def exact_bounds(q, k, scale=SCALE):
    """[H]: |scale| · max |q_i| · max |k_j|, the larger over the batch, in float64."""
    norms = [np.linalg.norm(x.double().numpy(), axis=-1).max(-1) for x in (q, k)]
    return (abs(scale) * norms[0] * norms[1].repeat(q.shape[1] // k.shape[1], 1)).max(0)


def assert_maxima(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def random_qk(shape="mha", seed=0):
    batch, heads, groups, rows, columns, width, dtype = SHAPES[shape]
    torch.manual_seed(seed)
    return torch.randn(batch, heads, rows, width).to(dtype), torch.randn(batch, groups, columns, width).to(dtype)


def random_masks(batch, heads, rows, columns, seed=0):
    """Name -> the arguments of AttentionMask, and what they allow."""
    generator = np.random.default_rng(seed)
    i, j = np.arange(rows)[:, None], np.arange(columns)[None, :]
    keys = generator.random((batch, columns)) < 0.6
    pairs = generator.random((rows, columns)) < 0.6
    every = generator.random((batch, heads, rows, columns)) < 0.5
    head = generator.random((1, heads, 1, columns)) < 0.6
    queries = generator.random((batch, 1, rows, 1)) < 0.6
    bias = torch.randn(rows, columns) * 50
    window = int(generator.integers(1, 6))

    masks = {
        "none": ({}, True),
        "causal": (dict(is_causal=True), j <= i),
        "window": (dict(window=window), abs(i - j) < window),
        "causal window": (dict(is_causal=True, window=window), (j <= i) & (i - j < window)),
        "wide window": (dict(window=2**40), True),
        "1-d": (dict(attn_mask=torch.from_numpy(keys[0])), keys[0]),
        "2-d": (dict(attn_mask=torch.from_numpy(pairs)), pairs),
        "2-d transposed": (dict(attn_mask=torch.from_numpy(pairs.T.copy()).T), pairs),
        "4-d": (dict(attn_mask=torch.from_numpy(every)), every),
        "padding of keys": (dict(attn_mask=torch.from_numpy(keys)[:, None, None]), keys[:, None, None]),
        "padding of queries": (dict(attn_mask=torch.from_numpy(queries)), queries),
        "of heads": (dict(attn_mask=torch.from_numpy(head)), head),
        "bias": (dict(attn_mask=torch.where(torch.from_numpy(pairs), bias, -INF)), pairs),
        "lowest float32": (
            dict(attn_mask=torch.where(torch.from_numpy(pairs), bias, torch.finfo(torch.float32).min)),
            pairs,
        ),
    }
    offset, reach = int(generator.integers(-columns, columns)), (int(generator.integers(0, 9)), window)
    offsets = generator.integers(-rows, columns, (batch, rows))
    shifts = offsets[:, None, :, None]
    of_queries, of_keys = generator.integers(0, 3, (batch, rows)), generator.integers(0, 3, (1, columns))
    other = (of_queries[:, :, None] == of_keys[:, None, :])[:, None]
    packed = dict(document_ids=torch.from_numpy(of_queries), key_document_ids=torch.from_numpy(of_keys))
    masks |= {
        "bottom right": (dict(is_causal=True, query_offset=columns - rows), j <= i + columns - rows),
        "moved window": (
            dict(window=reach, query_offset=offset),
            (j <= i + offset + reach[1]) & (i + offset - j <= reach[0]),
        ),
        "past alone": (dict(window=(None, 0)), j <= i),
        "causal, a window's future": (dict(is_causal=True, window=(3, 2)), (j <= i) & (i - j <= 3)),
        "other documents": (packed, other),
        "moved by query": (
            dict(packed, is_causal=True, window=(7, None), query_offset=torch.from_numpy(offsets)),
            other & (j <= i + shifts) & (i + shifts - j <= 7),
        ),
    }
    if rows == columns:
        documents = np.sort(generator.integers(0, 4, (batch, rows)), axis=1)
        same = (documents[:, :, None] == documents[:, None, :])[:, None]
        masks["documents"] = (dict(document_ids=torch.from_numpy(documents)), same)
        everything = dict(is_causal=True, window=5, document_ids=torch.from_numpy(documents).to(torch.int32))
        everything["attn_mask"] = torch.from_numpy(every)
        masks["all together"] = (everything, (j <= i) & (i - j < 5) & same & every)
    return masks


MASKED = [
    pytest.param(shape, mask, id=f"{shape}-{mask}")
    for shape, (batch, heads, _, rows, columns, *_) in SHAPES.items()
    for mask in random_masks(batch, heads, rows, columns)
]


@pytest.mark.parametrize(("shape", "mask"), MASKED)
def test_is_exact_under_every_mask(head_maxima, shape, mask):
    q, k = random_qk(shape)
    arguments, allowed = random_masks(*q.shape[:3], k.shape[2])[mask]
    maximum, bound = head_maxima(q, k, **arguments)
    assert_maxima(maximum, exact_maxima(q, k, allowed))
    np.testing.assert_array_equal(bound, maximum)


@pytest.mark.parametrize(("dtype", "masked"), FORBIDDING)
def test_whatever_forbids_a_pair_does_so(head_maxima, dtype, masked):
    """A mask of floats counts as the dense boolean mask of its forbidden pairs; a bias is not a mask."""
    q, k = random_qk("gqa")
    allowed = torch.rand(70, 70) < 0.3
    mask = torch.where(allowed, torch.linspace(LOWEST_BIAS, 0, 70).to(getattr(torch, dtype)), masked)
    expected = exact_maxima(q, k, allowed.numpy())
    assert_maxima(head_maxima(q, k, attn_mask=mask)[0], expected)
    assert (exact_maxima(q, k) > 1.05 * expected).any()


@pytest.mark.parametrize(("name", "dtype"), [(name, "float32") for name in ADDED] + [("of windows", "bfloat16")])
def test_the_whole_mask_says_which_of_its_values_forbid(head_maxima, name, dtype):
    """The device says it, of −100 (Swin) and ALiBi at 30000 positions too."""
    q, k = random_qk("mha")
    added, allowed = added_tensors(2, 3, 17, dtype)[name]
    added = torch.from_numpy(added).to(getattr(torch, dtype))
    maximum, _ = head_maxima(q, k, attn_mask=added[None] if added.ndim == 3 else added)
    assert_maxima(maximum, exact_maxima(q, k, allowed))


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), length=st.integers(1, 80), groups=st.sampled_from([1, 2, 4]), data=st.data())
def test_is_exact_at_every_length(head_maxima, seed, length, groups, data):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 4, length, 7), torch.randn(2, groups, length, 7)
    masks = random_masks(2, 4, length, length, seed)
    arguments, allowed = masks[data.draw(st.sampled_from(sorted(masks)))]
    assert_maxima(head_maxima(q, k, **arguments)[0], exact_maxima(q, k, allowed))


def test_a_row_block_is_left_out_where_its_log_sum_exp_certifies_it(head_maxima):
    """The norm bound of such a block is above the floor; the bound that it leaves is that of the log-sum-exp."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
    q[:, :, 70] *= 6
    scores = SCALE * q @ k.mT
    lse, expected = scores.logsumexp(-1), exact_maxima(q, k)
    floor = lse[:, :, :64].amax().item()
    assert (exact_bounds(q[:, :, :64], k) > floor).all()
    assert (expected > floor).all()
    maximum, bound = head_maxima(q, k, floor=floor, bounds=lse + 1e-3)
    assert_maxima(maximum, expected)
    maximum, bound = head_maxima(q[:, :, :64], k, floor=floor + 1e-3, bounds=lse[:, :, :64] + 1e-3)
    assert (maximum == -INF).all()
    np.testing.assert_allclose(bound, lse[:, :, :64].amax((0, 2)) + 1e-3, rtol=1e-5)
    q[0, 1, 3] = NAN  # of which a kernel may say that its log-sum-exp is 0
    assert np.isnan(head_maxima(q, k, floor=INF, bounds=torch.zeros_like(lse))[0][1])


def test_takes_any_strides(head_maxima):
    torch.manual_seed(0)
    q = torch.randn(2, 9, 33, 4).permute(0, 3, 2, 1)
    fused = torch.randn(2, 33, 2, 18).transpose(1, 2)
    key = fused[..., :9]
    for k in (key, fused[..., 9:], fused[..., ::2], key[:1].expand(2, -1, -1, -1), key.mT.contiguous().mT):
        assert_maxima(head_maxima(q, k, is_causal=True)[0], exact_maxima(q, k, np.tri(33, dtype=bool)))
        np.testing.assert_allclose(head_maxima(q, k, floor=INF)[1], exact_bounds(q, k), rtol=1e-4)


def test_low_precision_is_multiplied_in_float32(head_maxima):
    q, k = (100 * x for x in random_qk("mqa"))
    np.testing.assert_allclose(head_maxima(q, k)[0], exact_maxima(q, k), rtol=1e-6)
    q = q.float() + torch.rand(q.shape)
    np.testing.assert_allclose(head_maxima(q, k)[0], exact_maxima(q, k), rtol=1e-6)
    np.testing.assert_allclose(head_maxima(k, q[:, :1])[0], exact_maxima(k, q[:, :1]), rtol=1e-6)


def test_is_signed(head_maxima):
    q, _ = random_qk()
    q = q.abs()
    assert (exact_maxima(q, -q) < 0).all()
    assert_maxima(head_maxima(q, -q)[0], exact_maxima(q, -q))
    assert_maxima(head_maxima(q, q, scale=-SCALE)[0], exact_maxima(q, q, scale=-SCALE))


def test_no_allowed_pair_gives_minus_infinity(head_maxima):
    q, k = random_qk()
    nothing = torch.zeros(1, 3, 1, 17, dtype=torch.bool)
    assert [list(part) for part in head_maxima(q, k, attn_mask=nothing)] == [[-INF] * 3] * 2
    one = nothing.clone()
    one[0, 1, 0, 4] = True
    maximum, bound = head_maxima(q, k, attn_mask=one)
    assert_maxima(maximum, exact_maxima(q, k, one.numpy()))
    assert list(np.isfinite(maximum)) == [False, True, False]
    np.testing.assert_array_equal(bound, maximum)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_to_see_gives_minus_infinity(head_maxima, empty):
    q, k = random_qk()
    q, k = {"batch": (q[:0], k[:0]), "queries": (q[:, :, :0], k), "keys": (q, k[:, :, :0])}[empty]
    assert [list(part) for part in head_maxima(q, k)] == [[-INF] * 3] * 2


@pytest.mark.parametrize("row", [0, 1, 63, 64, 68])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("floor", [-INF, 1e9])
def test_non_finite_logits_are_kept(head_maxima, row, value, floor):
    torch.manual_seed(row)
    q, k = torch.randn(2, 2, 70, 3), torch.randn(2, 1, 41, 3)
    q[1, 1, row, 0] = value
    maximum, bound = head_maxima(q, k, floor=floor)
    np.testing.assert_array_equal([maximum[1], bound[1]], [value, value])
    assert_maxima(maximum[0], exact_maxima(q, k)[0] if floor == -INF else -INF)


@pytest.mark.parametrize("column", [0, 31, 32, 38])
def test_non_finite_keys_count_where_they_are_allowed(head_maxima, column):
    torch.manual_seed(column)
    q, k = torch.randn(1, 2, 40, 3), torch.randn(1, 2, 40, 3)
    k[0, 1, column] = NAN
    keep = torch.arange(40) != column
    assert list(np.isnan(head_maxima(q, k, floor=1e9)[0])) == [False, True]
    assert list(np.isnan(head_maxima(q[:, :, :column], k, is_causal=True)[0])) == [False, False]
    assert_maxima(head_maxima(q, k, attn_mask=keep)[0], exact_maxima(q, k.nan_to_num(), keep.numpy()))


def test_everything_not_a_number_and_overflow(head_maxima):
    q = torch.full((1, 2, 3, 2), NAN)
    assert np.isnan(head_maxima(q, q)).all()
    large = torch.full((1, 2, 3, 2), 1e20)
    assert head_maxima(large, large, scale=1.0, floor=3e38)[0].tolist() == [INF, INF]
    assert head_maxima(large, -large, scale=1.0, floor=3e38)[0].tolist() == [-INF, -INF]
    assert np.isnan(head_maxima(q[:, :1], large[:, :1], floor=NAN)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_computes_nothing_where_the_bound_certifies(head_maxima, shape):
    q, k = random_qk(shape)
    certificate = exact_bounds(q, k)
    for scale in (SCALE, -SCALE):
        maximum, bound = head_maxima(q, k, scale=scale, floor=certificate * 1.0001, is_causal=True)
        assert (maximum == -INF).all()
        assert (bound >= certificate).all()
        assert (bound <= certificate * 1.0001).all()
    maximum, _ = head_maxima(q, k, floor=certificate * 0.9999)
    assert (maximum > -INF).all()


def test_the_bound_holds_although_it_is_rounded(head_maxima):
    """q = k: the largest logit is the bound itself."""
    for seed in range(5):
        torch.manual_seed(seed)
        q = torch.randn(1, 8, 9, 64)
        maximum, bound = head_maxima(q, q, floor=INF)
        assert (maximum == -INF).all()
        assert (bound >= exact_maxima(q, q)).all()
        assert (bound >= head_maxima(q, q)[0]).all()


def test_the_bound_holds_where_squares_underflow(head_maxima):
    q, k = torch.full((1, 1, 3, 4), 1e-24), torch.full((1, 1, 3, 4), 1e18)
    maximum, bound = head_maxima(q, k, scale=1.0, floor=0.0)
    np.testing.assert_allclose(maximum, 4e-6, rtol=1e-6)
    assert bound >= maximum


def test_only_loud_heads_are_computed(head_maxima):
    q, k = random_qk("gqa")
    q = q * torch.tensor([0.1, 30, 0.2, 10])[:, None, None]
    exact = exact_maxima(q, k)
    maximum, bound = head_maxima(q, k, floor=20.0)
    assert list(exact > 20) == [False, True, False, True]
    assert_maxima(maximum[[1, 3]] / 100, exact[[1, 3]] / 100)
    assert list(maximum[[0, 2]]) == [-INF, -INF]
    assert (exact <= bound * (1 + 1e-6)).all()
    assert (bound[[0, 2]] <= 20).all()


def test_each_head_has_its_own_floor(head_maxima):
    q, k = random_qk()
    maximum, _ = head_maxima(q, k, floor=[INF, -INF, INF])
    assert_maxima(maximum, np.where([False, True, False], exact_maxima(q, k), -INF))


def test_only_loud_row_blocks_are_computed(head_maxima):
    """The second block is loud and negative; the first, positive and quiet, must not be seen."""
    q, k = torch.full((1, 1, 128, 4), 0.1), torch.ones(1, 1, 5, 4)
    q[:, :, 64:] = -10
    maximum, bound = head_maxima(q, k, scale=1.0, floor=1.0)
    assert maximum == -40
    np.testing.assert_allclose(bound, 0.4, rtol=1e-4)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), length=st.integers(1, 80), loudness=st.floats(-2, 2), mask=st.sampled_from(range(5)))
def test_is_exact_above_the_floor_and_certified_below(head_maxima, seed, length, loudness, mask):
    torch.manual_seed(seed)
    q = torch.randn(2, 4, length, 5) * 10 ** (loudness * torch.rand(2, 4, length, 1))
    k = torch.randn(2, 2, length, 5)
    floor = exact_bounds(q, k) * np.random.default_rng(seed).random(4)
    arguments, allowed = list(random_masks(2, 4, length, length, seed).values())[mask]
    maximum, bound = head_maxima(q, k, floor=floor, **arguments)
    exact = exact_maxima(q, k, allowed)
    for h in range(4):
        assert exact[h] <= bound[h] + 2e-6 * abs(bound[h])
        if maximum[h] > floor[h] or exact[h] > floor[h] * (1 + 1e-5):
            np.testing.assert_allclose(maximum[h], exact[h], rtol=1e-5)
            assert bound[h] == maximum[h]
        else:
            assert bound[h] <= np.float32(floor[h])


@pytest.mark.parametrize(("q_dtype", "k_dtype"), [(torch.float64, torch.float64), (torch.float32, torch.float64)])
def test_float64_is_refused(head_maxima, q_dtype, k_dtype):
    q, k = random_qk()
    message = f"q is {q_dtype}, k is {k_dtype}; the kernel takes float32"
    with pytest.raises(ValueError, match=message):
        head_maxima(q.to(q_dtype), k.to(k_dtype))


@pytest.mark.parametrize(("dtype", "capability"), [("bf16", 90), ("fp32", 90), ("fp32", 100)])
@pytest.mark.parametrize("of_each_query", [False, True])
def test_compiles_without_a_gpu_and_keeps_nan_and_float32(dtype, capability, of_each_query, tmp_path, monkeypatch):
    """The compiler refuses some of what the interpreter takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from muonclip.torch.logits.kernels.head_maxima import _head_maxima

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = _head_maxima.arg_names
    constants = dict(WIDTH=80, q_width=1, k_width=1, document_row=1, blocks=1)
    if not of_each_query:
        constants["offsets"] = None
    constants |= {name.removeprefix("_"): size for name, size in BLOCKS.items()}
    types = dict(q=f"*{dtype}", k=f"*{dtype}", attn_mask="*fp16", scale="fp32")
    types |= dict.fromkeys(["documents", "key_documents", "offsets"], "*i64")
    types |= dict.fromkeys(["row_bounds", "floor", "highest_masked", "maxima", "bounds"], "*fp32") | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(_head_maxima, {name: types.get(name, "i32") for name in names}, constants)
    assembly = compile_kernel(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert "max.NaN.f32" in assembly
    assert "tf32" not in assembly


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="The compiled kernel needs a GPU")
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(
    "mask", ["none", "causal", "causal window", "documents", "4-d", "lowest float32", "moved by query"]
)
def test_is_exact_when_compiled(mask, dtypes):
    from muonclip.torch.logits.kernels.head_maxima import head_maxima

    torch.manual_seed(0)
    q, k = (torch.randn(2, heads, 300, 80).to(dtype) for heads, dtype in zip((4, 2), dtypes, strict=True))
    q[:, 1] *= 100
    arguments, allowed = random_masks(2, 4, 300, 300)[mask]
    arguments = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    arguments = AttentionMask(300, 300, **arguments)
    exact = exact_maxima(q, k, allowed)
    q, k = q.cuda(), k.cuda()
    for floor, computed in ((torch.full((4,), -INF), [0, 1, 2, 3]), (torch.full((4,), 150.0), [1])):
        maximum, bound = head_maxima(q, k, scale=SCALE, mask=arguments, floor=floor.cuda())
        np.testing.assert_allclose(maximum.cpu()[computed], exact[computed], rtol=1e-5)
        assert maximum.isfinite().sum() == len(computed)
        assert (bound.cpu().numpy() >= exact - 1e-5 * abs(exact)).all()
    reference = measure_max_logits(q, k, scale=SCALE, mask=arguments)
    torch.testing.assert_close(maximum[1], reference[1], rtol=1e-5, atol=0)
    q[0, 2, 7] = NAN
    maximum, _ = head_maxima(q, k, scale=SCALE, mask=arguments, floor=torch.full((4,), 150.0, device="cuda"))
    assert maximum.isnan().tolist() == [False, False, True, False]


if __name__ == "__main__":
    serve()
