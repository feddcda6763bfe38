"""What the engine has done so far: counters, device time, percentiles; as a dict and as text."""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from engine.request import Request

WINDOW = 10_000  # finished requests that percentiles look back on
TOKEN_WINDOW = 100_000  # tokens that they look back on
PERCENTILES = (50, 90, 99)
LATENCIES = ("queue_ms", "ttft_ms", "tpot_ms", "latency_ms")

Phase = Literal["prefill", "decode"]


@dataclass
class EngineStats:
    """Counters since the engine began; `as_dict` is what users see."""

    num_prefill_launches: int = 0
    num_prefill_tokens: int = 0
    prefill_busy_ms: float = 0.0  # of the device, for launches whose tokens were taken
    num_decode_launches: int = 0
    num_decode_tokens: int = 0
    decode_busy_ms: float = 0.0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_graphs: int = 0  # CUDA graphs, of prefill and decode
    capture_ms: float = 0.0  # of the start-up's time, what capturing them took
    graph_bytes: int = 0  # of the devices' memory, what they took
    finished: dict[str, int] = field(default_factory=dict)  # finish_reason -> requests
    _active_ms: float = 0.0  # up to the last time that no request was left
    _active_since: float | None = None
    _latencies: deque[dict[str, float | int | None]] = field(
        default_factory=lambda: deque(maxlen=WINDOW)
    )
    _itl_ms: deque[float] = field(default_factory=lambda: deque(maxlen=TOKEN_WINDOW))

    def prefill_launched(self, num_tokens: int) -> None:
        """Count one prefill launch of so many tokens."""
        self.num_prefill_launches += 1
        self.num_prefill_tokens += num_tokens

    def decode_launched(self, num_tokens: int) -> None:
        """Count one decode step of so many requests."""
        self.num_decode_launches += 1
        self.num_decode_tokens += num_tokens

    def device_was_busy(self, phase: Phase, ms: float) -> None:
        """Count what the device took for one launch."""
        name = f"{phase}_busy_ms"
        setattr(self, name, getattr(self, name) + ms)

    def is_active(self, now: float) -> None:
        """Note that there are requests, since now at the latest."""
        if self._active_since is None:
            self._active_since = now

    def is_idle(self) -> None:
        """Note that no request is left."""
        self._active_ms, self._active_since = self.active_ms, None

    @property
    def active_ms(self) -> float:
        """For how long there were requests."""
        since = self._active_since
        return self._active_ms + (0.0 if since is None else (time.perf_counter() - since) * 1e3)

    def graphs_captured(self, num_graphs: int, capture_ms: float, graph_bytes: int) -> None:
        """Count CUDA graphs captured in so many milliseconds, that took so much memory."""
        self.num_graphs += num_graphs
        self.capture_ms += capture_ms
        self.graph_bytes += graph_bytes

    def token_taken(self, request: Request, now: float) -> None:
        """Count a new token of a request, known to the host at that time."""
        if request.first_token_time is None:
            request.first_token_time = now
        else:
            self._itl_ms.append((now - request.last_token_time) * 1e3)
        request.last_token_time = now

    def request_finished(self, request: Request) -> None:
        """Count a request that has ended, however it did."""
        reason = str(request.finish_reason)
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.num_cached_tokens += request.num_cached_tokens
        self.num_preemptions += request.num_preemptions
        self._latencies.append(request.metrics())

    def as_dict(self) -> dict[str, object]:
        """A plain dict of counts; of active_ms and, by phase, what share of it the device was busy;
        and of {p50, p90, p99} in milliseconds for each latency, itl_ms (from token to token)
        among them. None where there is nothing to tell yet."""
        counts = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        latencies = {
            name: percentiles(m[name] for m in self._latencies if m[name] is not None)
            for name in LATENCIES
        }
        active_ms = self.active_ms
        shares = {
            f"{phase}_utilisation": counts[f"{phase}_busy_ms"] / active_ms if active_ms else None
            for phase in ("prefill", "decode")
        }
        itl = {"itl_ms": percentiles(self._itl_ms), "active_ms": active_ms}
        return counts | shares | latencies | itl | {"finished": dict(self.finished)}


