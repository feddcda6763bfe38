"""Time of one call among many, from a CUDA graph of calls over buffers that push each other out of
L2."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ROTATED_BYTES = (
    300_000_000  # five times an H100's L2: a buffer has left it when its turn comes again
)
MAX_COPIES = 64  # smaller than 5 MB a call: what is measured is the launch, wherever the data lie
MAX_CALLS = 512

Run = Callable[[int], Any]  # launches over one copy of the buffers


@dataclass(frozen=True)
class Effort:
    """How long one reading may take."""

    graph_ms: float = 4.0  # of one graph: what its launch adds lies under 1 %
    reading_ms: float = 80.0
    min_replays: int = 10
    max_replays: int = 50
    settle_ms: float = 0.0  # of calls launched from Python before the first that counts


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: 20, 50 and 80 % of the replays were as fast or faster."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, ms: list[float]) -> "Times":
        if len(ms) < 2:
            raise ValueError(f"ms must hold two times or more, got {len(ms)}")
        fifths = statistics.quantiles(ms, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(ms), fifths[3])


def copies_for(num_bytes: int) -> int:
    """Copies of a working set that together exceed L2 several times; two at least."""
    return min(max(2, -(-ROTATED_BYTES // max(num_bytes, 1))), MAX_COPIES)


def time_calls(
    run: Run,
    copies: int,
    device: torch.device,
    effort: Effort,
    *,
    captured: bool = True,
    stream: torch.cuda.Stream | None = None,
) -> Times:
    """Times of run(0), run(1), .. run(copies - 1), run(0), .. one after the other on a stream.

    captured: as one CUDA graph; else launched from Python, for what cannot be captured and takes
    longer than its launch. stream: one of a partition's, which confines the graph; None: a new one.
    On the CPU a clock around the calls.
    """
    if device.type != "cuda":
        return _time_on_host(run, copies, effort)
    stream = torch.cuda.Stream(device) if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for i in range(copies):
            run(i)
        torch.cuda.synchronize(device)
        if not captured:
            return _time_launches(run, copies, effort)
        # a first graph says how long a call takes: launches from Python would say how long they do
        calls = copies * -(-16 // copies)
        call_ms = _replay(capture(run, copies, calls, stream), 3, stream)[-1] / calls
        calls = _whole_rounds(effort.graph_ms / call_ms, copies)
        graph = capture(run, copies, calls, stream)
        wanted = int(effort.reading_ms / (call_ms * calls))
        replays = min(max(wanted, effort.min_replays), effort.max_replays)
        _replay(graph, 2, stream)
        return Times.of([ms / calls for ms in _replay(graph, replays, stream)])


def _whole_rounds(calls: float, copies: int) -> int:
    """About so many calls, every copy as often as the others."""
    rounds = min(calls, MAX_CALLS) / copies
    return copies * max(1, round(rounds))


def capture(run: Run, copies: int, calls: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """So many calls as one graph, over the copies in turn."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            run(i % copies)
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int, stream: torch.cuda.Stream) -> list[float]:
    """Milliseconds of each replay; all are queued before the first is waited for."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record(stream)
    for event in events[1:]:
        graph.replay()
        event.record(stream)
    stream.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _time_launches(run: Run, copies: int, effort: Effort) -> Times:
    stream = torch.cuda.current_stream()

    def round_ms() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for i in range(copies):
            run(i)
        end.record(stream)
        stream.synchronize()
        return start.elapsed_time(end)

    settled_ms = round_ms()
    while settled_ms < effort.settle_ms:
        settled_ms += round_ms()
    return Times.of([round_ms() / copies for _ in range(effort.min_replays)])


def _time_on_host(run: Run, copies: int, effort: Effort) -> Times:
    ms = []
    for i in range(max(2, min(effort.min_replays, 3))):
        start = time.perf_counter()
        run(i % copies)
        ms.append((time.perf_counter() - start) * 1e3)
    return Times.of(ms)
