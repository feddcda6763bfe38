"""Rows of the decode device: what they hold is of the request that has them now."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.batch import sampling_columns
from engine.decode_rows import DecodeRows
from engine.request import Request, SamplingParams

NUM_ROWS, BLOCK_SIZE, MAX_BLOCKS = 3, 4, 6


class RowsMachine(RuleBasedStateMachine):
    """Requests come, take steps, give rows and blocks back and come again, known tokens and all."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = DecodeRows(NUM_ROWS, BLOCK_SIZE, MAX_BLOCKS)
        self.requests: list[Request] = []  # that have rows
        self.away: list[Request] = []  # that had one
        self.tables: dict[int, list[int]] = {}  # request_id -> blocks
        self.sent = np.full(NUM_ROWS * MAX_BLOCKS, -1)  # what the device's tables hold
        self.num_blocks = 0  # granted so far, each a number of its own

    @property
    def has_room(self) -> bool:
        return len(self.requests) < NUM_ROWS

    @precondition(lambda self: self.has_room)
    @rule(length=st.integers(1, 12), top_k=st.integers(0, 9), seed=st.integers(-9, 9))
    def come(self, length: int, top_k: int, seed: int) -> None:
        params = SamplingParams(top_k=top_k, seed=seed, top_p=0.5, min_p=0.25, temperature=0.75)
        request_id = len(self.requests) + len(self.away)
        self.admit(Request(request_id, [7] * length, params))

    @precondition(lambda self: self.has_room and self.away)
    @rule(choice=st.integers(0, 99))
    def come_again(self, choice: int) -> None:
        self.admit(self.away.pop(choice % len(self.away)))

    def admit(self, request: Request) -> None:
        assert self.rows.without_row([request]) == [request]
        self.tables[request.request_id] = []
        request.num_in_flight = 1  # prefill has drawn a token
        self.grow(request)
        self.rows.admit([request])
        self.requests.append(request)

    def grow(self, request: Request) -> None:
        table = self.tables[request.request_id]
        while len(table) * BLOCK_SIZE < request.num_tokens:
            table.append(self.num_blocks)
            self.num_blocks += 1

    @precondition(lambda self: self.requests)
    @rule(choice=st.integers(0, 99))
    def leave(self, choice: int) -> None:
        request = self.requests.pop(choice % len(self.requests))
        self.rows.release(request)
        self.rows.release(request)  # harmless
        request.num_in_flight = 0
        self.away.append(request)

    @precondition(lambda self: self.requests)
    @rule(first=st.integers(0, 2), is_known=st.booleans())
    def step(self, first: int, is_known: bool) -> None:
        limit = MAX_BLOCKS * BLOCK_SIZE
        requests = [r for r in self.requests[first:] if r.num_tokens < limit]
        for request in requests:
            self.grow(request)
            request.num_in_flight += 1
        self.check_columns(requests)
        for request in requests if is_known else ():
            request.token_ids.extend([8] * (request.num_in_flight - 1))
            request.num_in_flight = 1

    def check_columns(self, requests: list[Request]) -> None:
        context_lens = np.array([r.num_tokens - 1 for r in requests], np.int64)
        rows = self.rows.of(requests)
        table_of = self.tables.__getitem__
        cells, blocks = self.rows.learn_blocks(requests, rows, context_lens, table_of)
        assert len(set(cells)) == len(cells)
        self.sent[cells] = blocks
        assert self.rows.learn_blocks(requests, rows, context_lens, table_of) == ([], [])
        columns = self.rows.columns(rows, context_lens)
        for name, values in sampling_columns(requests).items():
            assert columns[name].tolist() == values
        assert columns["context_lens"].tolist() == context_lens.tolist()
        positions = columns["positions"].tolist()
        assert positions == [n - 1 for n in context_lens]
        sent = self.sent.reshape(NUM_ROWS, MAX_BLOCKS)
        for i, (request, position) in enumerate(zip(requests, positions, strict=True)):
            table, num_read = self.tables[request.request_id], position // BLOCK_SIZE + 1
            assert sent[rows[i], :num_read].tolist() == table[:num_read]
            slot = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            assert columns["slot_mapping"][i] == slot

    @invariant()
    def every_row_has_one_owner_or_is_free(self) -> None:
        rows = self.rows.of(self.requests).tolist()
        assert sorted(rows + self.rows._free) == list(range(NUM_ROWS))
        assert self.rows.num_free == NUM_ROWS - len(self.requests)
        assert all(request in self.rows for request in self.requests)
        assert self.rows.without_row(self.requests + self.away) == self.away


TestRows = RowsMachine.TestCase


@given(block_size=st.integers(1, 9), num_tokens=st.integers(2, 40))
def test_blocks_are_asked_for_only_where_a_token_needs_one_that_is_not_known(
    block_size: int, num_tokens: int
) -> None:
    rows = DecodeRows(2, block_size, 40)
    request = Request(0, [1], SamplingParams())
    asked: list[int] = []

    def table_of(request_id: int) -> list[int]:
        asked.append(request_id)
        return list(range(-(-length // block_size)))

    where = rows.admit([request])
    for length in range(1, num_tokens):
        rows.learn_blocks([request], where, np.array([length]), table_of)
    assert len(asked) == -(-(num_tokens - 1) // block_size)


def test_a_request_without_a_row_is_an_error() -> None:
    rows = DecodeRows(1, 4, 4)
    with pytest.raises(KeyError):
        rows.of([Request(5, [1], SamplingParams())])
