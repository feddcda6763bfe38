"""Causal attention of ragged new tokens over their paged context, cached prefix included.

On Hopper by `prefill_pipeline`, elsewhere and for what that does not take by the kernel here, after
FlashAttention-2 (Dao, 2023): one pass over the keys with an online softmax in base 2; tiles that
every row sees run without a mask.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import hopper
from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.prefill_load import CONSUMERS, ROWS
from kernels.prefill_pipeline import _prefill_pipeline_kernel
from kernels.tile import (
    Tile,
    cdiv,
    device_sms,
    dot_precision,
    next_power_of_2,
    output,
    require_paged,
    require_unit_stride,
    require_vector,
)


@triton.jit
def _attend_tiles(
    q,
    top,
    total,
    acc,
    kv_ptrs,
    block_ids_ptr,
    query_positions,
    start,
    end,
    context_len,
    scale_log2,
    stride_kv_block,
    stride_kv_pair,
    stride_kv_slot,
    mask_d,
    BLOCK_SIZE: tl.constexpr,
    EVEN_D: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the keys start..end; MASKED: some rows do not see some of them."""
    offs_n = start + tl.arange(0, BLOCK_N)
    block_ids = tl.load(block_ids_ptr + offs_n // BLOCK_SIZE, mask=offs_n < context_len, other=0)
    for _ in range(start, end, BLOCK_N):
        mask_n = offs_n < context_len
        rows = block_ids.to(tl.int64) * stride_kv_block + offs_n % BLOCK_SIZE * stride_kv_slot
        ptrs = kv_ptrs + rows[:, None]  # [BLOCK_N, BLOCK_D]
        if MASKED or not EVEN_D:
            mask = mask_n[:, None] & mask_d[None, :]
            k = tl.load(ptrs, mask=mask, other=0.0)
            v = tl.load(ptrs + stride_kv_pair, mask=mask, other=0.0)
        else:
            k = tl.load(ptrs)
            v = tl.load(ptrs + stride_kv_pair)
        next_n = offs_n + BLOCK_N
        block_ids = tl.load(
            block_ids_ptr + next_n // BLOCK_SIZE, mask=next_n < context_len, other=0
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = offs_n[None, :] <= query_positions[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
        probs = tl.exp2(scores * scale_log2 - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(probs, axis=1)
        acc = tl.dot(probs.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
        offs_n = next_n
    return top, total, acc


@triton.jit(do_not_specialize=["stride_table_b"])
def _prefill_attention_kernel(
    q_ptr,
    kv_cache_ptr,
    block_table_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    out_ptr,
    scale_log2,
    stride_q_t,
    stride_q_h,
    stride_kv_block,
    stride_kv_pair,
    stride_kv_slot,
    stride_kv_head,
    stride_table_b,
    stride_o_t,
    stride_o_h,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program takes BLOCK_M queries of one request and one head, the longest contexts first."""
    wait_for_inputs(PDL)
    # the last tiles of a request see the most keys: started first, they do not trail behind
    pid_m = tl.num_programs(2) - 1 - tl.program_id(2)
    head = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    query_start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    query_len = (tl.load(cu_seqlens_ptr + b + 1) - query_start).to(tl.int32)
    if pid_m * BLOCK_M >= query_len:
        return
    context_len = tl.load(context_lens_ptr + b)
    first = context_len - query_len + pid_m * BLOCK_M  # position of the tile's first query
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m, mask_d = pid_m * BLOCK_M + offs_m < query_len, offs_d < D
    rows = query_start + pid_m * BLOCK_M + offs_m
    q_ptrs = q_ptr + rows[:, None] * stride_q_t + head * stride_q_h + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    kv_ptrs = kv_cache_ptr + (head // GROUP) * stride_kv_head + offs_d[None, :]
    block_ids_ptr = block_table_ptr + b * stride_table_b
    seen_by_all = (first + 1) // BLOCK_N * BLOCK_N
    top, total, acc = _attend_tiles(
        q, top, total, acc, kv_ptrs, block_ids_ptr, first + offs_m, 0, seen_by_all, context_len,
        scale_log2, stride_kv_block, stride_kv_pair, stride_kv_slot, mask_d,
        BLOCK_SIZE, BLOCK_D == D, False, PRECISION, BLOCK_N,
    )  # fmt: skip
    end = tl.minimum(first + BLOCK_M, context_len)
    top, total, acc = _attend_tiles(
        q, top, total, acc, kv_ptrs, block_ids_ptr, first + offs_m, seen_by_all, end, context_len,
        scale_log2, stride_kv_block, stride_kv_pair, stride_kv_slot, mask_d,
        BLOCK_SIZE, BLOCK_D == D, True, PRECISION, BLOCK_N,
    )  # fmt: skip
    out_ptrs = out_ptr + rows[:, None] * stride_o_t + head * stride_o_h + offs_d[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask_m[:, None] & mask_d[None, :])


PIPELINE_ROWS = CONSUMERS.value * ROWS.value
MIN_BLOCK_B = 64  # lanes over the requests: one compiled kernel serves most batches
# Queries a request, on average, from which the pipeline is the faster one: it holds one tile on an
# SM, and a tile of few keys is mostly waiting.
PIPELINE_MIN_QUERIES = 64


def choose_tile(max_query_len: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """Queries x keys a program holds: what fits registers and shared memory."""
    if dtype == torch.float32:
        num_keys = 32 if head_dim <= 64 else 16
        return Tile(BLOCK_M=32, BLOCK_N=num_keys, BLOCK_K=head_dim, num_warps=8, num_stages=2)
    if head_dim > 128:
        return Tile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=head_dim, num_warps=8, num_stages=3)
    if max_query_len <= 64:
        return Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=head_dim, num_stages=3)
    return Tile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=head_dim, num_warps=8, num_stages=3)


def choose_pipeline_tile(block_size: int, head_dim: int) -> Tile:
    """The same for `prefill_pipeline`: a ring of two steps of 128 keys was fastest on an H100. Of
    short blocks, half as long steps: the loading warp's registers hold no more ids of blocks."""
    num_keys, stages = (64, 4) if block_size < 16 else (128, 2)
    return Tile(
        BLOCK_M=PIPELINE_ROWS,
        BLOCK_N=num_keys,
        BLOCK_K=head_dim,
        num_warps=8,
        num_stages=stages,
    )


def takes(q: Tensor, kv_cache: Tensor) -> bool:
    """Whether `prefill_pipeline` can: Hopper, a 16-bit dtype, heads of q one after the other, a
    pool that is a matrix to the copy engine."""
    is_known = q.dtype in hopper.GL_DTYPES and hopper.has_wgmma(q.device)
    is_matrix = q.stride(1) == q.shape[2] and hopper.is_aligned(q)
    return is_known and is_matrix and hopper.is_pool_matrix(kv_cache)


def has_form(tile: Tile) -> bool:
    """Whether `prefill_pipeline` can be compiled for a tile."""
    shape = (tile.BLOCK_M, tile.num_warps)
    return shape == (PIPELINE_ROWS, 8) and tile.BLOCK_N in (64, 128) and tile.num_stages >= 2


def prefill_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    scale: float,
    *,
    out: Tensor | None = None,
    tile: Tile | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """Causal attention of ragged queries over their paged context, cached prefix included.

    q: [T, H, D], the requests' new tokens one after the other; kv_cache: one layer [num_blocks, 2,
    block_size, H_KV, D], new tokens already stored; block_table: [B, max_blocks] int32; cu_seqlens:
    [B + 1] int32, where each request's queries start; context_lens: [B] int32, prefix and new
    tokens; max_query_len: at least the longest of the queries' lengths -> [T, H, D]. num_sms sizes
    the grid of `prefill_pipeline` for a partition. Raises ValueError where a shape or a stride does
    not fit.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, _, block_size, num_kv_heads, _ = kv_cache.shape
    num_requests = context_lens.shape[0]
    require_paged(q, kv_cache, block_table, num_requests)
    require_vector("cu_seqlens", cu_seqlens, num_requests + 1)
    require_unit_stride("context_lens", context_lens)
    out = output(out, q.shape, q)
    if num_tokens == 0 or max_query_len == 0:
        return out
    is_long = num_tokens >= PIPELINE_MIN_QUERIES * num_requests if tile is None else has_form(tile)
    if is_long and takes(q, kv_cache):
        tile = choose_pipeline_tile(block_size, head_dim) if tile is None else tile
        paging = kv_cache, block_table, cu_seqlens, context_lens
        _launch_pipeline(q, *paging, scale, out, tile=tile, num_sms=num_sms)
        return out
    tile = choose_tile(max_query_len, head_dim, kv_cache.dtype) if tile is None else tile
    grid = (num_heads, num_requests, cdiv(max_query_len, tile.BLOCK_M))
    _prefill_attention_kernel[grid](
        q,
        kv_cache,
        block_table,
        cu_seqlens,
        context_lens,
        out,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        *kv_cache.stride()[:4],
        block_table.stride(0),
        out.stride(0),
        out.stride(1),
        GROUP=num_heads // num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        PRECISION=dot_precision(kv_cache.dtype),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q.device),
    )
    return out


def _launch_pipeline(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
    *,
    tile: Tile,
    num_sms: int | None,
) -> None:
    """Launch over arguments that the caller has checked and that the pipeline `takes`."""
    num_tokens, num_heads, head_dim = q.shape
    num_requests = len(context_lens)
    pool = hopper.describe_pool(kv_cache)
    sms = device_sms(q.device) if num_sms is None else num_sms
    most_tiles = num_tokens // PIPELINE_ROWS + num_requests
    _prefill_pipeline_kernel[(min(sms, most_tiles * num_heads),)](
        hopper.describe(
            q, ROWS.value, head_dim, shape=(num_tokens, num_heads * head_dim), stride=q.stride(0)
        ),
        pool.desc,
        block_table,
        cu_seqlens,
        context_lens,
        out,
        scale * math.log2(math.e),
        block_table.stride(0),
        out.stride(0),
        out.stride(1),
        pool.rows_per_block,
        pool.rows_to_v,
        pool.num_rows,
        num_requests,
        num_heads,
        num_heads // kv_cache.shape[3],
        BLOCK_B=max(next_power_of_2(num_requests), MIN_BLOCK_B),
        BLOCK_N=tile.BLOCK_N,
        STAGES=tile.num_stages,
        num_warps=4,  # of the first consumer; the kernel adds the others
        **launch_options(q.device),
    )
