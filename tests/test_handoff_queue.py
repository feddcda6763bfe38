"""HandoffQueue by itself: what decode waited for, and copies that fail."""

import time
from types import SimpleNamespace

import pytest

from engine.handoff_queue import HandoffQueue


class FakeCopy:
    """Done when it is told to be; asking it can fail, as can waiting for it."""

    def __init__(self) -> None:
        self.done, self.error = False, None
        self.num_bytes, self.ms = 0, 0.0

    def send(self, layers=None, after=()) -> None:
        self.num_bytes, self.ms = 100, 2.0

    @property
    def is_done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.done

    def wait(self) -> None:
        if self.error is not None:
            raise self.error
        self.done = True


class FakeLink:
    """Hands out copies that it keeps."""

    def __init__(self) -> None:
        self.way, self.copies = "kernel", []

    def open(self, source_blocks, target_blocks) -> FakeCopy:
        self.copies.append(FakeCopy())
        return self.copies[-1]


class FakeScheduler:
    """Notes what it is told. stale: hand-overs whose requests have lost their blocks."""

    def __init__(self) -> None:
        self.done, self.failed, self.stale = [], [], []

    def handoff_done(self, handoff) -> bool:
        self.done.append(handoff)
        return handoff not in self.stale

    def handoff_failed(self, handoff) -> None:
        self.failed.append(handoff)


def handoff(*, num_in_flight: int = 0, last_token_time: float | None = None) -> SimpleNamespace:
    request = SimpleNamespace(num_in_flight=num_in_flight, last_token_time=last_token_time)
    return SimpleNamespace(request=request, src_blocks=[0], dst_blocks=[1])


@pytest.fixture
def queue() -> SimpleNamespace:
    """A queue over fakes, and these."""
    scheduler, slabs = FakeScheduler(), FakeLink()
    queue = HandoffQueue(scheduler, slabs, FakeLink())
    return SimpleNamespace(queue=queue, scheduler=scheduler, copies=slabs.copies)


def exposed(queue: HandoffQueue) -> list[float]:
    """Milliseconds that decode waited, of each hand-over in turn."""
    return list(queue.stats._exposed_ms)


def end_of(case: SimpleNamespace) -> tuple[float, float]:
    """End the only transfer; the times before and behind that."""
    case.copies[0].done = True
    before = time.perf_counter()
    assert case.queue.poll()
    return before, time.perf_counter()


def test_a_token_known_behind_the_start_is_when_decode_begins_to_wait(queue):
    sent = handoff()
    queue.queue.start([sent], ())
    time.sleep(0.01)
    known = sent.request.last_token_time = time.perf_counter()
    assert not queue.queue.poll() and not exposed(queue.queue)
    before, behind = end_of(queue)
    (ms,) = exposed(queue.queue)
    assert (before - known) * 1e3 <= ms <= (behind - known) * 1e3


@pytest.mark.parametrize("known", [None, 0.0], ids=["no token yet", "a token of long ago"])
def test_else_decode_waits_from_the_start_of_the_copy(queue, known):
    earliest = time.perf_counter()
    queue.queue.start([handoff(last_token_time=known)], ())
    latest = time.perf_counter()
    time.sleep(0.01)
    before, behind = end_of(queue)
    (ms,) = exposed(queue.queue)
    assert (before - latest) * 1e3 <= ms <= (behind - earliest) * 1e3


def test_where_the_token_is_waited_for_the_copy_costs_nothing(queue):
    queue.queue.start([handoff(num_in_flight=1)], ())
    time.sleep(0.01)
    end_of(queue)
    assert exposed(queue.queue) == [0.0]


def test_nobody_waits_for_a_stale_one_but_its_bytes_were_sent(queue):
    stale, other = handoff(), handoff(num_in_flight=1)
    queue.scheduler.stale = [stale]
    queue.queue.start([stale, other], ())
    end_of(queue)
    assert queue.scheduler.done == [stale, other] and len(exposed(queue.queue)) == 1
    stats = queue.queue.stats
    assert (stats.num_handoffs, stats.num_bytes, stats.copy_ms) == (2, 100, 2.0)


@pytest.mark.parametrize("way", ["poll", "wait"])
def test_a_copy_that_fails_is_reported_once_and_others_go_on(queue, way):
    first, second, third = handoff(), handoff(), handoff()
    for sent in (first, second, third):
        queue.queue.start([sent], ())
    for copy in queue.copies:
        copy.done = True
    queue.copies[1].error = RuntimeError("an illegal address")
    with pytest.raises(RuntimeError, match="an illegal address"):
        getattr(queue.queue, way)()
    assert queue.scheduler.done == [first] and queue.scheduler.failed == [second]
    assert len(queue.queue) == 1
    getattr(queue.queue, way)()
    assert queue.scheduler.done == [first, third] and len(queue.queue) == 0


@pytest.mark.parametrize("way", ["poll", "wait"])
def test_who_is_interrupted_leaves_the_copy_in_the_queue(queue, way):
    """It may still run: its blocks must not be given to others."""
    queue.queue.start([handoff()], ())
    queue.copies[0].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        getattr(queue.queue, way)()
    assert len(queue.queue) == 1 and not queue.scheduler.failed
