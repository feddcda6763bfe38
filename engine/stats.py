"""What the engine has done so far: counters, and percentiles over the finished requests."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engine.request import Request

WINDOW = 10_000  # finished requests that percentiles look back on
PERCENTILES = (50, 90, 99)
LATENCIES = ("queue_ms", "ttft_ms", "tpot_ms", "latency_ms")


@dataclass
class EngineStats:
    """Counters since the engine began; `as_dict` is what users see."""

    num_prefill_launches: int = 0
    num_prefill_tokens: int = 0
    num_decode_launches: int = 0
    num_decode_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_graphs: int = 0  # CUDA graphs, of prefill and decode
    capture_ms: float = 0.0  # of the start-up's time, what capturing them took
    finished: dict[str, int] = field(default_factory=dict)  # finish_reason -> requests
    _latencies: deque[dict[str, float | int | None]] = field(
        default_factory=lambda: deque(maxlen=WINDOW)
    )

    def prefill_launched(self, num_tokens: int) -> None:
        """Count one prefill launch of so many tokens."""
        self.num_prefill_launches += 1
        self.num_prefill_tokens += num_tokens

    def decode_launched(self, num_tokens: int) -> None:
        """Count one decode step of so many requests."""
        self.num_decode_launches += 1
        self.num_decode_tokens += num_tokens

    def graphs_captured(self, num_graphs: int, capture_ms: float) -> None:
        """Count CUDA graphs captured in so many milliseconds."""
        self.num_graphs += num_graphs
        self.capture_ms += capture_ms

    def request_finished(self, request: Request) -> None:
        """Count a request that has ended, however it did."""
        reason = str(request.finish_reason)
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.num_cached_tokens += request.num_cached_tokens
        self.num_preemptions += request.num_preemptions
        self._latencies.append(request.metrics())

    def as_dict(self) -> dict[str, object]:
        """A plain dict of counts, and of {p50, p90, p99} per latency in milliseconds."""
        counts = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        latencies = {
            name: _percentiles(m[name] for m in self._latencies if m[name] is not None)
            for name in LATENCIES
        }
        return counts | latencies | {"finished": dict(self.finished)}


def _percentiles(values: Iterable[float]) -> dict[str, float] | None:
    values = list(values)
    if not values:
        return None
    found = np.percentile(values, PERCENTILES)
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}
