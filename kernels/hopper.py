"""What the Gluon kernels for Hopper share: names that differ between Tritons, and descriptors."""

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.6 and 3.9 name these differently
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

gdc_wait = tl.extra.cuda.gdc_wait
gdc_launch_dependents = tl.extra.cuda.gdc_launch_dependents

ALIGNMENT = 16  # bytes, of a row's start: the copy engine's unit
GL_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}

_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpret(buffers, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same bytes of shared memory in another shape and layout."""
    if _REINTERPRETS:
        return buffers.reinterpret(buffers.dtype, SHAPE, LAYOUT)
    else:
        return buffers._reinterpret(buffers.dtype, SHAPE, LAYOUT)


@lru_cache(maxsize=64)
def has_wgmma(device: torch.device) -> bool:
    """Hopper alone: later GPUs have another instruction, the interpreter knows no Gluon."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def is_aligned(tensor: Tensor) -> bool:
    """Whether the copy engine can address the rows of a 16-bit tensor."""
    return tensor.data_ptr() % ALIGNMENT == 0 and tensor.stride(0) * 2 % ALIGNMENT == 0


def describe(
    matrix: Tensor, rows: int, cols: int, *, shape: tuple[int, int] | None = None, stride: int = 0
) -> TensorDescriptor:
    """What TMA copies [rows, cols] at a time. shape and stride, in elements: of the matrix that
    begins at the tensor's first element, where that is not the tensor itself."""
    layout = _layout(rows, cols, GL_DTYPES[matrix.dtype])
    strides = [stride or matrix.stride(0), 1]
    return TensorDescriptor(matrix, list(shape or matrix.shape), strides, [rows, cols], layout)


@lru_cache(maxsize=64)
def _layout(rows: int, cols: int, dtype: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, cols], dtype)
