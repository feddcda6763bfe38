"""The kernel of decode attention on Hopper: each warp by itself, fed by the copy engine, in Gluon.

A program is one warp, so that nothing in its loop waits for other warps; it fills its own ring of
buffers through TMA, which leaves the addresses and the bytes in flight to the copy engine. What the
splits are, see `decode_attention`; how they are dealt out and joined, `decode_deal`, `decode_join`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.core import _aggregate as aggregate  # 3.6 has no public name for it

from kernels.decode_deal import (
    all_units,
    cut,
    next_share,
    request_with,
    share_at,
    share_with,
    tail_of,
)
from kernels.decode_join import LOWEST, join_splits, store_out
from kernels.hopper import (
    PIECE_D,
    block_rows,
    gdc_launch_dependents,
    gdc_wait,
    is_up_to,
    reinterpret,
    thread_barrier,
    tma_load,
)

ROWS = gl.constexpr(16)  # of an mma: the heads of a group, padded


@aggregate
class Ring:
    """Buffers of one step's keys and values each, and the barriers of their arrival."""

    k: gl.shared_memory_descriptor  # [STAGES * pieces, BLOCK_SIZE, PIECE_D]
    v: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # [STAGES, 1]
    STAGES: gl.constexpr
    BLOCK_N: gl.constexpr  # tokens of a step
    BLOCK_SIZE: gl.constexpr
    D: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, k, v, full, STAGES, BLOCK_N, BLOCK_SIZE, D):
        self.k = k
        self.v = v
        self.full = full
        self.STAGES = gl.constexpr(STAGES)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.BLOCK_SIZE = gl.constexpr(BLOCK_SIZE)
        self.D = gl.constexpr(D)


@gluon.jit
def _load_step(ring, kv_desc, stage, rows, rows_to_v, column):
    """Keys and values of one step into a stage, piece by piece: a tile's rows below each other,
    then the other half of the columns, as ldmatrix finds them. rows: of its blocks in the pool."""
    COUNT: gl.constexpr = ring.BLOCK_N // ring.BLOCK_SIZE
    PIECES: gl.constexpr = ring.D // PIECE_D
    ready = ring.full.index(stage)
    mbarrier.expect(ready, 2 * ring.BLOCK_N * ring.D * 2)
    for i in gl.static_range(COUNT):
        for piece in gl.static_range(PIECES):
            at = stage * (PIECES * COUNT) + piece * COUNT + i
            corner = column + piece * PIECE_D
            tma_load(kv_desc, [rows[i], corner], ready, ring.k.index(at))
            tma_load(kv_desc, [rows[i] + rows_to_v, corner], ready, ring.v.index(at))


