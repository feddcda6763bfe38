"""Events around launches: which step they tell of, and that no replay is read half done."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.graphs import StepGraphs
from engine.pipeline import DecodePipeline
from engine.stage_schedule import Placement, make_schedule
from engine.stage_streams import InOrder
from engine.stage_times import TimedStreams
from tests.checkpoints import save_random
from tests.decode_steps import Steps, decoder_of, row_by_row, worker_options

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="stands in for all events; test_gpu_pipeline has real ones"
)


class Event:
    """An event on a clock that every record moves on by a millisecond."""

    now = 0.0
    is_over = True

    def __init__(self, *, enable_timing: bool, external: bool = False) -> None:
        assert enable_timing
        self.time: float | None = None

    def record(self, stream: object = None) -> None:
        Event.now += 1.0
        self.time = Event.now

    def query(self) -> bool:
        return Event.is_over

    def synchronize(self) -> None:
        """Every step is over before its tokens are asked for."""

    def elapsed_time(self, other: "Event") -> float:
        assert self.time is not None and other.time is not None, "never recorded"
        return other.time - self.time


@pytest.fixture(autouse=True)
def events(monkeypatch) -> type[Event]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "now", 0.0)
    monkeypatch.setattr(Event, "is_over", True)
    return Event


def test_every_launch_lies_between_two_events(events):
    timed = TimedStreams(InOrder())
    schedule, ran = make_schedule(2, 2, Placement()), []
    for launch in schedule:
        timed.run(launch, lambda launch=launch: ran.append(launch))
    assert ran == list(schedule)
    times = timed.read()
    assert times.step_ms == 2 * len(schedule) - 1 and times.busy_ms == {"attention": 4, "ffn": 4}
    events.is_over = False
    assert timed.read() is None


def timed_pipeline(folder: Path, *streams: InOrder) -> DecodePipeline:
    decoder = decoder_of(save_random(folder, num_hidden_layers=1), row_by_row())
    options = worker_options(decoder, 0, 8)
    pipeline = DecodePipeline(**options, streams=streams, min_requests=1)
    pipeline._is_timed = True
    return pipeline


def num_timed(pipeline: DecodePipeline) -> int:
    """Steps whose times are known, without a look at what has come since."""
    return pipeline.statistics.as_dict()["num_timed_steps"]


def test_a_step_is_read_before_its_events_are_recorded_anew(events, tmp_path):
    pipeline = timed_pipeline(tmp_path, InOrder())
    steps = Steps(pipeline, [3, 5, 9], 0)
    with torch.inference_mode():
        for _ in range(2):
            steps.step()
        assert num_timed(pipeline) == 0  # two turns are under way
        steps.step()
        assert num_timed(pipeline) == 1
        events.is_over = False
        assert pipeline.get_pipeline_statistics()["num_timed_steps"] == 1
        events.is_over = True
        stats = pipeline.get_pipeline_statistics()
    assert stats["num_timed_steps"] == 3
    assert stats["step_ms"] == 2 * len(pipeline.schedule) - 1
    assert stats["busy_ms"] == {"attention": 2.0, "ffn": 2.0}


def test_a_step_under_way_is_not_read_by_the_events_of_its_replay_before(tmp_path):
    """Which a graph has recorded, and not yet anew."""
    pipeline = timed_pipeline(tmp_path, InOrder())
    steps = Steps(pipeline, [3, 5, 9], 0)
    with torch.inference_mode():
        steps.step()
        (key,) = pipeline._unread
        pipeline._unread[key] = SimpleNamespace(query=lambda: False)
        assert pipeline.get_pipeline_statistics()["num_timed_steps"] == 0
        pipeline._unread[key] = SimpleNamespace(query=lambda: True)
        assert pipeline.get_pipeline_statistics()["num_timed_steps"] == 1


def test_events_are_gone_before_their_streams(tmp_path):
    class Closing(InOrder):
        """Looks for them."""

        num_events = -1

        def close(self) -> None:
            self.num_events = len(pipeline._timed) + len(pipeline._unread)

    streams = Closing()
    pipeline = timed_pipeline(tmp_path, streams)
    with torch.inference_mode():
        Steps(pipeline, [3, 5, 9], 0).step()
    assert pipeline._timed and pipeline._unread
    pipeline.close()
    assert streams.num_events == 0


class OnADevice:
    """The pipeline's work, as if the device took its time for it."""

    def __init__(self, graphs: StepGraphs, step_ms: float) -> None:
        self.captured: dict = {}
        self.is_capturing = True
        self._graphs, self._step_ms = graphs, step_ms

    def run(self, key, step) -> None:
        self._graphs.run(key, step)
        Event.now += self._step_ms
        self.captured[key] = None


def test_a_serial_step_lies_between_two_events_of_the_device(events, tmp_path):
    pipeline = timed_pipeline(tmp_path)
    pipeline.graphs = OnADevice(pipeline.graphs, 7.0)
    steps = Steps(pipeline, [3, 5, 9], 0)
    pipeline.device = torch.device("cuda")  # or spans are of the host's clock
    with torch.inference_mode():
        for _ in range(4):
            steps.step()
        assert num_timed(pipeline) == 2  # the first was captured, the last is under way
        events.is_over = False
        assert pipeline.get_pipeline_statistics()["num_timed_steps"] == 2
        events.is_over = True
        stats = pipeline.get_pipeline_statistics()
    assert stats["partitioning"] == "none" and stats["timed_mode"] == "serial"
    assert (stats["num_timed_steps"], stats["step_ms"]) == (3, 8.0)
    assert stats["busy_ms"] is stats["overlap"] is stats["occupancy"] is None


def test_on_a_cpu_nothing_is_timed(tmp_path):
    decoder = decoder_of(save_random(tmp_path, num_hidden_layers=1), row_by_row())
    options = worker_options(decoder, 0, 8)
    pipeline = DecodePipeline(**options, streams=[], min_requests=1, is_timed=True)
    with torch.inference_mode():
        Steps(pipeline, [3, 5, 9], 0).step()
    assert pipeline.get_pipeline_statistics()["step_ms"] is None
