"""What a core on one device and one on two have in common: tokens, ends and failures."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from engine.base_scheduler import BaseScheduler, PrefillChunk
from engine.batch import Launched
from engine.block_manager import BlockManager
from engine.decode import DecodeWorker
from engine.prefill import PrefillWorker
from engine.request import FinishReason, Request
from engine.stats import EngineStats
from models.config import ModelConfig

logger = logging.getLogger(__name__)

# told of each new token; returns why the request ends, where its text says so
OnToken = Callable[[Request, int], FinishReason | None]


class BaseCore(ABC):
    """Requests in, token ids out. Knows no text."""

    scheduler: BaseScheduler
    decode: DecodeWorker

    def __init__(self, model_config: ModelConfig) -> None:
        self.model_config = model_config
        self.stats = EngineStats()
        self._ended: list[Request] = []  # requests that the caller has not heard of yet
        self._leftover = ""  # what of it is logged

    @property
    def is_idle(self) -> bool:
        """No request is unfinished; results that nobody waits for may still be on their way."""
        return self.scheduler.is_idle

    @abstractmethod
    def step(self, on_token: OnToken) -> list[Request]:
        """Launch what can be launched, and take what is there; returns the requests that ended.

        An exception in a launch puts its requests back into the queue, blocks returned, and is
        raised again once the others' tokens have been taken: `take_ended` has who ended then.
        """

    def take_ended(self) -> list[Request]:
        """The requests that ended and were not returned yet."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Give back what memory alone does not free; nothing may be launched afterwards."""
        try:
            self.drain()
        finally:
            self.decode.close()

    def drain(self) -> None:
        """Wait for what is in flight and drop it: nobody asks for it any more.

        All KV blocks are free behind it. What is not has leaked: that is logged, once, and the
        engine goes on with the others.
        """
        self._drop_in_flight()
        leftover = self._find_leftover()
        if leftover and leftover != self._leftover:
            logger.error("KV blocks are held though no request is left: %s", leftover)
        self._leftover = leftover

    @abstractmethod
    def _drop_in_flight(self) -> None:
        """Wait for it. Where that raises, a later call goes on behind it."""

    @abstractmethod
    def _find_leftover(self) -> str:
        """Which KV blocks are held, in words; "" where none is. Cheap: no block is looked at."""

    @abstractmethod
    def assert_idle(self) -> None:
        """Assert that every KV block is back and that its manager says so; for tests, as it looks
        at each."""

    @property
    @abstractmethod
    def pools(self) -> tuple[BlockManager, BlockManager]:
        """Of the KV blocks that prompts are computed in, and of those that decode reads."""

    def statistics(self) -> dict[str, object]:
        """What `LLM.stats` shows."""
        depths = {
            "num_waiting": self.scheduler.num_waiting,
            "num_running": self.scheduler.num_running,
            "handoff": self._handoff_statistics(),
        }
        for name, pool in zip(("prefill_kv_blocks", "kv_blocks"), self.pools, strict=True):
            depths[f"num_{name}"] = pool.num_blocks
            depths[f"num_free_{name}"] = pool.num_free_blocks
        return self.stats.as_dict() | depths

    def _handoff_statistics(self) -> dict[str, object] | None:
        """Of what goes from device to device; None where there is only one."""
        return None

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in whatever state it is."""
        self.scheduler.finish(request, reason)
        request.finished_time = time.perf_counter()
        self.stats.request_finished(request)
        if self.is_idle:  # whoever ended it: after a cancelled one there may be no step to say so
            self.stats.is_idle()

    def _warm_up(self, worker: PrefillWorker | DecodeWorker) -> None:
        """Capture its graphs, before the first request waits for them."""
        if not worker.graphs.is_capturing:
            return
        worker.warm_up()
        graphs = worker.graphs
        self.stats.graphs_captured(len(graphs.captured), graphs.capture_ms, graphs.captured_bytes)

    def _prefill_scheduled(self, chunks: Sequence[PrefillChunk]) -> None:
        now = time.perf_counter()
        self.stats.is_active(now)
        for chunk in chunks:
            if chunk.request.first_scheduled_time is None:
                chunk.request.first_scheduled_time = now

    def _prefill_launched(self, chunks: Sequence[PrefillChunk]) -> None:
        self.scheduler.launched(chunks)
        self.stats.prefill_launched(sum(chunk.num_tokens for chunk in chunks))

    def _take(self, launched: Launched, on_token: OnToken) -> None:
        """Wait for the tokens of one launch and hand them on. Where that fails, the request at
        fault ends with "error" and those behind it draw their tokens again."""
        try:
            token_ids = launched.wait()
            busy_ms = launched.span.ms
        except BaseException:  # of a device that has failed, or an interrupt: nobody has the tokens
            self._requeue_fresh(launched, 0)
            raise
        now = time.perf_counter()
        self.stats.device_was_busy(launched.phase, busy_ms)
        for row, ((request, epoch), token_id) in enumerate(
            zip(launched.requests, token_ids, strict=True)
        ):
            if not self.scheduler.record_token(request, token_id, epoch):
                continue
            self.stats.token_taken(request, now)
            if request.params.logprobs is not None:
                request.logprobs.append(launched.logprobs_of(row, token_id))
            try:
                reason = on_token(request, token_id)
            except BaseException:
                self.finish(request, "error")
                self._requeue_fresh(launched, row + 1)
                raise
            reason = reason or request.end_reason(self.model_config.eos_token_ids)
            if reason is not None:
                self.finish(request, reason)
                self._ended.append(request)

    def _requeue_fresh(self, launched: Launched, first_row: int) -> None:
        """Have the requests from this row on drawn again whose tokens nobody has taken."""
        rows = launched.requests[first_row:]
        self._requeue([request for request, epoch in rows if request.epoch == epoch])

    @contextmanager
    def _requeued_on_error(self, requests: Sequence[Request]) -> Iterator[None]:
        """Put the requests of a failed launch back in front of the queue, in their order."""
        try:
            yield
        except BaseException:
            self._requeue(requests)
            raise

    def _requeue(self, requests: Sequence[Request]) -> None:
        for request in reversed(list(dict.fromkeys(requests))):
            self.scheduler.preempt(request)
