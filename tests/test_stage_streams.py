"""Which streams launches go to and which events they wait for, over streams that only take notes;
and what happens where there is no partition."""

from contextlib import nullcontext

import pytest
import torch

from engine import stage_streams
from engine.happens_before import find_races
from engine.stage_schedule import Placement, make_schedule
from engine.stage_streams import MAX_TRIES, GpuStreams, InOrder
from green.driver import GreenContextError
from green.streams import GreenContextUnsupported


class Stream:
    """Takes down what it is told, in one list for all."""

    def __init__(self, name: str, notes: list) -> None:
        self.name, self.notes = name, notes

    def wait_event(self, event) -> None:
        self.notes.append((self.name, "wait", event))

    def record_event(self):
        event = f"event {len(self.notes)}"
        self.notes.append((self.name, "record", event))
        return event


@pytest.fixture
def notes(monkeypatch) -> list:
    found: list = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main", found))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return found


def test_launches_wait_and_record_on_their_own_streams(notes):
    schedule = make_schedule(3, 2, Placement())
    streams = GpuStreams([Stream(name, notes) for name in ("attention", "ffn")], name="some")
    for launch in schedule:
        streams.run(launch, lambda launch=launch: notes.append((launch.stream, "run", launch)))
    ran = [launch for _, what, launch in notes if what == "run"]
    assert ran == list(schedule)
    # the schedule again, as the streams were told it
    told, waits = [], []
    for stream, what, value in notes:
        if what == "wait":
            waits.append(value)
        elif what == "run":
            told.append({"launch": value, "waits": waits, "stream": stream, "records": None})
            waits = []
        else:
            told[-1]["records"] = value
            assert told[-1]["stream"] == stream
    for one, launch in zip(told, schedule, strict=True):
        assert one["stream"] == launch.stream and len(one["waits"]) == len(launch.waits)
        assert (one["records"] is None) == (launch.records is None)
    by_event = {launch.records: one["records"] for one, launch in zip(told, schedule, strict=True)}
    for one, launch in zip(told, schedule, strict=True):
        assert one["waits"] == [by_event[event] for event in launch.waits]


def test_grids_are_those_of_the_partition_and_main_has_the_whole_device():
    streams = GpuStreams([None, None], name="48:84", granted=(48, 84), grid=(48, 84))
    assert [streams.num_sms(s) for s in ("attention", "ffn", "main")] == [48, 84, None]
    assert [InOrder().num_sms(s) for s in ("attention", "ffn", "main")] == [None] * 3
    same = InOrder.with_grid((48, 84))
    assert [same.num_sms(s) for s in ("attention", "ffn", "main")] == [48, 84, None]
    assert InOrder().num_sms("ffn") is None


def test_in_order_runs_at_once():
    schedule, ran = make_schedule(1, 2, Placement()), []
    for launch in schedule:
        InOrder().run(launch, lambda launch=launch: ran.append(launch))
    assert ran == list(schedule) and find_races(ran) == []


def test_a_partition_has_two_stages():
    with pytest.raises(ValueError, match="SMs for attention and ffn, got"):
        GpuStreams.partitioned((48, 40, 40), torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_there_is_no_partition():
    with pytest.raises(GreenContextUnsupported, match="no green contexts"):
        GpuStreams.partitioned((48, 84), torch.device("cuda"))


class Owner:
    """A GreenStreams that notes whether it was closed."""

    granted, streams = (48, 84), (None, None)

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_a_probe_that_fails_leaves_no_partition(monkeypatch):
    owner = Owner()

    def are_concurrent(streams):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stage_streams.GreenStreams, "of", lambda asked, device: owner)
    monkeypatch.setattr("green.probe.are_concurrent", are_concurrent)
    with pytest.raises(torch.OutOfMemoryError):
        GpuStreams.partitioned((48, 84), torch.device("cuda"))
    assert owner.is_closed


@pytest.mark.parametrize("num_turned_down", range(MAX_TRIES + 1))
def test_streams_that_take_turns_are_given_back(monkeypatch, num_turned_down):
    owners: list[Owner] = []

    def of(asked, device) -> Owner:
        assert not any(owner.is_closed for owner in owners)  # or the same queue would come again
        owners.append(Owner())
        return owners[-1]

    monkeypatch.setattr(stage_streams.GreenStreams, "of", of)
    monkeypatch.setattr("green.probe.are_concurrent", lambda _: len(owners) > num_turned_down)
    device = torch.device("cuda")
    if num_turned_down == MAX_TRIES:
        with pytest.raises(GreenContextError, match="streams in one hardware queue"):
            GpuStreams.partitioned((48, 84), device)
    else:
        with GpuStreams.partitioned((48, 84), device) as streams:
            assert streams.granted == (48, 84) and streams.name == "48:84"
            assert [owner.is_closed for owner in owners] == [True] * num_turned_down + [False]
    assert len(owners) == min(num_turned_down + 1, MAX_TRIES)
    assert all(owner.is_closed for owner in owners)
