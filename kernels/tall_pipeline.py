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
    rest: gl.shared_memory_descriptor  # of a tile in two parts the second's, else the first's
    full: gl.shared_memory_descriptor  # [STAGES, 1] barriers: its bytes have arrived
    empty: gl.shared_memory_descriptor  # [STAGES, 1] barriers: every consumer has read them
    STAGES: gl.constexpr
    CONSUMERS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, x, weight, rest, full, empty, STAGES, CONSUMERS):
        self.x = x
        self.weight = weight
        self.rest = rest
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
def _load_part(buffers, desc, ready, stage, column, k, N):
    """[columns, BLOCK_K] of the weight, for so many of the tile; gated: of gate and, under it, of
    up."""
    COLUMNS: gl.constexpr = desc.block_type.shape[0]
    for half in gl.static_range(buffers.shape[1] // COLUMNS):
        buffer = buffers.index(stage).slice(half * COLUMNS, COLUMNS)
        tma_load(desc, [column + half * N, k], ready, buffer)


@gluon.jit
def _load_weight(ring, weight_desc, rest_desc, stage, column, k, N):
    """[BLOCK_N, BLOCK_K] of the weight, in one part or two."""
    ready = ring.full.index(stage)
    _load_part(ring.weight, weight_desc, ready, stage, column, k, N)
    if rest_desc is not None:
        column += weight_desc.block_type.shape[0]
        _load_part(ring.rest, rest_desc, ready, stage, column, k, N)


@gluon.jit
def _load(
    ring, x_desc, weight_desc, rest_desc, M, N, K, GROUP_M: gl.constexpr, SIDE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The producer, one warp: keeps the ring full."""
    BLOCK_M: gl.constexpr = ring.CONSUMERS * ring.x.shape[1]
    BLOCK_N: gl.constexpr = columns_of(weight_desc, rest_desc)
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    LOADED: gl.constexpr = ring.CONSUMERS * x_desc.block_type.shape[0]
    WIDTH: gl.constexpr = ring.weight.shape[1] // weight_desc.block_type.shape[0] * BLOCK_N
    BYTES: gl.constexpr = (LOADED + WIDTH) * BLOCK_K * 2
    num_k = gl.cdiv(K, BLOCK_K)
    num_items, start, end = dealt(M, N, num_k, BLOCK_M, BLOCK_N, SIDE)
    # the kernel before writes no weights: those of the first round need not wait for its end
    row, column, begin, stop = item(0, start, end, M, N, num_k, BLOCK_M, BLOCK_N, GROUP_M, SIDE)
    ahead = gl.minimum(stop - begin, ring.STAGES)
    for i in range(ahead):
        mbarrier.expect(ring.full.index(i), BYTES)
        _load_weight(ring, weight_desc, rest_desc, i, column, (begin + i) * BLOCK_K, N)
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
            _load_weight(ring, weight_desc, rest_desc, stage, column, block * BLOCK_K, N)
            stage, phase = _next(stage, phase, ring.STAGES)


@gluon.constexpr_function
def columns_of(weight_desc, rest_desc):
    """Columns of out that a tile has, in one part or two."""
    rest = 0 if rest_desc is None else rest_desc.block_type.shape[0]
    return weight_desc.block_type.shape[0] + rest


@gluon.jit
def _mma(ring, stage, accs, WHICH: gl.constexpr, use_acc: gl.constexpr):
    """The sums, one a part, with a step's product added; that of the step before is done."""
    x = ring.x.index(stage * ring.CONSUMERS + WHICH)
    weight = ring.weight.index(stage).permute((1, 0))
    acc = warpgroup_mma(x, weight, accs[0], use_acc=use_acc, is_async=True)
    if len(accs) == 1:
        return (warpgroup_mma_wait(num_outstanding=1, deps=(acc,)),)
    else:
        weight = ring.rest.index(stage).permute((1, 0))
        rest_acc = warpgroup_mma(x, weight, accs[1], use_acc=use_acc, is_async=True)
        return warpgroup_mma_wait(num_outstanding=2, deps=(acc, rest_acc))


@gluon.jit
def _multiply(
    ring, out_bufs, x_desc, weight_desc, rest_desc, out_desc, bias_ptr, residual_ptr, rstd_ptr,
    sums_ptr, is_there_ptr, M, N, K, stride_r_m, WHICH: gl.constexpr, GATED: gl.constexpr,
    GROUP_M: gl.constexpr, SIDE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Consumer WHICH: one warp group, which multiplies and stores its ROWS rows of every tile."""
    CONSUMERS: gl.constexpr = ring.CONSUMERS
    ROWS: gl.constexpr = ring.x.shape[1]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    FIRST_N: gl.constexpr = weight_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = columns_of(weight_desc, rest_desc)
    WIDTH: gl.constexpr = ring.weight.shape[1]  # FIRST_N, twice that if gated
    CHUNK_N: gl.constexpr = out_desc.block_type.shape[1]
    IN_TILE: gl.constexpr = BLOCK_N // CHUNK_N
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
        accs = (acc,)
        if rest_desc is not None:
            REST: gl.constexpr = ring.rest.shape[1]
            REST_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
            accs = (acc, gl.zeros([ROWS, REST], gl.float32, REST_ACC))
        mbarrier.wait(ring.full.index(stage), phase)
        accs = _mma(ring, stage, accs, WHICH, SIDE > 0)
        before = stage
        stage, phase = _next(stage, phase, ring.STAGES)
        residual, rest_residual = None, None
        if residual_ptr is not None:  # asked for here, so that it arrives while the sums are made
            cols = column + gl.arange(0, CHUNK_N, gl.SliceLayout(0, CHUNK))
            ptrs = residual_ptr + rows.to(gl.int64)[:, None] * stride_r_m + cols[None, :]
            residual = residual_chunks(ptrs, mask_m, cols, N, FIRST_N // CHUNK_N, CHUNK_N)
            if rest_desc is not None:
                rest_residual = residual_chunks(
                    ptrs + FIRST_N, mask_m, cols + FIRST_N, N, (BLOCK_N - FIRST_N) // CHUNK_N,
                    CHUNK_N,
                )  # fmt: skip
        for _ in range(begin + 1, stop):
            mbarrier.wait(ring.full.index(stage), phase)
            accs = _mma(ring, stage, accs, WHICH, True)
            # all but this step are done: their buffers are free again
            mbarrier.arrive(ring.empty.index(before), count=1)
            before = stage
            stage, phase = _next(stage, phase, ring.STAGES)
        if rest_desc is None:
            acc = warpgroup_mma_wait(num_outstanding=0, deps=accs)
        else:
            acc, rest_acc = warpgroup_mma_wait(num_outstanding=0, deps=accs)
        mbarrier.arrive(ring.empty.index(before), count=1)
        if SIDE == 0:
            finish(
                i, acc, rstd, residual, bias_ptr, out_bufs, out_desc, row, column, N, 0, IN_TILE,
                GATED,
            )  # fmt: skip
            if rest_desc is not None:
                finish(
                    i, rest_acc, rstd, rest_residual, bias_ptr, out_bufs, out_desc, row,
                    column + FIRST_N, N, FIRST_N // CHUNK_N, IN_TILE, GATED,
                )  # fmt: skip
        elif stop == num_k:
            finish(
                i, acc, rstd, residual, bias_ptr, out_bufs, out_desc, row, column, N, 0, IN_TILE,
                GATED,
            )  # fmt: skip
        else:
            place = gl.program_id(0) * CONSUMERS + WHICH
            pass_on(acc, sums_ptr + place * (ROWS * WIDTH), is_there_ptr + place)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _tall_matmul_kernel(
    x_desc,
    weight_desc,
    rest_desc,
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
    rows where M is no more, [BLOCK_N, BLOCK_K] and [ROWS, CHUNK_N]. Columns that are no power of 2
    are two parts, the weight's with a descriptor each."""
    dtype: gl.constexpr = x_desc.dtype
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    WIDTH: gl.constexpr = weight_desc.block_type.shape[0] * (2 if GATED else 1)
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], x_desc.layout)
    weight_bufs = gl.allocate_shared_memory(dtype, [STAGES, WIDTH, BLOCK_K], weight_desc.layout)
    rest_bufs = weight_bufs
    if rest_desc is not None:
        gl.static_assert(SIDE == 0, "tiles of two parts are whole ones")
        REST: gl.constexpr = rest_desc.block_type.shape[0] * (2 if GATED else 1)
        rest_bufs = gl.allocate_shared_memory(dtype, [STAGES, REST, BLOCK_K], rest_desc.layout)
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
    ring = Ring(x_bufs, weight_bufs, rest_bufs, full, empty, STAGES, CONSUMERS)
    # constexprs stay so only where these tuples are written out in place
    # fmt: off
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_multiply, (
                ring, out_bufs, x_desc, weight_desc, rest_desc, out_desc, bias_ptr, residual_ptr,
                rstd_ptr, sums_ptr, is_there_ptr, M, N, K, stride_r_m, 0, GATED, GROUP_M, SIDE, PDL,
            )),
            (_load, (ring, x_desc, weight_desc, rest_desc, M, N, K, GROUP_M, SIDE, PDL)),
        ], [1], [24])
    else:
        other_bufs = gl.allocate_shared_memory(dtype, out_shape, out_desc.layout)
        gl.warp_specialize([
            (_multiply, (
                ring, out_bufs, x_desc, weight_desc, rest_desc, out_desc, bias_ptr, residual_ptr,
                rstd_ptr, sums_ptr, is_there_ptr, M, N, K, stride_r_m, 0, GATED, GROUP_M, SIDE, PDL,
            )),
            (_multiply, (
                ring, other_bufs, x_desc, weight_desc, rest_desc, out_desc, bias_ptr, residual_ptr,
                rstd_ptr, sums_ptr, is_there_ptr, M, N, K, stride_r_m, 1, GATED, GROUP_M, SIDE, PDL,
            )),
            (_load, (ring, x_desc, weight_desc, rest_desc, M, N, K, GROUP_M, SIDE, PDL)),
        ], [4, 1], [240, 24])
    # fmt: on
