"""Which logits a row keeps: the threshold of top-k, top-p and min-p, without a sort.

Two kernels stand between the two of `kernels.sampling`, and do nothing for a row without limits.
One estimates from a sample of the row between which two values its threshold lies; one reads the
row, sums what is above and sets aside what is between: few candidates, among which `threshold_of`
finds the threshold exactly, by bisection over the bits of floats. The estimate decides only how
fast that is: where it fails, the whole row is searched.
"""

import triton
import triton.language as tl

from kernels.dependent_launch import wait_for_inputs

INF = tl.constexpr(float("inf"))
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
# weights under 2 ** -126 of the largest are flushed to zero: what is below is never drawn
OCTAVES = tl.constexpr(126.0)


@triton.jit
def _float_to_cell(x, SHIFT: tl.constexpr):
    """An int64 that orders as the fp32 values do, without the bits that their dtype leaves zero."""
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
    return (key >> SHIFT).to(tl.int64)


@triton.jit
def _cell_to_float(cell, SHIFT: tl.constexpr):
    """The least fp32 value of a cell: each holds one value of the dtype."""
    key = (cell << SHIFT).to(tl.uint32)
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, ~key)
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
def _below_top(octaves, top, scale, SHIFT: tl.constexpr):
    """The value whose weight is 2 ** -octaves, as the least of its cell."""
    value = tl.minimum(top, MAX_FLOAT) - octaves / scale
    return _cell_to_float(_float_to_cell(value, SHIFT), SHIFT)


@triton.jit
def mass_of_pieces(top_ptr, mass_ptr, b, scale, NUM_PIECES: tl.constexpr, BLOCK_P: tl.constexpr):
    """(largest logit, [BLOCK_P] masses relative to it) of row b."""
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < NUM_PIECES
    tops = tl.load(top_ptr + b * NUM_PIECES + offs_p, mask=mask_p, other=-INF)
    mass = tl.load(mass_ptr + b * NUM_PIECES + offs_p, mask=mask_p, other=0.0)
    top = tl.max(tops, axis=0)
    return top, tl.where(tops > -INF, mass * weights_of(tops, top, scale), 0.0)


@triton.jit
def _estimate(weights, counts_k, margin, root_low, root_high, NUM_STEPS: tl.constexpr):
    """How many octaves below the top the threshold surely is at most, and at least; the latter 0
    where that cannot be told. Both by bisection over the sample's weights.

    S is what the sample has below a value: mass, or a count where counts_k. Square roots are
    compared, for so the ends of the confidence interval of S, that is S +- 2 m sqrt(S w) with w the
    largest weight below and m the margin, are those of a sum and a difference.
    """
    terms = tl.where(counts_k, 1.0, weights)
    low_no, low_yes = 0.0, OCTAVES
    high_yes, high_no = 0.0, OCTAVES
    for _ in range(NUM_STEPS):
        low, high = (low_no + low_yes) * 0.5, (high_yes + high_no) * 0.5
        below_low = tl.sum(tl.where(weights < tl.exp2(-low), terms, 0.0), axis=0)
        below_high = tl.sum(tl.where(weights < tl.exp2(-high), terms, 0.0), axis=0)
        is_low = tl.sqrt(below_low) + margin * tl.exp2(-0.5 * low) <= root_low
        is_high = tl.sqrt(below_high) - margin * tl.exp2(-0.5 * high) > root_high
        low_no, low_yes = tl.where(is_low, low_no, low), tl.where(is_low, low, low_yes)
        high_yes, high_no = tl.where(is_high, high, high_yes), tl.where(is_high, high_no, high)
    return low_yes, high_yes


