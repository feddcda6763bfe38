"""What follows the sums of `tall_pipeline`: scale, SiLU(gate) * up, bias, residual, and the store.

A consumer finishes its rows in chunks of columns: few registers, and small buffers that TMA empties
while the next chunk is made.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from kernels.hopper import thread_barrier, tma_store


@gluon.jit
def _split(x, LAYOUT: gl.constexpr):
    """The left and the right half of the columns, which lie in the same threads."""
    half: gl.constexpr = x.shape[1] // 2
    left, right = x.reshape([x.shape[0], 2, half]).permute(0, 2, 1).split()
    left = gl.convert_layout(left, LAYOUT, assert_trivial=True)
    return left, gl.convert_layout(right, LAYOUT, assert_trivial=True)


@gluon.jit
def _chunks(x, CHUNK_N: gl.constexpr):
    """[ROWS, CHUNK_N] pieces of x, from the left."""
    if x.shape[1] == CHUNK_N:
        return (x,)
    else:
        half: gl.constexpr = x.shape[1] // 2
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
        left, right = _split(x, layout)
        return _chunks(left, CHUNK_N) + _chunks(right, CHUNK_N)


@gluon.jit
def residual_chunks(ptrs, mask_m, cols, N, NUM: gl.constexpr, CHUNK_N: gl.constexpr):
    """NUM [ROWS, CHUNK_N] pieces of the residual, from the left."""
    piece = gl.load(ptrs, mask=mask_m[:, None] & (cols < N)[None, :], other=0.0)
    if NUM == 1:
        return (piece,)
    else:
        rest = residual_chunks(ptrs + CHUNK_N, mask_m, cols + CHUNK_N, N, NUM - 1, CHUNK_N)
        return (piece,) + rest  # noqa: RUF005  Triton knows no star in a tuple


@gluon.jit
def finish(
    i, acc, rstd, residual, bias_ptr, out_bufs, out_desc, row, column, N, BEFORE: gl.constexpr,
    IN_TILE: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Scale, gate, add and store one consumer's sums of its i-th tile at [row, column], chunk by
    chunk.

    acc: [ROWS, WIDTH]; rstd, residual: None or what applies, the latter in chunks. BEFORE: chunks
    of the tile that were stored already; IN_TILE: all of its chunks.
    """
    CHUNK_N: gl.constexpr = out_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = acc.shape[1] // 2 if GATED else acc.shape[1]
    BUFFERS: gl.constexpr = out_bufs.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK_N, 16])
    if GATED:
        gate, up = _split(acc, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
        chunks, ups = _chunks(gate, CHUNK_N), _chunks(up, CHUNK_N)
    else:
        chunks = _chunks(acc, CHUNK_N)
    for c in gl.static_range(BLOCK_N // CHUNK_N):
        value = chunks[c]
        if rstd is not None:
            value *= rstd[:, None]
        if GATED:
            up = ups[c]
            if rstd is not None:
                up *= rstd[:, None]
            value = value / (1.0 + gl.exp(-value)) * up
        if bias_ptr is not None:
            cols = column + c * CHUNK_N + gl.arange(0, CHUNK_N, gl.SliceLayout(0, LAYOUT))
            value += gl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(gl.float32)[None, :]
        if residual is not None:
            value += residual[c].to(gl.float32)
        # in turn, from tile to tile too: the store before may still read its own
        turn = BEFORE + c if IN_TILE % BUFFERS == 0 else i * IN_TILE + BEFORE + c
        buffer = out_bufs.index(turn % BUFFERS)
        tma.store_wait(BUFFERS - 1)  # the last store from this buffer has read it
        thread_barrier()
        buffer.store(value.to(out_desc.dtype))
        fence_async_shared()
        thread_barrier()
        tma_store(out_desc, [row, column + c * CHUNK_N], buffer)
