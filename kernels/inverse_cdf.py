"""The token at which a running sum of weights passes a row's uniform number.

By sums of neighbours first, then within the one that is hit: of a row's pieces and their groups, or
of the lanes of a list of candidates. At once where registers hold all candidates.
"""

import triton
import triton.language as tl

from kernels.candidates import masses_of_list
from kernels.logit_weights import INF, weights_of, without_nan


@triton.jit
def uniform(seed, step):
    """A number in (0, 1) with 52 random bits, fp64."""
    zero = tl.zeros([1], tl.uint32)
    high, low, _, _ = tl.philox(seed, zero, zero + step.to(tl.uint32), zero, zero)
    bits = ((high >> 6).to(tl.int64) << 26) | (low >> 6).to(tl.int64)
    return tl.sum((bits.to(tl.float64) + 0.5) * 2.220446049250313e-16, axis=0)  # 2 ** -52


@triton.jit
def _locate(weights, share, BLOCK: tl.constexpr):
    """(index, rest): the first at which the running sum passes this share of all, and how far into
    it that is, as a share. Never one of no weight, unless none has any."""
    offs = tl.arange(0, BLOCK)
    wide = weights.to(tl.float64)
    sums = tl.cumsum(wide, axis=0)
    total = tl.max(sums, axis=0)
    wanted = share * total
    # rounding may leave none beyond: then the last of all with a weight
    is_passed = ((sums > wanted) | (sums >= total)) & (weights > 0.0)
    index = tl.min(tl.where(is_passed, offs, BLOCK), axis=0)
    index = tl.where(index < BLOCK, index, 0)
    # 24 bits of a piece's mass do; an fp64 division is a call that spills
    rest = (wanted - (sums - wide)).to(tl.float32) / tl.where(weights > 0.0, weights, 1.0)
    return index, tl.sum(tl.where(offs == index, rest, 0.0), axis=0)


@triton.jit
def _kept_weights(ptr, offs, V, threshold, top, scale, is_greedy):
    """Of the logits at ptr + offs; of a greedy row, 1 for each of the largest."""
    x = without_nan(tl.load(ptr + offs, mask=offs < V, other=-INF))
    weights = tl.where(x >= threshold, weights_of(x, top, scale), 0.0)
    return tl.where(is_greedy, ((x == top) & (offs < V)).to(tl.float32), weights)


@triton.jit
def draw_from_row(
    row_ptr, masses, share, threshold, top, scale, is_greedy, V, PIECE_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A token from `threshold` on. masses: [BLOCK_P] of them, by pieces."""
    GROUPS: tl.constexpr = PIECE_V // GROUP
    piece, share = _locate(masses, share, BLOCK_P)
    first = piece * PIECE_V
    offs_v = first + tl.arange(0, PIECE_V)
    weights = _kept_weights(row_ptr, offs_v, V, threshold, top, scale, is_greedy)
    sums = tl.sum(tl.reshape(weights, [GROUPS, GROUP]), axis=1)
    group, share = _locate(sums, share, GROUPS)
    first += group * GROUP
    offs_v = first + tl.arange(0, GROUP)
    weights = _kept_weights(row_ptr, offs_v, V, threshold, top, scale, is_greedy)
    token, _ = _locate(weights, share, GROUP)
    return first + token


@triton.jit
def draw_from_held(held, token_ptr, share, threshold, top, scale, LANES: tl.constexpr):
    """The same from [LANES] candidates and their tokens."""
    weights = tl.where(held >= threshold, weights_of(held, top, scale), 0.0)
    index, _ = _locate(weights, share, LANES)
    return tl.load(token_ptr + index)


@triton.jit
def draw_from_list(
    value_ptr, token_ptr, count, share, threshold, top, scale, LANES: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The same from a list of `count` values and their tokens, up to BLOCK_I of them in a lane."""
    masses = masses_of_list(value_ptr, count, threshold, top, scale, LANES)
    lane, share = _locate(masses, share, LANES)
    per_lane = tl.cdiv(count, LANES)
    first = lane * per_lane
    offs_i = tl.arange(0, BLOCK_I)
    mask_i = (offs_i < per_lane) & (first + offs_i < count)
    x = tl.load(value_ptr + first + offs_i, mask=mask_i, other=-INF)
    weights = tl.where(x >= threshold, weights_of(x, top, scale), 0.0)
    index, _ = _locate(weights, share, BLOCK_I)
    return tl.load(token_ptr + first + index)
