"""The loading warp of `prefill_pipeline`, and the rings of buffers that it fills."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate  # 3.6 has no public name for it

from kernels.hopper import PIECE_D, block_rows, gdc_wait, tma_load
from kernels.prefill_deal import deal, num_turns

ROWS = gl.constexpr(64)  # queries of a consumer: the rows of a wgmma
CONSUMERS = gl.constexpr(2)


@aggregate
class Rings:
    """What passes between the warps of a program: buffers, and whose turn each of them is."""

    q: gl.shared_memory_descriptor  # [CONSUMERS, ROWS, D]
    k: gl.shared_memory_descriptor  # [STAGES * pieces, BLOCK_SIZE, PIECE_D]
    v: gl.shared_memory_descriptor
    q_bars: gl.shared_memory_descriptor  # [2, 1] barriers: its bytes have arrived; it was read
    k_full: gl.shared_memory_descriptor  # [STAGES, 1] barriers: its bytes have arrived
    k_empty: gl.shared_memory_descriptor  # [STAGES, 1] barriers: every consumer has read them
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    turns: gl.shared_memory_descriptor  # [CONSUMERS, 1] barriers: it may issue its products
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, q, k, v, q_bars, k_full, k_empty, v_full, v_empty, turns, STAGES):
        self.q = q
        self.k = k
        self.v = v
        self.q_bars = q_bars
        self.k_full = k_full
        self.k_empty = k_empty
        self.v_full = v_full
        self.v_empty = v_empty
        self.turns = turns
        self.STAGES = gl.constexpr(STAGES)


@gluon.jit
def _load_step(kv_desc, buffers, ready, stage, rows, shift, column, D: gl.constexpr):
    """Keys or values of one step, piece by piece: a tile of whole rows below each other, then the
    other half of the columns, as wgmma wants it."""
    COUNT: gl.constexpr = len(rows)
    PIECES: gl.constexpr = D // PIECE_D
    mbarrier.expect(ready, COUNT * kv_desc.block_type.shape[0] * D * 2)
    for i in gl.static_range(COUNT):
        for piece in gl.static_range(PIECES):
            buffer = buffers.index(stage * (PIECES * COUNT) + piece * COUNT + i)
            tma_load(kv_desc, [rows[i] + shift, column + piece * PIECE_D], ready, buffer)


@gluon.jit
def load(
    rings, batch, q_desc, kv_desc, block_table_ptr, stride_table_b, rows_per_block, rows_to_v, past,
    group, D: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The producer, one warp: keeps the rings full."""
    STAGES: gl.constexpr = rings.STAGES
    BLOCK_SIZE: gl.constexpr = kv_desc.block_type.shape[0]
    COUNT: gl.constexpr = batch.BLOCK_N // BLOCK_SIZE
    turns = num_turns(batch, 1)
    if PDL:
        gdc_wait()
    step = 0  # of keys, so far
    taken = 0  # tiles of queries so far
    level = 0
    for turn in range(turns):
        item, level = deal(batch, turn, level, 1)
        if item.num_steps > 0:
            # of the step in hand: its blocks in the table, and how many are left from there on
            table_ptr = block_table_ptr + item.request.to(gl.int64) * stride_table_b
            num_left = gl.cdiv(item.context_len, BLOCK_SIZE)
            column = item.head // group * D
            ahead = block_rows(table_ptr, num_left, rows_per_block, past, COUNT)
            mbarrier.wait(rings.q_bars.index(1), (taken & 1) ^ 1)
            mbarrier.expect(rings.q_bars.index(0), batch.BLOCK_M * D * 2)
            for c in gl.static_range(CONSUMERS):
                corner = [item.row + c * ROWS, item.head * D]
                tma_load(q_desc, corner, rings.q_bars.index(0), rings.q.index(c))
            taken += 1
            stage = step % STAGES
            mbarrier.wait(rings.k_empty.index(stage), (step // STAGES & 1) ^ 1)
            _load_step(kv_desc, rings.k, rings.k_full.index(stage), stage, ahead, 0, column, D)
            ahead = block_rows(table_ptr + COUNT, num_left - COUNT, rows_per_block, past, COUNT)
            for _ in range(1, item.num_steps):
                later = block_rows(
                    table_ptr + 2 * COUNT, num_left - 2 * COUNT, rows_per_block, past, COUNT
                )
                next_stage = (step + 1) % STAGES
                mbarrier.wait(rings.k_empty.index(next_stage), ((step + 1) // STAGES & 1) ^ 1)
                ready = rings.k_full.index(next_stage)
                _load_step(kv_desc, rings.k, ready, next_stage, ahead, 0, column, D)
                # read again: registers are scarce here, and these are in the cache
                here = block_rows(table_ptr, num_left, rows_per_block, past, COUNT)
                mbarrier.wait(rings.v_empty.index(stage), (step // STAGES & 1) ^ 1)
                ready = rings.v_full.index(stage)
                _load_step(kv_desc, rings.v, ready, stage, here, rows_to_v, column, D)
                ahead = later
                table_ptr += COUNT
                num_left -= COUNT
                step += 1
                stage = next_stage
            here = block_rows(table_ptr, num_left, rows_per_block, past, COUNT)
            mbarrier.wait(rings.v_empty.index(stage), (step // STAGES & 1) ^ 1)
            ready = rings.v_full.index(stage)
            _load_step(kv_desc, rings.v, ready, stage, here, rows_to_v, column, D)
            step += 1
