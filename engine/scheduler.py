"""Who is prefilled and who is decoded next. Knows nothing of tensors or devices."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.block_manager import BlockManager
from engine.config import check_int
from engine.request import FinishReason, Request, RequestState


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, start + num_tokens) of a request, to be computed in one launch."""

    request: Request
    start: int
    num_tokens: int
    is_last: bool  # a token is sampled after it
    epoch: int  # the request's when it was scheduled

    @property
    def is_stale(self) -> bool:
        """The request has lost its blocks since: the chunk must not be launched any more."""
        return self.epoch != self.request.epoch


class Scheduler:
    """First come, first served; under pressure the last to come gives its blocks back.

    Requests are admitted in the order of arrival and preempted in the reverse, so those that hold
    blocks always arrived before those that wait. The oldest is therefore never preempted, and
    as each one fits the cache alone, each one ends.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        on_release: Callable[[Request], None] | None = None,
    ):
        check_int("max_num_seqs", max_num_seqs, 1)
        check_int("max_num_batched_tokens", max_num_batched_tokens, 1)
        check_int("max_model_len", max_model_len, 2)
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.on_release = on_release  # called when a request has given its blocks back
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        self.prefilling: Request | None = None  # at most one is cut by the token budget
        self.running: dict[int, Request] = {}  # decoding; in the order of arrival
        self._refused: tuple[Request | None, int] = (None, 0)  # a head, and the free blocks then

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet, or none any more."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self.running) + (self.prefilling is not None)

    @property
    def is_idle(self) -> bool:
        """No request is unfinished."""
        return not self.waiting and not self.num_running

    def add(self, request: Request) -> None:
        """Queue a request, or raise a ValueError if it could never run."""
        if self._find(request.request_id) is not None:
            raise ValueError(f"request_id must be new, got {request.request_id}")
        request.max_total_tokens = min(request.max_total_tokens, self.check(request))
        self.waiting[request.request_id] = request

    def check(self, request: Request) -> int:
        """Return how many tokens the request may come to; a ValueError if it cannot run."""
        capacity = self.block_manager.num_blocks * self.block_manager.block_size
        limit = min(self.max_model_len, capacity)
        if not 1 <= request.num_prompt_tokens < limit:
            raise ValueError(
                f"prompt must be 1 to {limit - 1} tokens, one less than the smaller of "
                f"max_model_len ({self.max_model_len}) and what the KV cache holds ({capacity}), "
                f"got {request.num_prompt_tokens}"
            )
        return limit

    def schedule_prefill(self) -> list[PrefillChunk]:
        """Choose the chunks of the next prefill launch, within the token budget."""
        chunks: list[PrefillChunk] = []
        budget = self.max_num_batched_tokens
        while budget and (request := self.prefilling or self._admit_next()) is not None:
            chunks.append(self._next_chunk(request, budget))
            budget -= chunks[-1].num_tokens
        return chunks

    def launched(self, chunks: Iterable[PrefillChunk]) -> None:
        """Note that the chunks are on the device: their full blocks can be shared from now on."""
        for chunk in chunks:
            if not chunk.is_stale:
                request = chunk.request
                end = chunk.start + chunk.num_tokens
                self.block_manager.commit(request.request_id, request.token_ids, end)

    def schedule_decode(self) -> list[Request]:
        """Choose the requests of the next decode launch, in the order of arrival.

        Each feeds its newest token, known or not, at position num_computed_tokens - 1, for which
        it has a block. One whose tokens all exist already only waits to know them.
        """
        scheduled: list[Request] = []
        grow = self.block_manager.grow
        for request in list(self.running.values()):
            num_tokens = len(request.token_ids) + request.num_in_flight
            if request.state is not RequestState.DECODING or num_tokens >= request.max_total_tokens:
                continue
            if grow(request.request_id, num_tokens) or self._make_room(request, num_tokens):
                request.num_computed_tokens += 1
                request.num_in_flight += 1
                scheduled.append(request)
        return scheduled

    def record_token(self, request: Request, token_id: int, epoch: int) -> bool:
        """Take a sampled token, now known. False: it is stale and was dropped.

        epoch is the request's when the step that sampled the token was launched.
        """
        if epoch != request.epoch:
            return False
        request.token_ids.append(token_id)
        request.num_in_flight -= 1
        # the newest token's k and v may not be written; those before it certainly are
        num_computed = len(request.token_ids) - 1
        self.block_manager.commit(request.request_id, request.token_ids, num_computed)
        return True

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in whatever state it is; one that has ended keeps its first reason."""
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.WAITING:
            del self.waiting[request.request_id]
            request.epoch += 1
        else:
            self._release(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def abort(self, request_id: int) -> Request | None:
        """End an unfinished request and return it; None if there is no such request."""
        request = self._find(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def preempt(self, request: Request) -> None:
        """Take a request's blocks back and put it in front of the queue, to be computed anew."""
        self._release(request)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)

    def _find(self, request_id: int) -> Request | None:
        if self.prefilling is not None and self.prefilling.request_id == request_id:
            return self.prefilling
        return self.waiting.get(request_id) or self.running.get(request_id)

    def _admit_next(self) -> Request | None:
        """Grant the head of the queue its blocks; nobody behind it is looked at before it."""
        if not self.waiting or self.num_running >= self.max_num_seqs:
            return None
        request = next(iter(self.waiting.values()))
        num_free = self.block_manager.num_free_blocks
        # hashing a long prompt at every step costs more than it can find while nothing was freed
        if self.num_running and self._refused[0] is request and num_free <= self._refused[1]:
            return None
        # a block for each running request, or the newcomer would soon be preempted
        num_cached = self.block_manager.admit(
            request.request_id, request.token_ids, keep_free=self.num_running
        )
        if num_cached is None:
            self._refused = (request, num_free)
            return None
        return self._start(request, num_cached)

    def _start(self, request: Request, num_cached: int) -> Request:
        del self.waiting[request.request_id]
        self._refused = (None, 0)
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_cached
        request.num_computed_tokens = num_cached
        request.state = RequestState.PREFILLING
        self.prefilling = request
        return request

    def _next_chunk(self, request: Request, budget: int) -> PrefillChunk:
        start = request.num_computed_tokens
        num_left = len(request.token_ids) - start
        num_tokens = min(budget, num_left)
        is_last = num_tokens == num_left
        request.num_computed_tokens += num_tokens
        if is_last:
            request.state = RequestState.DECODING
            request.num_in_flight = 1
            self.prefilling = None
            self.running[request.request_id] = request
        return PrefillChunk(request, start, num_tokens, is_last, request.epoch)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Preempt the latest arrivals until the request can grow; False: it was one of them."""
        while not self.block_manager.grow(request.request_id, num_tokens):
            victim = self.prefilling or next(reversed(self.running.values()))
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _release(self, request: Request) -> None:
        """Take blocks and place away; results still in flight are stale from here on."""
        if self.prefilling is request:
            self.prefilling = None
        else:
            del self.running[request.request_id]
        self.block_manager.release(request.request_id)
        request.epoch += 1
        request.num_in_flight = 0
        request.num_computed_tokens = 0
        if self.on_release is not None:
            self.on_release(request)
