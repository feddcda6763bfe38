"""What a logit weighs beside its row's largest, and logits as integers in the same order."""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
# weights under 2 ** -126 of the largest are flushed to zero: what is below is never drawn
OCTAVES = tl.constexpr(126.0)
ALL_BITS = tl.constexpr(0xFFFFFFFF)  # ~x as x ^ ALL_BITS: Triton 3.6's interpreter knows no other


@triton.jit
def float_to_cell(x, SHIFT: tl.constexpr):
    """An int64 that orders as the fp32 values do, without the bits that their dtype leaves zero."""
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ ALL_BITS, bits | 0x80000000)
    return (key >> SHIFT).to(tl.int64)


@triton.jit
def cell_to_float(cell, SHIFT: tl.constexpr):
    """The least fp32 value of a cell: each holds one value of the dtype."""
    key = (cell << SHIFT).to(tl.uint32)
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ ALL_BITS)
    # keys under that of -inf stand for NaNs
    return tl.where(key < 0x007FFFFF, -INF, bits.to(tl.float32, bitcast=True))


@triton.jit
def without_nan(x):
    x = x.to(tl.float32)
    return tl.where(x > -INF, x, -INF)


@triton.jit
def per_octave(temperature):
    """1 / temperature, for powers of two; finite, so that 0 times it is 0."""
    return tl.minimum(LOG2_E / temperature, MAX_FLOAT)


@triton.jit
def weights_of(x, top, scale):
    """exp((x - top) / temperature), an infinite logit taken for the largest finite one."""
    origin = tl.where(top > -INF, tl.minimum(top, MAX_FLOAT), 0.0)
    return tl.exp2((tl.minimum(x, MAX_FLOAT) - origin) * scale)


@triton.jit
def below_top(octaves, top, scale, SHIFT: tl.constexpr):
    """The value whose weight is 2 ** -octaves, as the least of its cell."""
    value = tl.minimum(top, MAX_FLOAT) - octaves / scale
    return cell_to_float(float_to_cell(value, SHIFT), SHIFT)
