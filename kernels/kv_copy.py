"""KV blocks from one pool to another, scattered on both sides, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.tile import cdiv, require_shape, require_vector

BLOCK = 4096  # elements a program moves: 8 KiB in bf16, 16-byte accesses


@triton.jit
def _copy_blocks_kernel(
    src_ptr,
    dst_ptr,
    src_ids_ptr,
    dst_ids_ptr,
    block_elements,
    stride_src_block,
    stride_dst_block,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program moves BLOCK elements of one KV block."""
    wait_for_inputs(PDL)
    pair = tl.program_id(0)
    src_id = tl.load(src_ids_ptr + pair).to(tl.int64)
    dst_id = tl.load(dst_ids_ptr + pair).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < block_elements
    values = tl.load(src_ptr + src_id * stride_src_block + offs, mask=mask)
    tl.store(dst_ptr + dst_id * stride_dst_block + offs, values, mask=mask)


def copy_blocks(src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
    """dst[dst_ids] = src[src_ids]. src, dst: [num_blocks, ...], ids: [n] int, dst_ids distinct.

    Whole slabs, or one layer's slices `pool[:, layer]`: all dims behind the first must be
    contiguous and alike. dst may lie on a peer device; the ids lie where the launch runs. Raises
    ValueError where shapes, dtypes or strides do not fit.
    """
    require_shape("dst", dst, dst.shape[0], *src.shape[1:])
    require_vector("src_ids", src_ids, src_ids.numel())
    require_vector("dst_ids", dst_ids, src_ids.numel())
    if src.dtype != dst.dtype:
        raise ValueError(f"dst must be {src.dtype}, got {dst.dtype}")
    for name, pool in (("src", src), ("dst", dst)):
        if pool.numel() and not pool[0].is_contiguous():
            raise ValueError(f"{name} must be contiguous behind dim 0, got stride {pool.stride()}")
    block_elements = src[0].numel() if src.shape[0] else 0
    if src_ids.numel() == 0 or block_elements == 0:
        return
    _copy_blocks_kernel[(src_ids.numel(), cdiv(block_elements, BLOCK))](
        src,
        dst,
        src_ids,
        dst_ids,
        block_elements,
        src.stride(0),
        dst.stride(0),
        BLOCK=BLOCK,
        num_warps=4,
        **launch_options(src.device),
    )
