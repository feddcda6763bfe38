"""RMSNorm of rows, alone and behind a residual add."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.tile import (
    next_power_of_2,
    output,
    require_fp32,
    require_shape,
    require_unit_stride,
    require_vector,
)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    N,
    stride_x_t,
    stride_r_t,
    stride_o_t,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program normalises one row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * stride_x_t + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * stride_r_t + offs_n
        x += tl.load(residual_ptrs, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(residual_ptrs, x.to(residual_ptr.dtype.element_ty), mask=mask_n)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / N + eps)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    out = (x * rstd * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_o_t + offs_n, out, mask=mask_n)


@triton.jit
def _row_rstd_kernel(x_ptr, out_ptr, N, stride_x_t, eps, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    """One program takes one row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * stride_x_t + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.rsqrt(tl.sum(x * x, axis=0) / N + eps))


def row_rstd(x: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """1 / rms of each row: what RMSNorm multiplies it by. x: [T, N] -> [T] fp32.

    Raises ValueError where a shape or a stride does not fit.
    """
    num_tokens, N = x.shape
    require_unit_stride("x", x)
    if out is None:
        out = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    require_vector("out", out, num_tokens)
    require_fp32("out", out)
    if num_tokens:
        block_n = next_power_of_2(N)
        _row_rstd_kernel[(num_tokens,)](
            x,
            out,
            N,
            x.stride(0),
            eps,
            BLOCK_N=block_n,
            num_warps=_num_warps(block_n),
            **launch_options(x.device),
        )
    return out


def _num_warps(block_n: int) -> int:
    return min(max(block_n // 256, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Normalise the last dim. x: [T, N], weight: [N] -> [T, N].

    Raises ValueError where a shape or a stride does not fit.
    """
    return _launch(x, None, weight, eps, out)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """residual += x in place, then normalise it. x, residual: [T, N] -> [T, N].

    Raises ValueError where a shape or a stride does not fit.
    """
    require_shape("residual", residual, *x.shape)
    require_unit_stride("residual", residual)
    return _launch(x, residual, weight, eps, out)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None
) -> Tensor:
    num_tokens, N = x.shape
    require_shape("weight", weight, N)
    require_unit_stride("weight", weight)
    require_unit_stride("x", x)
    out = output(out, x.shape, x)
    if num_tokens == 0:
        return out
    block_n = next_power_of_2(N)
    _rms_norm_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        out,
        N,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=block_n,
        num_warps=_num_warps(block_n),
        **launch_options(x.device),
    )
    return out
