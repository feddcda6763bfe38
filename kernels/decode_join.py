"""What follows the splits in `decode_pipeline`: their partial results joined, and stored."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOWEST = gl.constexpr(-1e30)  # finite, so that a step without a token fades nothing


@gluon.jit
def join_splits(
    partial_ptr, max_sum_ptr, num_splits, GROUP: gl.constexpr, D: gl.constexpr,
    JOIN_AHEAD: gl.constexpr, BLOCK_J: gl.constexpr,
):  # fmt: skip
    """(sums of weights [BLOCK_J], weighted values [BLOCK_J, D]) over all splits of one kv head."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    offs_j = gl.arange(0, BLOCK_J, gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    mask_j = offs_j < GROUP
    partial_ptrs = partial_ptr + offs_j[:, None] * D + offs_d[None, :]
    max_sum_ptrs = max_sum_ptr + offs_j * 2
    top = gl.full([BLOCK_J], LOWEST, gl.float32, gl.SliceLayout(1, LAYOUT))
    total = gl.zeros([BLOCK_J], gl.float32, gl.SliceLayout(1, LAYOUT))
    acc = gl.zeros([BLOCK_J, D], gl.float32, LAYOUT)
    for first in range(0, num_splits, JOIN_AHEAD):
        # all loads of a round first, so that they are on their way at once
        tops, totals, values = _partials(
            partial_ptrs + first * GROUP * D, max_sum_ptrs + first * GROUP * 2, num_splits - first,
            mask_j, GROUP, D, JOIN_AHEAD,
        )  # fmt: skip
        for i in gl.static_range(JOIN_AHEAD):
            new_top = gl.maximum(top, tops[i])
            fade, weight = gl.exp2(top - new_top), gl.exp2(tops[i] - new_top)
            total = total * fade + totals[i] * weight
            acc = acc * fade[:, None] + values[i] * weight[:, None]
            top = new_top
    return total, acc


@gluon.jit
def _partials(
    partial_ptrs, max_sum_ptrs, num_left, mask_j, GROUP: gl.constexpr, D: gl.constexpr,
    NUM: gl.constexpr,
):  # fmt: skip
    """NUM splits' maxima, sums and values; past the last, what weighs nothing."""
    mask = mask_j & (num_left > 0)
    # .cg: other programs wrote these, and L1 may hold what an earlier launch left there
    top = gl.load(max_sum_ptrs, mask=mask, other=LOWEST, cache_modifier=".cg")
    total = gl.load(max_sum_ptrs + 1, mask=mask, other=0.0, cache_modifier=".cg")
    value = gl.load(partial_ptrs, mask=mask[:, None], other=0.0, cache_modifier=".cg")
    if NUM == 1:
        return (top,), (total,), (value,)
    else:
        tops, totals, values = _partials(
            partial_ptrs + GROUP * D, max_sum_ptrs + GROUP * 2, num_left - 1, mask_j, GROUP, D,
            NUM - 1,
        )  # fmt: skip
        return (top,) + tops, (total,) + totals, (value,) + values  # noqa: RUF005


@gluon.jit
def store_out(out_ptr, total, acc, stride_o_h, GROUP: gl.constexpr):
    """Weighted means to the heads of one kv head; a padding row's are zeros."""
    LAYOUT: gl.constexpr = acc.type.layout
    offs_g = gl.arange(0, acc.shape[0], gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    out = acc / gl.where(total > 0.0, total, 1.0)[:, None]
    ptrs = out_ptr + offs_g[:, None] * stride_o_h + offs_d[None, :]
    gl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=(offs_g < GROUP)[:, None])
