"""The kernel of `tall_matmul`: warps that specialise, in Gluon, for Hopper.

One warp loads: it walks the tiles of its program and fills a ring of buffers through the copy
engine (TMA), as far ahead as the ring reaches, also while the tile before is being stored. The
consumers, a warp group each, multiply (wgmma): each holds ROWS rows of a tile and reads the same
weights as the others. Which tiles a program has, and how much of each sum, `tall_deal` says.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate  # 3.6 has no public name for it

from kernels.hopper import gdc_launch_dependents, gdc_wait, thread_barrier, tma_load
from kernels.tall_deal import dealt, item, pass_on, take_over
from kernels.tall_epilogue import finish, residual_chunks


@aggregate
class Ring:
    """What passes between the warps of a program: buffers, and whose turn each of them is."""

    x: gl.shared_memory_descriptor  # [STAGES * CONSUMERS, ROWS, BLOCK_K], of few tokens half filled
    weight: gl.shared_memory_descriptor  # [STAGES, WIDTH, BLOCK_K]
    full: gl.shared_memory_descriptor  # [STAGES, 1] barriers: its bytes have arrived
    empty: gl.shared_memory_descriptor  # [STAGES, 1] barriers: every consumer has read them
    STAGES: gl.constexpr
    CONSUMERS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, x, weight, full, empty, STAGES, CONSUMERS):
        self.x = x
        self.weight = weight
        self.full = full
        self.empty = empty
        self.STAGES = gl.constexpr(STAGES)
        self.CONSUMERS = gl.constexpr(CONSUMERS)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The buffer after this one, and the phase of its barriers."""
    wrap = stage + 1 == STAGES
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _load_x(ring, x_desc, stage, row, k):
    """[BLOCK_M, BLOCK_K] of x, to the consumers in turn; of few tokens the first LOADED rows, and
    what is under them stays as it is: no row of a product is made of another's."""
    LOADED: gl.constexpr = x_desc.block_type.shape[0]
    ROWS: gl.constexpr = ring.x.shape[1]
    for c in gl.static_range(ring.CONSUMERS):
        buffer = ring.x.index(stage * ring.CONSUMERS + c)
        if LOADED < ROWS:
            buffer = buffer.slice(0, LOADED)
        tma_load(x_desc, [row + c * ROWS, k], ring.full.index(stage), buffer)


