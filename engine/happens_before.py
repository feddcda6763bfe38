"""Whether launches on several streams are ordered wherever they must be: a check over vector clocks
(Mattern, 1989), on paper. Knows nothing of devices, nor of what is launched.

Launches on one stream run in order; an event recorded behind one makes those ordered that wait for
it. Two launches that touch the same buffer, one of them to write, must be ordered one way or
another.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What one stream is given at a time."""

    name: str
    stream: str
    waits: tuple[int, ...] = ()  # events that must have passed before it
    records: int | None = None  # the event behind it
    reads: frozenset[str] = frozenset()  # names of buffers
    writes: frozenset[str] = frozenset()

    def without_wait(self, event: int) -> "Launch":
        """The same, but for one event that it no longer waits for."""
        return replace(self, waits=tuple(wait for wait in self.waits if wait != event))


@dataclass(frozen=True, order=True)
class Race:
    """Two launches that nothing orders though they share a buffer, the first in launch order."""

    first: str
    second: str
    buffer: str


Clock = dict[str, int]  # stream -> how many of its launches are over


def find_races(launches: Sequence[Launch]) -> list[Race]:
    """Every pair that races, in launch order. ValueError where an event is waited for that none of
    the launches before has recorded: on a device, such a wait does not wait."""
    clocks: defaultdict[str, Clock] = defaultdict(dict)  # what each stream knows to be over
    events: dict[int, Clock] = {}
    # of each buffer by stream: its launches that touched it, with how many the stream then had
    written: defaultdict[str, list[tuple[Launch, int]]] = defaultdict(list)
    touched: defaultdict[str, list[tuple[Launch, int]]] = defaultdict(list)
    races: list[Race] = []
    for launch in launches:
        clock = clocks[launch.stream]
        for event in launch.waits:
            if event not in events:
                raise ValueError(f"{launch.name} waits for event {event}, which nobody recorded")
            for stream, count in events[event].items():
                clock[stream] = max(clock.get(stream, 0), count)
        for buffer in sorted(launch.reads | launch.writes):
            earlier = touched[buffer] if buffer in launch.writes else written[buffer]
            for other, count in earlier:
                if clock.get(other.stream, 0) < count:
                    races.append(Race(other.name, launch.name, buffer))
        clock[launch.stream] = count = clock.get(launch.stream, 0) + 1
        for buffer in launch.reads | launch.writes:
            touched[buffer].append((launch, count))
        for buffer in launch.writes:
            written[buffer].append((launch, count))
        if launch.records is not None:
            events[launch.records] = dict(clock)
    return races
