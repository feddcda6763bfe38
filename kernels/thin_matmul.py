"""Matrix products of few tokens, bound by reading weights: any dtype, any alignment, any GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.tile import Tile, cdiv, dot_precision


@triton.jit(do_not_specialize=["M"])
def _thin_matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    rstd_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_x_m,
    stride_w_n,
    stride_r_m,
    stride_o_m,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program computes [BLOCK_M, BLOCK_N] tiles of out, num_programs apart. GATED: weight holds
    N gate rows and then N up rows."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    wait_for_inputs(PDL)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tl.swizzle2d(tile // num_n, tile % num_n, num_m, num_n, GROUP_M)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
        # columns past the end read the last row of the weight again: cheaper than a mask; rows past
        # the end are masked, for most may be, and all programs would crowd on that one row of x
        rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
        mask_m = (offs_m < M)[:, None]
        x_ptrs = x_ptr + rows_m[:, None] * stride_x_m + offs_k[None, :]
        w_ptrs = weight_ptr + rows_n[:, None] * stride_w_n + offs_k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if GATED:
            up_ptrs = weight_ptr + (rows_n + N)[:, None] * stride_w_n + offs_k[None, :]
            acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            mask_k = (offs_k < K - k)[None, :]
            x = tl.load(x_ptrs + k, mask=mask_m & mask_k, other=0.0)
            w = tl.load(w_ptrs + k) if EVEN_K else tl.load(w_ptrs + k, mask=mask_k, other=0.0)
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
            if GATED:
                up = (
                    tl.load(up_ptrs + k) if EVEN_K else tl.load(up_ptrs + k, mask=mask_k, other=0.0)
                )
                acc_up = tl.dot(x, tl.trans(up), acc_up, input_precision=PRECISION)
        if HAS_RSTD:
            rstd = tl.load(rstd_ptr + rows_m)
            acc *= rstd[:, None]
            if GATED:
                acc_up *= rstd[:, None]
        if GATED:
            acc = acc / (1.0 + tl.exp(-acc)) * acc_up
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows_n).to(tl.float32)[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + rows_m[:, None] * stride_r_m + offs_n[None, :]
            acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + rows_m[:, None] * stride_o_m + offs_n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=num_warps, num_stages=num_stages)


HEAD_WIDTH = 65536  # a vocabulary rather than a layer


def choose_tile(num_tokens: int, width: int, dtype: torch.dtype) -> Tile:
    """A tile for [num_tokens, depth] x [depth, width], as found best on an H100."""
    if dtype == torch.float32:
        return Tile(BLOCK_M=16 if num_tokens <= 16 else 64, BLOCK_N=32, BLOCK_K=32)
    if num_tokens <= 16:
        if width >= HEAD_WIDTH:
            return _tile(16, 64, 128, 4, 6)
        return _tile(16, 16 if width <= 2048 else 32, 256, 2, 4)
    if num_tokens <= 64:
        block_m = 32 if num_tokens <= 32 else 64
        if width >= HEAD_WIDTH:
            return _tile(block_m, 64, 128, 4, 4)
        return _tile(block_m, 16 if width <= 1024 else 32, 128, 4, 4)
    return _tile(64, 64, 64, 4, 4)


def launch_thin_matmul(
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
    """Launch over arguments that the caller has checked.

    x: [T, K], rstd: [T] fp32 -> out: [T, N], or [T, N / 2] gated.
    """
    (num_tokens, K), N = x.shape, out.shape[1]
    num_tiles = cdiv(num_tokens, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
    # without a partition the hardware deals tiles out as programs end, which evens out better
    programs = num_tiles if num_sms is None else min(num_tiles, num_sms)
    _thin_matmul_kernel[(programs,)](
        x,
        weight,
        bias,
        residual,
        rstd,
        out,
        num_tokens,
        N,
        K,
        x.stride(0),
        weight.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_RSTD=rstd is not None,
        GATED=gated,
        EVEN_K=K % tile.BLOCK_K == 0,
        PRECISION=dot_precision(x.dtype),
        GROUP_M=8,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x.device),
    )
