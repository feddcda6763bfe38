"""Many tokens on Hopper: which tile a product takes, and what its warps make of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import OutOfResources

import kernels
from kernels import Tile, reference, tall_matmul
from kernels.hopper import has_wgmma
from kernels.tall_matmul import (
    FLAT_GATED_TILE,
    FLAT_PLAIN_TILE,
    GATED_TILES,
    PLAIN_TILES,
    choose_tile,
    has_form,
    launch_tall_matmul,
)
from kernels.tile import cdiv
from tests.strategies import DEVICE, assert_close, assert_same_bits, randn
from tests.test_linear import dot_scale, normed
from tests.test_mlp import gate_up_scale

EPS = 1e-6
device = torch.device(DEVICE)
CHOICES = [
    pytest.param(tile, gated, id=f"{'gated-' * gated}{tile.BLOCK_M}x{tile.BLOCK_N}")
    for gated, tiles in (
        (False, (FLAT_PLAIN_TILE, *(tile for tile, _ in PLAIN_TILES))),
        (True, (FLAT_GATED_TILE, *(tile for tile, _ in GATED_TILES))),
    )
    for tile in dict.fromkeys(tiles)
]
GOOD = Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=2)


def on_hopper(test):
    if not has_wgmma(device):
        test = pytest.mark.skip(reason="needs a Hopper GPU")(test)
    return pytest.mark.gpu(test)


@pytest.mark.parametrize("tile, gated", CHOICES)
def test_tiles_of_the_tables_have_a_form_and_a_ring_that_overlaps(tile, gated):
    assert has_form(tile, gated=gated)
    assert 4 <= tile.num_stages <= tall_matmul.MAX_STAGES


@given(
    T=st.integers(65, 20000),
    N=st.integers(1, 200000),
    num_sms=st.integers(1, 132),
    gated=st.booleans(),
)
def test_no_tile_of_the_table_keeps_the_fullest_sm_less_busy(T, N, num_sms, gated):
    costs = {
        tile: cdiv(cdiv(T, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N), num_sms) * time
        for tile, time in (GATED_TILES if gated else PLAIN_TILES)
    }
    assert costs[choose_tile(T, N, num_sms, gated=gated)] == min(costs.values())


@pytest.mark.parametrize(
    "change",
    [
        {"num_warps": 2},
        {"num_warps": 16},
        {"num_warps": 4},  # one consumer: too many sums
        {"BLOCK_M": 64},
        {"BLOCK_M": 256, "BLOCK_N": 256},
        {"BLOCK_N": 512},
        {"BLOCK_N": 16},
        {"BLOCK_K": 128},
        {"num_stages": 1},  # each consumer would wait for a buffer that it holds itself
    ],
)
def test_a_tile_without_a_form_is_an_error(change):
    tile = Tile(**vars(GOOD) | change)
    x = torch.zeros(128, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="tile must have 4 or 8 warps"):
        launch_tall_matmul(x, x, None, None, None, x, gated=False, tile=tile, num_sms=1)


def test_sums_of_gate_and_up_count_both():
    wide = Tile(**vars(GOOD) | {"BLOCK_N": 256})
    assert has_form(wide, gated=False) and not has_form(wide, gated=True)
    assert has_form(GOOD, gated=True)


@pytest.mark.skipif(has_wgmma(device), reason="has a Hopper GPU")
def test_without_hopper_nothing_is_taken():
    x = torch.zeros(128, 64, dtype=torch.float16, device=device)
    assert not tall_matmul.takes(x, x, None, x)


def launch(
    T: int, N: int, K: int, extras: str, tile: Tile, *, gated: bool, dtype: torch.dtype,
    num_sms: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out amid NaN, what it is to be, the scale of its sums). extras: norm, bias, residual."""
    rows = 2 * N if gated else N
    x, weight, bias, residual = randn(0, (T, K), (rows, K), (N,), (T, N), dtype=dtype)
    weight = weight * K**-0.5
    held = torch.full((T + 130, N + 264), float("nan"), dtype=dtype, device=device)
    out = held[:T, :N]
    rms_eps = EPS if "norm" in extras else None
    bias = bias if "bias" in extras else None
    if "residual" in extras:
        out.copy_(residual)
    else:
        residual = None
    if gated:
        expected = reference.gate_up(x.float(), weight, rms_eps)
        scale = gate_up_scale(x, weight)
    else:
        expected = reference.linear(x.float(), weight, bias, residual, rms_eps)
        scale = dot_scale(normed(x) if rms_eps else x, weight)
    launch_tall_matmul(
        x, weight, bias, out if residual is not None else None,
        kernels.row_rstd(x, EPS) if rms_eps else None, out,
        gated=gated, tile=tile, num_sms=num_sms,
    )  # fmt: skip
    assert held[T:].isnan().all() and held[:, N:].isnan().all()  # nothing past the end
    return out, expected, scale


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile, gated", CHOICES)
def test_every_tile_matches_the_reference(tile, gated, dtype):
    for extras in ("norm",) if gated else ("", "norm bias", "residual"):
        for T in (2, 17, 64, 65, 129, 300):
            # part of a tile and some; fewer steps than the ring has buffers, and many rounds of it
            for N, K in ((24, 72), (2 * tile.BLOCK_N + 24, 1288)):
                actual, expected, scale = launch(T, N, K, extras, tile, gated=gated, dtype=dtype)
                assert_close(actual, expected, scale=scale)


@on_hopper
@pytest.mark.parametrize("tile, gated", CHOICES)
def test_every_partition_gives_the_same_bits(tile, gated):
    extras = "norm" if gated else "norm residual"
    shape = 300, 40 * tile.BLOCK_N + 24, 1288
    outs = [
        launch(*shape, extras, tile, gated=gated, dtype=torch.bfloat16, num_sms=num_sms)[0]
        for num_sms in (7, 48, 132)
    ]
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@on_hopper
def test_a_ring_too_deep_is_out_of_resources():
    deep = Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=5)
    with pytest.raises(OutOfResources):
        launch(128, 256, 64, "", deep, gated=False, dtype=torch.bfloat16)


@on_hopper
@pytest.mark.parametrize("num_tokens", [100, 256, 1000])
def test_dependent_launches_in_a_graph_give_the_same_bits(num_tokens):
    """Each kernel starts while the one before it still writes what it reads, x in place."""
    shapes = ((num_tokens, 1024), (6144, 1024), (1024, 3072))
    start, gate_up, down = randn(0, *shapes, dtype=torch.bfloat16)
    gate_up, down = gate_up * 1024**-0.5, down * 3072**-0.5
    x, act = torch.empty_like(start), start.new_empty(num_tokens, 3072)
    rstd = torch.empty(num_tokens, dtype=torch.float32, device=device)

    def layers(after_each):
        for _ in range(6):
            kernels.mlp(x, gate_up, down, EPS, rstd=rstd, act=act, out=x)
            after_each()

    x.copy_(start)
    layers(torch.cuda.synchronize)
    expected = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(lambda: None)
    for _ in range(20):
        act.fill_(float("nan"))
        rstd.fill_(float("nan"))
        x.copy_(start)
        graph.replay()
        assert_same_bits(x, expected)
