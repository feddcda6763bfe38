"""How long stages took on the device: events around their launches, in CUDA graphs too."""

import torch

from engine.pipeline_stats import StepTimes
from engine.stage_schedule import Stage, StageLaunch
from engine.stage_streams import StageStreams, Work


class TimedStreams:
    """StageStreams of a GPU for one step, with an event before and behind each launch.

    Where the step is captured, the graph records them anew in each replay: keep this as long.
    """

    def __init__(self, streams: StageStreams) -> None:
        self.name, self.granted = streams.name, streams.granted
        self._streams = streams
        self._spans: list[tuple[Stage, torch.cuda.Event, torch.cuda.Event]] = []

    def run(self, launch: StageLaunch, work: Work) -> None:
        """See the protocol."""
        # external: a capture makes them nodes that record, not mere dependencies
        start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))

        def timed() -> None:
            start.record()
            work()
            end.record()

        self._streams.run(launch, timed)
        self._spans.append((launch.stream, start, end))

    def num_sms(self, stage: Stage) -> int | None:
        """See the protocol."""
        return self._streams.num_sms(stage)

    def close(self) -> None:
        """See the protocol."""
        self._streams.close()

    def read(self) -> StepTimes | None:
        """Times of the step, or of its newest replay; None while that is not over."""
        if not all(end.query() for _, _, end in self._spans):
            return None
        first = self._spans[0][1]
        return StepTimes.of(
            [
                (stream, first.elapsed_time(start), first.elapsed_time(end))
                for stream, start, end in self._spans
            ]
        )
