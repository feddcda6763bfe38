"""Matrix products: from one token to many, with bias, residual and a fused RMSNorm."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference
from kernels.tile import Tile
from tests import plain_torch
from tests.plain_torch import assert_no_worse_than_torch
from tests.strategies import (
    DEVICE,
    assert_close,
    assert_same_bits,
    dtypes,
    poisoned,
    randn,
    run_twice,
    seeds,
    strided,
)

EPS = 1e-6
tokens = st.integers(0, 20) | st.sampled_from([32, 33, 63, 64, 65, 80])
tiles = st.none() | st.builds(
    Tile,
    BLOCK_M=st.sampled_from([16, 32]),
    BLOCK_N=st.sampled_from([16, 32, 64]),
    BLOCK_K=st.sampled_from([16, 64, 128]),
)
# many tokens take these to `tall_matmul` on Hopper, and to `thin_matmul` elsewhere
TALL = Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64)
WIDE = Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8)


def dot_scale(x: Tensor, weight: Tensor) -> Tensor:
    """Root of the sum of squares of the terms of x @ weight.T: each may be rounded once."""
    return (x.float().square() @ weight.float().square().T).sqrt()


def normed(x: Tensor) -> Tensor:
    """Rows of x at a root mean square of one, in fp32."""
    return x.float() * reference.row_rstd(x, EPS)[:, None]


@given(
    T=tokens,
    N=st.integers(1, 150),
    K=st.integers(1, 300),
    extras=st.sets(st.sampled_from(["bias", "residual", "norm", "out", "strided"])),
    tile=tiles,
    num_sms=st.sampled_from([None, 1, 3]),
    dtype=dtypes,
    seed=seeds,
)
@example(0, 16, 16, set(), None, None, torch.float16, 0)
@example(1, 1, 1, {"bias", "norm"}, None, None, torch.float16, 0)
@example(16, 32, 256, {"norm"}, None, None, torch.float16, 0)  # no masked lane
@example(17, 33, 257, {"norm", "residual"}, None, None, torch.float16, 0)  # one lane over
@example(64, 48, 96, {"norm"}, None, 3, torch.float32, 0)  # a full tile of rows
@example(65, 48, 96, {"norm", "out"}, None, 3, torch.float16, 0)  # one row over: many
@example(65, 150, 64, {"bias", "residual"}, None, None, torch.float16, 0)  # rows out of alignment
@example(70, 200, 136, {"norm", "residual", "strided", "out"}, TALL, 1, torch.float16, 0)
@example(70, 264, 72, {"norm", "bias", "residual"}, WIDE, None, torch.float16, 0)
def test_linear_matches_reference(T, N, K, extras, tile, num_sms, dtype, seed):
    x, weight, bias, residual = randn(seed, (T, K), (N, K), (N,), (T, N), dtype=dtype)
    x = strided(x) if "strided" in extras else x
    bias = bias if "bias" in extras else None
    residual = residual if "residual" in extras else None
    rms_eps = EPS if "norm" in extras else None
    expected = reference.linear(x.float(), weight, bias, residual, rms_eps)
    out = strided(poisoned(expected, dtype)) if "out" in extras else None
    actual = kernels.linear(x, weight, bias, residual, rms_eps, out=out, tile=tile, num_sms=num_sms)
    assert out is None or actual is out
    assert_close(actual, expected, scale=dot_scale(normed(x) if rms_eps else x, weight))


@given(T=tokens, N=st.integers(1, 80), K=st.integers(1, 80), dtype=dtypes, seed=seeds)
def test_linear_adds_in_place_to_its_residual(T, N, K, dtype, seed):
    x, weight, residual = randn(seed, (T, K), (N, K), (T, N), dtype=dtype)
    expected = kernels.linear(x, weight, residual=residual)
    assert_same_bits(kernels.linear(x, weight, residual=residual, out=residual), expected)


@given(T=tokens, N=st.integers(1, 150), K=st.integers(1, 100), dtype=dtypes, seed=seeds)
def test_linear_gives_the_same_bits_on_every_partition(T, N, K, dtype, seed):
    x, weight = randn(seed, (T, K), (N, K), dtype=dtype)
    whole = kernels.linear(x, weight, rms_eps=EPS)
    for num_sms in (1, 3):
        part = kernels.linear(x, weight, rms_eps=EPS, num_sms=num_sms)
        assert_same_bits(part, whole)


@run_twice
@given(
    T=tokens,
    N=st.integers(1, 150),
    K=st.integers(1, 100),
    rms_eps=st.sampled_from([None, EPS]),
    num_sms=st.sampled_from([None, 3]),
    dtype=dtypes,
    seed=seeds,
)
def test_linear_gives_the_same_bits_again(T, N, K, rms_eps, num_sms, dtype, seed):
    x, weight, bias = randn(seed, (T, K), (N, K), (N,), dtype=dtype)
    options = {"num_sms": num_sms, "workspace": kernels.matmul_workspace(DEVICE)}
    first = kernels.linear(x, weight, bias, rms_eps=rms_eps, **options)
    again = kernels.linear(x, weight, bias, rms_eps=rms_eps, **options)
    assert_same_bits(again, first)


def test_norm_of_large_fp16_does_not_overflow():
    """The product with the raw x leaves the range of fp16, that with the normalised x does not."""
    x, weight = randn(0, (2, 64), (32, 64), dtype=torch.float16)
    x, weight = x * 1e4, weight * 50
    expected = reference.linear(x.float(), weight, rms_eps=EPS)
    actual = kernels.linear(x, weight, rms_eps=EPS)
    assert_close(actual, expected, scale=dot_scale(normed(x), weight))


@given(T=st.integers(2, 20), N=st.integers(1, 80), K=st.integers(1, 80), dtype=dtypes, seed=seeds)
def test_norm_works_in_given_scratch(T, N, K, dtype, seed):
    x, weight = randn(seed, (T, K), (N, K), dtype=dtype)
    rstd = torch.full((T + 3,), float("nan"), dtype=torch.float32, device=x.device)
    actual = kernels.linear(x, weight, rms_eps=EPS, rstd=rstd)
    assert_same_bits(actual, kernels.linear(x, weight, rms_eps=EPS))
    assert_same_bits(rstd[:T], kernels.row_rstd(x, EPS))
    assert rstd[T:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 65, 256, 1000, 2048])
@pytest.mark.parametrize("N, K", [(4096, 1024), (1024, 2048), (6144, 4096), (4096, 12288)])
def test_linear_at_model_shapes(num_tokens, N, K, dtype):
    x, weight, residual = randn(0, (num_tokens, K), (N, K), (num_tokens, N), dtype=dtype)
    expected = reference.linear(x.float(), weight, None, residual, EPS)
    actual = kernels.linear(x, weight, None, residual, EPS)
    assert_close(actual, expected, scale=dot_scale(normed(x), weight))
    assert_no_worse_than_torch(actual, plain_torch.linear(x, weight, residual, EPS), expected)
