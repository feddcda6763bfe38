"""FreeBlocks: free KV blocks, kept and given out as runs of neighbours.

Blocks of one request that lie side by side in both pools go from GPU to GPU as one copy, for which
the host makes one call, not one each. Taken in any order, free blocks scatter within a few hundred
requests. Taken from the shortest run that is long enough (best fit), and joined with their
neighbours when they come back (boundary tags), they do not: see Knuth, The Art of Computer
Programming 1, 2.5.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence


class FreeBlocks:
    """A set of block numbers, at first all of 0 to num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self._num = num_blocks
        # a run reaches from its first block to one before its end
        self._end_of = {0: num_blocks}
        self._first_of = {num_blocks: 0}  # the inverse
        self._by_length = [(num_blocks, 0)]  # (length, first) of each, the shortest first

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[int]:
        """The blocks, run by run."""
        for first, end in self._end_of.items():
            yield from range(first, end)

    def take(self, num_blocks: int) -> list[int]:
        """Take so many out, which there must be: the beginning of the shortest run that has as
        many, or the longest runs one after the other."""
        taken: list[int] = []
        self._num -= num_blocks
        while num_blocks:
            place = bisect_left(self._by_length, (num_blocks, 0))
            length, first = self._by_length[min(place, len(self._by_length) - 1)]
            used = min(length, num_blocks)
            self._remove(first, first + length)
            if used < length:
                self._insert(first + used, first + length)
            taken.extend(range(first, first + used))
            num_blocks -= used
        return taken

    def put(self, blocks: Iterable[int]) -> None:
        """Put these back, none of which may be there, each once."""
        for first, end in _runs(sorted(blocks)):
            self._num += end - first
            before, behind = self._first_of.get(first), self._end_of.get(end)
            if before is not None:
                self._remove(before, first)
                first = before
            if behind is not None:
                self._remove(end, behind)
                end = behind
            self._insert(first, end)

    def _insert(self, first: int, end: int) -> None:
        self._end_of[first] = end
        self._first_of[end] = first
        insort(self._by_length, (end - first, first))

    def _remove(self, first: int, end: int) -> None:
        del self._end_of[first], self._first_of[end]
        del self._by_length[bisect_left(self._by_length, (end - first, first))]


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of neighbours; blocks: rising."""
    start = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield blocks[start], blocks[i - 1] + 1
            start = i
