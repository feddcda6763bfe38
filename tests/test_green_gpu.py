"""Partitions hold on the GPU: which SMs a stage runs on, eagerly and under replay of a graph."""

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from green.driver import GreenContextError, GreenContextUnsupported, load_driver
from green.partition import Grain, Partition, legal_splits
from green.probe import are_concurrent, launch_records, record_launch, recorded_sms
from green.streams import GreenStreams
from tests.strategies import DEVICE

pytestmark = pytest.mark.gpu
KEPT_BYTES = 8 << 20  # of a closed partition; a pair of contexts that is not destroyed: twice that


@pytest.fixture(scope="module", autouse=True)
def supported() -> None:
    try:
        GreenStreams.of((8,), DEVICE).close()
    except GreenContextUnsupported as error:
        pytest.skip(error.reason)


@pytest.fixture
def split() -> Iterator[Callable[..., GreenStreams]]:
    made: list[GreenStreams] = []

    def make(*asked: int) -> GreenStreams:
        made.append(GreenStreams.of(asked, DEVICE))
        return made[-1]

    yield make
    for green in made:
        green.close()


def num_sms() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def some_splits() -> list[tuple[int, ...]]:
    """Even and uneven, with and without idle SMs."""
    if not torch.cuda.is_available():
        return []
    splits = legal_splits(num_sms(), torch.cuda.get_device_capability(DEVICE))
    full = [s for s in splits if sum(s) == num_sms()]
    idle = [s for s in splits if sum(s) < num_sms()]
    return full[:: max(len(full) // 8, 1)] + idle[:: max(len(idle) // 8, 1)]


def run_each(green: GreenStreams) -> list[Tensor]:
    """A launch on each stage's stream, behind what the current stream did, and joined to it."""
    current = torch.cuda.current_stream()
    records = [launch_records(DEVICE) for _ in green.streams]
    fork_and_join(green.streams, current, [lambda r=r: record_launch(r) for r in records])
    return records


def fork_and_join(
    streams: Sequence[torch.cuda.Stream], current: torch.cuda.Stream, runs: list[Callable]
) -> None:
    for stream, run in zip(streams, runs, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
    for stream in streams:
        current.wait_stream(stream)


def check(green: GreenStreams, records: list[Tensor]) -> list[set[int]]:
    """The SMs of each stage: as many as were granted, none of another's."""
    sets = [recorded_sms(r) for r in records]
    assert tuple(map(len, sets)) == green.granted == green.partition.granted
    assert len(set().union(*sets)) == sum(green.granted)
    return sets


@pytest.mark.parametrize("asked", some_splits(), ids=lambda asked: ":".join(map(str, asked)))
def test_stages_run_on_sms_of_their_own(split, asked):
    green = split(*asked)
    assert green.partition.granted == asked
    assert check(green, run_each(green)) == check(green, run_each(green))


def test_without_a_partition_a_launch_runs_everywhere():
    records = launch_records(DEVICE)
    record_launch(records)
    assert len(recorded_sms(records)) == num_sms()


def test_a_graph_over_both_stages_keeps_their_sms(split):
    green = split(48, 84)
    eager = check(green, run_each(green))
    records = [launch_records(DEVICE) for _ in green.streams]
    graph, main = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=main):
        for _ in range(3):  # to and fro
            runs = [lambda r=r: record_launch(r) for r in records]
            fork_and_join(green.streams, main, runs)
    for stream in (torch.cuda.current_stream(), main, green.streams[0], torch.cuda.Stream()):
        for record in records:
            record.fill_(-1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        assert check(green, records) == eager
    del graph


def test_a_graph_captured_on_a_stage_keeps_its_sms(split):
    green = split(64)
    eager = check(green, run_each(green))
    records, graph = launch_records(DEVICE), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=green.streams[0]):
        record_launch(records)
    graph.replay()
    assert [recorded_sms(records)] == eager
    del graph


def test_stages_see_what_the_other_wrote(split):
    attention, ffn = split(48, 84).streams
    x = torch.zeros(1 << 22, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(attention):
            x.add_(1)
        ffn.wait_stream(attention)
        with torch.cuda.stream(ffn):
            x.mul_(2)
        attention.wait_stream(ffn)
    torch.cuda.synchronize()
    assert x.unique().tolist() == [2**11 - 2]


def test_several_partitions_live_at_once(split):
    splits = [split(*asked) for asked in ((16, 116), (48, 84), (16, 16), (64,), (96, 36))]
    for green in (*splits, *reversed(splits)):
        check(green, run_each(green))
    splits[1].close()
    check(splits[0], run_each(splits[0]))


def test_stages_run_at_the_same_time(split):
    """Any of some, for two streams of a partition may have come to one hardware queue."""
    assert any(are_concurrent(split(48, 84).streams) for _ in range(4))
    one = torch.cuda.Stream()
    assert not are_concurrent([one, one])


def test_no_context_becomes_current(split):
    driver = load_driver()
    torch.zeros(1, device=DEVICE)
    before = int(driver.call("cuCtxGetCurrent"))
    green = split(48, 84)
    assert int(driver.call("cuCtxGetCurrent")) == before
    run_each(green)
    green.close()
    assert int(driver.call("cuCtxGetCurrent")) == before


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="reads the whole GPU's free memory: run it alone"
)
def test_closed_partitions_keep_no_more_than_the_driver_does():
    """Driver 580 holds on to 8 MiB for each, see GreenStreams; a later one may do better."""
    free = []
    for _ in range(20):
        with GreenStreams.of((48, 84), DEVICE) as green:
            check(green, run_each(green))
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(DEVICE)[0])
    later = free[5:]  # the first ones start what stays
    assert later[0] - later[-1] <= (len(later) - 1) * KEPT_BYTES


def test_the_driver_says_what_it_cannot_split():
    beyond = num_sms() + 1
    impossible = Partition(asked=(beyond,), granted=(beyond,), num_sms=beyond, grain=Grain(1, 1))
    with pytest.raises(GreenContextError, match="cuDevSmResourceSplitByCount failed") as caught:
        GreenStreams(impossible, DEVICE)
    assert caught.value.code == 915 and not isinstance(caught.value, GreenContextUnsupported)
    with GreenStreams.of((48, 84), DEVICE) as green:
        check(green, run_each(green))
