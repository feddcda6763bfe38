"""The fused MLP: norm, gate/up, SiLU * up, down, residual."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

import kernels
from kernels import reference
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
from tests.test_linear import dot_scale, normed, tiles, tokens

EPS = 1e-6


def gate_up_scale(x: Tensor, weight: Tensor) -> Tensor:
    """How far silu(gate) * up moves with one rounding of each term of gate and up."""
    gate, up = (normed(x) @ weight.float().T).chunk(2, dim=-1)
    gate_scale, up_scale = dot_scale(normed(x), weight).chunk(2, dim=-1)
    steepest = 1.1  # of silu
    return steepest * gate_scale * up.abs() + up_scale * silu(gate).abs()


def mlp_scale(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """The same for the MLP, whose intermediate is rounded too."""
    act = reference.gate_up(x.float(), gate_up_weight, EPS)
    act_scale = torch.maximum(gate_up_scale(x, gate_up_weight), act.abs())
    return dot_scale(act_scale, down_weight)


@given(
    T=tokens,
    N=st.integers(1, 200),
    intermediate=st.integers(1, 100),
    spread=st.booleans(),
    tile=tiles,
    num_sms=st.sampled_from([None, 1, 3]),
    dtype=dtypes,
    seed=seeds,
)
@example(0, 16, 16, False, None, None, torch.float16, 0)
@example(1, 1, 1, False, None, None, torch.float32, 0)
@example(16, 256, 32, False, None, None, torch.float16, 0)  # no masked lane
@example(65, 64, 33, True, None, 3, torch.float16, 0)  # one row over a tile
def test_gate_up_matches_reference(T, N, intermediate, spread, tile, num_sms, dtype, seed):
    x, weight = randn(seed, (T, N), (2 * intermediate, N), dtype=dtype)
    x, weight = strided(x) if spread else x, weight * N**-0.5
    expected = reference.gate_up(x.float(), weight, EPS)
    out = strided(poisoned(expected, dtype)) if spread else None
    actual = kernels.gate_up(x, weight, EPS, out=out, tile=tile, num_sms=num_sms)
    assert out is None or actual is out
    assert_close(actual, expected, scale=gate_up_scale(x, weight))


@given(
    T=tokens,
    N=st.integers(1, 100),
    intermediate=st.integers(1, 64),
    buffers=st.sets(st.sampled_from(["act", "in place", "out"])),
    num_sms=st.sampled_from([None, 3]),
    dtype=dtypes,
    seed=seeds,
)
@example(0, 16, 16, {"act"}, None, torch.float16, 0)
@example(65, 32, 32, {"act", "in place"}, 3, torch.float16, 0)
def test_mlp_matches_reference(T, N, intermediate, buffers, num_sms, dtype, seed):
    x, gate_up_weight, down_weight = randn(
        seed, (T, N), (2 * intermediate, N), (N, intermediate), dtype=dtype
    )
    gate_up_weight = gate_up_weight * N**-0.5
    weights = (gate_up_weight, down_weight, EPS)
    expected = reference.mlp(x.float(), *weights)
    act = reference.gate_up(x.float(), gate_up_weight, EPS)
    scale = mlp_scale(x, gate_up_weight, down_weight)
    scratch = poisoned(act, dtype) if "act" in buffers else None
    out = poisoned(expected, dtype) if "out" in buffers else None
    out = x if "in place" in buffers else out
    actual = kernels.mlp(x, *weights, act=scratch, out=out, num_sms=num_sms)
    assert out is None or actual is out
    assert_close(actual, expected, scale=scale)


@given(T=tokens, N=st.integers(1, 100), dtype=dtypes, seed=seeds)
def test_gate_up_gives_the_same_bits_on_every_partition(T, N, dtype, seed):
    x, weight = randn(seed, (T, N), (160, N), dtype=dtype)
    whole = kernels.gate_up(x, weight, EPS)
    assert_same_bits(kernels.gate_up(x, weight, EPS, num_sms=3), whole)


@run_twice
@given(
    T=tokens,
    N=st.integers(1, 100),
    intermediate=st.integers(1, 64),
    num_sms=st.sampled_from([None, 3]),
    dtype=dtypes,
    seed=seeds,
)
def test_gate_up_and_mlp_give_the_same_bits_again(T, N, intermediate, num_sms, dtype, seed):
    x, gate_up, down = randn(seed, (T, N), (2 * intermediate, N), (N, intermediate), dtype=dtype)
    options = {"num_sms": num_sms, "workspace": kernels.matmul_workspace(DEVICE)}
    for launch in (
        lambda: kernels.gate_up(x, gate_up * N**-0.5, EPS, **options),
        lambda: kernels.mlp(x, gate_up * N**-0.5, down, EPS, **options),
    ):
        first = launch()
        assert_same_bits(launch(), first)


def test_silu_of_large_gates_saturates():
    """exp(-gate) overflows to inf, or falls to 0: silu is then 0, or the gate itself."""
    x = torch.tensor([[1.0, -1.0]], device=DEVICE)
    weight = torch.tensor([[-200.0, 0], [200.0, 0], [1.0, 0], [1.0, 0]], device=DEVICE)
    actual = kernels.gate_up(x, weight)
    assert actual.tolist() == [[0.0, 200.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 65, 256, 1000, 2048])
@pytest.mark.parametrize("N, intermediate", [(1024, 3072), (4096, 12288)])
def test_gate_up_at_model_shapes(num_tokens, N, intermediate, dtype):
    x, weight = randn(0, (num_tokens, N), (2 * intermediate, N), dtype=dtype)
    weight = weight * N**-0.5
    expected = reference.gate_up(x.float(), weight, EPS)
    actual = kernels.gate_up(x, weight, EPS)
    assert_close(actual, expected, scale=gate_up_scale(x, weight))
    assert_no_worse_than_torch(actual, plain_torch.gate_up(x, weight, EPS), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 300, 2048])
@pytest.mark.parametrize("N, intermediate", [(1024, 3072), (4096, 12288)])
def test_mlp_at_model_shapes(num_tokens, N, intermediate, dtype):
    shapes = (num_tokens, N), (2 * intermediate, N), (N, intermediate)
    x, gate_up, down = randn(0, *shapes, dtype=dtype)
    weights = gate_up * N**-0.5, down * intermediate**-0.5
    expected = reference.mlp(x.float(), *weights, EPS)
    scale = mlp_scale(x, *weights)
    workspace = kernels.matmul_workspace(DEVICE)
    for num_sms in (None, 84):
        actual = kernels.mlp(x, *weights, EPS, num_sms=num_sms, workspace=workspace)
        assert_close(actual, expected, scale=scale)
        assert_no_worse_than_torch(actual, plain_torch.mlp(x, *weights, EPS), expected)
