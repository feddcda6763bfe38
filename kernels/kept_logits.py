"""Which logits a row keeps: the threshold of top-k, top-p and min-p, without a sort.

By bisection over the bits of floats, among the few candidates that `kernels.candidates` has listed,
or over the whole row where they are more than the list holds.
"""

import triton
import triton.language as tl

from kernels.candidates import scan_list
from kernels.logit_weights import INF, cell_to_float, float_to_cell, weights_of


@triton.jit
def scan_row(
    row_ptr, pivot, top, scale, V, PIECE_V: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(count, mass), [BLOCK_P] each, of a row's logits >= pivot, by pieces."""
    offs_p = tl.arange(0, BLOCK_P)[:, None]
    count = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
    mass = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, PIECE_V, BLOCK_C):
        offs_v = offs_p * PIECE_V + start + tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=-INF).to(tl.float32)
        is_reached = x >= pivot
        count += is_reached.to(tl.int32)
        mass += tl.where(is_reached, weights_of(x, top, scale), 0.0)
    return tl.sum(count, axis=1), tl.sum(mass, axis=1)


@triton.jit
def _scan(
    source, pivot, top, scale, BY_MASS: tl.constexpr, PIECE_V: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """How many values of the source are >= pivot, or their mass."""
    is_listed, value_ptr, num_listed, row_ptr, V = source
    if is_listed:
        counts, masses = scan_list(value_ptr, num_listed, pivot, top, scale, LANES)
        found = tl.sum(masses if BY_MASS else counts, axis=0)
    else:
        piece_counts, piece_masses = scan_row(
            row_ptr, pivot, top, scale, V, PIECE_V, BLOCK_P, BLOCK_C
        )
        found = tl.sum(piece_masses if BY_MASS else piece_counts, axis=0)
    return found


@triton.jit
def _largest_pivot(
    source, low, high, want, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr,
    PIECE_V: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The largest cell in low..high - 1 with `want` values, or that much mass, at or above it; low
    is taken to have them."""
    while high - low > 1:
        middle = (low + high) // 2
        pivot = cell_to_float(middle, SHIFT)
        found = _scan(source, pivot, top, scale, BY_MASS, PIECE_V, BLOCK_P, BLOCK_C, LANES)
        low, high = tl.where(found >= want, middle, low), tl.where(found >= want, high, middle)
    return low


@triton.jit
def threshold_of(
    source, limits, low, floor, top, total, scale, SHIFT: tl.constexpr, PIECE_V: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The smallest logit that a row keeps, of those from `low` on.

    source: (whether it is a list, the list's values, how many they are, the row's logits, V);
    limits: (by_k, top_k, by_p, top_p); floor: the smallest that min-p keeps; total: the row's mass.
    """
    by_k, top_k, by_p, top_p = limits
    low_cell, high_cell = float_to_cell(low, SHIFT), float_to_cell(top, SHIFT) + 1
    if by_k:
        low_cell = _largest_pivot(
            source, low_cell, high_cell, top_k, top, scale, False, SHIFT, PIECE_V, BLOCK_P, BLOCK_C,
            LANES,
        )  # fmt: skip
    if by_p:
        if by_k:  # the share is of the mass among the top-k
            pivot = cell_to_float(low_cell, SHIFT)
            total = _scan(source, pivot, top, scale, True, PIECE_V, BLOCK_P, BLOCK_C, LANES)
        low_cell = _largest_pivot(
            source, low_cell, high_cell, top_p * total, top, scale, True, SHIFT, PIECE_V, BLOCK_P,
            BLOCK_C, LANES,
        )  # fmt: skip
    return tl.maximum(cell_to_float(low_cell, SHIFT), floor)
