"""Matrix products against a [N, K] weight: from one decode token to a tall prefill.

One kernel serves `linear` and the gate/up half of the MLP: RMSNorm may be fused into the load of x,
and bias, residual or SiLU(gate) * up into the store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.norm import rms_norm
from kernels.tile import (
    Tile,
    cdiv,
    dot_precision,
    output,
    require_shape,
    require_unit_stride,
)

# RMSNorm inside the load repeats per column of tiles: worth it while x is small enough for L2
FUSED_NORM_MAX_TOKENS = 64

NORM_NONE, NORM_FUSED, NORM_FIRST = 0, 1, 2


@triton.jit
def _row_rstd(x_ptrs, K, eps, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / rms of BLOCK_M rows. x_ptrs: [BLOCK_M, BLOCK_K], the first tile along K."""
    offs_k = tl.arange(0, BLOCK_K)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs + k) if EVEN_K else tl.load(x_ptrs + k, mask=offs_k < K - k, other=0.0)
        squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
    return tl.rsqrt(squares / K + eps)


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_x_m,
    stride_w_n,
    stride_r_m,
    stride_o_m,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes [BLOCK_M, BLOCK_N] tiles of out, num_programs apart. GATED: weight holds
    N gate rows and then N up rows."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tl.swizzle2d(tile // num_n, tile % num_n, num_m, num_n, GROUP_M)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # rows past the end read the last row again: cheaper than a mask, and never stored
        rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
        rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
        x_ptrs = x_ptr + rows_m[:, None] * stride_x_m + offs_k[None, :]
        w_ptrs = weight_ptr + rows_n[:, None] * stride_w_n + offs_k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if GATED:
            up_ptrs = weight_ptr + (rows_n + N)[:, None] * stride_w_n + offs_k[None, :]
            acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if NORM == 1:
            squares = tl.zeros([BLOCK_M], tl.float32)
        if NORM == 2:
            rstd = _row_rstd(x_ptrs, K, eps, EVEN_K, BLOCK_M, BLOCK_K)
        for k in range(0, K, BLOCK_K):
            mask_k = (offs_k < K - k)[None, :]
            x = tl.load(x_ptrs + k) if EVEN_K else tl.load(x_ptrs + k, mask=mask_k, other=0.0)
            w = tl.load(w_ptrs + k) if EVEN_K else tl.load(w_ptrs + k, mask=mask_k, other=0.0)
            if NORM != 0:
                x32 = x.to(tl.float32)
                if NORM == 1:
                    squares += tl.sum(x32 * x32, axis=1)
                else:
                    x32 = x32 * rstd[:, None]
                norm_weight = tl.load(norm_weight_ptr + k + offs_k, mask=offs_k < K - k, other=0.0)
                x = (x32 * norm_weight.to(tl.float32)[None, :]).to(x.dtype)
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
            if GATED:
                up = (
                    tl.load(up_ptrs + k) if EVEN_K else tl.load(up_ptrs + k, mask=mask_k, other=0.0)
                )
                acc_up = tl.dot(x, tl.trans(up), acc_up, input_precision=PRECISION)
        if NORM == 1:
            # the scale of a row factors out of its dot products
            rstd = tl.rsqrt(squares / K + eps)
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


def choose_tile(num_tokens: int, width: int, depth: int, dtype: torch.dtype, gated: bool) -> Tile:
    """A tile for [num_tokens, depth] x [depth, width]: many programs if thin, reuse if tall."""
    if dtype == torch.float32:
        return Tile(BLOCK_M=16 if num_tokens <= 16 else 64, BLOCK_N=32, BLOCK_K=32)
    if num_tokens <= 16:
        wide = width >= 16384 and not gated
        return Tile(BLOCK_M=16, BLOCK_N=32 if wide else 16, BLOCK_K=256, num_stages=4)
    if num_tokens <= 32:
        return Tile(BLOCK_M=32, BLOCK_N=32 if width >= 4096 else 16, BLOCK_K=128, num_stages=5)
    if num_tokens <= 64:
        return Tile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=128, num_stages=4)
    if num_tokens <= 512:
        wide = cdiv(num_tokens, 128) * cdiv(width, 64 if gated else 128) >= 132
        if wide:
            return Tile(BLOCK_M=128, BLOCK_N=64 if gated else 128, BLOCK_K=64, num_stages=4)
        return Tile(BLOCK_M=64, BLOCK_N=32 if gated or width < 4096 else 64, BLOCK_K=128)
    if gated:
        return Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    if cdiv(num_tokens, 128) * cdiv(width, 256) >= 132:
        return Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)
    return Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4)


def launch_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out: Tensor,
    *,
    gated: bool,
    tile: Tile | None,
    num_sms: int | None,
) -> None:
    """Launch over arguments that the caller has checked. out: [T, N], or [T, N / 2] gated."""
    (num_tokens, K), N = x.shape, out.shape[1]
    if num_tokens == 0:
        return
    tile = choose_tile(num_tokens, N, K, x.dtype, gated) if tile is None else tile
    norm = NORM_NONE
    if norm_weight is not None:
        # in fp16, x * norm_weight could overflow where the normalised product does not
        norm = NORM_FIRST if x.dtype == torch.float16 else NORM_FUSED
    num_tiles = cdiv(num_tokens, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
    # without a partition the hardware deals tiles out as programs end, which evens out better
    programs = num_tiles if num_sms is None else min(num_tiles, num_sms)
    _matmul_kernel[(programs,)](
        x,
        weight,
        bias,
        residual,
        norm_weight,
        out,
        num_tokens,
        N,
        K,
        x.stride(0),
        weight.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        eps,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        NORM=norm,
        GATED=gated,
        EVEN_K=K % tile.BLOCK_K == 0,
        PRECISION=dot_precision(x.dtype),
        GROUP_M=8,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def normalise_if_tall(
    x: Tensor, norm_weight: Tensor | None, eps: float, normed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(x, norm_weight) for the kernel: tall x is normalised here once, into `normed`."""
    if norm_weight is None or x.shape[0] <= FUSED_NORM_MAX_TOKENS:
        return x, norm_weight
    return rms_norm(x, norm_weight, eps, out=normed), None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    normed: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """norm(x) @ weight.T + bias + residual. x: [T, K], weight: [N, K] -> [T, N].

    norm_weight: [K] asks for RMSNorm of x with `eps` first, `normed`: [T, K] is its scratch where
    it is not fused; bias: [N]; residual: [T, N], which may be `out` itself. num_sms caps the grid
    to a partition. Raises ValueError where a shape or a stride does not fit.
    """
    num_tokens, K = x.shape
    N = weight.shape[0]
    require_shape("weight", weight, N, K)
    for name, tensor, shape in (
        ("bias", bias, (N,)),
        ("residual", residual, (num_tokens, N)),
        ("norm_weight", norm_weight, (K,)),
    ):
        if tensor is not None:
            require_shape(name, tensor, *shape)
            require_unit_stride(name, tensor)
    require_unit_stride("x", x)
    require_unit_stride("weight", weight)
    out = output(out, (num_tokens, N), x)
    x, norm_weight = normalise_if_tall(x, norm_weight, eps, normed)
    launch_matmul(
        x,
        weight,
        bias,
        residual,
        norm_weight,
        eps,
        out,
        gated=False,
        tile=tile,
        num_sms=num_sms,
    )
    return out
