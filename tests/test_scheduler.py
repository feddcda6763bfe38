"""The scheduler drives a simulated device, one step ahead; what comes out must be right."""

from collections import deque

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from engine.base_scheduler import PrefillChunk
from engine.block_manager import BlockManager
from engine.request import Request, RequestState, SamplingParams
from engine.scheduler import Scheduler
from tests.fake_engine import (
    EngineMachine,
    FakeEngine,
    Result,
    check_running,
    expected_tokens,
    mix,
    sample,
)


class Engine(FakeEngine):
    """Scheduler, block manager and a device whose results arrive num_behind steps later."""

    def __init__(self, num_blocks: int, block_size: int, num_behind: int = 1, **limits: int):
        self.manager = BlockManager(num_blocks, block_size)
        limits = {"max_num_seqs": 4, "max_num_batched_tokens": 7, "max_model_len": 99} | limits
        super().__init__(Scheduler(self.manager, on_release=self.drop_row, **limits))
        self.num_behind = num_behind
        self.pool = [[b""] * block_size for _ in range(num_blocks)]
        self.pending: deque[list[Result]] = deque()
        self.is_in_order = True

    def write(self, request: Request, position: int, token_id: int) -> bytes:
        """Compute one position from the one before, through the block table."""
        table, size = self.manager.block_table(request.request_id), self.manager.block_size
        assert table[position // size] not in self.manager._digest_of, "others may be reading it"
        before = b""
        if position:
            before = self.pool[table[(position - 1) // size]][(position - 1) % size]
        cell = self.pool[table[position // size]][position % size] = mix(before, token_id)
        return cell

    def launch_prefill(self, chunks: list[PrefillChunk]) -> list[Result]:
        results = []
        for chunk in chunks:
            request, end = chunk.request, chunk.start + chunk.num_tokens
            for position in range(chunk.start, end):
                cell = self.write(request, position, request.token_ids[position])
            if chunk.is_last:
                assert end == len(request.token_ids)
                self.rows[request.request_id] = sample(cell)
                results.append((request, sample(cell), chunk.epoch))
        return results

    def launch_decode(self, requests: list[Request]) -> list[Result]:
        results = []
        for request in requests:
            token_id, position = self.rows[request.request_id], request.num_computed_tokens - 1
            assert position == request.num_tokens - 2
            token_id = sample(self.write(request, position, token_id))
            self.rows[request.request_id] = token_id
            results.append((request, token_id, request.epoch))
        return results

    def step(self, schedule_both_first: bool = False, fails: str = "") -> None:
        chunks = self.scheduler.schedule_prefill()
        assert sum(chunk.num_tokens for chunk in chunks) <= self.scheduler.max_num_batched_tokens
        assert all(chunk.num_tokens > 0 for chunk in chunks)
        decoding = self.scheduler.schedule_decode() if schedule_both_first else None
        fresh_chunks = [chunk for chunk in chunks if not chunk.is_stale]
        if fails == "prefill":
            self.requeue([chunk.request for chunk in fresh_chunks])
            results = []
        else:
            results = self.launch_prefill(fresh_chunks)
            self.scheduler.launched(chunks)
        decoding = self.scheduler.schedule_decode() if decoding is None else decoding
        if fails == "decode":
            self.requeue(decoding)
            self.is_in_order = False  # a prompt half-way keeps its blocks, though it came later
        else:
            results += self.launch_decode(decoding)
        self.pending.append(results)
        while len(self.pending) > self.num_behind:
            self.collect()

    def collect(self) -> None:
        self.record(self.pending.popleft())

    def run_to_end(self) -> None:
        self.step_to_end(steps_per_token=3 + self.num_behind)
        while self.pending:
            self.collect()
        self.manager.assert_idle()
        self.check_outputs()

    def check(self) -> None:
        self.manager.check()
        scheduler = self.scheduler
        waiting, running = list(scheduler.waiting), list(scheduler.running)
        cut = [] if scheduler.prefilling is None else [scheduler.prefilling.request_id]
        order = running + cut + waiting
        check_running(scheduler)
        assert not self.is_in_order or order == sorted(order), "not first come, first served"
        assert len(running) + len(cut) == scheduler.num_running <= scheduler.max_num_seqs
        assert scheduler.num_waiting == len(waiting)
        assert set(self.rows) == set(running)
        for request in self.requests:
            self.check_request(request)

    def check_request(self, request: Request) -> None:
        holds_blocks = request.request_id in self.manager._holdings
        in_cache = request.state in (RequestState.PREFILLING, RequestState.DECODING)
        assert holds_blocks == in_cache
        if request.state is RequestState.DECODING:
            assert request.num_computed_tokens == request.num_tokens - 1
            assert request.num_in_flight >= 0 and request.num_tokens <= request.max_total_tokens
            table = self.manager.block_table(request.request_id)
            assert len(table) * self.manager.block_size >= request.num_computed_tokens
        else:
            assert request.num_in_flight == 0
            assert in_cache == (request.num_computed_tokens > 0)


class SchedulerMachine(EngineMachine):
    """Small pools, so that preemption is the rule; tokens of the fake model must not notice."""

    @initialize(
        num_blocks=st.integers(6, 16),
        block_size=st.sampled_from([1, 2, 4]),
        num_behind=st.integers(0, 2),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 20),
        max_model_len=st.integers(2, 99),
    )
    def start(self, **options: int) -> None:
        self.engine = Engine(**options)

    @rule(both_first=st.booleans(), num_steps=st.integers(1, 4))
    def step(self, both_first: bool, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step(schedule_both_first=both_first)

    @rule(fails=st.sampled_from(["prefill", "prefill", "prefill", "decode"]))
    def step_with_failing_launch(self, fails: str) -> None:
        self.engine.step(fails=fails)

    @rule()
    def collect_early(self) -> None:
        if self.engine.pending:
            self.engine.collect()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    budget=st.integers(1, 50),
    num_blocks=st.integers(12, 40),
    num_behind=st.integers(0, 2),
)
@example(lengths=[8, 8, 8], budget=8, num_blocks=12, num_behind=1)  # 0 modulo the block
@example(lengths=[9, 9, 9], budget=8, num_blocks=12, num_behind=1)  # 1
@example(lengths=[7, 7, 7], budget=8, num_blocks=12, num_behind=1)  # -1
@example(lengths=[40, 1, 40], budget=1, num_blocks=12, num_behind=2)  # one token at a time
def test_tokens_do_not_depend_on_the_schedule(
    lengths: list[int], budget: int, num_blocks: int, num_behind: int
) -> None:
    engine = Engine(num_blocks, 4, num_behind, max_num_batched_tokens=budget)
    for i, length in enumerate(lengths):
        engine.add([1 + (i + j * j) % 3 for j in range(length)], max_tokens=30)
    engine.run_to_end()


def test_pressure_preempts_the_latest_and_it_comes_next() -> None:
    engine = Engine(5, 4, max_num_batched_tokens=99)
    first, second, third = (engine.add([token] * 7, max_tokens=8) for token in (1, 2, 3))
    assert len(expected_tokens([1] * 7, 15)) == len(expected_tokens([2] * 7, 15)) == 8  # no EOS
    engine.step()
    assert list(engine.scheduler.running) == [0, 1]  # a block is left for each that runs
    while not second.num_preemptions:
        engine.step()
        engine.check()
    assert list(engine.scheduler.waiting) == [second.request_id, third.request_id]
    assert (second.epoch, second.num_in_flight, second.state) == (1, 0, RequestState.WAITING)
    engine.run_to_end()
    assert first.num_preemptions == 0
    assert second.num_cached_tokens == 0  # finding its own blocks again does not count


@pytest.mark.parametrize(("num_blocks", "num_running"), [(4, 1), (5, 2), (7, 2), (8, 3)])
def test_a_block_is_left_for_each_that_runs(num_blocks: int, num_running: int) -> None:
    engine = Engine(num_blocks, 4, max_num_batched_tokens=99)
    for token in (1, 2, 3):
        engine.add([token] * 7, max_tokens=8)
    assert len(engine.scheduler.schedule_prefill()) == engine.scheduler.num_running == num_running


def test_who_came_first_and_is_computed_again_takes_blocks_of_no_one_already_scheduled() -> None:
    """It is computed behind a later arrival then; its turn in a step comes before that one's."""
    for num_blocks in (5, 6, 7):
        engine = Engine(num_blocks, 4, max_num_batched_tokens=99)
        first, second = (engine.add([n] * 4, max_tokens=12) for n in (1, 2))
        engine.step()
        engine.scheduler.preempt(first)
        engine.is_in_order = False
        engine.step()
        assert list(engine.scheduler.running) == [first.request_id, second.request_id]
        engine.run_to_end()
        assert second.num_preemptions > 0


def test_who_is_computed_again_waits_in_the_order_of_arrival() -> None:
    """Whichever was taken first: after a failed launch it may be the oldest."""
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        engine = Engine(64, 4, max_num_batched_tokens=99)
        requests = [engine.add([n] * 4, max_tokens=12) for n in range(1, 5)]
        engine.step()
        for index in order:
            engine.scheduler.preempt(requests[index])
        assert list(engine.scheduler.waiting) == [r.request_id for r in requests[:3]]
        engine.is_in_order = False
        engine.run_to_end()


def test_prefix_is_shared_only_once_launched() -> None:
    engine = Engine(20, 4, max_num_batched_tokens=99)
    prompt = [1] * 9
    same_batch = [engine.add(prompt, 4), engine.add(prompt, 4)]
    engine.step()
    later = engine.add(prompt, 4)
    engine.run_to_end()
    assert [r.num_cached_tokens for r in (*same_batch, later)] == [0, 0, 8]


def test_head_of_the_queue_is_not_skipped() -> None:
    engine = Engine(8, 4, max_num_batched_tokens=99)
    engine.add([1] * 20, 8)
    big, small = engine.add([2] * 20, 8), engine.add([3], 8)
    engine.step()
    assert list(engine.scheduler.waiting) == [big.request_id, small.request_id]
    engine.run_to_end()


def test_results_of_a_finished_request_are_dropped() -> None:
    engine = Engine(8, 4)
    request = engine.add([1, 2], 8)
    engine.step()
    epoch = request.epoch
    engine.scheduler.finish(request, "stop")
    engine.scheduler.finish(request, "error")  # the first reason stays
    assert not engine.scheduler.record_token(request, 5, epoch)
    assert request.finish_reason == "stop" and request.num_generated == 0
    engine.manager.assert_idle()


def test_stale_chunk_shares_nothing() -> None:
    engine = Engine(8, 4)
    request = engine.add([1] * 5, 8)
    chunks = engine.scheduler.schedule_prefill()
    assert not chunks[0].is_stale
    engine.scheduler.preempt(request)
    assert chunks[0].is_stale
    engine.scheduler.launched(chunks)
    assert engine.manager.num_cached_blocks == 0
    engine.run_to_end()


@pytest.mark.parametrize(("num_tokens", "limit"), [(0, 11), (12, 11), (40, 11)])
def test_prompt_that_can_never_run_is_refused(num_tokens: int, limit: int) -> None:
    engine = Engine(3, 4)
    with pytest.raises(
        ValueError, match=rf"prompt must be 1 to {limit} .*\(12\), got {num_tokens}"
    ):
        engine.add([1] * num_tokens, 8)
    assert engine.scheduler.is_idle


def test_same_id_twice_is_refused() -> None:
    engine = Engine(8, 4)
    engine.add([1], 4)
    with pytest.raises(ValueError, match="request_id must be new, got 0"):
        engine.scheduler.add(Request(0, [1], SamplingParams()))


@pytest.mark.parametrize(
    ("name", "value"), [("max_num_seqs", 0), ("max_num_batched_tokens", 0), ("max_model_len", 1)]
)
def test_bad_limits_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be an integer >= \d, got {value}"):
        Engine(8, 4, **{name: value})
