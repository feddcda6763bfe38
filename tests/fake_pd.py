"""Two devices and the copies between them, for tests of PDScheduler: all in plain Python.

Copies move nothing before they complete, which is whenever the test says, in any order. A block is
watched as long: to free it or to grant it anew meanwhile is an error at once.
"""

from collections import Counter, deque
from collections.abc import Sequence

from engine.base_scheduler import PrefillChunk
from engine.block_manager import BlockManager
from engine.pd_scheduler import Handoff, PDScheduler
from engine.request import Request, RequestState
from tests.fake_engine import FakeEngine, Result, check_running, mix, sample

UNWRITTEN = b"unwritten"
NOT_DECODING_YET = (RequestState.PREFILLING, RequestState.PREFILLED, RequestState.COPYING)
HOLDS_NOTHING = (RequestState.WAITING, RequestState.FINISHED)


class WatchedManager(BlockManager):
    """A block manager that knows which blocks a copy reads or writes."""

    def __init__(self, num_blocks: int, block_size: int):
        super().__init__(num_blocks, block_size)
        self.copying: Counter[int] = Counter()  # block -> copies in flight

    def _grant(self, num_blocks: int) -> list[int]:
        blocks = super()._grant(num_blocks)
        assert not self._copied(blocks), "granted anew while a copy reads or writes them"
        return blocks

    def _free(self, blocks: Sequence[int]) -> None:
        assert not self._copied(blocks), "freed while a copy reads or writes them"
        super()._free(blocks)

    def _copied(self, blocks: Sequence[int]) -> list[int]:
        return [block for block in blocks if self.copying[block]]


