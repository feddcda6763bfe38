"""RMSNorm, alone and behind the residual add."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kernels
from kernels import reference
from tests.strategies import (
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
tokens = st.integers(0, 24)
widths = st.integers(1, 2048)
gains = st.sampled_from([1e-3, 1.0, 1e3])  # eps decides, does not, and squares leave fp16's range


@given(T=tokens, N=widths, gain=gains, dtype=dtypes, spread=st.booleans(), seed=seeds)
@example(T=1, N=512, gain=1.0, dtype=torch.float16, spread=False, seed=0)  # N == BLOCK_N
@example(T=2, N=513, gain=1.0, dtype=torch.float16, spread=True, seed=0)  # one lane over
@example(T=0, N=64, gain=1.0, dtype=torch.float32, spread=False, seed=0)
def test_rms_norm_matches_reference(T, N, gain, dtype, spread, seed):
    x, weight = randn(seed, (T, N), (N,), dtype=dtype)
    x = strided(x * gain) if spread else x * gain
    expected = reference.rms_norm(x.float(), weight, EPS)
    assert_close(kernels.rms_norm(x, weight, EPS), expected)
    out = strided(poisoned(expected, dtype))
    assert kernels.rms_norm(x, weight, EPS, out=out) is out
    assert_close(out, expected)


@given(T=tokens, N=widths, gain=gains, dtype=dtypes, spread=st.booleans(), seed=seeds)
@example(T=3, N=1, gain=1.0, dtype=torch.float32, spread=True, seed=0)
@example(T=0, N=64, gain=1.0, dtype=torch.float32, spread=False, seed=0)
def test_add_rms_norm_matches_reference(T, N, gain, dtype, spread, seed):
    x, residual, weight = randn(seed, (T, N), (T, N), (N,), dtype=dtype)
    x, residual = x * gain, strided(residual) if spread else residual
    summed = x.float() + residual.float()
    expected = reference.rms_norm(summed, weight, EPS)
    before = x.clone()
    out = strided(poisoned(expected, dtype)) if spread else None
    actual = kernels.add_rms_norm(x, residual, weight, EPS, out=out)
    assert out is None or actual is out
    assert_close(actual, expected)
    assert_same_bits(residual, summed.to(dtype))
    assert_same_bits(x, before)


@given(T=tokens, N=widths, gain=gains, dtype=dtypes, spread=st.booleans(), seed=seeds)
@example(T=0, N=64, gain=1.0, dtype=torch.float32, spread=False, seed=0)
def test_row_rstd_matches_reference(T, N, gain, dtype, spread, seed):
    (x,) = randn(seed, (T, N), dtype=dtype)
    x = strided(x * gain) if spread else x * gain
    torch.testing.assert_close(
        kernels.row_rstd(x, EPS), reference.row_rstd(x.double(), EPS), rtol=1e-5, atol=0
    )


@run_twice
@given(T=tokens, N=widths, dtype=dtypes, seed=seeds)
def test_norms_give_the_same_bits_again(T, N, dtype, seed):
    x, residual, weight = randn(seed, (T, N), (T, N), (N,), dtype=dtype)
    for launch in (
        lambda: kernels.rms_norm(x, weight, EPS),
        lambda: kernels.add_rms_norm(x, residual.clone(), weight, EPS),
        lambda: kernels.row_rstd(x, EPS, out=poisoned(x[:, 0], torch.float32)),
    ):
        first = launch()
        assert_same_bits(launch(), first)


@given(N=widths, dtype=dtypes, seed=seeds)
def test_norm_may_write_over_its_input(N, dtype, seed):
    x, weight = randn(seed, (3, N), (N,), dtype=dtype)
    expected = kernels.rms_norm(x, weight, EPS)
    assert_same_bits(kernels.rms_norm(x, weight, EPS, out=x), expected)


@given(T=st.integers(1, 8), N=widths, dtype=dtypes, seed=seeds)
def test_norm_of_a_row_does_not_depend_on_the_others(T, N, dtype, seed):
    x, weight = randn(seed, (T, N), (N,), dtype=dtype)
    assert_same_bits(
        kernels.rms_norm(x, weight, EPS)[T - 1 :], kernels.rms_norm(x[T - 1 :], weight, EPS)
    )
