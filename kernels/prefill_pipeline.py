"""The kernel of prefill attention on Hopper: warps that specialise, in Gluon.

As in FlashAttention-3 (Shah et al., 2024). One warp loads: queries, and keys and values block by
block, through the copy engine (TMA) into rings of buffers. Two consumers, a warp group each, hold
64 queries: the scores of the next keys are on their way through the tensor cores (wgmma) while
the softmax of these runs, and the consumers take turns, so that one's softmax runs under the
other's products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hopper import (
    PIECE_D,
    gdc_launch_dependents,
    gdc_wait,
    is_up_to,
    reinterpret,
    thread_barrier,
)
from kernels.prefill_deal import Batch, deal, num_turns
from kernels.prefill_load import CONSUMERS, ROWS, Rings, load

# three warp groups have 168 registers a thread, shared out anew once the producer has its own
PRODUCER_REGISTERS = gl.constexpr(56)
CONSUMER_REGISTERS = gl.constexpr((3 * 168 - 56) // 2)


@gluon.jit
def _clear_last(pieces, end, num, STEP: gl.constexpr, PIECES: gl.constexpr, SIZE: gl.constexpr):
    """Zero `num` slots, fewer than 2 * SIZE, in front of slot `end`, a multiple of that, and in all
    PIECES, STEP slots apart. A store for each bit of num."""
    if num & SIZE:
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])  # swizzles stay in a row
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        NUM: gl.constexpr = pieces.shape[0] * pieces.shape[1] // SIZE
        some = reinterpret(pieces, [NUM, SIZE, PIECE_D], PLAIN)
        for i in gl.static_range(PIECES):
            zeros = gl.zeros([SIZE, PIECE_D], pieces.dtype, LAYOUT)
            some.index((end + i * STEP) // SIZE - 1).store(zeros)
        end -= SIZE
    if SIZE > 1:
        _clear_last(pieces, end, num, STEP, PIECES, SIZE // 2)


@gluon.jit
def _clear_unwritten(
    pieces, item, stage, BLOCK_N: gl.constexpr, BLOCK_SIZE: gl.constexpr, D: gl.constexpr
):
    """Zero what lies past the context in the last block of V: it may be NaN, and 0 * NaN is NaN.
    Both consumers do, and neither waits: they store zeros alone, whichever comes first."""
    COUNT: gl.constexpr = BLOCK_N // BLOCK_SIZE
    PIECES: gl.constexpr = D // PIECE_D
    block = item.context_len // BLOCK_SIZE - (item.num_steps - 1) * COUNT
    written = item.context_len % BLOCK_SIZE
    if (written > 0) & (block < COUNT):
        end = (stage * (PIECES * COUNT) + block + 1) * BLOCK_SIZE
        num = BLOCK_SIZE - written
        _clear_last(pieces, end, num, COUNT * BLOCK_SIZE, PIECES, BLOCK_SIZE // 2)
        fence_async_shared()
        thread_barrier()


@gluon.jit
def _softmax(
    scores, top, total, positions, start, scale_log2, MASKED: gl.constexpr, FIRST: gl.constexpr
):
    """Online, in base 2: (probabilities, top, total, what the past fades by)."""
    LAYOUT: gl.constexpr = scores.type.layout
    if MASKED:
        keys = gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))
        seen = is_up_to(keys[None, :], (positions - start)[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    new_top = gl.max(scores, axis=1) * scale_log2
    if not FIRST:
        new_top = gl.maximum(top, new_top)
    probs = gl.exp2(scores * scale_log2 - new_top[:, None])
    new_total = gl.sum(probs, axis=1)
    fade = gl.exp2(top - new_top)
    if not FIRST:
        new_total += total * fade
    return probs, new_top, new_total, fade


@gluon.jit
def _steps(
    rings, q, k_tiles, v_tiles, acc, probs, top, total, step, taken, begin, end, positions,
    scale_log2, WHICH: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of steps begin..end, each beside the product of the one before and V."""
    STAGES: gl.constexpr = rings.STAGES
    D: gl.constexpr = acc.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    for i in range(begin, end):
        stage = step % STAGES
        next_stage = (step + 1) % STAGES
        mbarrier.wait(rings.k_full.index(next_stage), (step + 1) // STAGES & 1)
        # a turn for every step but a tile's first; of a fresh barrier, the phase before counts as
        # over, so that consumer 0 begins
        mbarrier.wait(rings.turns.index(WHICH), (step - taken & 1) ^ (WHICH == 0))
        scores = warpgroup_mma(
            q, k_tiles.index(next_stage).permute((1, 0)),
            gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT), use_acc=False, is_async=True,
        )  # fmt: skip
        acc = warpgroup_mma(probs, v_tiles.index(stage), acc, is_async=True)
        mbarrier.arrive(rings.turns.index((WHICH + 1) % CONSUMERS), count=1)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
        mbarrier.arrive(rings.k_empty.index(next_stage), count=1)
        new_probs, top, total, fade = _softmax(
            scores, top, total, positions, i * BLOCK_N, scale_log2, MASKED, False
        )
        new_probs = gl.convert_layout(new_probs.to(q.dtype), P_LAYOUT)
        # the next step's V, waited for here: ptxas moves no wait for a wgmma up across a loop
        mbarrier.wait(rings.v_full.index(next_stage), (step + 1) // STAGES & 1)
        acc, probs = warpgroup_mma_wait(num_outstanding=0, deps=(acc, probs))
        mbarrier.arrive(rings.v_empty.index(stage), count=1)
        probs = new_probs
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
        step += 1
    return acc, probs, top, total, step


@gluon.jit
def _store(acc, total, out_ptr, row, num_queries, head, stride_o_t, stride_o_h):
    """Weighted means of up to ROWS queries, 16 bytes a thread."""
    O_LAYOUT: gl.constexpr = acc.type.layout
    D: gl.constexpr = acc.shape[1]
    REGISTERS: gl.constexpr = (
        [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]] if D == 128
        else [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]]
    )  # fmt: skip
    LANES: gl.constexpr = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    WIDE: gl.constexpr = gl.DistributedLinearLayout(
        REGISTERS, LANES, [[16, 0], [32, 0]], [], [ROWS, D]
    )
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), WIDE)
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    base = out_ptr + row.to(gl.int64) * stride_o_t + head * stride_o_h
    ptrs = base + (offs_m * stride_o_t)[:, None] + offs_d[None, :]
    gl.store(ptrs, out, mask=(offs_m < num_queries)[:, None] & (offs_d < D)[None, :])


