"""The ring of decode attention on Hopper: the kernel's own control flow, walked on Python numbers.

What a program asks the copy engine for, in which stage, and what it reads is noted; sums are not
made. So the protocol is held to its rules without a GPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import pairwise
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from hypothesis import example, given
from hypothesis import strategies as st
from triton.runtime.jit import JITFunction

from kernels import decode_deal, decode_pipeline
from tests.test_tall_matmul import Grid

# by import_module: the package exports a function of that name
decode_attention = import_module("kernels.decode_attention")

CUT = {
    name: getattr(decode_attention, name)
    for name in ("SPLIT_LEN", "MIN_SPLIT_LEN", "FEW_SPLITS", "MAX_SPLITS", "SPLIT_UNIT")
}
TAIL = {name: getattr(decode_attention, name) for name in ("TAIL_PART", "TAIL_SHARES", "MIN_TAIL")}
BLOCK_SIZE = 16
PAST = -1  # the row of a block that is not there
# of the kernel's parts; others are stood in for
WALKED = ("cut", "tail_of", "share_at", "share_with", "_attend_run")


class Number(int):
    """A Python number where the kernel has a scalar."""

    def to(self, dtype: Any) -> "Number":
        return self

    def __add__(self, other: Any) -> Any:
        return Number(int(self) + other) if isinstance(other, int) else NotImplemented

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return Number(int(self) * other) if isinstance(other, int) else NotImplemented

    __rmul__ = __mul__


class Anything:
    """A layout, a buffer or sums: whatever is done with it, it stays so."""

    def same(self, *args: Any, **kwargs: Any) -> "Anything":
        return self

    __call__ = __getattr__ = __getitem__ = same
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __lt__ = __and__ = same


ANYTHING = Anything()


class Pointer:
    """Into a list."""

    def __init__(self, numbers: list[int], at: int = 0) -> None:
        self.numbers, self.at = numbers, at

    def __add__(self, offset: int) -> "Pointer":
        return Pointer(self.numbers, self.at + offset)


class Scalars(Grid):
    """What the kernel takes of Gluon, of one program among so many."""

    static_range = staticmethod(range)

    def __getattr__(self, name: str) -> Anything:
        return ANYTHING

    def program_id(self, axis: int) -> Number:
        return Number(self.program)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        if condition is ANYTHING:
            return ANYTHING
        chosen = a if condition else b
        return Number(chosen) if isinstance(chosen, int) else chosen

    def load(self, pointer: Any, mask: Any = True, other: Any = 0) -> Any:
        if not isinstance(pointer, Pointer):
            return ANYTHING
        if not mask:
            return other
        assert 0 <= pointer.at < len(pointer.numbers)
        return pointer.numbers[pointer.at]

    def atomic_add(self, pointer: Pointer, number: int, sem: str) -> int:
        pointer.numbers[pointer.at] += number
        return pointer.numbers[pointer.at] - number

    def store(self, pointer: Any, number: Any, mask: Any = True) -> None:
        if isinstance(pointer, Pointer):
            pointer.numbers[pointer.at] = number


class Ring:
    """Stages, the loads and reads of each, and what was read in which order."""

    k = v = ANYTHING
    D = 128

    def __init__(self, num_stages: int, block_n: int) -> None:
        self.STAGES, self.BLOCK_N, self.BLOCK_SIZE = num_stages, block_n, BLOCK_SIZE
        self.full = SimpleNamespace(index=int)
        self.rows: list[tuple[int, ...]] = [()] * num_stages
        self.num_loads, self.num_reads = [0] * num_stages, [0] * num_stages
        self.read: list[tuple[int, ...]] = []

    def load(self, ring: Any, desc: Any, stage: int, rows: tuple[int, ...], *where: Any) -> None:
        assert self.num_loads[stage] == self.num_reads[stage], "not read yet"
        self.num_loads[stage] += 1
        self.rows[stage] = rows

    def wait(self, stage: int, phase: int) -> None:
        assert self.num_loads[stage] == self.num_reads[stage] + 1, "nothing on its way"
        assert phase == self.num_reads[stage] % 2
        self.num_reads[stage] += 1
        self.read.append(self.rows[stage])


class Batch:
    """Requests, and how their splits are dealt out to so many groups."""

    def __init__(self, context_lens: list[int], num_groups: int, gl: Scalars) -> None:
        self.context_lens, self.num_groups = context_lens, num_groups
        self.max_blocks = max(gl.cdiv(max(context_lens), BLOCK_SIZE), 1)
        with patch.object(decode_deal, "gl", gl):
            cuts = [decode_deal.cut.fn(length, **CUT) for length in context_lens]
        self.units = [splits * (length // CUT["SPLIT_UNIT"]) for splits, length in cuts]
        self.table = list(range(len(context_lens) * self.max_blocks))
        self.num_taken = 0
        self.arrived = [0] * (2 + TAIL["TAIL_SHARES"]) * num_groups
        self.num_written = [0] * len(context_lens)
        self.reached = 0  # of the program that is walked: the request that its last share began in

    def all_units(self, *shape: Any) -> int:
        return sum(self.units)

    def request_with(self, unit: int, b: int, base: int, *shape: Any) -> tuple[int, ...]:
        assert base == sum(self.units[:b]) and b >= self.reached, "it looks on from where it was"
        b = base = 0
        while b < len(self.units) and base + self.units[b] <= unit:
            base += self.units[b]
            b += 1
        self.reached = b
        return Number(b), base

    def next_share(self, taken: Any, num_groups: int, num_tail: int) -> int:
        self.num_taken += 1
        return num_groups + self.num_taken - 1 if self.num_taken <= num_tail else -1

    def store_out(self, out: Pointer, *sums: Any) -> None:
        self.num_written[out.at] += 1

    def steps(self, block_n: int) -> Iterator[tuple[int, ...]]:
        """Rows of every step of every request."""
        count = block_n // BLOCK_SIZE
        for b, length in enumerate(self.context_lens):
            for first in range(0, -(-length // BLOCK_SIZE), count):
                ids = range(first, first + count)
                there = -(-length // BLOCK_SIZE)
                yield tuple(b * self.max_blocks + i if i < there else PAST for i in ids)


def block_rows(pointer: Pointer, num_left: int, rows: int, past: int, count: int):
    return tuple(pointer.numbers[pointer.at + i] if i < num_left else past for i in range(count))


@contextmanager
def stood_in_for(batch: Batch, ring: Ring, gl: Scalars) -> Iterator[None]:
    """The kernel's surroundings."""
    barrier = SimpleNamespace(wait=ring.wait, init=ANYTHING, MBarrierLayout=ANYTHING)
    instead = {
        "gl": gl,
        "Ring": lambda *parts: ring,
        "mbarrier": barrier,
        "_load_step": ring.load,
        "block_rows": block_rows,
        "all_units": batch.all_units,
        "request_with": batch.request_with,
        "next_share": batch.next_share,
        "store_out": batch.store_out,
        "join_splits": lambda *args: (ANYTHING, ANYTHING),
    }
    for name, value in vars(decode_pipeline).items():
        if isinstance(value, JITFunction) and name in WALKED:
            instead[name] = value.fn
        elif isinstance(value, (JITFunction, FunctionType)) and name not in instead:
            instead[name] = ANYTHING
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(decode_pipeline, **instead))
        stack.enter_context(patch.multiple(decode_deal, gl=gl, cut=decode_deal.cut.fn))
        yield


