"""What the Gluon kernels for Hopper share: names that differ between Tritons, and descriptors."""

from functools import lru_cache
from typing import NamedTuple

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

PIECE_D = gl.constexpr(64)  # elements of a head that TMA moves at a time: the widest swizzle
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


@gluon.jit
def is_up_to(columns, last):
    """columns <= last, of the columns of a matrix product. Bits 1 and 2, which tell lanes apart, go
    to the other side: what stays is a constant of each register, where whole columns would take
    registers of their own, through all loops."""
    return (columns & ~6) <= last - (columns & 6)


@gluon.jit
def block_rows(table_ptr, num_left, rows_per_block, past, COUNT: gl.constexpr):
    """First rows in the pool of COUNT blocks from table_ptr on, of which num_left are there; past,
    which reads as zeros, for the others. Loops move the pointer: an index beside it would be
    widened to 64 bits and take registers that they have not."""
    is_there = num_left > 0
    row = gl.load(table_ptr, mask=is_there, other=0) * rows_per_block
    row = gl.where(is_there, row, past)
    if COUNT == 1:
        return (row,)
    else:
        rest = block_rows(table_ptr + 1, num_left - 1, rows_per_block, past, COUNT - 1)
        return (row,) + rest  # noqa: RUF005  Triton knows no star in a tuple


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


def is_pool_matrix(kv_cache: Tensor) -> bool:
    """Whether one layer of a 16-bit pool, [num_blocks, 2, block_size, H_KV, D], is a matrix to the
    copy engine: heads of 64 or 128 one after the other, blocks and keys a whole number of slots
    apart."""
    block, pair, slot, head, _ = kv_cache.stride()
    _, _, block_size, _, head_dim = kv_cache.shape
    return (
        head_dim in (64, 128)
        and block_size in (8, 16, 32, 64)
        and head == head_dim
        and block % slot == pair % slot == 0
        and slot * 2 % ALIGNMENT == kv_cache.data_ptr() % ALIGNMENT == 0
    )


class PoolMatrix(NamedTuple):
    """One layer of a pool as a matrix with a row for each slot; between two blocks lie the rows of
    other layers."""

    desc: TensorDescriptor  # of [block_size, PIECE_D] at a time
    rows_per_block: int  # from block to block
    rows_to_v: int  # from a block's keys to its values
    num_rows: int  # also a row that is not there, and reads as zeros


def describe_pool(kv_cache: Tensor) -> PoolMatrix:
    """kv_cache: one layer for which `is_pool_matrix`."""
    num_blocks, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    block, pair, slot = kv_cache.stride()[:3]
    num_rows = ((num_blocks - 1) * block + pair) // slot + block_size
    shape = (num_rows, num_kv_heads * head_dim)
    desc = describe(kv_cache, block_size, PIECE_D.value, shape=shape, stride=slot)
    return PoolMatrix(desc, block // slot, pair // slot, num_rows)
