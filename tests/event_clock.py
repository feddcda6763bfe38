"""Events of a clock that stands still but for the launches of a test."""

import itertools
from collections.abc import Callable

import pytest
import torch


def clocked(monkeypatch: pytest.MonkeyPatch, run_ms: Callable[[int], float]) -> Callable[..., None]:
    """A launch that takes as long as run_ms says of its number, by torch's events."""
    now, numbers, waited_for = [0.0], itertools.count(), [0.0]

    class Stream:
        def synchronize(self) -> None:
            waited_for[0] = now[0]

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            self.ms = -1.0

        def record(self, stream: object = None) -> None:
            self.ms = now[0]

        def synchronize(self) -> None:
            assert self.ms == now[0], "it waits for the last"
            waited_for[0] = self.ms

        def elapsed_time(self, other: "Event") -> float:
            assert other.ms <= waited_for[0], "not over yet"
            return other.ms - self.ms

    def run(*_: object) -> None:
        now[0] += run_ms(next(numbers))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return run
