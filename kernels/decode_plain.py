"""The kernel of decode attention for any GPU and dtype; see `decode_attention`."""

import triton
import triton.language as tl

from kernels.dependent_launch import let_next_start, wait_for_previous


@triton.jit
def _cut(
    context_len, SPLIT_LEN: tl.constexpr, MIN_SPLIT_LEN: tl.constexpr, FEW_SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(splits, tokens in each) of a context: multiples of BLOCK_N, at most MAX_SPLITS splits."""
    even = tl.cdiv(context_len, MAX_SPLITS)
    least = tl.minimum(tl.maximum(tl.cdiv(context_len, FEW_SPLITS), MIN_SPLIT_LEN), SPLIT_LEN)
    split_len = tl.cdiv(tl.maximum(even, least), BLOCK_N) * BLOCK_N
    # an empty context is one split of no tokens, so that a padding row is written too
    return tl.maximum(tl.cdiv(context_len, split_len), 1), split_len


@triton.jit
def _attend_run(
    q,
    kv_ptrs,
    block_ids_ptr,
    first_split,
    end_split,
    split_len,
    context_len,
    scale_log2,
    stride_kv_block,
    stride_kv_pair,
    stride_kv_slot,
    partial_ptrs,
    max_sum_ptrs,
    keeps_partials,
    mask_g,
    mask_d,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Online softmax of q over each of the splits first_split..end_split, in one loop, that loads
    run on past a split's end. keeps_partials: store each split's result; else there is but one, and
    it is returned. kv_ptrs: [1, BLOCK_D], the kv head's keys."""
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    start, end = first_split * split_len, tl.minimum(end_split * split_len, context_len)
    offs_n = start + tl.arange(0, BLOCK_N)
    # ids of the next tile are loaded one tile ahead: inside the loop they would delay its k and v
    block_ids = tl.load(block_ids_ptr + offs_n // BLOCK_SIZE, mask=offs_n < end, other=0)
    for n in range(start, end, BLOCK_N):
        mask_n = offs_n < end
        rows = block_ids.to(tl.int64) * stride_kv_block + offs_n % BLOCK_SIZE * stride_kv_slot
        ptrs = kv_ptrs + rows[:, None]  # [BLOCK_N, BLOCK_D]
        mask = mask_n[:, None] if BLOCK_D == D else mask_n[:, None] & mask_d[None, :]
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
        split = n // split_len
        is_end = (n + BLOCK_N >= end) | (n + BLOCK_N == (split + 1) * split_len)
        if keeps_partials & is_end:
            mask_q = mask_g[:, None] & mask_d[None, :]
            tl.store(partial_ptrs + split * GROUP * D, acc, mask=mask_q)
            tl.store(max_sum_ptrs + split * GROUP * 2, top, mask=mask_g)
            tl.store(max_sum_ptrs + split * GROUP * 2 + 1, total, mask=mask_g)
            top = tl.full([BLOCK_G], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_G], tl.float32)
            acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    return total, acc


@triton.jit
def _join_splits(
    partial_ptr, max_sum_ptr, num_splits, GROUP: tl.constexpr, D: tl.constexpr,
    JOIN_AHEAD: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(sums of weights [BLOCK_J], weighted values [BLOCK_J, BLOCK_D]) over all splits of one kv
    head."""
    offs_j, offs_d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    mask_j = offs_j < GROUP
    mask_q = mask_j[:, None] & (offs_d < D)[None, :]
    partial_ptrs = partial_ptr + offs_j[:, None] * D + offs_d[None, :]
    max_sum_ptrs = max_sum_ptr + offs_j * 2
    top = tl.full([BLOCK_J], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_J], tl.float32)
    acc = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    # unrolled, so that loads of several splits are on their way at once; a tile of them, joined by
    # sums over one of its dims, took 1 to 3 us longer
    for split in tl.range(0, num_splits, loop_unroll_factor=JOIN_AHEAD):
        # .cg: other programs wrote these, and L1 may hold what an earlier launch left there
        at = max_sum_ptrs + split * GROUP * 2
        split_top = tl.load(at, mask=mask_j, other=0.0, cache_modifier=".cg")
        split_total = tl.load(at + 1, mask=mask_j, other=0.0, cache_modifier=".cg")
        split_acc = tl.load(
            partial_ptrs + split * GROUP * D, mask=mask_q, other=0.0, cache_modifier=".cg"
        )
        new_top = tl.maximum(top, split_top)  # a split that is joined has a token, so is finite
        fade, weight = tl.exp2(top - new_top), tl.exp2(split_top - new_top)
        total = tl.fma(split_total, weight, total * fade)
        acc = tl.fma(split_acc, weight[:, None] + tl.zeros_like(acc), acc * fade[:, None])
        top = new_top
    return total, acc


@triton.jit(do_not_specialize=["splits_per_place", "B", "stride_table_b"])
def _decode_attention_kernel(
    q_ptr,
    kv_cache_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    max_sum_ptr,
    arrived_ptr,
    out_ptr,
    splits_per_place,
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
    SPLIT_LEN: tl.constexpr,
    MIN_SPLIT_LEN: tl.constexpr,
    FEW_SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    JOIN_AHEAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program works off its kv head's share of an equal run of all splits."""
    let_next_start(PDL)
    kv_head, group = tl.program_id(0) % H_KV, tl.program_id(0) // H_KV
    num_groups = tl.num_programs(0) // H_KV
    offs_b = tl.arange(0, BLOCK_B)
    lens = tl.load(context_lens_ptr + offs_b, mask=offs_b < B, other=0)
    splits, lens_of_splits = _cut(lens, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, BLOCK_N)
    # dealt out in units of BLOCK_N tokens, for splits differ in length: to each group the splits
    # that begin within its share
    units = tl.where(offs_b < B, splits * (lens_of_splits // BLOCK_N), 0)
    ends = tl.cumsum(units, axis=0)  # [BLOCK_B], units of the requests up to each
    in_all = tl.sum(units, axis=0)
    share, share_end = in_all * group // num_groups, in_all * (group + 1) // num_groups
    b = tl.sum((ends <= share).to(tl.int32), axis=0).to(tl.int64)
    base = tl.sum(tl.where(offs_b < b, units, 0), axis=0)  # where the request's units begin
    wait_for_previous(PDL)
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask_g, mask_d = offs_g < GROUP, offs_d < D
    while base < share_end:
        context_len = tl.load(context_lens_ptr + b)
        num_splits, split_len = _cut(
            context_len, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, BLOCK_N
        )
        split_units = split_len // BLOCK_N
        first_split = tl.maximum(tl.cdiv(share - base, split_units), 0)
        end_split = tl.minimum(tl.cdiv(share_end - base, split_units), num_splits)
        # programs that share a context work in the place of the one that has its first split; what
        # a program has to itself goes to another, for the former may still be in use
        done = end_split - first_split
        is_shared = done < num_splits
        first = ((base + 1) * num_groups - 1) // in_all
        place = tl.where(is_shared, first, num_groups + group) * H_KV + kv_head
        partial_at = partial_ptr + place.to(tl.int64) * splits_per_place * GROUP * D
        max_sum_at = max_sum_ptr + place.to(tl.int64) * splits_per_place * GROUP * 2
        heads = kv_head * GROUP + offs_g
        q_ptrs = q_ptr + b * stride_q_b + heads[:, None] * stride_q_h + offs_d[None, :]
        q = tl.load(q_ptrs, mask=mask_g[:, None] & mask_d[None, :], other=0.0)
        total, acc = _attend_run(
            q,
            kv_cache_ptr + kv_head * stride_kv_head + offs_d[None, :],
            block_table_ptr + b * stride_table_b,
            first_split,
            end_split,
            split_len,
            context_len,
            scale_log2,
            stride_kv_block,
            stride_kv_pair,
            stride_kv_slot,
            partial_at + offs_g[:, None] * D + offs_d[None, :],
            max_sum_at + offs_g * 2,
            num_splits > 1,
            mask_g,
            mask_d,
            BLOCK_SIZE,
            GROUP,
            D,
            PRECISION,
            BLOCK_G,
            BLOCK_N,
            BLOCK_D,
        )
        out_at = out_ptr + b * stride_o_b + kv_head * GROUP * stride_o_h
        if (num_splits == 1) & (done == 1):
            _store_out(out_at, total, acc, stride_o_h, GROUP, D, BLOCK_G, BLOCK_D)
        elif done > 0:
            # every thread's partials must be out before one thread counts them as arrived
            tl.debug_barrier()
            if is_shared:
                done += tl.atomic_add(arrived_ptr + place, done, sem="acq_rel")
            if done == num_splits:
                tl.store(arrived_ptr + place, 0)
                joined_total, joined = _join_splits(
                    partial_at,
                    max_sum_at,
                    num_splits,
                    GROUP,
                    D,
                    JOIN_AHEAD,
                    BLOCK_J,
                    BLOCK_D,
                )
                _store_out(out_at, joined_total, joined, stride_o_h, GROUP, D, BLOCK_J, BLOCK_D)
            # the next request may use the same place
            tl.debug_barrier()
        base += num_splits * split_units
        b += 1


@triton.jit
def _store_out(
    out_ptr, total, acc, stride_o_h, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted means to the heads of one kv head; a padding row's are zeros."""
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    mask = (offs_g < GROUP)[:, None] & (offs_d < D)[None, :]
    out_ptrs = out_ptr + offs_g[:, None] * stride_o_h + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