@dataclass
class HandoffStats:
    """Counters of what went from the prefill to the decode device."""

    num_handoffs: int = 0  # whose copies have ended, the request's end notwithstanding
    num_bytes: int = 0
    copy_ms: float = 0.0  # that the link was busy
    _exposed_ms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def handed_over(self, num_handoffs: int, num_bytes: int, copy_ms: float) -> None:
        """Count hand-overs whose blocks went together."""
        self.num_handoffs += num_handoffs
        self.num_bytes += num_bytes
        self.copy_ms += copy_ms

    def decode_waited(self, ms: float) -> None:
        """Count how long a request could have been decoded, had its blocks been there."""
        self._exposed_ms.append(ms)

    def as_dict(self) -> dict[str, object]:
        """A plain dict: num_handoffs, num_bytes, copy_ms, gb_s of the copies, and the percentiles
        of exposed_ms, which decode waited for a copy alone."""
        gb_s = self.num_bytes / self.copy_ms / 1e6 if self.copy_ms else None
        counts = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return counts | {"gb_s": gb_s, "exposed_ms": percentiles(self._exposed_ms)}


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """{p50, p90, p99}; None where there are no values."""
    values = list(values)
    if not values:
        return None
    found = np.percentile(values, PERCENTILES)
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def as_text(stats: Mapping[str, Any]) -> str:
    """What `LLM.stats` gives, in lines to be read."""
    lines = [_phase_line(stats, phase) for phase in ("prefill", "decode")]
    ended = ", ".join(f"{num} {reason}" for reason, num in stats["finished"].items()) or "none"
    lines += [
        f"requests  {stats['num_waiting']} waiting, {stats['num_running']} running, "
        f"{stats['num_preemptions']} preempted; ended: {ended}",
        f"KV blocks {_pool(stats, 'prefill_kv_blocks')} free for prefill, "
        f"{_pool(stats, 'kv_blocks')} for decode; "
        f"{stats['num_cached_tokens']} prompt tokens cached",
    ]
    handoff = stats["handoff"]
    if handoff is not None:
        lines.append(_handoff_line(handoff))
    lines += [f"{name:9} {_spread(stats[name])}" for name in (*LATENCIES, "itl_ms")]
    return "\n".join(lines)


def _phase_line(stats: Mapping[str, Any], phase: Phase) -> str:
    share = stats[f"{phase}_utilisation"]
    return (
        f"{phase:9} {stats[f'num_{phase}_tokens']} tokens in "
        f"{stats[f'num_{phase}_launches']} launches, device busy "
        f"{stats[f'{phase}_busy_ms']:.0f} ms" + ("" if share is None else f" ({share:.0%})")
    )


def _pool(stats: Mapping[str, Any], name: str) -> str:
    return f"{stats[f'num_free_{name}']} of {stats[f'num_{name}']}"


def _handoff_line(handoff: Mapping[str, Any]) -> str:
    speed = "" if handoff["gb_s"] is None else f" at {handoff['gb_s']:.1f} GB/s"
    return (
        f"hand-over {handoff['num_handoffs']} of {handoff['num_bytes'] / 1e6:.1f} MB{speed}, "
        f"{handoff['mode']} by {handoff['way']} (link {handoff['link_gb_s']:.1f} GB/s), "
        f"{handoff['num_in_flight']} in flight, {handoff['num_prefilled']} to be sent, "
        f"{handoff['num_copying']} on their way, {handoff['num_decoding']} decoding, backlog "
        f"{handoff['backlog']} (at most {handoff['peak_backlog']}), "
        f"{handoff['credits']} credits, exposed {_spread(handoff['exposed_ms'])}"
    )


def _spread(values: Mapping[str, float] | None) -> str:
    if values is None:
        return "-"
    return ", ".join(f"{name} {value:.2f} ms" for name, value in values.items())
