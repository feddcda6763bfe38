"""Inputs that stay in place, and which call of a step is run, captured or replayed."""

import gc
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.graphs import ALIGNMENT, StaticInputs, StepGraphs, _no_garbage_collection
from tests.strategies import DEVICE

FIELDS = {
    "rows": (np.int64, (5,)),
    "temperature": (np.float32, (5,)),
    "lens": (np.int32, (3,)),
    "table": (np.int32, (3, 4)),
}
EMPTY = {
    "rows": [0] * 5,
    "temperature": [0.0] * 5,
    "lens": [0] * 3,
    "table": [[0] * 4] * 3,
}


def inputs() -> StaticInputs:
    return StaticInputs(FIELDS, torch.device(DEVICE))


def values(made: StaticInputs) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in made.tensors.items()}


def test_an_upload_fills_every_field_and_leaves_nothing_of_the_last():
    made = inputs()
    made.upload(
        {"rows": [2**40, -7], "temperature": [0.5], "lens": (4, 5, 6), "table": [[1, 2], [3, 4]]},
        {"rows": -1, "lens": 9},
    )
    assert values(made) == {
        "rows": [2**40, -7, -1, -1, -1],
        "temperature": [0.5, 0, 0, 0, 0],
        "lens": [4, 5, 6],
        "table": [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 0, 0]],
    }
    made.upload({"table": np.ones((1, 4))}, {"lens": 2})
    assert values(made) == EMPTY | {"lens": [2] * 3, "table": [[1] * 4, [0] * 4, [0] * 4]}
    made.upload({}, {})
    assert values(made) == EMPTY


def num_sent(made: StaticInputs) -> int:
    """Host buffers that it has."""
    (sent,) = made._buffers._sent.values()
    return len(sent)


def test_uploads_that_are_still_to_come_keep_what_they_were_given():
    made, found = inputs(), []
    if DEVICE == "cuda":
        torch.cuda._sleep(10**8)  # the device is some 50 ms late, and the host does not wait
    for i in range(4):
        made.upload({"lens": [i]}, {"lens": -i})
        found.append(made.tensors["lens"].clone())
    num_buffers = num_sent(made)
    assert [lens.tolist() for lens in found] == [[i, -i, -i] for i in range(4)]
    assert 1 <= num_buffers <= (4 if DEVICE == "cuda" else 1)
    for i in range(9):  # one buffer does where each upload is waited for
        made.upload({"lens": [i]}, {})
        assert made.tensors["lens"].tolist() == [i, 0, 0]
    assert num_sent(made) == num_buffers


def test_more_values_than_a_field_holds_are_an_error():
    with pytest.raises(ValueError, match="broadcast"):
        inputs().upload({"lens": [1, 2, 3, 4]}, {})
    with pytest.raises(ValueError, match="broadcast"):
        inputs().upload({"table": [[1] * 5]}, {})


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_fields_stay_in_place_aligned_and_apart(lengths):
    dtypes = [np.int32, np.int64, np.float32]
    fields = {str(i): (dtypes[i % 3], (n,)) for i, n in enumerate(lengths)}
    made = StaticInputs(fields, torch.device(DEVICE))
    before = {name: tensor.data_ptr() for name, tensor in made.tensors.items()}
    columns = {str(i): [i + 1] * n for i, n in enumerate(lengths)}
    made.upload(columns, {})
    assert before == {name: tensor.data_ptr() for name, tensor in made.tensors.items()}
    assert all(address % ALIGNMENT == 0 for address in before.values())
    assert values(made) == columns


def test_steps_run_as_they_are_without_a_pool():
    calls: list[int] = []
    graphs = StepGraphs(torch.device("cpu"), None)
    for size in (4, 4, 2, 4):
        graphs.run(size, calls.append)
    assert calls == [4, 4, 2, 4]
    assert graphs.captured == {} and graphs.capture_ms == graphs.captured_bytes == 0


class FakeGraph:
    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


def test_a_size_is_run_captured_and_from_then_on_replayed(monkeypatch):
    calls: list[str] = []

    def capture(self, size, step):
        calls.append(f"capture {size}")
        return FakeGraph()

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    graphs = StepGraphs(torch.device("cpu"), (0, 1))
    for size in (4, 4, 2, 4):
        graphs.run(size, lambda size: calls.append(f"run {size}"))
    assert calls == ["run 4", "capture 4", "run 2", "capture 2"]
    assert {size: graph.num_replays for size, graph in graphs.captured.items()} == {4: 2, 2: 0}


def test_memory_of_graphs_is_what_captures_left_less_free(monkeypatch):
    """Not what the cache gives back when a capture begins, nor that of graphs that were dropped."""
    free = {"bytes": 1000, "cached": 300}

    def empty_cache() -> None:
        free["bytes"] += free["cached"]
        free["cached"] = 0

    @contextmanager
    def capture(graph, **options):
        empty_cache()
        yield
        free["cached"] += 40

    def step(size: int) -> None:
        free["bytes"] -= size

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 2000))
    graphs = StepGraphs(torch.device("cpu"), (0, 1))
    for size in (100, 20, 100, -5):  # of the last, others gave back more than it took
        graphs.run(size, step)
    assert graphs.captured_bytes == 120
    del graphs.captured[100]
    assert graphs.captured_bytes == 20


def test_a_step_that_fails_is_not_captured(monkeypatch):
    monkeypatch.setattr(StepGraphs, "_capture", lambda self, size, step: FakeGraph())
    graphs = StepGraphs(torch.device("cpu"), (0, 1))
    with pytest.raises(ZeroDivisionError):
        graphs.run(4, lambda size: size // 0)
    assert graphs.captured == {}


def test_nothing_is_collected_until_the_last_of_two_captures_is_over():
    """Engines may be built in two threads; the flag is one for both."""
    first_is_in, first_may_end, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        with _no_garbage_collection():
            first_is_in.set()
            first_may_end.wait(10)

    def second() -> None:
        first_is_in.wait(10)
        threading.Timer(0.05, first_may_end.set).start()  # while this one waits or captures
        with _no_garbage_collection():
            ended.wait(10)
            seen.append(gc.isenabled())

    ended = threading.Event()
    threads = [threading.Thread(target=run) for run in (first, second)]
    assert gc.isenabled()
    for thread in threads:
        thread.start()
    threads[0].join(20)
    ended.set()
    threads[1].join(20)
    assert seen == [False] and gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with pytest.raises(RuntimeError), _no_garbage_collection():
            raise RuntimeError("a capture that breaks off")
        assert not gc.isenabled()
    finally:
        gc.enable()
