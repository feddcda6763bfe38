"""Times of stages from spans on a device's clock, and what users are shown of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pipeline_stats import PipelineStats, StepTimes
from engine.stage_schedule import STAGES

SPANS = [
    ("main", 0.0, 1.0),
    ("attention", 1.0, 3.0),
    ("ffn", 3.0, 7.0),
    ("attention", 3.5, 5.5),
    ("ffn", 7.0, 9.0),
    ("main", 9.5, 11.0),
]


def test_times_of_a_step():
    times = StepTimes.of(SPANS)
    assert times == StepTimes(11.0, 8.0, {"attention": 4.0, "ffn": 6.0})


def test_a_step_without_stages_has_no_times():
    with pytest.raises(ValueError, match="spans must hold a stage's, got none"):
        StepTimes.of([("main", 0.0, 1.0)])


def test_occupancy_and_overlap_are_of_the_step_and_bubbles_of_its_layers():
    stats = PipelineStats(asked_sms=(40, 92), granted_sms=(40, 92), partitioning="40:92")
    for _ in range(2):
        stats.step_timed("40:92", StepTimes.of(SPANS))
    found = stats.as_dict()
    assert found["num_timed_steps"] == 2
    assert found["step_ms"] == 11.0 and found["layers_ms"] == 8.0
    assert found["busy_ms"] == {"attention": 4.0, "ffn": 6.0}
    assert found["bubble_ms"] == {"attention": 4.0, "ffn": 2.0}
    assert found["occupancy"] == {"attention": 4 / 11, "ffn": 6 / 11}
    assert found["overlap"] == 10 / 11
    assert found["granted_sms"] == {"attention": 40, "ffn": 92}
    text = stats.as_text()
    assert "SMs asked 40:92, granted 40:92" in text
    assert "ffn busy 6.000 ms (55%), idle 2.000 ms of its layers" in text
    assert "40:92: step 11.000 ms, its layers 8.000 ms, overlap 0.91 over 2 timed steps" in text


def test_times_are_told_apart_by_mode():
    stats = PipelineStats(partitioning="40:92, 56:76", max_connections="8")
    stats.granted_by_mode = {"40:92": (40, 92), "56:76": (56, 76)}
    twice = [(stream, 2 * start, 2 * end) for stream, start, end in SPANS]
    for mode, times in (
        ("serial", StepTimes(5.0)),
        ("40:92", StepTimes.of(SPANS)),
        ("56:76", StepTimes.of(twice)),
        ("56:76", StepTimes.of(twice)),
        ("serial", StepTimes(6.0)),
        ("serial", StepTimes(7.0)),
    ):
        stats.step_timed(mode, times)
    found = stats.as_dict()
    by_mode = found["times_by_mode"]
    assert {mode: times["step_ms"] for mode, times in by_mode.items()} == {
        "serial": 6.0, "40:92": 11.0, "56:76": 22.0,
    }  # fmt: skip
    assert by_mode["serial"]["overlap"] is by_mode["serial"]["busy_ms"] is None
    assert by_mode["56:76"]["busy_ms"] == {"attention": 8.0, "ffn": 12.0}
    assert found["timed_mode"] == "56:76" and found["num_timed_steps"] == 2
    assert found.items() >= by_mode["56:76"].items()
    assert found["granted_sms_by_mode"]["40:92"] == {"attention": 40, "ffn": 92}
    text = stats.as_text()
    assert "granted 40:92, 56:76, CUDA_DEVICE_MAX_CONNECTIONS 8" in text
    assert "serial: step 6.000 ms over 3 timed steps" in text


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=20))
def test_one_after_the_other_overlaps_by_one(lengths):
    """Launches without gaps on two streams in turn: all of the time is busy, none is shared."""
    now, spans = 0.0, []
    for i, length in enumerate(lengths):
        spans.append((STAGES[i % 2], now, now + length))
        now += length
    stats = PipelineStats()
    stats.step_timed("plain", StepTimes.of(spans))
    assert stats.as_dict()["overlap"] == pytest.approx(1)
    assert sum(stats.as_dict()["occupancy"].values()) == pytest.approx(1)


def test_falling_back_says_why_and_counts_all_the_same():
    stats = PipelineStats(why_none="the driver must be of CUDA 12.5 or later, got 12.2")
    stats.step_launched("serial", 8, 5)
    found = stats.as_dict()
    assert found["partitioning"] == "none" and found["num_tokens"] == 5
    assert found["step_ms"] is found["overlap"] is found["busy_ms"] is found["granted_sms"] is None
    assert "partitioning none: the driver must be" in stats.as_text()
    assert "no step was timed" in stats.as_text()
    stats.step_timed("serial", StepTimes(5.0))
    found = stats.as_dict()
    assert (found["timed_mode"], found["num_timed_steps"], found["step_ms"]) == ("serial", 1, 5.0)
    assert found["overlap"] is found["busy_ms"] is found["occupancy"] is None
