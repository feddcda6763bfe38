"""The logits of a row that its limits may keep, found without reading the row again.

The row's index holds the largest logit and the mass of every group of neighbouring tokens. A value
that so many groups reach as top-k wants is no higher than top-k's threshold; one under which the
index shows little enough mass is most likely no higher than top-p's, and is lowered where it is.
Whatever is at or above such a value is in a group that reaches it: few groups, whose logits are
read and listed, in the order of their tokens.
"""

import triton
import triton.language as tl

from kernels.logit_weights import INF, OCTAVES, below_top, weights_of

FIRST_OCTAVES = tl.constexpr(8.0)  # below the largest logit, where the search for a value begins
LAST_OCTAVES = tl.constexpr(0.0625)  # where it ends: what is left to be found
FEW_GROUPS = tl.constexpr(32)  # sooner listed than avoided by a higher value


@triton.jit
def _load_index(
    index, top, scale, by_mass, NUM_PIECES: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(largest logits, masses relative to the row's largest), [BLOCK_P * GROUPS] each, the latter
    zeros where they are not asked for. GROUPS: in a piece."""
    top_ptr, group_top_ptr, group_mass_ptr = index
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < NUM_PIECES
    offs_g = offs_p[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    group_tops = tl.load(group_top_ptr + offs_g, mask=mask_p[:, None], other=-INF)
    masses = tl.zeros([BLOCK_P, GROUPS], tl.float32)
    if by_mass:
        tops = tl.load(top_ptr + offs_p, mask=mask_p, other=-INF)
        mask = (tops > -INF)[:, None]
        masses = tl.load(group_mass_ptr + offs_g, mask=mask, other=0.0)
        masses *= weights_of(tops, top, scale)[:, None]
    group_tops = tl.reshape(group_tops.to(tl.float32), [BLOCK_P * GROUPS])
    return group_tops, tl.reshape(masses, [BLOCK_P * GROUPS])


@triton.jit
def _octaves_below(group_tops, masses, top, scale, by_k, top_k, allowance, num_groups):
    """How far below the largest a value is that top_k groups reach, or where not by_k, under which
    is about `allowance` of mass: by bisection, until few groups more than needed reach it."""
    too_few, enough, octaves = 0.0, OCTAVES, FIRST_OCTAVES
    few = tl.where(by_k, top_k + top_k // 4, 0) + FEW_GROUPS
    is_searching = True
    while is_searching:
        is_reached = group_tops >= top - octaves / scale
        count = tl.sum(is_reached.to(tl.int32), axis=0)
        is_enough, is_tight = count >= top_k, count <= few
        if by_k == 0:
            rest = tl.sum(tl.where(is_reached, 0.0, masses), axis=0)
            # groups that reach it have logits under it too, as many as others have
            room = allowance * (num_groups - count).to(tl.float32) / num_groups
            is_enough = rest <= room
            is_tight |= rest >= 0.75 * room
        too_few = tl.where(is_enough, too_few, octaves)
        enough = tl.where(is_enough, octaves, enough)
        is_searching = ((is_enough & is_tight) == 0) & (enough - too_few > LAST_OCTAVES)
        halfway = (too_few + enough) * 0.5
        octaves = tl.where(enough < OCTAVES, halfway, tl.minimum(octaves * 2.0, OCTAVES))
    return enough


@triton.jit
def _words_of(is_set, BLOCK: tl.constexpr, WORD: tl.constexpr):
    """[BLOCK / WORD] int32 whose bits, from the lowest, are WORD neighbours of is_set: [BLOCK]."""
    bits = tl.where(is_set, 1 << (tl.arange(0, BLOCK) % WORD), 0)
    return tl.sum(tl.reshape(bits, [BLOCK // WORD, WORD]), axis=1)


@triton.jit
def _popcount(words):
    """How many bits are set."""
    words = words.to(tl.uint32, bitcast=True)
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return ((((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _list_bits(words, first, list_ptr, count, room):
    """Write first + n for every set bit n of every word, in order, behind `count` others and while
    there is room; the count with them. first: [N] int32, of each word."""
    num_set = _popcount(words)
    place = count + tl.cumsum(num_set, axis=0) - num_set
    for _ in range(tl.max(num_set, axis=0)):
        lowest = words & -words
        mask = (words != 0) & (place < room)
        tl.store(list_ptr + place, first + _popcount(lowest - 1), mask=mask)
        words ^= lowest
        place += 1
    return count + tl.sum(num_set, axis=0)


@triton.jit
def _load_groups(group_ptr, start, num_listed, V, BLOCK_L: tl.constexpr):
    """[BLOCK_L] groups listed from `start` on, V where there are no more."""
    offs_l = start + tl.arange(0, BLOCK_L)
    return tl.load(group_ptr + offs_l, mask=offs_l < num_listed, other=V)


@triton.jit
def _load_logits(row_ptr, groups, V, GROUP: tl.constexpr, BLOCK_L: tl.constexpr):
    """[BLOCK_L * GROUP] logits of these groups, NaN behind the vocabulary: -inf may be a candidate,
    NaN is none."""
    tokens = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(row_ptr + tokens, mask=tokens < V, other=float("nan"))
    return tl.reshape(x, [BLOCK_L * GROUP])


@triton.jit
def _list_tokens(
    row_ptr, lists, num_listed, low, V, GROUP: tl.constexpr, MAX_CANDIDATES: tl.constexpr,
    WORD: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write token and value of each logit of the listed groups that reaches `low`, in the tokens'
    order; how many they are, or some number over MAX_CANDIDATES, of which not all are written."""
    group_ptr, word_ptr, token_ptr, value_ptr = lists
    WORDS: tl.constexpr = GROUP // WORD
    x = _load_logits(row_ptr, _load_groups(group_ptr, 0, num_listed, V, BLOCK_L), V, GROUP, BLOCK_L)
    groups = _load_groups(group_ptr, BLOCK_L, num_listed, V, BLOCK_L)
    for start in range(0, num_listed, BLOCK_L):
        # on their way while those before are looked at, and behind them which come next: a logit
        # is not asked for before it is known where it lies
        next_x = _load_logits(row_ptr, groups, V, GROUP, BLOCK_L)
        groups = _load_groups(group_ptr, start + 2 * BLOCK_L, num_listed, V, BLOCK_L)
        words = _words_of(x.to(tl.float32) >= low, BLOCK_L * GROUP, WORD)
        offs_w = start * WORDS + tl.arange(0, BLOCK_L * WORDS)
        tl.store(word_ptr + offs_w, words, mask=offs_w < num_listed * WORDS)
        x = next_x
    tl.debug_barrier()  # other threads read a list than wrote it
    count, start = 0, 0
    while (start < num_listed * WORDS) & (count <= MAX_CANDIDATES):
        offs_w = start + tl.arange(0, BLOCK_W)
        words = tl.load(word_ptr + offs_w, mask=offs_w < num_listed * WORDS, other=0)
        group = tl.load(group_ptr + offs_w // WORDS, mask=words != 0, other=0)
        first = group * GROUP + offs_w % WORDS * WORD
        count = _list_bits(words, first, token_ptr, count, MAX_CANDIDATES)
        start += BLOCK_W
    tl.debug_barrier()
    for start in range(0, tl.minimum(count, MAX_CANDIDATES), LANES):
        offs = start + tl.arange(0, LANES)
        mask = offs < tl.minimum(count, MAX_CANDIDATES)
        token = tl.load(token_ptr + offs, mask=mask, other=0)
        tl.store(value_ptr + offs, tl.load(row_ptr + token).to(tl.float32), mask=mask)
    tl.debug_barrier()
    return count


@triton.jit
def list_candidates(
    row_ptr, index, lists, limits, top, total, scale, least, V, NUM_PIECES: tl.constexpr,
    PIECE_V: tl.constexpr, GROUP: tl.constexpr, MAX_CANDIDATES: tl.constexpr, SHIFT: tl.constexpr,
    WORD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """(low, count): the list has every logit from `low` on, unless there are over MAX_CANDIDATES.

    index: pointers to the row's largest logits by piece and by group, and masses by group; lists:
    to groups, to bits of their tokens, to tokens and to values; limits: (by_k, top_k, by_p, top_p).
    No kept logit is under `low`, or it is `least`, under which there is nothing to keep.
    """
    group_ptr, value_ptr = lists[0], lists[3]
    by_k, top_k, by_p, top_p = limits
    GROUPS: tl.constexpr = PIECE_V // GROUP
    BLOCK_G: tl.constexpr = BLOCK_P * GROUPS
    only_p = by_p & (by_k == 0)
    allowance = (1.0 - top_p) * total * 0.875  # aimed at a little less than may be left out
    low, count, is_short, at_least = least, 0, True, 0.0
    while is_short:
        group_tops, masses = _load_index(index, top, scale, only_p, NUM_PIECES, GROUPS, BLOCK_P)
        if by_k | by_p:
            octaves = _octaves_below(
                group_tops, masses, top, scale, by_k, top_k, allowance, tl.cdiv(V, GROUP)
            )
            octaves = tl.maximum(octaves, at_least)
            low = tl.maximum(below_top(octaves, top, scale, SHIFT), least)
            # what is missing may lie in groups that all reach it: next time twice as far down, and
            # in the end at `least`
            at_least = tl.minimum(2.0 * tl.maximum(octaves, FIRST_OCTAVES), OCTAVES)
        # what fills the index up to a power of 2 has no room in the list, and reaches -inf
        is_group = tl.arange(0, BLOCK_G) < NUM_PIECES * GROUPS
        words = _words_of(is_group & (group_tops >= low), BLOCK_G, WORD)
        first = tl.arange(0, BLOCK_G // WORD) * WORD
        num_listed = _list_bits(words, first, group_ptr, 0, BLOCK_G)
        tl.debug_barrier()
        count = _list_tokens(
            row_ptr, lists, num_listed, low, V, GROUP, MAX_CANDIDATES, WORD, BLOCK_L, BLOCK_W, LANES
        )
        is_short = False
        if only_p & (low > least) & (count <= MAX_CANDIDATES):
            found = masses_of_list(value_ptr, count, low, top, scale, LANES)
            is_short = tl.sum(found, axis=0) < top_p * total
    return low, count


@triton.jit
def masses_of_list(value_ptr, count, threshold, top, scale, LANES: tl.constexpr):
    """[LANES] masses of the listed values >= threshold; a lane has neighbours."""
    per_lane = tl.cdiv(count, LANES)
    offs = tl.arange(0, LANES) * per_lane
    mass = tl.zeros([LANES], tl.float32)
    for i in range(per_lane):
        x = tl.load(value_ptr + offs + i, mask=offs + i < count, other=-INF)
        mass += tl.where(x >= threshold, weights_of(x, top, scale), 0.0)
    return mass
