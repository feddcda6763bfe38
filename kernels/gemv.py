"""Matrix-vector products for one token: no tensor cores, every byte of the weights in flight."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.tile import Tile, cdiv


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    N,
    K,
    stride_w_n,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program computes BLOCK_N elements of out. GATED: weight holds N gate rows, then N up
    rows."""
    wait_for_inputs(PDL)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = weight_ptr + rows[:, None] * stride_w_n + offs_k[None, :]
    up_ptrs = weight_ptr + (rows + N)[:, None] * stride_w_n + offs_k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        mask_k = offs_k < K - k
        if EVEN_K:
            w = tl.load(w_ptrs + k)
            x = tl.load(x_ptr + k + offs_k).to(tl.float32)
        else:
            w = tl.load(w_ptrs + k, mask=mask_k[None, :], other=0.0)
            x = tl.load(x_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        if GATED:
            if EVEN_K:
                up = tl.load(up_ptrs + k)
            else:
                up = tl.load(up_ptrs + k, mask=mask_k[None, :], other=0.0)
            acc_up += up.to(tl.float32) * x[None, :]
        acc += w.to(tl.float32) * x[None, :]
        if NORM:
            squares += x * x
    out = tl.sum(acc, axis=1)
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / K + eps) if NORM else 1.0
    out *= rstd
    if GATED:
        out = out / (1.0 + tl.exp(-out)) * (tl.sum(acc_up, axis=1) * rstd)
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows).to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + rows).to(tl.float32)
    tl.store(out_ptr + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < N)


def choose_tile(depth: int) -> Tile:
    """Rows of weight a program reads at a time, and how many loads it issues before the first use
    (num_stages counts them here), as found best on an H100."""
    if depth <= 1024:
        return Tile(BLOCK_M=1, BLOCK_N=4, BLOCK_K=512, num_warps=2, num_stages=4)
    return Tile(BLOCK_M=1, BLOCK_N=2, BLOCK_K=1024, num_warps=4, num_stages=4)


def launch_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rms_eps: float | None,
    out: Tensor,
    *,
    gated: bool,
    tile: Tile | None,
) -> None:
    """Launch over arguments that the caller has checked. x: [1, K], out: [1, N]."""
    K, N = x.shape[1], out.shape[1]
    tile = choose_tile(K) if tile is None else tile
    _gemv_kernel[(cdiv(N, tile.BLOCK_N),)](
        x,
        weight,
        bias,
        residual,
        out,
        N,
        K,
        weight.stride(0),
        rms_eps or 0.0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        NORM=rms_eps is not None,
        GATED=gated,
        EVEN_K=K % tile.BLOCK_K == 0,
        UNROLL=tile.num_stages,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        **launch_options(x.device),
    )
