"""What our kernels are held against where it is installed; what is not is skipped by name."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from experiments.kernel_case import Impl
from experiments.timing import Run
from kernels.tile import device_sms

SILU_BLOCK = 1024


@lru_cache
def optional(name: str) -> ModuleType | None:
    """The module, or None and one printed line."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package built for other versions fails in ways of its own
        print(f"skipped {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, N, stride_x_t, stride_o_t, BLOCK_N: tl.constexpr):
    """One program takes BLOCK_N columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    gate = tl.load(x_ptr + row * stride_x_t + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x_t + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * stride_o_t + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def silu_mul(x: Tensor, out: Tensor) -> None:
    """silu(gate) * up in one pass, as a library chain has it. x: [T, 2 * I] -> out: [T, I]."""
    num_tokens, width = out.shape
    if x.shape != (num_tokens, 2 * width):
        raise ValueError(f"x must be [{num_tokens}, {2 * width}], got {list(x.shape)}")
    grid = (num_tokens, triton.cdiv(width, SILU_BLOCK))
    _silu_mul_kernel[grid](
        x, out, width, x.stride(0), out.stride(0), BLOCK_N=SILU_BLOCK, num_warps=4
    )


def mlp_chains(
    x: list[Tensor], gate_up_weight: list[Tensor], down_weight: list[Tensor], eps: float
) -> list[Impl]:
    """RMSNorm, cuBLAS, SiLU * up, cuBLAS, add; and the same with the add inside the last matmul."""
    (num_tokens, hidden), width = x[0].shape, down_weight[0].shape[1]
    ones = x[0].new_ones(hidden)  # the norm's weight is folded into gate_up_weight
    normed, out, down = (torch.empty_like(x[0]) for _ in range(3))
    pair = x[0].new_empty(num_tokens, 2 * width)
    act = x[0].new_empty(num_tokens, width)

    def activate(i: int) -> None:
        kernels.rms_norm(x[i], ones, eps, out=normed)
        torch.mm(normed, gate_up_weight[i].T, out=pair)
        silu_mul(pair, act)

    def chain(i: int) -> Tensor:
        activate(i)
        torch.mm(act, down_weight[i].T, out=down)
        return torch.add(x[i], down, out=out)

    def chain_addmm(i: int) -> Tensor:
        activate(i)
        return torch.addmm(x[i], act, down_weight[i].T, out=out)

    return [
        Impl(name="cublas chain", run=chain),
        Impl(name="cublas chain, addmm", run=chain_addmm),
    ]


def told(impl: Impl, num_sms: int, device: torch.device) -> Impl:
    """A chain whose cuBLAS chooses its tiles for so many SMs, where it would for the whole GPU."""

    def run(i: int) -> object:
        with cublas_for(num_sms, device):
            return impl.run(i)

    return replace(impl, name=f"{impl.name}, told its SMs", run=run)


@contextmanager
def cublas_for(num_sms: int, device: torch.device) -> Iterator[None]:
    """torch hands a number of SMs to cuBLASLt alone. RuntimeError where it has none."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        torch._C._set_sm_carveout_experimental(device_sms(device) - num_sms)
        yield
    finally:
        torch._C._set_sm_carveout_experimental(None)
        torch.backends.cuda.preferred_blas_library(before)


def linear_chains(
    x: list[Tensor], weight: list[Tensor], eps: float | None, residual: Tensor | None
) -> list[Impl]:
    """cuBLAS with the norm before it and the add behind it as kernels of their own."""
    normed, ones = torch.empty_like(x[0]), x[0].new_ones(x[0].shape[1])
    product = x[0].new_empty(x[0].shape[0], weight[0].shape[0])
    out = torch.empty_like(product)

    def chain(i: int) -> Tensor:
        rows = x[i] if eps is None else kernels.rms_norm(x[i], ones, eps, out=normed)
        torch.mm(rows, weight[i].T, out=product)
        return product if residual is None else torch.add(product, residual, out=out)

    def chain_addmm(i: int) -> Tensor:
        return torch.addmm(residual, x[i], weight[i].T, out=out)

    name = "cublas" if eps is None and residual is None else "cublas chain"
    fused = Impl(name="cublas, addmm", run=chain_addmm)
    return [Impl(name=name, run=chain)] + [fused] * (eps is None and residual is not None)


def rms_norm_peers(x: list[Tensor], weight: Tensor, eps: float) -> list[Impl]:
    """torch's own, and Liger's."""

    def torch_norm(i: int) -> Tensor:
        return torch.nn.functional.rms_norm(x[i], weight.shape, weight, eps)

    impls = [Impl(name="torch", run=torch_norm)]
    liger = optional("liger_kernel.transformers.functional")
    if liger is not None:
        impls.append(Impl(name="liger", run=lambda i: liger.liger_rms_norm(x[i], weight, eps)))
    return impls


def add_rms_norm_peers(
    x: list[Tensor], residual: list[Tensor], weight: Tensor, eps: float
) -> list[Impl]:
    """FlashInfer's, in place as ours; Liger's, which writes two new tensors."""
    impls = []
    liger = optional("liger_kernel.transformers.functional")
    if liger is not None and hasattr(liger, "liger_fused_add_rms_norm"):

        def liger_norm(i: int) -> tuple[Tensor, Tensor]:
            return tuple(liger.liger_fused_add_rms_norm(x[i], residual[i], weight, eps))

        impls.append(Impl(name="liger", run=liger_norm))
    flashinfer = optional("flashinfer")
    if flashinfer is not None:

        def flashinfer_norm(i: int) -> tuple[Tensor, Tensor]:
            flashinfer.fused_add_rmsnorm(x[i], residual[i], weight, eps)
            return x[i], residual[i]

        impls.append(Impl(name="flashinfer", run=flashinfer_norm))
    return impls


def argmax_peer(logits: list[Tensor]) -> list[Impl]:
    """torch's argmax: what greedy sampling is."""
    out = torch.empty(len(logits[0]), dtype=torch.int64, device=logits[0].device)
    run: Run = lambda i: torch.argmax(logits[i], dim=-1, out=out)  # noqa: E731
    return [Impl(name="torch argmax", run=run)]
