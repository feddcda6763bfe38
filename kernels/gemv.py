"""Matrix-vector products for one token: no tensor cores, every byte of the weights in flight."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, let_next_start, wait_for_previous
from kernels.tile import Tile, cdiv


@triton.jit
def _load_row(ptrs, offs_k, left, EVEN_K: tl.constexpr):
    """What of a row's next elements there is; `left` of them are."""
    if EVEN_K:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=offs_k < left, other=0.0)


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
    let_next_start(PDL)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = weight_ptr + rows[:, None] * stride_w_n + offs_k[None, :]
    up_ptrs = weight_ptr + (rows + N)[:, None] * stride_w_n + offs_k[None, :]
    # weights do not depend on the kernel before: the first of them come while it still runs
    w = _load_row(w_ptrs, offs_k[None, :], K, EVEN_K)
    if GATED:
        up = _load_row(up_ptrs, offs_k[None, :], K, EVEN_K)
    wait_for_previous(PDL)
    x = _load_row(x_ptr + offs_k, offs_k, K, EVEN_K).to(tl.float32)
    acc = w.to(tl.float32) * x[None, :]
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if GATED:
        acc_up = up.to(tl.float32) * x[None, :]
    squares = x * x
    for k in tl.range(BLOCK_K, K, BLOCK_K, loop_unroll_factor=UNROLL):
        w = _load_row(w_ptrs + k, offs_k[None, :], K - k, EVEN_K)
        x = _load_row(x_ptr + k + offs_k, offs_k, K - k, EVEN_K).to(tl.float32)
        if GATED:
            up = _load_row(up_ptrs + k, offs_k[None, :], K - k, EVEN_K)
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


def _tile(n: int, k: int, num_warps: int, unroll: int) -> Tile:
    return Tile(BLOCK_M=1, BLOCK_N=n, BLOCK_K=k, num_warps=num_warps, num_stages=unroll)


def choose_tile(depth: int, *, gated: bool) -> Tile:
    """Rows of weight a program reads at a time, and how many loads it issues before the first use
    (num_stages counts them here), as found best on an H100."""
    if depth <= 1024:
        return _tile(2, 1024, 4, 1) if gated else _tile(4, 512, 2, 4)
    if depth < 4096:
        return _tile(2, 2048, 8, 2)
    return _tile(2, 1024, 4, 4)


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
    tile = choose_tile(K, gated=gated) if tile is None else tile
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
        EVEN_K=K > 0 and K % tile.BLOCK_K == 0,
        UNROLL=tile.num_stages,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        **launch_options(x.device),
    )
