"""Where stages run: on streams of their own, with or without SMs of their own, or all on one."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch

from engine.stage_schedule import STAGES, Stage, StageLaunch
from green.driver import GreenContextError
from green.streams import GreenStreams

Work = Callable[[], None]
MAX_TRIES = 4  # to have a partition's streams in hardware queues of their own


class StageStreams(Protocol):
    """What launches of a schedule are given to."""

    name: str  # unique among those that one worker has: "48:84", "plain", "in order"
    granted: tuple[int, ...] | None  # SMs of each stage; None where they share all of them

    def run(self, launch: StageLaunch, work: Work) -> None:
        """Have `work` launched where it belongs, behind the events that it waits for."""

    def num_sms(self, stage: Stage) -> int | None:
        """SMs that a kernel of this stage may count on; None: all of the device."""

    def close(self) -> None:
        """Give back what was taken for them; graphs over them must not run again."""


class InOrder:
    """All stages on the current stream: the serial step over the same micro-batches. And what
    stands in for streams on a CPU."""

    name = "in order"
    granted = None
    _grid: tuple[int | None, ...] = (None, None)  # SMs of each stage

    @classmethod
    def with_grid(cls, grid: Sequence[int | None]) -> "InOrder":
        """For kernels as a partition of so many SMs has them: a tile is chosen by the SMs too, and
        the same tiles give the same bits."""
        streams = cls()
        streams._grid = tuple(grid)
        return streams

    def run(self, launch: StageLaunch, work: Work) -> None:
        """See the protocol; the launches come in an order that needs no events."""
        work()

    def num_sms(self, stage: Stage) -> int | None:
        """All of the device, where no grid was asked for: nothing else runs."""
        return dict(zip(STAGES, self._grid, strict=True)).get(stage)

    def close(self) -> None:
        """Nothing was taken."""


class GpuStreams:
    """Two streams of one GPU, the first for attention. Main is the caller's current stream."""

    def __init__(
        self,
        streams: Sequence[torch.cuda.Stream],
        *,
        name: str,
        granted: tuple[int, ...] | None = None,
        grid: tuple[int | None, ...] = (None, None),
        owner: GreenStreams | None = None,
    ) -> None:
        """granted: the SMs of each stream's partition; grid: the SMs that each stage's kernels size
        their grids for; owner: what made the streams, closed together with them."""
        self.name = name
        self.granted = granted
        self._streams = dict(zip(STAGES, streams, strict=True))
        self._grid = dict(zip(STAGES, grid, strict=True))
        self._events: dict[int, torch.cuda.Event] = {}
        self._owner = owner

    @classmethod
    def plain(
        cls, device: torch.device, grid: tuple[int | None, ...] = (None, None)
    ) -> "GpuStreams":
        """Two ordinary streams: stages overlap, on SMs that the hardware deals out."""
        streams = [torch.cuda.Stream(device) for _ in STAGES]
        limits = "" if grid == (None, None) else " " + ":".join(map(str, grid))
        return cls(streams, name=f"plain{limits}", grid=grid)

    @classmethod
    def partitioned(cls, asked: Sequence[int], device: torch.device) -> "GpuStreams":
        """Streams of a partition: SMs for attention, then for FFN.

        ValueError for numbers that no split of the device has, GreenContextError where it cannot be
        had, or has not two streams that run at the same time.
        """
        if len(asked) != len(STAGES):
            raise ValueError(f"asked must be SMs for {' and '.join(STAGES)}, got {tuple(asked)}")
        owner = _concurrent_streams(asked, device)
        name, granted = ":".join(map(str, owner.granted)), owner.granted
        return cls(owner.streams, name=name, granted=granted, grid=granted, owner=owner)

    def run(self, launch: StageLaunch, work: Work) -> None:
        """See the protocol; may be called while the current stream is captured."""
        stream = self._streams.get(launch.stream) or torch.cuda.current_stream()
        for event in launch.waits:
            stream.wait_event(self._events[event])
        with torch.cuda.stream(stream):
            work()
        if launch.records is not None:
            self._events[launch.records] = stream.record_event()

    def num_sms(self, stage: Stage) -> int | None:
        """See the protocol."""
        return self._grid.get(stage)

    def close(self) -> None:
        """Wait for the device and give the partition back; graphs over it must not run again."""
        self._events.clear()
        self._streams.clear()
        if self._owner is not None:
            self._owner.close()

    def __enter__(self) -> "GpuStreams":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _concurrent_streams(asked: Sequence[int], device: torch.device) -> GreenStreams:
    """A partition whose streams run at the same time; see `GpuStreams.partitioned`."""
    from green.probe import are_concurrent

    with ExitStack() as turned_down:  # until the end: streams made anew then get other queues
        for _ in range(MAX_TRIES):
            owner = GreenStreams.of(asked, device)
            kept = turned_down.enter_context(ExitStack())
            kept.callback(owner.close)
            if are_concurrent(owner.streams):
                kept.pop_all()
                return owner
    raise GreenContextError(
        "cuGreenCtxStreamCreate",
        0,
        "streams in one hardware queue",
        "set CUDA_DEVICE_MAX_CONNECTIONS=32 before CUDA starts",
    )


def in_a_line(error: Exception) -> str:
    """What failed, in short: compilers and torch say more than a line."""
    if isinstance(error, GreenContextError):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