@gluon.jit
def _attend(
    rings, batch, out_ptr, stride_o_t, stride_o_h, scale_log2,
    WHICH: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Consumer WHICH: one warp group, and ROWS queries of every tile."""
    STAGES: gl.constexpr = rings.STAGES
    BLOCK_N: gl.constexpr = batch.BLOCK_N
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_tiles = reinterpret(rings.k, [STAGES, BLOCK_N, D], TILE)
    v_tiles = reinterpret(rings.v, [STAGES, BLOCK_N, D], TILE)
    q = rings.q.index(WHICH)
    offs_m = WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    turns = num_turns(batch, 4)
    if PDL:
        gdc_wait()
    step = 0  # of keys, so far
    taken = 0  # tiles of queries so far
    level = 0
    for turn in range(turns):
        item, level = deal(batch, turn, level, 4)
        if item.num_steps > 0:
            positions = item.position + offs_m
            mbarrier.wait(rings.q_bars.index(0), taken & 1)
            stage = step % STAGES
            mbarrier.wait(rings.k_full.index(stage), step // STAGES & 1)
            scores = warpgroup_mma(
                q, k_tiles.index(stage).permute((1, 0)),
                gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT), use_acc=False, is_async=True,
            )  # fmt: skip
            scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
            mbarrier.arrive(rings.k_empty.index(stage), count=1)
            top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
            probs, top, total, _ = _softmax(
                scores, top, total, positions, 0, scale_log2, True, True
            )
            probs = gl.convert_layout(probs.to(q.dtype), P_LAYOUT)
            acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
            mbarrier.wait(rings.v_full.index(stage), step // STAGES & 1)
            # steps that every row of the consumer sees come first, and need no mask
            seen = (item.position + WHICH * ROWS + 1) // BLOCK_N
            seen = gl.maximum(gl.minimum(seen, item.num_steps), 1)
            acc, probs, top, total, step = _steps(
                rings, q, k_tiles, v_tiles, acc, probs, top, total, step, taken, 1, seen,
                positions, scale_log2, WHICH, False, BLOCK_N,
            )  # fmt: skip
            acc, probs, top, total, step = _steps(
                rings, q, k_tiles, v_tiles, acc, probs, top, total, step, taken, seen,
                item.num_steps, positions, scale_log2, WHICH, True, BLOCK_N,
            )  # fmt: skip
            mbarrier.arrive(rings.q_bars.index(1), count=1)
            stage = step % STAGES
            _clear_unwritten(rings.v, item, stage, BLOCK_N, BLOCK_SIZE, D)
            acc = warpgroup_mma(probs, v_tiles.index(stage), acc, is_async=True)
            acc, probs = warpgroup_mma_wait(num_outstanding=0, deps=(acc, probs))
            mbarrier.arrive(rings.v_empty.index(stage), count=1)
            step += 1
            taken += 1
            _store(
                acc, total, out_ptr, item.row + WHICH * ROWS, item.num_queries - WHICH * ROWS,
                item.head, stride_o_t, stride_o_h,
            )  # fmt: skip


@gluon.jit
def _barriers(NUM: gl.constexpr, count: gl.constexpr):
    """[NUM, 1] barriers, each of so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit(do_not_specialize=["stride_table_b", "past", "num_requests", "num_heads", "group"])
def _prefill_pipeline_kernel(
    q_desc,
    kv_desc,
    block_table_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    out_ptr,
    scale_log2,
    stride_table_b,
    stride_o_t,
    stride_o_h,
    rows_per_block,
    rows_to_v,
    past,
    num_requests,
    num_heads,
    group,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Programs take tiles of CONSUMERS * ROWS queries as `deal` deals them. kv_desc: one layer of
    the pool as a matrix, a row for each slot, with rows_per_block from block to block and rows_to_v
    from a block's keys to its values; past: a row that is not there."""
    dtype: gl.constexpr = kv_desc.dtype
    D: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_SIZE: gl.constexpr = kv_desc.block_type.shape[0]
    PIECES: gl.constexpr = STAGES * (BLOCK_N // BLOCK_SIZE) * (D // PIECE_D)
    q_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [PIECES, BLOCK_SIZE, PIECE_D], kv_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [PIECES, BLOCK_SIZE, PIECE_D], kv_desc.layout)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=CONSUMERS)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    turns = _barriers(CONSUMERS, 1)
    fence_async_shared()
    thread_barrier()
    if PDL:
        gdc_launch_dependents()
    rings = Rings(q_bufs, k_bufs, v_bufs, q_bars, k_full, k_empty, v_full, v_empty, turns, STAGES)
    batch = Batch(
        cu_seqlens_ptr, context_lens_ptr, num_requests, num_heads, BLOCK_B, CONSUMERS * ROWS,
        BLOCK_N,
    )  # fmt: skip
    # constexprs stay so only where these tuples are written out in place
    # fmt: off
    gl.warp_specialize([
        (_attend, (
            rings, batch, out_ptr, stride_o_t, stride_o_h, scale_log2, 0, D, BLOCK_SIZE, PDL,
        )),
        (_attend, (
            rings, batch, out_ptr, stride_o_t, stride_o_h, scale_log2, 1, D, BLOCK_SIZE, PDL,
        )),
        (load, (
            rings, batch, q_desc, kv_desc, block_table_ptr, stride_table_b, rows_per_block,
            rows_to_v, past, group, D, PDL,
        )),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    # fmt: on
