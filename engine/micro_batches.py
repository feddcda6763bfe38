"""How a decode batch is cut into micro-batches. Knows nothing of tensors or devices."""

from collections.abc import Sequence

ROW_STEP = 8  # rows: a micro-batch of more is a multiple, so that what it has begins aligned


def cut(context_lens: Sequence[int], num_micro_batches: int) -> list[list[int]]:
    """Which requests, by index and in their order, go to each micro-batch.

    The FFN stage takes time by requests, the attention stage by KV tokens: numbers of requests
    differ by one at most, sums of context_lens by the longest of them at most, or by the longest
    less the shortest where all have as many requests. The same lengths are cut the same way.
    ValueError where num_micro_batches is below 1.
    """
    if num_micro_batches < 1:
        raise ValueError(f"num_micro_batches must be 1 or more, got {num_micro_batches}")
    longest_first = sorted(range(len(context_lens)), key=lambda i: (-context_lens[i], i))
    micro_batches: list[list[int]] = [[] for _ in range(num_micro_batches)]
    num_tokens = [0] * num_micro_batches
    # in rounds, the longest left to the lightest: sums that differ by d are afterwards apart by at
    # most d or the spread of the round, whichever is more, and never by the sum of the two
    for first in range(0, len(longest_first), num_micro_batches):
        lightest_first = sorted(range(num_micro_batches), key=num_tokens.__getitem__)
        dealt = longest_first[first : first + num_micro_batches]
        for request, micro_batch in zip(dealt, lightest_first, strict=False):
            micro_batches[micro_batch].append(request)
            num_tokens[micro_batch] += context_lens[request]
    return [sorted(requests) for requests in micro_batches]


def places(micro_batches: Sequence[Sequence[int]], size: int) -> list[int]:
    """Each request's row in a step whose micro-batches have `size` rows each, one behind another.

    ValueError where one has more requests than rows.
    """
    row_of: dict[int, int] = {}
    for i, requests in enumerate(micro_batches):
        if len(requests) > size:
            raise ValueError(f"size must be {len(requests)} rows or more, got {size}")
        row_of |= {request: i * size + row for row, request in enumerate(requests)}
    return [row_of[request] for request in sorted(row_of)]


def rows_of(size: int, num_micro_batches: int) -> list[slice]:
    """The rows of each micro-batch in such a step."""
    return [slice(i * size, (i + 1) * size) for i in range(num_micro_batches)]


def num_rows(max_num_seqs: int, num_micro_batches: int) -> int:
    """Rows of a step that holds so many requests, whichever way they are cut."""
    most = -(-max_num_seqs // num_micro_batches)
    if most > ROW_STEP:
        most = -(-most // ROW_STEP) * ROW_STEP
    return most * num_micro_batches
