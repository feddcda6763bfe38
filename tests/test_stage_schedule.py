"""Schedules of stages, and the check that finds every event that one lacks."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.happens_before import Launch, Race, find_races
from engine.stage_schedule import STAGES, Placement, StageLaunch, make_schedule

placements = st.builds(Placement, qkv=st.sampled_from(STAGES), o=st.sampled_from(STAGES))
schedules = st.builds(make_schedule, st.integers(1, 4), st.integers(1, 4), placements)


def launch(name: str, stream: str, reads: str = "", writes: str = "", **events) -> Launch:
    buffers = {"reads": frozenset(reads.split()), "writes": frozenset(writes.split())}
    return Launch(name=name, stream=stream, **buffers, **events)


def test_launches_of_one_stream_are_in_order():
    assert find_races([launch("a", "x", writes="b"), launch("c", "x", reads="b")]) == []


@pytest.mark.parametrize(
    ("first", "second"), [({"writes": "b"}, {"reads": "b"}), ({"reads": "b"}, {"writes": "b"})]
)
def test_an_event_orders_and_without_it_there_is_a_race(first, second):
    a, c = launch("a", "x", records=0, **first), launch("c", "y", waits=(0,), **second)
    assert find_races([a, c]) == []
    assert find_races([a, c.without_wait(0)]) == [Race("a", "c", "b")]


def test_two_reads_need_no_order():
    assert find_races([launch("a", "x", reads="b"), launch("c", "y", reads="b")]) == []


def test_order_passes_on_through_a_third_stream():
    a = launch("a", "x", writes="b", records=0)
    through = launch("t", "z", waits=(0,), records=1)
    assert find_races([a, through, launch("c", "y", writes="b", waits=(1,))]) == []


def test_an_event_is_what_was_recorded_last_and_covers_nothing_later():
    a = launch("a", "x", writes="b", records=0)
    later = launch("later", "x", writes="b")
    c = launch("c", "y", reads="b", waits=(0,))
    assert find_races([a, later, c]) == [Race("later", "c", "b")]
    assert find_races([a, replace(later, records=0), c]) == []


def test_a_wait_for_nothing_is_an_error():
    with pytest.raises(ValueError, match="c waits for event 3, which nobody recorded"):
        find_races([launch("c", "y", waits=(3,))])


@given(schedule=schedules, copies=st.integers(1, 3))
def test_a_schedule_has_no_race_nor_have_steps_one_after_the_other(schedule, copies):
    assert find_races(schedule * copies) == []


@given(schedule=schedules)
def test_without_any_one_of_its_waits_a_schedule_has_a_race(schedule):
    num_waits = 0
    for i, one in enumerate(schedule):
        for event in one.waits:
            num_waits += 1
            broken = [*schedule[:i], one.without_wait(event), *schedule[i + 1 :]]
            assert find_races(broken), f"{one.name} need not wait for {event}"
    assert num_waits >= 2  # a fork and a join


@given(schedule=schedules)
def test_one_stream_less_hides_nothing(schedule):
    """All on one stream is the serial step: nothing to order."""
    serial = [replace(one, stream="main", waits=(), records=None) for one in schedule]
    assert find_races(serial * 2) == []


@given(num_layers=st.integers(1, 4), num=st.integers(1, 4), placement=placements)
def test_every_micro_batch_goes_through_every_layer_in_order(num_layers, num, placement):
    schedule = make_schedule(num_layers, num, placement)
    wanted = [(op, layer) for layer in range(num_layers) for op in ("qkv", "attend", "o", "mlp")]
    for i in range(num):
        own = [one for one in schedule if one.micro_batch == i]
        assert [operation for one in own for operation in one.operations] == wanted
        for one in own:
            assert {placement.stage_of(name) for name, _ in one.operations} == {one.stream}
    assert [one.name for one in schedule if one.stream == "main"] == ["begin", "end"]
    assert len({one.name for one in schedule}) == len(schedule)


def test_streams_hold_the_micro_batches_in_turn():
    """What overlaps: while one is in the FFN, the other is in the attention of the same layer."""
    schedule = make_schedule(2, 2, Placement())

    def names(stage: str) -> list[str]:
        return [one.name for one in schedule if one.stream == stage]

    assert names("attention") == [
        "qkv0+attend0 of 0", "qkv0+attend0 of 1", "qkv1+attend1 of 0", "qkv1+attend1 of 1",
    ]  # fmt: skip
    assert names("ffn") == ["o0+mlp0 of 0", "o0+mlp0 of 1", "o1+mlp1 of 0", "o1+mlp1 of 1"]
    waits = {event for one in schedule if one.name == "o0+mlp0 of 0" for event in one.waits}
    assert waits == {one.records for one in schedule if one.name == "qkv0+attend0 of 0"}


def test_projections_of_the_ffn_stage_are_launched_with_the_mlp():
    schedule = make_schedule(2, 1, Placement(qkv="ffn", o="ffn"))
    assert [one.name for one in schedule] == [
        "begin", "qkv0 of 0", "attend0 of 0", "o0+mlp0+qkv1 of 0", "attend1 of 0", "o1+mlp1 of 0",
        "end",
    ]  # fmt: skip


def test_launches_name_their_buffers():
    first, second = [one for one in make_schedule(1, 2, Placement()) if one.operations[0][0] == "o"]
    assert isinstance(first, StageLaunch)
    assert first.reads == {"attention[0]", "hidden[0]"}
    own = {"rstd[1]", "act[1]", "hidden[1]"}
    assert second.writes == own | {"o_workspace", "mlp_workspace"}


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)])
def test_a_schedule_needs_layers_and_micro_batches(sizes):
    with pytest.raises(ValueError, match="must be 1 or more, got 0"):
        make_schedule(*sizes, Placement())


def test_a_projection_goes_to_a_stage():
    with pytest.raises(ValueError, match="o must be one of attention, ffn, got 'main'"):
        Placement(o="main")
