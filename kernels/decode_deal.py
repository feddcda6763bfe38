"""How `decode_pipeline` deals splits out to its programs.

All splits of a batch, one request after the other, are cut into shares of equal length: a front
share for each group of programs, and, of large batches, a tail of small ones that groups come for
as they get through. SMs that stand close together read more slowly when all do, some by a tenth:
what one of them is late with in front, the others take from the tail.

Lengths are in units of tokens; a split belongs to the share that it begins in. Kv heads are dealt
out apart: each has a program in every group, and a counter of what was taken of its tail.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def cut(
    context_len, SPLIT_LEN: gl.constexpr, MIN_SPLIT_LEN: gl.constexpr, FEW_SPLITS: gl.constexpr,
    MAX_SPLITS: gl.constexpr, SPLIT_UNIT: gl.constexpr,
):  # fmt: skip
    """(splits, tokens in each) of a context: multiples of SPLIT_UNIT, at most MAX_SPLITS splits."""
    even = (context_len + MAX_SPLITS - 1) // MAX_SPLITS
    few = (context_len + FEW_SPLITS - 1) // FEW_SPLITS
    least = gl.minimum(gl.maximum(few, MIN_SPLIT_LEN), SPLIT_LEN)
    split_len = (gl.maximum(even, least) + SPLIT_UNIT - 1) // SPLIT_UNIT * SPLIT_UNIT
    # an empty context is one split of no tokens, so that a padding row is written too
    return gl.maximum((context_len + split_len - 1) // split_len, 1), split_len


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _units_of(
    context_lens_ptr, first, B, SPLIT_LEN: gl.constexpr, MIN_SPLIT_LEN: gl.constexpr,
    FEW_SPLITS: gl.constexpr, MAX_SPLITS: gl.constexpr, SPLIT_UNIT: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """[COUNT] units of the splits of each request from the first on; 0 past the last of B."""
    LANES: gl.constexpr = gl.BlockedLayout([COUNT // 32], [32], [1], [0])
    offs_b = first + gl.arange(0, COUNT, LANES)
    lens = gl.load(context_lens_ptr + offs_b, mask=offs_b < B, other=0)
    splits, split_lens = cut(lens, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, SPLIT_UNIT)
    return gl.where(offs_b < B, splits * (split_lens // SPLIT_UNIT), 0)


@gluon.jit
def _requests_before(unit, units):
    """(how many requests end before this unit, their units)."""
    is_before = gl.associative_scan(units, 0, _add) <= unit
    return gl.sum(is_before.to(gl.int32), axis=0), gl.sum(gl.where(is_before, units, 0), axis=0)


@gluon.jit
def tail_of(
    in_all, num_groups, TAIL_PART: gl.constexpr, TAIL_SHARES: gl.constexpr, MIN_TAIL: gl.constexpr
):
    """(units in front, shares of the tail): none where each group's part of it would be small."""
    tail = in_all // TAIL_PART
    tail = gl.where(tail >= MIN_TAIL * num_groups, tail, 0)
    return in_all - tail, gl.where(tail > 0, TAIL_SHARES * num_groups, 0)


@gluon.jit
def share_at(i, in_all, front, num_groups, num_tail):
    """(first unit of share i, the one behind its last). front: units of the first num_groups."""
    j = i - num_groups
    parts = gl.maximum(num_tail, 1)
    tail = in_all - front
    start = gl.where(j < 0, front * i // num_groups, front + tail * j // parts)
    end = gl.where(j < 0, front * (i + 1) // num_groups, front + tail * (j + 1) // parts)
    return start, end


@gluon.jit
def share_with(unit, in_all, front, num_groups, num_tail):
    """Which share has this unit."""
    tail = gl.maximum(in_all - front, 1)
    of_tail = num_groups + ((unit - front + 1) * num_tail - 1) // tail
    return gl.where(unit < front, ((unit + 1) * num_groups - 1) // front, of_tail)


@gluon.jit
def all_units(
    context_lens_ptr, B, SPLIT_LEN: gl.constexpr, MIN_SPLIT_LEN: gl.constexpr,
    FEW_SPLITS: gl.constexpr, MAX_SPLITS: gl.constexpr, SPLIT_UNIT: gl.constexpr,
    BLOCK_B: gl.constexpr,
):  # fmt: skip
    """Of the splits of all B requests. BLOCK_B: requests looked at together."""
    units = _units_of(
        context_lens_ptr, 0, B, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, SPLIT_UNIT,
        BLOCK_B,
    )  # fmt: skip
    for i in range(BLOCK_B, B, BLOCK_B):
        units += _units_of(
            context_lens_ptr, i, B, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, SPLIT_UNIT,
            BLOCK_B,
        )  # fmt: skip
    return gl.sum(units, axis=0)


@gluon.jit
def request_with(
    unit, b, base, context_lens_ptr, B, SPLIT_LEN: gl.constexpr, MIN_SPLIT_LEN: gl.constexpr,
    FEW_SPLITS: gl.constexpr, MAX_SPLITS: gl.constexpr, SPLIT_UNIT: gl.constexpr,
    BLOCK_B: gl.constexpr,
):  # fmt: skip
    """(the request that has this unit, units of those before it); B where none has. b, base: such a
    pair to look on from, whose request is at most the one behind that wanted. Looking from the
    first request on for every share costs more than reading where contexts are short."""
    back = gl.maximum(b - 1, 0)  # the share before may have ended in the request that has it
    splits, split_len = cut(
        gl.load(context_lens_ptr + back), SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS,
        SPLIT_UNIT,
    )  # fmt: skip
    base -= gl.where(b > 0, splits * (split_len // SPLIT_UNIT), 0)
    b = back
    units = _units_of(
        context_lens_ptr, b, B, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, SPLIT_UNIT,
        BLOCK_B,
    )  # fmt: skip
    held = gl.sum(units, axis=0)
    while (base + held <= unit) & (b + BLOCK_B < B):
        base += held
        b += BLOCK_B
        units = _units_of(
            context_lens_ptr, b, B, SPLIT_LEN, MIN_SPLIT_LEN, FEW_SPLITS, MAX_SPLITS, SPLIT_UNIT,
            BLOCK_B,
        )  # fmt: skip
        held = gl.sum(units, axis=0)
    num_before, units_before = _requests_before(unit - base, units)
    return gl.minimum(b + num_before, B), base + units_before


@gluon.jit
def next_share(taken_ptr, num_groups, num_tail):
    """The next share of the tail, -1 where none is left. Each group asks once too often: who is the
    last to do so leaves zero for the next launch."""
    share = -1
    if num_tail > 0:
        taken = gl.atomic_add(taken_ptr, 1, sem="relaxed")
        if taken < num_tail:
            share = num_groups + taken
        elif taken == num_tail + num_groups - 1:
            gl.store(taken_ptr, 0)
    return share
