"""Matrix products of many tokens on Hopper: tiles moved by its copy engine (TMA), sums by wgmma.

Programs are persistent: while one tile's results are scaled and stored, the next one's operands
are already on their way. How large a tile is decides how often weights are read again and how
evenly the tiles divide among the SMs: `choose_tile` weighs the two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dependent_launch import has_dependent_launch, launch_options, wait_for_inputs
from kernels.tile import Tile, cdiv, device_sms

ALIGNMENT = 16  # bytes, of a row's start: the copy engine's unit
WIDE_N = 256  # results of so many columns are finished in two halves, to fit the registers
TALL_BLOCK_M = 64  # rows of a tile from which wgmma takes it


@triton.jit
def _finish(
    acc, rstd, bias_ptr, residual_desc, out_desc, row, column, N, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_RSTD: tl.constexpr,
):  # fmt: skip
    """Scale, add and store sums at [row, column] of out. What lies past its edges is not stored."""
    if HAS_RSTD:
        acc *= rstd[:, None]
    if HAS_BIAS:
        offs_n = column + tl.arange(0, acc.shape[1])
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += residual_desc.load([row, column]).to(tl.float32)
    out_desc.store([row, column], acc.to(out_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def _tall_matmul_kernel(
    x_desc,
    weight_desc,
    residual_desc,
    out_desc,
    bias_ptr,
    rstd_ptr,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    GATED: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program computes [BLOCK_M, BLOCK_N] tiles of out, num_programs apart. GATED: weight holds
    N gate rows and then N up rows. HALVES: finish a tile's columns in two halves."""
    wait_for_inputs(PDL)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # one loop over tiles and their steps together lets loads run on past a tile's end; two sums do
    # not leave it the registers
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=not GATED):
        pid_m, pid_n = tl.swizzle2d(tile // num_n, tile % num_n, num_m, num_n, GROUP_M)
        row, column = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            acc = tl.dot(x, weight_desc.load([column, k]).T, acc)
            if GATED:
                acc_up = tl.dot(x, weight_desc.load([N + column, k]).T, acc_up)
        rstd = 1.0
        if HAS_RSTD:
            rows = row + tl.arange(0, BLOCK_M)
            rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        if GATED:
            if HAS_RSTD:
                acc *= rstd[:, None]
                acc_up *= rstd[:, None]
            acc = acc / (1.0 + tl.exp(-acc)) * acc_up
            out_desc.store([row, column], acc.to(out_desc.dtype))
        elif HALVES:
            halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
            left, right = tl.split(halves)
            _finish(
                left, rstd, bias_ptr, residual_desc, out_desc, row, column, N,
                HAS_BIAS, HAS_RESIDUAL, HAS_RSTD,
            )  # fmt: skip
            _finish(
                right, rstd, bias_ptr, residual_desc, out_desc, row, column + BLOCK_N // 2, N,
                HAS_BIAS, HAS_RESIDUAL, HAS_RSTD,
            )  # fmt: skip
        else:
            _finish(
                acc, rstd, bias_ptr, residual_desc, out_desc, row, column, N,
                HAS_BIAS, HAS_RESIDUAL, HAS_RSTD,
            )  # fmt: skip


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=num_warps, num_stages=num_stages)


# with the share of the largest tile's rate that each keeps on a full H100
PLAIN_TILES = (
    (_tile(128, 256, 64, 8, 3), 1.0),
    (_tile(128, 128, 64, 8, 4), 0.9),
    (_tile(64, 128, 64, 4, 6), 0.6),
    (_tile(64, 64, 64, 4, 6), 0.4),
    (_tile(64, 32, 128, 4, 5), 0.25),
)
GATED_TILES = (
    (_tile(128, 128, 64, 8, 3), 1.0),
    (_tile(128, 64, 64, 4, 5), 0.75),
    (_tile(64, 64, 64, 4, 6), 0.45),
)


def choose_tile(num_tokens: int, width: int, num_sms: int, *, gated: bool) -> Tile:
    """A tile for [num_tokens, depth] x [depth, width] on so many SMs: that whose fullest SM has the
    least to do."""

    def cost(tile: Tile, rate: float) -> float:
        num_tiles = cdiv(num_tokens, tile.BLOCK_M) * cdiv(width, tile.BLOCK_N)
        return cdiv(num_tiles, num_sms) * tile.BLOCK_M * tile.BLOCK_N / rate

    return min(GATED_TILES if gated else PLAIN_TILES, key=lambda choice: cost(*choice))[0]


def takes(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> bool:
    """Whether `launch_tall_matmul` can: a 16-bit dtype, and a copy engine that can address them."""
    if x.element_size() != 2 or not has_copy_engine(x.device):
        return False
    matrices = [x, weight, out] if residual is None else [x, weight, out, residual]
    return all(m.data_ptr() % ALIGNMENT == 0 and m.stride(0) * 2 % ALIGNMENT == 0 for m in matrices)


def has_copy_engine(device: torch.device) -> bool:
    """Hopper and later; the interpreter stands in for it."""
    return device.type != "cuda" or has_dependent_launch(device)


def launch_tall_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rstd: Tensor | None,
    out: Tensor,
    *,
    gated: bool,
    tile: Tile,
    num_sms: int | None,
) -> None:
    """Launch over arguments that the caller has checked and that this module `takes`.

    x: [T, K] fp16 or bf16, rstd: [T] fp32 -> out: [T, N], or [T, N / 2] gated.
    """
    (num_tokens, K), N = x.shape, out.shape[1]
    halves = not gated and tile.BLOCK_N >= WIDE_N
    out_block = [tile.BLOCK_M, tile.BLOCK_N // 2 if halves else tile.BLOCK_N]
    num_tiles = cdiv(num_tokens, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
    sms = device_sms(x.device) if num_sms is None else num_sms
    _tall_matmul_kernel[(min(num_tiles, sms),)](
        _describe(x, [tile.BLOCK_M, tile.BLOCK_K]),
        _describe(weight, [tile.BLOCK_N, tile.BLOCK_K]),
        _describe(residual, out_block) if residual is not None else None,
        _describe(out, out_block),
        bias,
        rstd,
        num_tokens,
        N,
        K,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_RSTD=rstd is not None,
        GATED=gated,
        HALVES=halves,
        GROUP_M=8,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x.device),
    )


def _describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], block)