@gluon.jit
def _clear_unwritten(ring, stage, end):
    """Zero V's rows from `end` tokens of the step on: they may be NaN, and 0 * NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    COUNT: gl.constexpr = ring.BLOCK_N // ring.BLOCK_SIZE
    PIECES: gl.constexpr = ring.D // PIECE_D
    slots = gl.arange(0, ring.BLOCK_SIZE, gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(COUNT):
        for piece in gl.static_range(PIECES):
            buffer = ring.v.index(stage * (PIECES * COUNT) + piece * COUNT + i)
            v = buffer.load(LAYOUT)
            keep = (slots + i * ring.BLOCK_SIZE < end)[:, None]
            buffer.store(gl.where(keep, v, gl.zeros_like(v)))
    fence_async_shared()  # before the copy engine writes there again
    thread_barrier()


@gluon.jit
def _attend_run(
    ring, kv_desc, q, step_count, table_ptr, first_split, end_split, split_len, context_len,
    scale_log2, rows_per_block, rows_to_v, past, column, partial_ptr, max_sum_ptr, keeps_partials,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Online softmax of q over each of the splits first_split..end_split, in one loop.
    keeps_partials: store each split's result; else there is but one, and it is returned."""
    BLOCK_N: gl.constexpr = ring.BLOCK_N
    COUNT: gl.constexpr = BLOCK_N // ring.BLOCK_SIZE
    STAGES: gl.constexpr = ring.STAGES
    D: gl.constexpr = ring.D
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_tiles = reinterpret(ring.k, [STAGES, BLOCK_N, D], TILE)
    v_tiles = reinterpret(ring.v, [STAGES, BLOCK_N, D], TILE)
    start = first_split * split_len
    end = gl.minimum(end_split * split_len, context_len)
    num_steps = gl.maximum((end - start + BLOCK_N - 1) // BLOCK_N, 0)
    first_block = start // ring.BLOCK_SIZE
    table_ptr += first_block
    num_left = gl.cdiv(end, ring.BLOCK_SIZE) - first_block  # blocks, from there on
    for i in range(gl.minimum(num_steps, STAGES - 1)):
        rows = block_rows(table_ptr + i * COUNT, num_left - i * COUNT, rows_per_block, past, COUNT)
        _load_step(ring, kv_desc, (step_count + i) % STAGES, rows, rows_to_v, column)
    # ids of the step after are loaded one step ahead: they would delay its k and v
    table_ptr += (STAGES - 1) * COUNT
    num_left -= (STAGES - 1) * COUNT
    ahead = block_rows(table_ptr, num_left, rows_per_block, past, COUNT)
    offs_g = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, MMA))
    in_group = offs_g < GROUP
    partial_offs = offs_g[:, None] * D + offs_d[None, :]
    partial_ptr += first_split * GROUP * D
    max_sum_ptr += first_split * GROUP * 2
    split_end = start + split_len
    top = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, MMA))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, MMA))
    acc = gl.zeros([ROWS, D], gl.float32, MMA)
    for i in range(num_steps):
        table_ptr += COUNT
        num_left -= COUNT
        later = block_rows(table_ptr, num_left, rows_per_block, past, COUNT)
        # the buffer of the step before, which every lane has read
        thread_barrier()
        if i + STAGES - 1 < num_steps:
            _load_step(ring, kv_desc, (step_count + STAGES - 1) % STAGES, ahead, rows_to_v, column)
        ahead = later
        n = start + i * BLOCK_N
        stage = step_count % STAGES
        mbarrier.wait(ring.full.index(stage), step_count // STAGES & 1)
        k = k_tiles.index(stage).permute((1, 0)).load(gl.DotOperandLayout(1, MMA, 2))
        scores = mma_v2(q, k, gl.zeros([ROWS, BLOCK_N], gl.float32, MMA))
        if n + BLOCK_N > end:
            scores = gl.where(is_up_to(offs_n, end - n - 1)[None, :], scores, float("-inf"))
            _clear_unwritten(ring, stage, end - n)
        new_top = gl.maximum(top, gl.max(scores, axis=1) * scale_log2)
        probs = gl.exp2(scores * scale_log2 - new_top[:, None])
        fade = gl.exp2(top - new_top)
        total = total * fade + gl.sum(probs, axis=1)
        v = v_tiles.index(stage).load(gl.DotOperandLayout(1, MMA, 2))
        probs = gl.convert_layout(probs.to(q.dtype), gl.DotOperandLayout(0, MMA, 2))
        acc = mma_v2(probs, v, acc * fade[:, None])
        top = new_top
        step_count += 1
        if keeps_partials & ((n + BLOCK_N >= end) | (n + BLOCK_N == split_end)):
            gl.store(partial_ptr + partial_offs, acc, mask=in_group[:, None])
            gl.store(max_sum_ptr + offs_g * 2, top, mask=in_group)
            gl.store(max_sum_ptr + offs_g * 2 + 1, total, mask=in_group)
            partial_ptr += GROUP * D
            max_sum_ptr += GROUP * 2
            split_end += split_len
            top = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, MMA))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, MMA))
            acc = gl.zeros([ROWS, D], gl.float32, MMA)
    return total, acc, step_count