@triton.jit
def _bracket_kernel(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    top_ptr,
    mass_ptr,
    sample_ptr,
    bracket_ptr,
    V,
    NUM_PIECES: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,
    SAMPLE_STRIDE: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program says between which two values its row's threshold lies, as far as can be told."""
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    temperature, top_k = tl.load(temperature_ptr + b), tl.load(top_k_ptr + b)
    top_p, min_p = tl.load(top_p_ptr + b), tl.load(min_p_ptr + b)
    by_k, by_p = (top_k > 0) & (top_k < V), top_p < 1.0
    limited = (temperature > 0.0) & (by_k | by_p | (min_p > 0.0))
    bracket_ptr += b * 5
    if limited:
        scale = per_octave(temperature)
        top, mass = mass_of_pieces(top_ptr, mass_ptr, b, scale, NUM_PIECES, BLOCK_P)
        total = tl.sum(mass, axis=0)
        floor = tl.where(min_p > 0.0, top + tl.log(min_p) * temperature, -INF)
        low, high = floor, floor
        if by_k | by_p:
            offs_s = tl.arange(0, BLOCK_S)
            sample = tl.load(
                sample_ptr + b * NUM_SAMPLES + offs_s, mask=offs_s < NUM_SAMPLES, other=-INF
            )
            # top-k: so many of the sample are not kept; top-p: so much of its mass is not
            rank = top_k.to(tl.float32) / SAMPLE_STRIDE
            spread = 5.0 * tl.sqrt(rank) + 8.0  # five standard deviations, and some for few
            rest = (1.0 - top_p) * total / SAMPLE_STRIDE
            few = tl.where(by_k, BLOCK_S - rank - spread, rest)
            many = tl.where(by_k, BLOCK_S - rank + spread, rest)
            # of top-k and top-p, the latter may end anywhere above the former
            many = tl.where(by_k & (by_p | (rank < spread)), INF, many)
            below_low, below_high = _estimate(
                weights_of(sample, top, scale), by_k, tl.where(by_k, 0.0, 2.5),
                tl.sqrt(tl.maximum(few, 0.0)), tl.sqrt(many), NUM_STEPS,
            )  # fmt: skip
            low = _below_top(below_low, top, scale, SHIFT)
            high = tl.where(below_high > 0.0, _below_top(below_high, top, scale, SHIFT), INF)
            if floor >= high:
                low, high = floor, floor
        tl.store(bracket_ptr, low)
        tl.store(bracket_ptr + 1, high)
        tl.store(bracket_ptr + 2, top)
        tl.store(bracket_ptr + 3, total)
    tl.store(bracket_ptr + 4, limited.to(tl.float32))


@triton.jit
def _set_aside(
    row_ptr, kept_ptr, piece, low, high, V, PIECE_V: tl.constexpr, MAX_CANDIDATES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Copy a piece's logits from low to high, in their order."""
    num_kept = 0
    # by small steps, which L1 still holds: a whole piece would take four times the registers
    for start in range(0, PIECE_V, BLOCK_V):
        offs_v = piece * PIECE_V + start + tl.arange(0, BLOCK_V)
        x = without_nan(tl.load(row_ptr + offs_v, mask=offs_v < V, other=-INF))
        is_within = (x >= low) & (x < high)
        place = num_kept + tl.cumsum(is_within.to(tl.int32), axis=0) - 1
        tl.store(kept_ptr + place, x, mask=is_within & (place < MAX_CANDIDATES))
        num_kept += tl.sum(is_within.to(tl.int32), axis=0)


@triton.jit
def _gather_kernel(
    logits_ptr,
    temperature_ptr,
    top_ptr,
    bracket_ptr,
    found_count_ptr,
    found_mass_ptr,
    candidates_ptr,
    V,
    stride_l_b,
    NUM_PIECES: tl.constexpr,
    PIECE_V: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program takes pieces of one row with limits, num_programs apart: what is above the
    bracket is summed, what is within also set aside."""
    wait_for_inputs(PDL)
    b = tl.program_id(1).to(tl.int64)
    if tl.load(bracket_ptr + b * 5 + 4) > 0.0:
        # -inf has no weight: neither it nor what is loaded behind the row's end is a candidate
        low = tl.maximum(tl.load(bracket_ptr + b * 5), -MAX_FLOAT)
        high = tl.load(bracket_ptr + b * 5 + 1)
        top, scale = tl.load(bracket_ptr + b * 5 + 2), per_octave(tl.load(temperature_ptr + b))
        row_ptr = logits_ptr + b * stride_l_b
        for piece in range(tl.program_id(0), NUM_PIECES, tl.num_programs(0)):
            counts, mass_above, mass_reached = 0, 0.0, 0.0
            if tl.load(top_ptr + b * NUM_PIECES + piece) >= low:
                offs_v = piece * PIECE_V + tl.arange(0, PIECE_V)
                x = without_nan(tl.load(row_ptr + offs_v, mask=offs_v < V, other=-INF))
                weights = weights_of(x, top, scale)
                # both counts in one sum: a piece has fewer than 2 ** 15 tokens
                counts = tl.sum((x >= low).to(tl.int32) + ((x >= high).to(tl.int32) << 16), axis=0)
                mass_above = tl.sum(tl.where(x >= high, weights, 0.0), axis=0)
                mass_reached = tl.sum(tl.where(x >= low, weights, 0.0), axis=0)
                if (counts & 0xFFFF) > (counts >> 16):
                    kept_ptr = candidates_ptr + (b * NUM_PIECES + piece) * MAX_CANDIDATES
                    _set_aside(
                        row_ptr, kept_ptr, piece, low, high, V, PIECE_V, MAX_CANDIDATES, BLOCK_V
                    )
            slot = b * 2 * NUM_PIECES + piece
            tl.store(found_count_ptr + slot, counts >> 16)
            tl.store(found_count_ptr + slot + NUM_PIECES, (counts & 0xFFFF) - (counts >> 16))
            tl.store(found_mass_ptr + slot, mass_above)
            tl.store(found_mass_ptr + slot + NUM_PIECES, mass_reached)


@triton.jit
def _scan(source, pivot, top, scale, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(count, mass) of the values >= pivot, [BLOCK_P] each, in every piece's list."""
    whole, row_ptr, PIECE_V, candidates_ptr, MAX_CANDIDATES, lengths = source
    offs_p = tl.arange(0, BLOCK_P)[:, None]
    count = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
    mass = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, tl.max(lengths, axis=0), BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)[None, :]
        mask = offs_c < lengths[:, None]
        if whole:
            x = tl.load(row_ptr + offs_p * PIECE_V + offs_c, mask=mask, other=-INF).to(tl.float32)
        else:
            x = tl.load(candidates_ptr + offs_p * MAX_CANDIDATES + offs_c, mask=mask, other=-INF)
        reached = (x >= pivot) & mask
        count += reached.to(tl.int32)
        mass += tl.where(reached, weights_of(x, top, scale), 0.0)
    return tl.sum(count, axis=1), tl.sum(mass, axis=1)


@triton.jit
def _largest_pivot(
    source, low, high, want, above, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest cell in low..high - 1 with `want` values, or that much mass, at or above it, with
    `above` added to what is found; low is taken to have them."""
    while high - low > 1:
        middle = (low + high) // 2
        count, mass = _scan(source, _cell_to_float(middle, SHIFT), top, scale, BLOCK_P, BLOCK_C)
        found = tl.sum(mass, axis=0) if BY_MASS else tl.sum(count, axis=0)
        enough = above + found >= want
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low


@triton.jit
def threshold_of(
    row_ptr, found_count_ptr, found_mass_ptr, candidates_ptr, bracket_ptr, top_k, top_p, min_p,
    temperature, V, NUM_PIECES: tl.constexpr, PIECE_V: tl.constexpr, MAX_CANDIDATES: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(the smallest logit that a row keeps, [BLOCK_P] masses of the kept)."""
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < NUM_PIECES
    by_k, by_p = (top_k > 0) & (top_k < V), top_p < 1.0
    low, high = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    top, total = tl.load(bracket_ptr + 2), tl.load(bracket_ptr + 3)
    scale = per_octave(temperature)
    above = tl.sum(tl.load(found_count_ptr + offs_p, mask=mask_p, other=0), axis=0)
    lengths = tl.load(found_count_ptr + NUM_PIECES + offs_p, mask=mask_p, other=0)
    masses = tl.load(found_mass_ptr + offs_p, mask=mask_p, other=0.0)
    reached = tl.load(found_mass_ptr + NUM_PIECES + offs_p, mask=mask_p, other=0.0)
    mass_above = tl.sum(masses, axis=0)
    floor = tl.where(min_p > 0.0, top + tl.log(min_p) * temperature, -INF)
    bottom = _below_top(OCTAVES, top, scale, SHIFT)
    # does the bracket hold the threshold? under the bottom, and under min-p's, there is no need
    reaches_k = (above + tl.sum(lengths, axis=0) >= top_k) | (low <= bottom)
    reaches_p = (tl.sum(reached, axis=0) >= top_p * total) | (low <= bottom)
    # the mass among the top-k is not known yet: top-p's threshold may be anywhere above theirs
    holds_k = tl.where(by_p, reaches_k & (high == INF), reaches_k | (low <= floor))
    holds_k &= above < top_k
    holds_p = (mass_above < top_p * total) & (reaches_p | (low <= floor))
    holds = tl.where(by_k, holds_k, holds_p | (top_p >= 1.0))
    whole = (tl.max(lengths, axis=0) > MAX_CANDIDATES) | (holds == 0)
    if whole:
        above, mass_above = above * 0, mass_above * 0.0
        masses, lengths = masses * 0.0, tl.minimum(tl.maximum(V - offs_p * PIECE_V, 0), PIECE_V)
    low_cell = _float_to_cell(tl.where(holds, low, bottom), SHIFT)
    high_cell = _float_to_cell(tl.where(holds, high, INF), SHIFT) + tl.where(holds, 0, 1)
    source = (whole, row_ptr, PIECE_V, candidates_ptr, MAX_CANDIDATES, lengths)
    if by_k:
        low_cell = _largest_pivot(
            source, low_cell, high_cell, top_k, above, top, scale, False, SHIFT, BLOCK_P, BLOCK_C
        )
        _, kept = _scan(source, _cell_to_float(low_cell, SHIFT), top, scale, BLOCK_P, BLOCK_C)
        total = mass_above + tl.sum(kept, axis=0)
    if by_p:
        low_cell = _largest_pivot(
            source, low_cell, high_cell, top_p * total, mass_above, top, scale, True, SHIFT,
            BLOCK_P, BLOCK_C,
        )  # fmt: skip
    threshold = tl.maximum(_cell_to_float(low_cell, SHIFT), floor)
    _, kept = _scan(source, threshold, top, scale, BLOCK_P, BLOCK_C)
    return threshold, masses + kept
