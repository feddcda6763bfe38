"""Which logits a row keeps: the threshold of top-k, top-p and min-p, without a sort.

By bisection over the bits of floats, among the few candidates that `kernels.candidates` has listed:
in registers where these hold them all, else by scans of the list, or of the whole row where they
are more than the list holds.
"""

import triton
import triton.language as tl

from kernels.logit_weights import INF, cell_to_float, float_to_cell, weights_of

SCAN_STAGES = tl.constexpr(5)  # steps of a scan that are read ahead: a row comes from memory


@triton.jit
def masses_from(
    row_ptr, threshold, top, scale, V, PIECE_V: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_P] masses of a row's logits >= threshold, by pieces."""
    offs_p = tl.arange(0, BLOCK_P)[:, None]
    mass = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, PIECE_V, BLOCK_C):
        offs_v = offs_p * PIECE_V + start + tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=-INF).to(tl.float32)
        mass += tl.where(x >= threshold, weights_of(x, top, scale), 0.0)
    return tl.sum(mass, axis=1)


@triton.jit
def _counted(x, top, scale, BY_MASS: tl.constexpr):
    """What each logit counts: its mass, or one."""
    return weights_of(x, top, scale) if BY_MASS else tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _scan(ptr, size, pivots, top, scale, BY_MASS: tl.constexpr, BLOCK_V: tl.constexpr):
    """How many of `size` logits reach each of three pivots, or their mass, fp32: three, since
    reading a row takes longer than comparing it."""
    offs = tl.arange(0, BLOCK_V)
    first = tl.zeros([BLOCK_V], tl.float32)
    second = tl.zeros([BLOCK_V], tl.float32)
    third = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, size, BLOCK_V, num_stages=SCAN_STAGES):
        x = tl.load(ptr + start + offs, mask=start + offs < size, other=-INF).to(tl.float32)
        counted = _counted(x, top, scale, BY_MASS)
        first += tl.where(x >= pivots[0], counted, 0.0)
        second += tl.where(x >= pivots[1], counted, 0.0)
        third += tl.where(x >= pivots[2], counted, 0.0)
    return tl.sum(first, axis=0), tl.sum(second, axis=0), tl.sum(third, axis=0)


@triton.jit
def _scan_source(source, pivots, top, scale, BY_MASS: tl.constexpr, BLOCK_V: tl.constexpr):
    """`_scan` of the list, or of the whole row."""
    is_listed, value_ptr, num_listed, row_ptr, V = source
    if is_listed:
        first, second, third = _scan(value_ptr, num_listed, pivots, top, scale, BY_MASS, BLOCK_V)
    else:
        first, second, third = _scan(row_ptr, V, pivots, top, scale, BY_MASS, BLOCK_V)
    return first, second, third


@triton.jit
def _largest_held(held, low, high, want, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr):
    """`_largest_pivot` among logits in registers: halves."""
    counted = _counted(held, top, scale, BY_MASS)
    while high - low > 1:
        middle = (low + high) // 2
        found = tl.sum(tl.where(held >= cell_to_float(middle, SHIFT), counted, 0.0), axis=0)
        low, high = tl.where(found >= want, middle, low), tl.where(found >= want, high, middle)
    return low


@triton.jit
def _largest_scanned(
    source, guess, low, high, want, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`_largest_pivot` by scans: quarters."""
    a = tl.minimum(tl.maximum(guess, low + 1), high - 1)
    while high - low > 1:
        b, c = a + (high - a) // 3, a + 2 * (high - a) // 3
        pivots = (cell_to_float(a, SHIFT), cell_to_float(b, SHIFT), cell_to_float(c, SHIFT))
        of_a, of_b, of_c = _scan_source(source, pivots, top, scale, BY_MASS, BLOCK_V)
        # more logits reach a lower pivot, and sums of them are no less however they are rounded
        below, above = tl.where(of_a >= want, a, low), tl.where(of_c >= want, high, c)
        low = tl.where(of_c >= want, c, tl.where(of_b >= want, b, below))
        high = tl.where(of_a < want, a, tl.where(of_b < want, b, above))
        a = low + tl.maximum((high - low) // 4, 1)
    return low


@triton.jit
def _largest_pivot(
    source, guess, low, high, want, top, scale, BY_MASS: tl.constexpr, IS_HELD: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The largest cell in low..high - 1 with `want` values, or that much mass, at or above it; low
    is taken to have them. guess: a cell near it."""
    if IS_HELD:
        return _largest_held(source, low, high, want, top, scale, BY_MASS, SHIFT)
    else:
        return _largest_scanned(source, guess, low, high, want, top, scale, BY_MASS, SHIFT, BLOCK_V)


@triton.jit
def _mass_from(source, pivot, top, scale, IS_HELD: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of the source's logits >= pivot."""
    if IS_HELD:
        return tl.sum(tl.where(source >= pivot, weights_of(source, top, scale), 0.0), axis=0)
    else:
        mass, _, _ = _scan_source(source, (pivot, pivot, pivot), top, scale, True, BLOCK_V)
        return mass


@triton.jit
def threshold_of(
    source, limits, guess, low, floor, top, total, scale, IS_HELD: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The smallest logit that a row keeps, of those from `low` on.

    source: where IS_HELD all candidates, in registers; else (whether they are listed, the list's
    values, how many they are, the row's logits, V); limits: (by_k, top_k, by_p, top_p); guess: a
    value near it; floor: the smallest that min-p keeps; total: the row's mass.
    """
    by_k, top_k, by_p, top_p = limits
    guess_cell, low_cell = float_to_cell(guess, SHIFT), float_to_cell(low, SHIFT)
    high_cell = float_to_cell(top, SHIFT) + 1
    if by_k:
        low_cell = _largest_pivot(
            source, guess_cell, low_cell, high_cell, top_k, top, scale, False, IS_HELD, SHIFT,
            BLOCK_V,
        )  # fmt: skip
    if by_p:
        if by_k:  # the share is of the mass among the top-k
            pivot = cell_to_float(low_cell, SHIFT)
            total = _mass_from(source, pivot, top, scale, IS_HELD, BLOCK_V)
        low_cell = _largest_pivot(
            source, guess_cell, low_cell, high_cell, top_p * total, top, scale, True, IS_HELD,
            SHIFT, BLOCK_V,
        )  # fmt: skip
    return tl.maximum(cell_to_float(low_cell, SHIFT), floor)