@gluon.jit
def _load_weight(ring, weight_desc, stage, column, k, N):
    """[BLOCK_N, BLOCK_K] of the weight; gated: of gate and, under it, of up."""
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    for half in gl.static_range(ring.weight.shape[1] // BLOCK_N):
        buffer = ring.weight.index(stage).slice(half * BLOCK_N, BLOCK_N)
        tma_load(weight_desc, [column + half * N, k], ring.full.index(stage), buffer)


@gluon.jit
def _load(
    ring, x_desc, weight_desc, M, N, K, GROUP_M: gl.constexpr, SIDE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The producer, one warp: keeps the ring full."""
    BLOCK_M: gl.constexpr = ring.CONSUMERS * ring.x.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    LOADED: gl.constexpr = ring.CONSUMERS * x_desc.block_type.shape[0]
    BYTES: gl.constexpr = (LOADED + ring.weight.shape[1]) * BLOCK_K * 2
    num_k = gl.cdiv(K, BLOCK_K)
    num_items, start, end = dealt(M, N, num_k, BLOCK_M, BLOCK_N, SIDE)
    # the kernel before writes no weights: those of the first round need not wait for its end
    row, column, begin, stop = item(0, start, end, M, N, num_k, BLOCK_M, BLOCK_N, GROUP_M, SIDE)
    ahead = gl.minimum(stop - begin, ring.STAGES)
    for i in range(ahead):
        mbarrier.expect(ring.full.index(i), BYTES)
        _load_weight(ring, weight_desc, i, column, (begin + i) * BLOCK_K, N)
    if PDL:
        gdc_wait()
    for i in range(ahead):
        _load_x(ring, x_desc, i, row, (begin + i) * BLOCK_K)
    stage = ahead % ring.STAGES
    phase = 1 - ahead // ring.STAGES  # 1 in the first round: no buffer has to be read before it
    for i in range(num_items):
        row, column, begin, stop = item(i, start, end, M, N, num_k, BLOCK_M, BLOCK_N, GROUP_M, SIDE)
        # not carried from tile to tile: Triton 3.6 folds a value that the loop sets to 0 into what
        # it was before the loop, and the consumers would wait for ever
        begun = gl.where(i == 0, ahead, 0)
        for block in range(begin + begun, stop):
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(ring.full.index(stage), BYTES)
            _load_x(ring, x_desc, stage, row, block * BLOCK_K)
            _load_weight(ring, weight_desc, stage, column, block * BLOCK_K, N)
            stage, phase = _next(stage, phase, ring.STAGES)


@gluon.jit
def _multiply(
    ring, out_bufs, x_desc, weight_desc, out_desc, bias_ptr, residual_ptr, rstd_ptr, sums_ptr,
    is_there_ptr, M, N, K, stride_r_m, WHICH: gl.constexpr, GATED: gl.constexpr,
    GROUP_M: gl.constexpr, SIDE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Consumer WHICH: one warp group, which multiplies and stores its ROWS rows of every tile."""
    CONSUMERS: gl.constexpr = ring.CONSUMERS
    ROWS: gl.constexpr = ring.x.shape[1]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    WIDTH: gl.constexpr = ring.weight.shape[1]  # BLOCK_N, twice that if gated
    CHUNK_N: gl.constexpr = out_desc.block_type.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    CHUNK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK_N, 16])
    num_k = gl.cdiv(K, x_desc.block_type.shape[1])
    num_items, start, end = dealt(M, N, num_k, BLOCK_M, BLOCK_N, SIDE)
    stage, phase = 0, 0
    if PDL:
        gdc_wait()
    for i in range(num_items):
        row, column, begin, stop = item(i, start, end, M, N, num_k, BLOCK_M, BLOCK_N, GROUP_M, SIDE)
        row += WHICH * ROWS
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, CHUNK))
        mask_m = rows < M
        if SIDE > 0:  # only who ends a sum needs what is added to it
            mask_m = mask_m & (stop == num_k)
        rstd = None
        if rstd_ptr is not None:
            rstd = gl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
        acc = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
        if SIDE > 0:  # noqa: SIM102  known when compiled, which `and` would not be
            if begin > 0:
                place = (gl.program_id(0) - SIDE) * CONSUMERS + WHICH
                sums = sums_ptr + place * (ROWS * WIDTH)
                acc = take_over(sums, is_there_ptr + place, ROWS, WIDTH, ACC)
        mbarrier.wait(ring.full.index(stage), phase)
        acc = warpgroup_mma(
            ring.x.index(stage * CONSUMERS + WHICH), ring.weight.index(stage).permute((1, 0)),
            acc, use_acc=SIDE > 0, is_async=True,
        )  # fmt: skip
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        before = stage
        stage, phase = _next(stage, phase, ring.STAGES)
        residual = None
        if residual_ptr is not None:  # asked for here, so that it arrives while the sums are made
            cols = column + gl.arange(0, CHUNK_N, gl.SliceLayout(0, CHUNK))
            ptrs = residual_ptr + rows.to(gl.int64)[:, None] * stride_r_m + cols[None, :]
            residual = residual_chunks(ptrs, mask_m, cols, N, BLOCK_N // CHUNK_N, CHUNK_N)
        for _ in range(begin + 1, stop):
            mbarrier.wait(ring.full.index(stage), phase)
            x = ring.x.index(stage * CONSUMERS + WHICH)
            acc = warpgroup_mma(x, ring.weight.index(stage).permute((1, 0)), acc, is_async=True)
            # all but this one are done: their buffer is free again
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(ring.empty.index(before), count=1)
            before = stage
            stage, phase = _next(stage, phase, ring.STAGES)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(ring.empty.index(before), count=1)
        if SIDE == 0:  # noqa: SIM114  likewise
            finish(i, acc, rstd, residual, bias_ptr, out_bufs, out_desc, row, column, N, GATED)
        elif stop == num_k:
            finish(i, acc, rstd, residual, bias_ptr, out_bufs, out_desc, row, column, N, GATED)
        else:
            place = gl.program_id(0) * CONSUMERS + WHICH
            pass_on(acc, sums_ptr + place * (ROWS * WIDTH), is_there_ptr + place)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _tall_matmul_kernel(
    x_desc,
    weight_desc,
    out_desc,
    bias_ptr,
    residual_ptr,
    rstd_ptr,
    sums_ptr,
    is_there_ptr,
    M,
    N,
    K,
    stride_r_m,
    GATED: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    OUT_BUFFERS: gl.constexpr,
    GROUP_M: gl.constexpr,
    SIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """One program computes [CONSUMERS * ROWS, BLOCK_N] tiles of out, as `tall_deal` deals them out:
    whole ones where SIDE is 0, else parts, over scratch for sums. GATED: weight holds N gate rows
    and then N up rows. The descriptors' blocks are what one copy moves: [ROWS, BLOCK_K], or fewer
    rows where M is no more, [BLOCK_N, BLOCK_K] and [ROWS, CHUNK_N]."""
    dtype: gl.constexpr = x_desc.dtype
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    WIDTH: gl.constexpr = weight_desc.block_type.shape[0] * (2 if GATED else 1)
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], x_desc.layout)
    weight_bufs = gl.allocate_shared_memory(dtype, [STAGES, WIDTH, BLOCK_K], weight_desc.layout)
    out_shape: gl.constexpr = [OUT_BUFFERS, ROWS, out_desc.block_type.shape[1]]
    out_bufs = gl.allocate_shared_memory(dtype, out_shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    thread_barrier()
    if PDL:
        gdc_launch_dependents()
    ring = Ring(x_bufs, weight_bufs, full, empty, STAGES, CONSUMERS)
    # constexprs stay so only where these tuples are written out in place
    # fmt: off
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_multiply, (
                ring, out_bufs, x_desc, weight_desc, out_desc, bias_ptr, residual_ptr, rstd_ptr,
                sums_ptr, is_there_ptr, M, N, K, stride_r_m, 0, GATED, GROUP_M, SIDE, PDL,
            )),
            (_load, (ring, x_desc, weight_desc, M, N, K, GROUP_M, SIDE, PDL)),
        ], [1], [24])
    else:
        other_bufs = gl.allocate_shared_memory(dtype, out_shape, out_desc.layout)
        gl.warp_specialize([
            (_multiply, (
                ring, out_bufs, x_desc, weight_desc, out_desc, bias_ptr, residual_ptr, rstd_ptr,
                sums_ptr, is_there_ptr, M, N, K, stride_r_m, 0, GATED, GROUP_M, SIDE, PDL,
            )),
            (_multiply, (
                ring, other_bufs, x_desc, weight_desc, out_desc, bias_ptr, residual_ptr, rstd_ptr,
                sums_ptr, is_there_ptr, M, N, K, stride_r_m, 1, GATED, GROUP_M, SIDE, PDL,
            )),
            (_load, (ring, x_desc, weight_desc, M, N, K, GROUP_M, SIDE, PDL)),
        ], [4, 1], [240, 24])
    # fmt: on
