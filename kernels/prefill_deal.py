"""Which tile of queries a program of `prefill_pipeline` takes in its turn."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate  # 3.6 has no public name for it


@aggregate
class Batch:
    """Where the requests' queries begin, and how many tokens each of them sees."""

    cu_seqlens_ptr: gl.tensor  # [num_requests + 1]
    context_lens_ptr: gl.tensor  # [num_requests]
    num_requests: gl.tensor
    num_heads: gl.tensor
    BLOCK_B: gl.constexpr  # lanes over the requests, 32 or more
    BLOCK_M: gl.constexpr  # queries of a tile
    BLOCK_N: gl.constexpr  # keys of a step

    @gluon.constexpr_function
    def __init__(
        self, cu_seqlens_ptr, context_lens_ptr, num_requests, num_heads, BLOCK_B, BLOCK_M, BLOCK_N
    ):
        self.cu_seqlens_ptr = cu_seqlens_ptr
        self.context_lens_ptr = context_lens_ptr
        self.num_requests = num_requests
        self.num_heads = num_heads
        self.BLOCK_B = gl.constexpr(BLOCK_B)
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_N = gl.constexpr(BLOCK_N)


@aggregate
class Item:
    """A tile of queries of one request and one head."""

    request: gl.tensor
    head: gl.tensor
    row: gl.tensor  # its first query, in the ragged batch
    num_queries: gl.tensor  # from there to the request's last
    position: gl.tensor  # of its first query in the context
    context_len: gl.tensor
    num_steps: gl.tensor  # of BLOCK_N keys; 0: there is nothing to do

    @gluon.constexpr_function
    def __init__(self, request, head, row, num_queries, position, context_len, num_steps):
        self.request = request
        self.head = head
        self.row = row
        self.num_queries = num_queries
        self.position = position
        self.context_len = context_len
        self.num_steps = num_steps


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tiles(batch, WARPS: gl.constexpr):
    """[BLOCK_B] tiles of each request, over the lanes of a warp and the same in every warp, so that
    sums need no shared memory."""
    LANES: gl.constexpr = gl.BlockedLayout([batch.BLOCK_B // 32], [32], [WARPS], [0])
    offs_b = gl.arange(0, batch.BLOCK_B, LANES)
    mask = offs_b < batch.num_requests
    starts = gl.load(batch.cu_seqlens_ptr + offs_b, mask=mask, other=0)
    ends = gl.load(batch.cu_seqlens_ptr + offs_b + 1, mask=mask, other=0)
    return (ends - starts + batch.BLOCK_M - 1) // batch.BLOCK_M


@gluon.jit
def num_turns(batch, WARPS: gl.constexpr):
    """Turns that each program has."""
    num_items = gl.sum(_tiles(batch, WARPS), axis=0) * batch.num_heads
    return gl.cdiv(num_items, gl.num_programs(0))


@gluon.jit
def deal(batch, turn, level, WARPS: gl.constexpr):
    """(Item of this program in its turn, its level), given its last item's level, at first 0.

    The last tile of a request sees the most keys. Dealt out first are the last tiles of all
    requests (level 0), then those before them, and so on, so that what comes at the end is short;
    every other turn runs backwards through the programs, so that their sums are alike. Nothing is
    dealt for requests without queries, with which a captured launch is padded.
    """
    programs, pid = gl.num_programs(0), gl.program_id(0)
    item = turn * programs + gl.where(turn % 2 == 0, pid, programs - 1 - pid)
    index = item // batch.num_heads
    tiles = _tiles(batch, WARPS)
    is_there = index < gl.sum(tiles, axis=0)
    while is_there & (gl.sum(gl.minimum(tiles, level + 1), axis=0) <= index):
        level += 1
    rank = gl.associative_scan((tiles > level).to(gl.int32), 0, _add)  # inclusive
    before = gl.sum(gl.minimum(tiles, level), axis=0)
    request = gl.sum((rank <= index - before).to(gl.int32), axis=0)
    request = gl.where(is_there, request, 0)
    start = gl.load(batch.cu_seqlens_ptr + request)
    query_len = gl.load(batch.cu_seqlens_ptr + request + 1) - start
    context_len = gl.load(batch.context_lens_ptr + request)
    first = ((query_len + batch.BLOCK_M - 1) // batch.BLOCK_M - 1 - level) * batch.BLOCK_M
    position = context_len - query_len + first
    end = gl.minimum(position + batch.BLOCK_M, context_len)
    num_steps = gl.where(is_there, gl.cdiv(end, batch.BLOCK_N), 0)
    return Item(
        request, item % batch.num_heads, start + first, query_len - first, position, context_len,
        num_steps,
    ), level  # fmt: skip
