"""Cuts of decode batches: each request once, and both stages' work in balance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.micro_batches import ROW_STEP, cut, num_rows, places, rows_of

lengths = st.lists(st.integers(1, 5000), max_size=40)
numbers = st.integers(1, 5)


def spread(values: list[int]) -> int:
    return max(values) - min(values)


@given(context_lens=lengths, num=numbers)
def test_each_request_is_in_one_micro_batch(context_lens, num):
    micro_batches = cut(context_lens, num)
    assert len(micro_batches) == num
    assert sorted(i for some in micro_batches for i in some) == list(range(len(context_lens)))
    assert all(some == sorted(some) for some in micro_batches)
    assert micro_batches == cut(context_lens, num)


@given(context_lens=lengths, num=numbers)
def test_requests_and_kv_tokens_are_balanced(context_lens, num):
    micro_batches = cut(context_lens, num)
    assert spread(list(map(len, micro_batches))) <= 1
    bound = max(context_lens, default=0)
    if context_lens and len(context_lens) % num == 0:
        bound -= min(context_lens)
    assert spread([sum(context_lens[i] for i in some) for some in micro_batches]) <= bound


def test_the_bounds_are_met_and_not_only_kept():
    assert cut([9, 1, 1, 1], 2) == [[0, 3], [1, 2]]  # 8 apart: the longest less the shortest
    assert cut([9], 2) == [[0], []]
    assert cut([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert cut([8, 7, 2, 1], 2) == [[0, 3], [1, 2]]  # 9 and 9


def test_there_is_a_micro_batch_at_least():
    with pytest.raises(ValueError, match="num_micro_batches must be 1 or more, got 0"):
        cut([1, 2], 0)


@given(context_lens=lengths, num=numbers, more=st.integers(0, 9))
def test_places_lie_in_the_rows_of_the_micro_batch(context_lens, num, more):
    micro_batches = cut(context_lens, num)
    size = max(map(len, micro_batches)) + more
    rows = places(micro_batches, size)
    assert len(set(rows)) == len(rows) == len(context_lens)
    for some, part in zip(micro_batches, rows_of(size, num), strict=True):
        assert [rows[i] for i in some] == list(range(part.start, part.start + len(some)))


def test_a_micro_batch_of_more_requests_than_rows_is_an_error():
    with pytest.raises(ValueError, match="size must be 2 rows or more, got 1"):
        places([[0, 1], [2]], 1)


@given(max_num_seqs=st.integers(1, 2000), num=numbers)
def test_rows_hold_every_batch_and_micro_batches_begin_aligned(max_num_seqs, num):
    rows = num_rows(max_num_seqs, num)
    size = rows // num
    assert rows == size * num and size == -(-rows // num)
    assert max_num_seqs <= rows < max_num_seqs + num * ROW_STEP
    assert size < ROW_STEP or size % ROW_STEP == 0


@pytest.mark.parametrize(("most", "rows"), [(4, 4), (16, 16), (18, 32), (7, 8)])
def test_rows_are_whole_steps_where_there_are_more_than_one(most, rows):
    assert num_rows(most, 2) == rows
