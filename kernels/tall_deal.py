"""How `tall_pipeline` deals a product out to its programs, and how two share a tile's sum.

Whole tiles, num_programs apart, leave SMs idle in the last round. A product of few rows can be
dealt out by steps through K instead: SIDE programs stand side by side, one for each tile down the
rows, and read the same columns at the same time, so that memory gives a weight once. All columns'
steps, one column after the other, are cut evenly among these groups (as stream-K does: Osama et
al., 2023). Where a cut falls into a tile, the program in front of it begins the sum and the one
behind goes on from there, in the order in which a single one would have added: where the cuts fall,
and so the number of SMs, changes no bit.

A program walks its range from its end, so that what it passes on is its first work and what it
takes over its last, which has been there for long. It waits for programs before it alone, which
started before it did and wait for none behind them: so it need not run beside them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.hopper import thread_barrier


@gluon.jit
def corner(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and column of a tile. Tiles run down GROUP_M rows before they move right, so that
    those at work together share rows of x and of the weight in L2."""
    num_m, num_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * num_n)
    top = group * GROUP_M
    height = gl.minimum(num_m - top, GROUP_M)
    inside = tile - group * (GROUP_M * num_n)
    return (top + inside % height) * BLOCK_M, inside // height * BLOCK_N


@gluon.jit
def dealt(M, N, num_k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SIDE: gl.constexpr):
    """(items of this program, first step and the one behind the last of its range). num_k: steps of
    a tile. SIDE 0: whole tiles, without a range."""
    if SIDE == 0:
        num_tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
        return gl.cdiv(num_tiles - gl.program_id(0), gl.num_programs(0)), 0, 0
    else:
        total = gl.cdiv(M, SIDE * BLOCK_M) * gl.cdiv(N, BLOCK_N) * num_k
        group, num_groups = gl.program_id(0) // SIDE, gl.num_programs(0) // SIDE
        start, end = group * total // num_groups, (group + 1) * total // num_groups
        return gl.cdiv(end, num_k) - start // num_k, start, end


@gluon.jit
def item(
    i, start, end, M, N, num_k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """(row, column, first step, step behind the last) of this program's i-th tile."""
    if SIDE == 0:
        tile = gl.program_id(0) + i * gl.num_programs(0)
        row, column = corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        return row, column, 0, num_k
    else:
        place = gl.cdiv(end, num_k) - 1 - i
        num_n = gl.cdiv(N, BLOCK_N)
        row = (place // num_n * SIDE + gl.program_id(0) % SIDE) * BLOCK_M
        begin = gl.maximum(start - place * num_k, 0)
        stop = gl.minimum(end - place * num_k, num_k)
        return row, place % num_n * BLOCK_N, begin, stop


@gluon.jit
def _offsets(ROWS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    offs_n = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    return offs_m[:, None] * WIDTH + offs_n[None, :]


@gluon.jit
def pass_on(acc, sums_ptr, is_there_ptr):
    """Put a warp group's sums where the program behind finds them. acc: [ROWS, WIDTH] fp32."""
    LAYOUT: gl.constexpr = acc.type.layout
    gl.store(sums_ptr + _offsets(acc.shape[0], acc.shape[1], LAYOUT), acc)
    thread_barrier()  # one thread speaks for all
    gl.atomic_xchg(is_there_ptr, 1, sem="release")


@gluon.jit
def take_over(
    sums_ptr, is_there_ptr, ROWS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr
):
    """Wait for sums, [ROWS, WIDTH], and leave the place empty for the next launch."""
    while gl.atomic_add(is_there_ptr, 0, sem="acquire") == 0:
        pass
    gl.store(is_there_ptr, 0)
    # .cg: another SM wrote them, and L1 may hold what an earlier launch left there
    return gl.load(sums_ptr + _offsets(ROWS, WIDTH, LAYOUT), cache_modifier=".cg")
