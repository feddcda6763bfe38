"""Paged attention of one new token per request, split over the context, all in one launch.

Flash-decoding (Dao et al., 2023). A context is cut into splits by its own length alone, and splits
are folded in order, always by the same arithmetic; the batch decides only how many of them one
program works off in a run. So a request's output does not depend, to the bit, on its neighbours.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.tile import (
    Tile,
    device_sms,
    dot_precision,
    next_power_of_2,
    output,
    require_paged,
    require_shape,
)

MAX_SPLITS = 16  # splits of one context: 16 x 8 kv heads fill 132 SMs at batch 1
MIN_SPLIT_LEN = 256  # tokens a split holds at least: below, its start costs more than its reads
RUNS_PER_PROGRAM = 2  # runs dealt to each program, where there are splits enough to choose
FOLD_AHEAD = 4  # partial results that are loaded together when splits are joined
PROGRAMS_PER_SM = 6  # of two warps each: many small ones hide each other's start
MIN_BLOCK_B = 128  # lanes over the requests: one compiled kernel serves all small batches


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of `decode_attention`, for one stream at a time; counters start and end at zero."""

    partial: Tensor  # [B, H, MAX_SPLITS, D] fp32, each split's weighted values
    max_sum: Tensor  # [B, H, MAX_SPLITS, 2] fp32, each split's maximum (base 2) and sum
    arrived: Tensor  # [B, H_KV] int32, splits that are done