class PDEngine(FakeEngine):
    """PDScheduler, its block managers, two devices with results in flight, and a copy engine."""

    def __init__(
        self, num_prefill_blocks: int, num_decode_blocks: int, block_size: int, **limits: int
    ):
        self.prefill = WatchedManager(num_prefill_blocks, block_size)
        self.decode = WatchedManager(num_decode_blocks, block_size)
        limits = {"max_num_seqs": 4, "max_num_batched_tokens": 99, "max_model_len": 999} | limits
        limits = {"max_decode_backlog": 4, "growth_tokens": 4} | limits
        limits |= {"on_release": self.drop_row}
        super().__init__(PDScheduler(self.prefill, self.decode, **limits))
        self.prefill_pool = [[UNWRITTEN] * block_size for _ in range(num_prefill_blocks)]
        self.decode_pool = [[UNWRITTEN] * block_size for _ in range(num_decode_blocks)]
        self.prefill_results: deque[list[Result]] = deque()
        self.decode_results: deque[list[Result]] = deque()
        self.copies: list[Handoff] = []
        self.cells: list[list[bytes]] = []  # request_id -> what its cache must hold
        self.num_handoffs = 0

    def add(self, prompt: list[int], max_tokens: int) -> Request:
        request = super().add(prompt, max_tokens)
        cell, cells = b"", []
        while len(cells) < request.max_total_tokens:  # a step ahead, one feeds an EOS too
            token_id = prompt[len(cells)] if len(cells) < len(prompt) else sample(cell)
            cell = mix(cell, token_id)
            cells.append(cell)
        self.cells.append(cells)
        return request

    def prefill_turn(self, *, fails: bool = False, pushes: bool = False) -> None:
        chunks = self.scheduler.schedule_prefill()
        assert sum(chunk.num_tokens for chunk in chunks) <= self.scheduler.max_num_batched_tokens
        assert len(chunks) <= (self.scheduler.max_chunks or len(chunks))
        if pushes:
            self.start_copies()
        if fails:
            self.requeue(chunk.request for chunk in chunks)
            return
        results = [self.compute_chunk(chunk) for chunk in chunks]
        self.scheduler.launched(chunks)
        self.prefill_results.append([result for result in results if result is not None])

    def compute_chunk(self, chunk: PrefillChunk) -> Result | None:
        request, end = chunk.request, chunk.start + chunk.num_tokens
        table = self.scheduler.prefill_table(request.request_id)
        for position in range(chunk.start, end):
            self.compute(self.prefill, self.prefill_pool, table, request, position)
        if not chunk.is_last:
            return None
        assert end == len(request.token_ids)
        return request, sample(self.cells[request.request_id][end - 1]), chunk.epoch

    def compute(
        self,
        manager: BlockManager,
        pool: list[list[bytes]],
        table: list[int],
        request: Request,
        position: int,
    ) -> None:
        """Write a cell, having read all before it, as attention does."""
        size, cells = manager.block_size, self.cells[request.request_id]
        before = [pool[table[i // size]][i % size] for i in range(position)]
        assert before == cells[:position], "the cache is not what was computed"
        block = table[position // size]
        assert block not in manager._digest_of, "others may be reading it"
        assert not manager.copying[block] or manager is self.prefill, "a copy writes it"
        pool[block][position % size] = cells[position]

    def start_copies(self) -> list[Handoff]:
        handoffs = self.scheduler.schedule_handoffs()
        for handoff in handoffs:
            assert len(handoff.src_blocks) == len(handoff.dst_blocks)
            self.prefill.copying.update(handoff.src_blocks)
            self.decode.copying.update(handoff.dst_blocks)
            for block in handoff.dst_blocks:
                self.decode_pool[block] = [UNWRITTEN] * self.decode.block_size
        self.copies += handoffs
        self.num_handoffs += len(handoffs)
        return handoffs

    def end_copy(self, index: int, *, fails: bool = False) -> None:
        """Complete one of the copies in flight, or have it fail."""
        handoff = self.copies.pop(index)
        for src, dst in zip(handoff.src_blocks, handoff.dst_blocks, strict=True):
            if not fails:
                self.decode_pool[dst] = list(self.prefill_pool[src])
        self.prefill.copying.subtract(handoff.src_blocks)
        self.decode.copying.subtract(handoff.dst_blocks)
        was_stale = handoff.is_stale
        if fails:
            self.scheduler.handoff_failed(handoff)
        else:
            assert self.scheduler.handoff_done(handoff) is not was_stale

    def decode_turn(self, *, fails: bool = False) -> list[Request]:
        scheduler = self.scheduler
        admitted = [*scheduler.running.values(), *filter(None, [scheduler.prefilling])]
        requests = scheduler.schedule_decode()
        self.check_pressure(admitted, requests)
        if fails:
            self.requeue(requests)
            return requests
        self.decode_results.append([self.compute_token(request) for request in requests])
        return requests

    def check_pressure(self, admitted: list[Request], requests: list[Request]) -> None:
        """Decode goes on but for copies in flight, and never at the cost of the oldest."""
        if admitted:
            oldest = min(admitted, key=lambda request: request.arrival_index)
            assert oldest.state is not RequestState.WAITING, "the oldest was preempted"
        can_go_on = [
            request
            for request in self.scheduler.running.values()
            if request.state is RequestState.DECODING
            and request not in requests
            and request.num_tokens < request.max_total_tokens
        ]
        assert not can_go_on or self.copies, "decode waits for nothing"

    def compute_token(self, request: Request) -> Result:
        request_id, position = request.request_id, request.num_computed_tokens - 1
        in_flight = {h.request.request_id for h in self.copies if not h.is_stale}
        assert request_id not in in_flight, "decoded before its copy has completed"
        assert position == request.num_tokens - 2
        if request_id not in self.rows:
            assert request.num_in_flight == 1, "the first token to feed is not known"
            self.rows[request_id] = request.token_ids[-1]
        known = list(request.token_ids[position : position + 1])
        assert known in ([], [self.rows[request_id]])
        table = self.scheduler.decode_table(request_id)
        self.compute(self.decode, self.decode_pool, table, request, position)
        self.rows[request_id] = sample(self.cells[request_id][position])
        return request, self.rows[request_id], request.epoch

    def collect(self, results: deque[list[Result]]) -> None:
        """Take the tokens of the oldest launch of one device."""
        self.record(results.popleft() if results else ())

    def step(self, *, pushes: bool = False, copies_end: bool = True) -> None:
        """One turn of everything, one step ahead of the results."""
        self.prefill_turn(pushes=pushes)
        self.start_copies()
        while copies_end and self.copies:
            self.end_copy(-1)
        self.decode_turn()
        for results in (self.prefill_results, self.decode_results):
            while len(results) > 1:
                self.collect(results)

    def run_to_end(self) -> None:
        """Step until every request has ended, and everything is back."""
        self.step_to_end(steps_per_token=6)
        for results in (self.prefill_results, self.decode_results):
            while results:
                self.collect(results)
        while self.copies:
            self.end_copy(-1)
        self.scheduler.leases.assert_idle()
        self.check_outputs()

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.leases.check()
        states = Counter(r.state for r in self.requests)
        backlog = sum(states[state] for state in NOT_DECODING_YET)
        backlog += sum(handoff.is_stale for handoff in self.copies)
        assert backlog == scheduler.decode_backlog <= scheduler.peak_backlog, "backlog"
        assert scheduler.peak_backlog <= scheduler.max_decode_backlog
        decoding = states[RequestState.COPYING] + states[RequestState.DECODING]
        assert decoding <= scheduler.max_num_seqs
        assert states[RequestState.DECODING] == scheduler.num_decoding
        for known, num, state in (
            (scheduler._prefilled, scheduler.num_prefilled, RequestState.PREFILLED),
            (scheduler._copying, scheduler.num_copying, RequestState.COPYING),
        ):
            assert len(known) == num
            assert set(known) == {r.request_id for r in self.requests if r.state is state}
        check_running(scheduler)
        waiting = [r.arrival_index for r in scheduler.waiting.values()]
        assert waiting == sorted(waiting), "not first come, first served"
        for request in self.requests:
            self.check_request(request)

    def check_request(self, request: Request) -> None:
        has_lease = request.request_id in self.scheduler.leases._open
        assert has_lease == (request.state not in HOLDS_NOTHING)
        if not has_lease:
            assert request.num_in_flight == 0 and request.num_computed_tokens == 0
            return
        lease = self.scheduler.leases.lease_of(request.request_id)
        is_there = request.state in (RequestState.COPYING, RequestState.DECODING)
        assert lease.in_decode == (is_there or lease.num_shared > 0)
        assert not (lease.in_prefill and request.state is RequestState.DECODING)
        if request.state is RequestState.DECODING:
            assert request.num_computed_tokens == request.num_tokens - 1
            assert request.num_tokens <= request.max_total_tokens
