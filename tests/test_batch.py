"""Requests to index tensors: positions, slots, tables, seeds; and log-probabilities back."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from engine.base_scheduler import PrefillChunk
from engine.batch import (
    Launched,
    PrefillBatch,
    TokenLogprobs,
    draw_index,
    prefill_columns,
    sampled_requests,
    sampling_columns,
)
from engine.device import Span
from engine.host_buffers import HostBuffers
from engine.request import Request, SamplingParams

CPU = torch.device("cpu")


def chunk(request_id: int, num_tokens: int, start: int = 0, stop: int | None = None, **params):
    """Tokens [start, stop) of a request whose i-th token is 100 * request_id + i."""
    request = Request(
        request_id,
        [100 * request_id + i for i in range(num_tokens)],
        SamplingParams(**params),
        seed=request_id + 50,
    )
    stop = num_tokens if stop is None else stop
    is_last = stop == num_tokens
    request.num_in_flight = int(is_last)  # as the scheduler leaves it
    return PrefillChunk(request, start, stop - start, is_last, 0)


def batch(chunks, tables, block_size=4) -> PrefillBatch:
    return PrefillBatch.of(
        prefill_columns(chunks, tables.__getitem__, block_size), HostBuffers(CPU)
    )


def test_a_ragged_batch_of_whole_cut_and_continued_prompts():
    chunks = [chunk(1, 3), chunk(2, 9, start=4), chunk(3, 6, stop=5), chunk(4, 1)]
    tables = {1: [7], 2: [0, 3, 9], 3: [5, 2], 4: [1]}
    made = batch(chunks, tables)
    assert made.token_ids.tolist() == [
        *[100, 101, 102],
        *[204, 205, 206, 207, 208],
        *[300, 301, 302, 303, 304],
        *[400],
    ]
    attention = made.attention
    assert attention.positions.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 0]
    assert attention.slot_mapping.tolist() == [
        *[28, 29, 30],
        *[12, 13, 14, 15, 36],
        *[20, 21, 22, 23, 8],
        *[4],
    ]
    assert attention.block_table.tolist() == [[7, 0, 0], [0, 3, 9], [5, 2, 0], [1, 0, 0]]
    assert attention.context_lens.tolist() == [3, 9, 5, 1]
    assert attention.cu_seqlens.tolist() == [0, 3, 8, 13, 14]
    assert attention.max_query_len == 5
    assert [request.request_id for request in sampled_requests(chunks)] == [1, 2, 4]
    assert made.sampled_rows.tolist() == [2, 7, 13]
    assert made.sampling.seeds.tolist() == [51, 52, 54]


def test_dtypes_are_those_that_kernels_take():
    made = batch([chunk(1, 3, temperature=0.5, top_k=3)], {1: [0]})
    attention, sampling = made.attention, made.sampling
    int64 = (made.token_ids, made.sampled_rows, attention.positions, attention.slot_mapping)
    int32 = (attention.block_table, attention.context_lens, attention.cu_seqlens)
    assert {t.dtype for t in (*int64, sampling.seeds)} == {torch.int64}
    assert {t.dtype for t in (*int32, sampling.top_k, sampling.steps)} == {torch.int32}
    floats = (sampling.temperature, sampling.top_p, sampling.min_p)
    assert {t.dtype for t in floats} == {torch.float32}


def test_a_batch_of_which_nothing_is_sampled():
    chunks = [chunk(1, 9, stop=4)]
    made = batch(chunks, {1: [0, 1, 2]})
    assert sampled_requests(chunks) == [] and made.sampled_rows.shape == (0,)
    assert all(t.shape == (0,) for t in made.sampling.arguments())


@given(
    spans=st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(0, 3)),
        min_size=1,
        max_size=5,
    ),
    block_size=st.sampled_from([1, 2, 4, 16]),
    seed=st.integers(0, 99),
)
@example([(0, 4, 0), (4, 4, 1), (3, 1, 0)], 4, 0)  # at the edges of blocks
def test_each_token_goes_to_the_slot_of_its_position(spans, block_size, seed):
    chunks = [
        chunk(i, start + num_tokens + num_left, start, start + num_tokens)
        for i, (start, num_tokens, num_left) in enumerate(spans)
    ]
    needed = [-(-len(c.request.token_ids) // block_size) for c in chunks]
    order = np.random.default_rng(seed).permutation(sum(needed)).tolist()
    tables = {i: [order.pop() for _ in range(n)] for i, n in enumerate(needed)}
    made = batch(chunks, tables, block_size)
    slots, starts = made.attention.slot_mapping.tolist(), made.attention.cu_seqlens.tolist()
    assert len(set(slots)) == len(slots)
    for i, c in enumerate(chunks):
        rows = range(starts[i], starts[i + 1])
        assert len(rows) == c.num_tokens
        for row, position in zip(rows, range(c.start, c.start + c.num_tokens), strict=True):
            block, offset = divmod(slots[row], block_size)
            assert block == tables[i][position // block_size]
            assert offset == position % block_size
            assert made.token_ids[row] == 100 * i + position


def test_sampling_follows_the_params():
    fields = {"top_k": 9, "top_p": 0.5, "min_p": 0.25}
    chunks = [
        chunk(1, 2, temperature=0.0, seed=-5),
        chunk(2, 2, temperature=0.7, **fields),
        chunk(3, 2, stop=1, temperature=0.9),  # draws nothing yet
    ]
    chunks[1].request.token_ids.extend([3, 4])
    chunks[1].request.num_in_flight = 2
    wanted = {
        "temperature": [0.0, 0.7],
        "top_k": [0, 9],
        "top_p": [1.0, 0.5],
        "min_p": [0.0, 0.25],
        "seeds": [-5, 52],  # the request's own comes before the engine's
        "steps": [0, 3],
    }
    assert sampling_columns(sampled_requests(chunks)) == wanted
    sampling = batch(chunks, {1: [0], 2: [1], 3: [2]}).sampling
    for tensor, values in zip(sampling.arguments(), wanted.values(), strict=True):
        assert tensor.tolist() == pytest.approx(values)
    assert [draw_index(c.request) for c in chunks[:2]] == [0, 3]


def test_a_draw_index_is_the_same_after_preemption():
    request = Request(0, [1, 2, 3], SamplingParams())
    request.token_ids.extend([4, 5])  # known; the next is in flight, after a new prefill
    request.num_in_flight = 1
    assert draw_index(request) == 2


def test_copies_do_not_follow_their_source():
    source = torch.arange(4)
    copy = HostBuffers(CPU).receive(source)
    source.zero_()
    assert copy.tolist() == [0, 1, 2, 3]


def test_logprobs_are_of_the_unscaled_logits():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [5.0, 0.0, 0.0, 1.0]])
    wanted = logits.log_softmax(-1)
    made = TokenLogprobs.of(HostBuffers(CPU), logits, torch.tensor([3, 0]), 2)
    assert made.row(0, 3, 2) == pytest.approx(
        {3: wanted[0, 3].item(), 1: wanted[0, 1].item(), 2: wanted[0, 2].item()}
    )
    assert list(made.row(0, 3, 2)) == [3, 1, 2]
    assert made.row(1, 0, 2) == pytest.approx({0: wanted[1, 0].item(), 3: wanted[1, 3].item()})
    assert made.row(0, 3, 0) == pytest.approx({3: wanted[0, 3].item()})
    half = TokenLogprobs.of(HostBuffers(CPU), logits.half(), torch.tensor([3, 0]), 0)
    assert half.sampled.dtype == torch.float32


def test_a_launch_keeps_tokens_owners_and_the_logprobs_asked_for():
    requests = [
        Request(i, [1], SamplingParams(logprobs=n)) for i, n in enumerate([None, 1, 99 % 21])
    ]
    requests[1].epoch = 4
    logits, token_ids = torch.randn(3, 7), torch.tensor([5, 6, 0])
    buffers = HostBuffers(token_ids.device)
    launched = Launched("decode", Span(CPU), buffers, requests, token_ids, logits)
    wanted = logits.log_softmax(-1)
    token_ids.zero_(), logits.zero_()  # the buffers of the next launch
    assert launched.wait() == [5, 6, 0]
    assert launched.requests == [(requests[0], 0), (requests[1], 4), (requests[2], 0)]
    assert launched.logprobs_of(0, 5) is None
    assert launched.logprobs_of(1, 6)[6] == pytest.approx(wanted[1, 6].item())
    assert len(launched.logprobs_of(2, 0)) == 7, "more were asked for than there are tokens"


def test_a_launch_without_logprobs_computes_none(monkeypatch):
    monkeypatch.setattr(torch, "log_softmax", None)
    token_ids = torch.tensor([5])
    requests = [Request(0, [1], SamplingParams())]
    launched = Launched(
        "decode", Span(CPU), HostBuffers(CPU), requests, token_ids, torch.randn(1, 7)
    )
    assert launched.logprobs_of(0, 5) is None