@gluon.jit(do_not_specialize=["splits_per_place", "B", "stride_table_b", "past"])
def _decode_pipeline_kernel(
    q_ptr,
    kv_desc,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    max_sum_ptr,
    arrived_ptr,
    taken_ptr,
    out_ptr,
    splits_per_place,
    B,
    scale_log2,
    stride_q_b,
    stride_q_h,
    stride_table_b,
    stride_o_b,
    stride_o_h,
    rows_per_block,
    rows_to_v,
    past,
    H_KV: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    SPLIT_LEN: gl.constexpr,
    MIN_SPLIT_LEN: gl.constexpr,
    FEW_SPLITS: gl.constexpr,
    MAX_SPLITS: gl.constexpr,
    SPLIT_UNIT: gl.constexpr,
    TAIL_PART: gl.constexpr,
    TAIL_SHARES: gl.constexpr,
    MIN_TAIL: gl.constexpr,
    JOIN_AHEAD: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_J: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """One program works off its kv head's share of an equal run of all splits. kv_desc and the
    rows: see `hopper.PoolMatrix`; past is a row that is not there."""
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = kv_desc.dtype
    BLOCK_SIZE: gl.constexpr = kv_desc.block_type.shape[0]
    PIECES: gl.constexpr = STAGES * (BLOCK_N // BLOCK_SIZE) * (D // PIECE_D)
    k_bufs = gl.allocate_shared_memory(dtype, [PIECES, BLOCK_SIZE, PIECE_D], kv_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [PIECES, BLOCK_SIZE, PIECE_D], kv_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    thread_barrier()
    ring = Ring(k_bufs, v_bufs, full, STAGES, BLOCK_N, BLOCK_SIZE, D)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    kv_head, group = gl.program_id(0) % H_KV, gl.program_id(0) // H_KV
    num_groups = gl.num_programs(0) // H_KV
    offs_g = gl.arange(0, ROWS, gl.SliceLayout(1, Q_LAYOUT))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, Q_LAYOUT))
    in_all = all_units(
        context_lens_ptr, B, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, SPLIT_UNIT, BLOCK_B
    )
    front, num_tail = tail_of(in_all, num_groups, TAIL_PART, TAIL_SHARES, MIN_TAIL)
    step_count, b, base = 0, 0, 0
    share = group
    while share >= 0:
        start, end = share_at(share, in_all, front, num_groups, num_tail)
        # from where the share before ended: a program's later ones begin further on
        b, base = request_with(
            start, b, base, context_lens_ptr, B, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS,
            SPLIT_UNIT, BLOCK_B,
        )  # fmt: skip
        first = share_with(base, in_all, front, num_groups, num_tail)
        if PDL:
            gdc_wait()  # it holds but the first time
        while base < end:
            context_len = gl.load(context_lens_ptr + b)
            num_splits, split_len = cut(
                context_len, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, SPLIT_UNIT
            )
            split_units = split_len // SPLIT_UNIT
            first_split = gl.maximum((start - base + split_units - 1) // split_units, 0)
            end_split = gl.minimum((end - base + split_units - 1) // split_units, num_splits)
            # programs that share a context work in the place of the share that it begins in; what a
            # program has to itself goes to its own, for the former may still be in use
            done = end_split - first_split
            is_shared = done < num_splits
            own = (1 + TAIL_SHARES) * num_groups + group
            place = gl.where(is_shared, gl.where(base < start, first, share), own) * H_KV + kv_head
            partial_at = partial_ptr + place.to(gl.int64) * splits_per_place * GROUP * D
            max_sum_at = max_sum_ptr + place.to(gl.int64) * splits_per_place * GROUP * 2
            heads = kv_head * GROUP + offs_g
            b64 = b.to(gl.int64)
            q_ptrs = q_ptr + b64 * stride_q_b + heads[:, None] * stride_q_h + offs_d[None, :]
            q = gl.load(q_ptrs, mask=(offs_g < GROUP)[:, None] & (offs_d < D)[None, :], other=0.0)
            total, acc, step_count = _attend_run(
                ring, kv_desc, q, step_count, block_table_ptr + b64 * stride_table_b, first_split,
                end_split, split_len, context_len, scale_log2, rows_per_block, rows_to_v, past,
                kv_head * D, partial_at, max_sum_at, num_splits > 1, GROUP,
            )  # fmt: skip
            out_at = out_ptr + b64 * stride_o_b + kv_head * GROUP * stride_o_h
            if (num_splits == 1) & (done == 1):
                store_out(out_at, total, acc, stride_o_h, GROUP)
            elif done > 0:
                # every lane's partials must be out before one counts them as arrived
                thread_barrier()
                if is_shared:
                    done += gl.atomic_add(arrived_ptr + place, done, sem="acq_rel")
                if done == num_splits:
                    gl.store(arrived_ptr + place, 0)
                    joined_total, joined = join_splits(
                        partial_at, max_sum_at, num_splits, GROUP, D, JOIN_AHEAD, BLOCK_J
                    )
                    store_out(out_at, joined_total, joined, stride_o_h, GROUP)
                # the next request may use the same place
                thread_barrier()
            base += num_splits * split_units
            b += 1
        share = next_share(taken_ptr + kv_head, num_groups, num_tail)
