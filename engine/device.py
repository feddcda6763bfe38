"""One device's stream, and spans of its time: when they end, and how long they took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Span:
    """What a device's current stream is given between `Span(device)` and `stop`.

    On a CPU nothing runs on behind a call: a span is over when it is stopped.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = _now(device)
        self._end: torch.cuda.Event | float | None = None

    def stop(self) -> None:
        """End it behind all that the device's current stream was given."""
        self._end = _now(self._device)

    @property
    def is_done(self) -> bool:
        """Whether it is over; asks the device, waits for nothing."""
        return not isinstance(self._end, torch.cuda.Event) or self._end.query()

    def wait(self) -> None:
        """Return once it is over."""
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()

    @property
    def ms(self) -> float:
        """How long the device took, of a span that is over: from the end of what was before it on
        the stream, or from the start."""
        if isinstance(self._end, torch.cuda.Event):
            return self._start.elapsed_time(self._end)
        return (self._end - self._start) * 1e3


def _now(device: torch.device) -> "torch.cuda.Event | float":
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class DeviceStream:
    """A device, and the stream that all launches of one core go to there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, launches go to this device and stream, and autograd is off."""
        with torch.inference_mode():
            if self.stream is None:
                yield
                return
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                yield

    def record(self) -> torch.cuda.Event | None:
        """An event behind all launches so far; None where none is needed: on a CPU."""
        return None if self.stream is None else self.stream.record_event()
