"""What scheduling on one device and on two have in common. Knows nothing of tensors or devices."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from operator import le
from typing import ClassVar

from engine.block_manager import BlockManager
from engine.config import check_int
from engine.request import FinishReason, Request, RequestState

# to look up a member of an enum, for each token of each step, takes CPython 3.11 up to 0.1 us
DECODING = RequestState.DECODING


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


class BaseScheduler(ABC):
    """First come, first served: the queue, prompts in chunks, tokens, ends, preemption.

    Requests are admitted in the order of arrival and preempted in the reverse. The oldest that
    holds blocks is therefore never preempted, and as each one fits the cache alone, each one ends.
    What blocks there are, and who may have them, is for the subclasses to say.
    """

    state_after_prefill: ClassVar[RequestState]

    def __init__(
        self,
        block_manager: BlockManager,
        capacity: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        on_release: Callable[[Request], None] | None,
        max_chunks: int | None = None,
    ):
        """block_manager: of the pool that prompts are computed in; capacity: tokens that one
        request may have in the cache; max_num_seqs: requests that may decode at a time;
        max_num_batched_tokens: of one prefill launch; max_model_len: tokens of one request, prompt
        and output; on_release: called when a request has given its blocks back; max_chunks: of one
        prefill launch, None for no limit. Raises ValueError where a limit is no integer or too
        small."""
        check_int("max_num_seqs", max_num_seqs, 1)
        check_int("max_num_batched_tokens", max_num_batched_tokens, 1)
        check_int("max_model_len", max_model_len, 2)
        if max_chunks is not None:
            check_int("max_chunks", max_chunks, 1)
        self.block_manager = block_manager
        self._block_size = block_manager.block_size
        self.capacity = capacity
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_chunks = max_chunks
        self.on_release = on_release
        self.waiting: OrderedDict[int, Request] = OrderedDict()  # in the order of arrival
        self.prefilling: Request | None = None  # at most one is cut by the token budget
        self.running: dict[int, Request] = {}  # all of their prompt launched; order of arrival
        self._num_arrived = 0
        self._refused: tuple[Request, tuple[int, ...]] | None = None  # a head, and the room then

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
        request.arrival_index = self._num_arrived
        self._num_arrived += 1
        self.waiting[request.request_id] = request

    def check(self, request: Request) -> int:
        """Return how many tokens the request may come to; a ValueError if it cannot run."""
        limit = min(self.max_model_len, self.capacity)
        if not 1 <= request.num_prompt_tokens < limit:
            raise ValueError(
                f"prompt must be 1 to {limit - 1} tokens, one less than the smaller of "
                f"max_model_len ({self.max_model_len}) and what the KV cache holds "
                f"({self.capacity}), got {request.num_prompt_tokens}"
            )
        return limit

    def schedule_prefill(self) -> list[PrefillChunk]:
        """Choose the chunks of the next prefill launch, within the limits."""
        chunks: list[PrefillChunk] = []
        budget = self.max_num_batched_tokens
        while budget and len(chunks) != self.max_chunks:
            request = self.prefilling or self._admit_next()
            if request is None:
                break
            chunks.append(self._next_chunk(request, budget))
            budget -= chunks[-1].num_tokens
        return chunks

    def launched(self, chunks: Iterable[PrefillChunk]) -> None:
        """Note that the chunks are on the device: their full blocks can be shared from now on."""
        for chunk in chunks:
            if not chunk.is_stale:
                self._commit(chunk.request, chunk.start + chunk.num_tokens)
                self._refused = None  # it may be what the head begins with

    def schedule_decode(self) -> list[Request]:
        """Choose the requests of the next decode launch, in the order of arrival.

        Each feeds its newest token, known or not, at position num_computed_tokens - 1, for which
        it has a block. One whose tokens all exist already only waits to know them.
        """
        scheduled: list[Request] = []
        block_size = self._block_size
        # a victim, which is the latest to have arrived, is never one that is scheduled already
        for request in list(self.running.values()):
            num_tokens = len(request.token_ids) + request.num_in_flight
            if request.state is not DECODING or num_tokens >= request.max_total_tokens:
                continue
            # it has blocks for all but the newest token, which may be the first of another block
            has_block = (num_tokens - 1) % block_size != 0
            if has_block or self._make_room(request, num_tokens):
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
        if num_computed % self._block_size == 0:  # one more block is full
            self._commit(request, num_computed)
        if request.state is not DECODING:
            self._first_token_known(request)
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

    def preempt(self, request: Request) -> None:
        """Take a request's blocks back and queue it where it arrived, to be computed anew."""
        self._release(request)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        index, others = request.arrival_index, self.waiting.values()
        # none as a rule; after a failed launch there may be waiting ones that came before
        older = list(takewhile(lambda other: other.arrival_index < index, others))
        for next_one in (request, *reversed(older)):
            self.waiting[next_one.request_id] = next_one
            self.waiting.move_to_end(next_one.request_id, last=False)

    @abstractmethod
    def _may_admit(self, request: Request) -> bool:
        """Whether the head of the queue may have blocks, as far as the limits go."""

    def _room(self) -> tuple[int, ...]:
        """Blocks, of each kind, that `_grant` may hand out to one who shares none; where there are
        no more of any than when it refused, it is not asked again."""
        return (self.block_manager.num_free_blocks,)

    @abstractmethod
    def _grant(self, request: Request) -> int | None:
        """Grant blocks for all tokens: how many of them are cached; None: too few are free."""

    @abstractmethod
    def _commit(self, request: Request, num_computed: int) -> None:
        """Make the full blocks among the first num_computed tokens findable."""

    @abstractmethod
    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Make the decode blocks cover num_tokens; False, and nothing has changed: they cannot."""

    @abstractmethod
    def _return_blocks(self, request: Request) -> None:
        """Take all blocks of the request back."""

    @abstractmethod
    def _first_token_known(self, request: Request) -> None:
        """The host has the token that prefill drew, of a request that does not decode yet."""

    def _victim(self) -> Request | None:
        """Whose blocks another one may have; None: none now, there will be some later."""
        return next(self._latest_first())

    def _latest_first(self) -> Iterator[Request]:
        """Those that hold blocks, in the reverse order of arrival."""
        cut = self.prefilling
        for request in reversed(self.running.values()):
            if cut is not None and cut.arrival_index > request.arrival_index:
                yield cut
                cut = None
            yield request
        if cut is not None:
            yield cut

    def _find(self, request_id: int) -> Request | None:
        if self.prefilling is not None and self.prefilling.request_id == request_id:
            return self.prefilling
        return self.waiting.get(request_id) or self.running.get(request_id)

    def _admit_next(self) -> Request | None:
        """Grant the head of the queue its blocks; nobody behind it is looked at before it."""
        request = next(iter(self.waiting.values()), None)
        if request is None or not self._may_admit(request):
            return None
        room = self._room()
        # hashing a long prompt at every step costs more than it can find while no room was made
        if self.num_running and self._refused is not None:
            refused, room_then = self._refused
            if refused is request and all(map(le, room, room_then)):
                return None
        num_cached = self._grant(request)
        if num_cached is None:
            self._refused = request, room
            return None
        return self._start(request, num_cached)

    def _start(self, request: Request, num_cached: int) -> Request:
        del self.waiting[request.request_id]
        self._refused = None
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
            request.state = self.state_after_prefill
            request.num_in_flight = 1
            self.prefilling = None
            self._run(request)
        return PrefillChunk(request, start, num_tokens, is_last, request.epoch)

    def _run(self, request: Request) -> None:
        """Let it be one of the running, in the order of arrival."""
        last = next(reversed(self.running.values()), request)
        self.running[request.request_id] = request
        if last.arrival_index > request.arrival_index:  # as a rule only after a failed launch
            by_arrival = sorted(self.running.values(), key=lambda other: other.arrival_index)
            self.running = {other.request_id: other for other in by_arrival}

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Preempt the latest arrivals until the request can grow; False: not in this step."""
        while not self._grow(request, num_tokens):
            victim = self._victim()
            if victim is None:
                return False
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
        self._return_blocks(request)
        request.epoch += 1
        request.num_in_flight = 0
        request.num_computed_tokens = 0
        if self.on_release is not None:
            self.on_release(request)
