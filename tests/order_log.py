"""What a PDCore on the CPU gives its four streams, as on paper: see `engine.happens_before`.

On the CPU all is over when it is launched, and nothing has to wait. Here each launch and copy is
logged with the blocks and layers that it reads and writes, with the events that it waits for, and
with what the host had seen as over: it would not have come to launch it before.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
from torch import Tensor

from engine.base_scheduler import PrefillChunk
from engine.batch import BlockTableOf, Launched
from engine.handoff import KVLink
from engine.happens_before import Launch
from engine.pd_core import PDCore
from engine.request import Request
from tests.late_link import LateCopy, LateLink

STREAMS = ("prefill", "decode", "slab", "push")


@dataclass(frozen=True)
class Event:
    """In place of a `torch.cuda.Event`."""

    stream: str  # one of STREAMS
    number: int  # counted over all streams


class OrderLog:
    """The launches and copies of an engine that has done nothing yet, in the order of launch."""

    def __init__(self, core: PDCore, patch: pytest.MonkeyPatch, rng: random.Random) -> None:
        """patch: undoes what is put into the engine; rng: says at each look at a launch or a copy
        whether it is over."""
        self.launches: list[Launch] = []
        self._seen: dict[
            str, Event
        ] = {}  # stream -> the newest event that the host knows to be over
        self._behind: dict[Launched, Event] = {}
        self._layers = range(core.model_config.num_layers)
        self._block_size = core.leases.prefill.block_size
        self._rng = rng
        self.draw_speeds()
        patch.setattr(core._prefill_side, "record", lambda: self.add("prefill", "event"))
        patch.setattr(core._decode_side, "record", lambda: self.add("decode", "event"))
        patch.setattr(core.prefill, "launch", self._prefill(core.prefill.launch))
        patch.setattr(core.decode, "launch", self._decode(core.decode.launch))
        self._watch_results(patch)
        queue = core.handoffs
        patch.setattr(queue, "_slabs", LoggedLink(queue._slabs, "slab", self))
        patch.setattr(queue, "_pushes", LoggedLink(queue._pushes, "push", self))

    def draw_speeds(self) -> None:
        """Which streams are late from now on: what a rule keeps apart seldom meets where all are
        alike."""
        self._luck = {stream: self._rng.choice([0.05, 0.3, 0.8]) for stream in STREAMS}

    def add(
        self,
        stream: str,
        what: str,
        *,
        after: Sequence[Event] = (),
        reads: Iterable[str] = (),
        writes: Iterable[str] = (),
    ) -> Event:
        """Log a launch behind those events and behind what the host has seen. Returns the event
        behind it."""
        event = Event(stream, len(self.launches))
        launch = Launch(
            name=f"{stream} {event.number}: {what}",
            stream=stream,
            waits=tuple(other.number for other in (*after, *self._seen.values())),
            records=event.number,
            reads=frozenset(reads),
            writes=frozenset(writes),
        )
        self.launches.append(launch)
        return event

    def copy(
        self, copy: "LoggedCopy", stream: str, layers: range | None, after: Sequence[Event]
    ) -> Event:
        """Log a copy of these layers; None: of all."""
        layers = layers or self._layers
        reads = buffers("prefill", copy.source, layers)
        writes = buffers("decode", copy.target, layers)
        return self.add(stream, f"layers {[*layers]}", after=after, reads=reads, writes=writes)

    def num_launches(self, stream: str) -> int:
        """Launches on it that touch a block."""
        return sum(x.stream == stream and bool(x.reads | x.writes) for x in self.launches)

    def see(self, event: Event) -> None:
        """The host has come to know that it is over, and all before it on its stream."""
        if not self._has_seen(event):
            self._seen[event.stream] = event

    def is_over(self, stream: str) -> bool:
        """Whether what the host looks at now on that stream is over: as it falls."""
        return self._rng.random() < self._luck[stream]

    def _has_seen(self, event: Event) -> bool:
        seen = self._seen.get(event.stream)
        return seen is not None and seen.number >= event.number

    def _watch_results(self, patch: pytest.MonkeyPatch) -> None:
        wait = Launched.wait

        def is_done(launched: Launched) -> bool:
            event = self._behind[launched]
            if self.is_over(event.stream):
                self.see(event)
            return self._has_seen(event)

        def seen_wait(launched: Launched) -> list[int]:
            self.see(self._behind[launched])
            return wait(launched)

        patch.setattr(Launched, "is_done", property(is_done))
        patch.setattr(Launched, "wait", seen_wait)

    def _prefill(self, launch: Callable) -> Callable:
        def logged(
            chunks: Sequence[PrefillChunk],
            table_of: BlockTableOf,
            on_layers: Callable[[range], None] | None = None,
        ) -> tuple[Launched, Tensor]:
            def behind_layers(layers: range) -> None:
                self._add_prefill(chunks, table_of, layers)
                if on_layers is not None:
                    on_layers(layers)

            launched, token_ids = launch(chunks, table_of, behind_layers)
            self._behind[launched] = self.add("prefill", "tokens")
            return launched, token_ids

        return logged

    def _add_prefill(
        self, chunks: Sequence[PrefillChunk], table_of: BlockTableOf, layers: range
    ) -> None:
        reads, writes = set(), set()
        for chunk in chunks:
            num_blocks = -(-(chunk.start + chunk.num_tokens) // self._block_size)
            blocks = table_of(chunk.request.request_id)[:num_blocks]
            reads |= buffers("prefill", blocks, layers)
            writes |= buffers("prefill", blocks[chunk.start // self._block_size :], layers)
        requests = [chunk.request.request_id for chunk in chunks]
        self.add("prefill", f"{requests}, layers {[*layers]}", reads=reads, writes=writes)

    def _decode(self, launch: Callable) -> Callable:
        def logged(requests: Sequence[Request], table_of: BlockTableOf) -> Launched:
            reads, writes = set(), set()
            for request in requests:
                # the newest token is counted as computed by now
                num_blocks = -(-request.num_computed_tokens // self._block_size)
                blocks = table_of(request.request_id)[:num_blocks]
                reads |= buffers("decode", blocks, self._layers)
                writes |= buffers("decode", blocks[-1:], self._layers)
            what = f"{[request.request_id for request in requests]}"
            event = self.add("decode", what, reads=reads, writes=writes)
            launched = launch(requests, table_of)
            self._behind[launched] = event
            return launched

        return logged


def buffers(pool: str, blocks: Sequence[int], layers: range) -> set[str]:
    """A name for each layer of each block."""
    return {f"{pool} block {block}, layer {layer}" for block in blocks for layer in layers}


class LoggedLink(LateLink):
    """A link in a running engine, whose copies are logged."""

    def __init__(self, link: KVLink, stream: str, log: OrderLog) -> None:
        super().__init__(link, lambda: log.is_over(stream))
        self.stream, self.log = stream, log

    def open(self, source: Sequence[int], target: Sequence[int]) -> "LoggedCopy":
        return LoggedCopy(self, source, target)


class LoggedCopy(LateCopy):
    """What `LoggedLink.open` gives."""

    def send(self, layers: range | None = None, after: Sequence[Event] = ()) -> None:
        if self.source:
            self.event = self.link.log.copy(self, self.link.stream, layers, after)
        super().send(layers, after)

    def wait(self) -> None:
        if self.layers:
            self.link.log.see(self.event)
        super().wait()