def walk(batch: Batch, ring: Ring, gl: Scalars) -> list[list[tuple[int, ...]]]:
    """One program; what it read, share by share."""
    kernel = decode_pipeline._decode_pipeline_kernel.fn
    desc = SimpleNamespace(
        dtype=ANYTHING, layout=ANYTHING, block_type=SimpleNamespace(shape=[BLOCK_SIZE, 64])
    )
    shares: list[list[tuple[int, ...]]] = []
    request_with = batch.request_with
    batch.reached = 0

    def opened(unit: int, *shape: Any) -> tuple[int, ...]:
        shares.append(ring.read)
        ring.read = []
        return request_with(unit, *shape)

    batch.request_with = opened
    paging = Pointer(batch.table), Pointer(batch.context_lens)
    with stood_in_for(batch, ring, gl):
        kernel(
            ANYTHING, desc, *paging, ANYTHING, ANYTHING, Pointer(batch.arrived), ANYTHING,
            Pointer(batch.num_written), splits_per_place=1,
            B=len(batch.context_lens), scale_log2=1.0, stride_q_b=0, stride_q_h=0,
            stride_table_b=batch.max_blocks, stride_o_b=1, stride_o_h=0, rows_per_block=1,
            rows_to_v=0, past=PAST, H_KV=1, GROUP=2, D=128, **CUT, **TAIL, JOIN_AHEAD=1,
            BLOCK_B=128, BLOCK_J=2, BLOCK_N=ring.BLOCK_N, STAGES=ring.STAGES, PDL=True,
        )  # fmt: skip
    batch.request_with = request_with
    return [*shares, ring.read]


lens = st.one_of(
    st.integers(0, 3000), st.integers(0, 100), st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 300])
)


@given(
    context_lens=st.lists(lens, min_size=1, max_size=40),
    num_groups=st.sampled_from([1, 2, 7, 66]),
    num_stages=st.integers(2, 4),
    block_n=st.sampled_from([16, 32]),
)
@example([300] * 40, 7, 3, 32)  # several requests to a group, and a tail
@example([5000, 1, 32, 0, 64, 0, 0, 200], 2, 3, 32)
def test_every_step_is_read_once_in_order_from_the_stage_it_came_to(
    context_lens, num_groups, num_stages, block_n
):
    batch = Batch(context_lens, num_groups, Scalars(0, num_groups))
    read = []
    for program in range(num_groups):
        ring = Ring(num_stages, block_n)
        for share in walk(batch, ring, Scalars(program, num_groups)):
            assert all(a[0] < b[0] for a, b in pairwise(share))
            read += share
        assert ring.num_loads == ring.num_reads  # nothing comes after the program has gone
    assert sorted(read) == sorted(batch.steps(block_n))
    assert set(batch.num_written) == {1} and not any(batch.arrived)