def decode_workspace(
    max_batch: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> DecodeWorkspace:
    """Scratch for batches of up to `max_batch` requests on `device`."""
    shape = (max_batch, num_heads, MAX_SPLITS)
    return DecodeWorkspace(
        partial=torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        max_sum=torch.empty(*shape, 2, dtype=torch.float32, device=device),
        arrived=torch.zeros(max_batch, num_kv_heads, dtype=torch.int32, device=device),
    )


@triton.jit
def _cut(context_len, MIN_LEN: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(splits, tokens in each) of a context: multiples of BLOCK_N, at most MAX_SPLITS splits."""
    even = tl.cdiv(context_len, MAX_SPLITS)
    split_len = tl.maximum(tl.cdiv(even, BLOCK_N) * BLOCK_N, MIN_LEN)
    # an empty context is one split of no tokens, so that a padding row is written too
    return tl.maximum(tl.cdiv(context_len, split_len), 1), split_len


@triton.jit
def _attend_split(
    q,
    kv_ptrs,
    block_ids_ptr,
    start,
    end,
    scale_log2,
    stride_kv_block,
    stride_kv_pair,
    stride_kv_slot,
    BLOCK_SIZE: tl.constexpr,
    EVEN_D: tl.constexpr,
    mask_d,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Online softmax of q over the tokens start..end. kv_ptrs: [1, BLOCK_D], the kv head's keys."""
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    offs_n = start + tl.arange(0, BLOCK_N)
    # ids of the next tile are loaded one tile ahead: inside the loop they would delay its k and v
    block_ids = tl.load(block_ids_ptr + offs_n // BLOCK_SIZE, mask=offs_n < end, other=0)
    for _ in range(start, end, BLOCK_N):
        mask_n = offs_n < end
        rows = block_ids.to(tl.int64) * stride_kv_block + offs_n % BLOCK_SIZE * stride_kv_slot
        ptrs = kv_ptrs + rows[:, None]  # [BLOCK_N, BLOCK_D]
        mask = mask_n[:, None] if EVEN_D else mask_n[:, None] & mask_d[None, :]
        k = tl.load(ptrs, mask=mask, other=0.0)
        v = tl.load(ptrs + stride_kv_pair, mask=mask, other=0.0)
        next_n = offs_n + BLOCK_N
        block_ids = tl.load(block_ids_ptr + next_n // BLOCK_SIZE, mask=next_n < end, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(mask_n[None, :], scores, float("-inf"))  # [BLOCK_G, BLOCK_N]
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        probs = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(probs, axis=1)
        acc = tl.dot(probs.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
        offs_n = next_n
    return top, total, acc


@triton.jit(do_not_specialize=["B", "stride_table_b"])
def _decode_attention_kernel(
    q_ptr,
    kv_cache_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    max_sum_ptr,
    arrived_ptr,
    out_ptr,
    B,
    scale_log2,
    stride_q_b,
    stride_q_h,
    stride_kv_block,
    stride_kv_pair,
    stride_kv_slot,
    stride_kv_head,
    stride_table_b,
    stride_o_b,
    stride_o_h,
    H_KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    MIN_LEN: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    RUNS_PER_PROGRAM: tl.constexpr,
    FOLD_AHEAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program works off items (run of splits of a request, kv head), num_programs apart."""
    wait_for_inputs(PDL)
    H: tl.constexpr = H_KV * GROUP
    offs_b = tl.arange(0, BLOCK_B)
    lens = tl.load(context_lens_ptr + offs_b, mask=offs_b < B, other=0)
    splits, _ = _cut(lens, MIN_LEN, MAX_SPLITS, BLOCK_N)
    splits = tl.where(offs_b < B, splits, 0)
    # whole contexts in one run where there are many of them, single splits where there are few
    num_splits_in_all = tl.sum(splits, axis=0) * H_KV
    run_len = num_splits_in_all // (tl.num_programs(0) * RUNS_PER_PROGRAM)
    run_len = tl.minimum(tl.maximum(run_len, 1), MAX_SPLITS)
    runs = tl.cdiv(splits, run_len)
    ends = tl.cumsum(runs, axis=0)  # [BLOCK_B], runs of the requests up to each, per kv head
    num_items = tl.sum(runs, axis=0) * H_KV
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask_g, mask_d = offs_g < GROUP, offs_d < D
    mask_q = mask_g[:, None] & mask_d[None, :]
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv_head, nth = item % H_KV, item // H_KV
        b = tl.sum((ends <= nth).to(tl.int32), axis=0).to(tl.int64)
        run = nth - tl.sum(tl.where(offs_b < b, runs, 0), axis=0)
        context_len = tl.load(context_lens_ptr + b)
        num_splits, split_len = _cut(context_len, MIN_LEN, MAX_SPLITS, BLOCK_N)
        heads = kv_head * GROUP + offs_g
        q_ptrs = q_ptr + b * stride_q_b + heads[:, None] * stride_q_h + offs_d[None, :]
        q = tl.load(q_ptrs, mask=mask_q, other=0.0)  # [BLOCK_G, BLOCK_D]
        out_ptrs = out_ptr + b * stride_o_b + heads[:, None] * stride_o_h + offs_d[None, :]
        rows = (b * H + heads) * MAX_SPLITS
        partial_ptrs = partial_ptr + rows[:, None] * D + offs_d[None, :]
        max_sum_ptrs = max_sum_ptr + rows * 2
        is_whole = num_splits <= run_len
        top = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for split in range(run * run_len, tl.minimum((run + 1) * run_len, num_splits)):
            split_top, split_total, split_acc = _attend_split(
                q,
                kv_cache_ptr + kv_head * stride_kv_head + offs_d[None, :],
                block_table_ptr + b * stride_table_b,
                split * split_len,
                tl.minimum((split + 1) * split_len, context_len),
                scale_log2,
                stride_kv_block,
                stride_kv_pair,
                stride_kv_slot,
                BLOCK_SIZE,
                BLOCK_D == D,
                mask_d,
                PRECISION,
                BLOCK_G,
                BLOCK_N,
                BLOCK_D,
            )
            if is_whole:
                top, total, acc = _fold(top, total, acc, split_top, split_total, split_acc)
            else:
                tl.store(partial_ptrs + split * D, split_acc, mask=mask_q)
                tl.store(max_sum_ptrs + split * 2, split_top, mask=mask_g)
                tl.store(max_sum_ptrs + split * 2 + 1, split_total, mask=mask_g)
        is_last = is_whole
        if not is_whole:
            # every thread's partials must be out before one thread counts this run as arrived
            tl.debug_barrier()
            arrived_ptrs = arrived_ptr + b * H_KV + kv_head
            arrived = tl.atomic_add(arrived_ptrs, 1, sem="acq_rel")
            is_last = arrived == tl.cdiv(num_splits, run_len) - 1
            if is_last:
                tl.store(arrived_ptrs, 0)
                top, total, acc = _join_splits(
                    top, total, acc, partial_ptrs, max_sum_ptrs, num_splits, mask_g, mask_q, D,
                    FOLD_AHEAD,
                )  # fmt: skip
        if is_last:
            out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _fold(top, total, acc, split_top, split_total, split_acc):
    """Add a split to those before it. fma says how it is rounded, which the compiler could choose
    differently in two places."""
    new_top = tl.maximum(top, split_top)
    # an empty split and nothing before it: both are -inf, and their difference no number
    fade = tl.where(top == float("-inf"), 0.0, tl.exp2(top - new_top))
    weight = tl.where(split_top == float("-inf"), 0.0, tl.exp2(split_top - new_top))
    total = tl.fma(split_total, weight, total * fade)
    acc = tl.fma(split_acc, weight[:, None] + tl.zeros_like(acc), acc * fade[:, None])
    return new_top, total, acc


@triton.jit
def _join_splits(
    top, total, acc, partial_ptrs, max_sum_ptrs, num_splits, mask_g, mask_q, D: tl.constexpr,
    FOLD_AHEAD: tl.constexpr,
):  # fmt: skip
    """Fold all splits of one kv head's queries, in their order."""
    for split in tl.range(0, num_splits, loop_unroll_factor=FOLD_AHEAD):
        # .cg: other programs wrote these, and L1 may hold what an earlier launch left there
        split_top = tl.load(max_sum_ptrs + split * 2, mask=mask_g, other=0.0, cache_modifier=".cg")
        split_total = tl.load(
            max_sum_ptrs + split * 2 + 1, mask=mask_g, other=0.0, cache_modifier=".cg"
        )
        split_acc = tl.load(partial_ptrs + split * D, mask=mask_q, other=0.0, cache_modifier=".cg")
        top, total, acc = _fold(top, total, acc, split_top, split_total, split_acc)
    return top, total, acc


def choose_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """Tokens a program reads at a time; BLOCK_M is the padded GQA group, set by the launcher."""
    stages = 2 if dtype == torch.float32 else 4
    return Tile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=head_dim, num_warps=2, num_stages=stages)


def decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    workspace: DecodeWorkspace | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """Attention of one new token per request over its paged context.

    q: [B, H, D]; kv_cache: one layer [num_blocks, 2, block_size, H_KV, D]; block_table:
    [B, max_blocks] int32; context_lens: [B] int32, this token included, 0 for a padding row, whose
    output is zeros -> [B, H, D]. workspace: from `decode_workspace`, for at least B requests,
    used by one stream at a time. num_sms sizes the grid for a partition. Raises ValueError where a
    shape or a stride does not fit.
    """
    num_requests, num_heads, head_dim = q.shape
    _, _, block_size, num_kv_heads, _ = kv_cache.shape
    require_paged(q, kv_cache, block_table, num_requests)
    require_shape("context_lens", context_lens, num_requests)
    out = output(out, q.shape, q)
    if num_requests == 0:
        return out
    if workspace is None:
        workspace = decode_workspace(num_requests, num_heads, num_kv_heads, head_dim, q.device)
    held = workspace.partial.shape
    if held[0] < num_requests or (held[1], held[3]) != (num_heads, head_dim):
        wanted = f"[>= {num_requests}, {num_heads}, {MAX_SPLITS}, {head_dim}]"
        raise ValueError(f"workspace must hold {wanted} partial sums, got {list(held)}")
    tile = choose_tile(head_dim, kv_cache.dtype) if tile is None else tile
    group = num_heads // num_kv_heads
    grid = (device_sms(q.device) if num_sms is None else num_sms) * PROGRAMS_PER_SM
    _decode_attention_kernel[(grid,)](
        q,
        kv_cache,
        block_table,
        context_lens,
        workspace.partial,
        workspace.max_sum,
        workspace.arrived,
        out,
        num_requests,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        *kv_cache.stride()[:4],
        block_table.stride(0),
        out.stride(0),
        out.stride(1),
        H_KV=num_kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        PRECISION=dot_precision(kv_cache.dtype),
        MIN_LEN=MIN_SPLIT_LEN,
        MAX_SPLITS=MAX_SPLITS,
        RUNS_PER_PROGRAM=RUNS_PER_PROGRAM,
        FOLD_AHEAD=FOLD_AHEAD,
        BLOCK_B=max(next_power_of_2(num_requests), MIN_BLOCK_B),
        BLOCK_G=max(16, next_power_of_2(group)),
        BLOCK_N=tile.BLOCK_N,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q.device),
    )
    return out
