"""decode_pipeline="auto" over stand-in times: what it times, chooses, keeps and says."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.auto_pipeline import (
    CALIBRATION_SECONDS,
    NOT_HELD,
    NOT_TIMED,
    NOT_WORTH_IT,
    TIME_WAS_UP,
    AutoPipeline,
)
from engine.build import _why_not_auto, make_decode_worker
from engine.calibration_file import CalibrationFile
from engine.config import EngineConfig
from engine.decode import DecodeWorker
from engine.pipeline_choice import MARGIN
from engine.stage_streams import InOrder
from engine.step_model import Rates, StepModel
from engine.trial_steps import LONG, SHORT, Reading, replay_ms
from green.driver import GreenContextError
from tests.checkpoints import save_random
from tests.decode_steps import Steps, decoder_of, random_cache, row_by_row, worker_options
from tests.event_clock import clocked
from tests.strategies import DEVICE

MAX_NUM_SEQS = 12
LONGEST = 64  # tokens: MAX_MODEL_LEN
SPLITS = ((40, 92), (56, 76), (72, 60))
# bytes for nothing and products that take long: every batch may win on every split
CHEAP_READS = StepModel(
    rates=Rates(132, 1e9, 1e6, 1e9),
    num_micro_batches=2,
    itemsize=2,
    kv_token_bytes=1 << 24,
    attention_bytes=0,
    ffn_bytes=1 << 20,
    head_bytes=0,
)


@dataclass(frozen=True)
class AnythingGoes(StepModel):
    """Rules nothing out."""

    def could_win(self, batch, context, split) -> bool:
        return True

    def candidates(self, batch, contexts, splits):
        return tuple(splits)


class At16(AnythingGoes):
    """Nothing could win elsewhere, by arithmetic."""

    def could_win(self, batch, context, split) -> bool:
        return context == 16


ANYTHING, AT_16 = (kind(**vars(CHEAP_READS)) for kind in (AnythingGoes, At16))


@dataclass
class Machine:
    """Splits that can be had or not, and the time of every step."""

    speedups: dict[str, float] = field(default_factory=dict)
    fails: frozenset[str] = frozenset()
    broken: dict[str, int] = field(default_factory=dict)  # split -> launches that go well
    ms: float = 10.0  # of a serial step
    seconds_a_reading: float = 0.0
    now: float = 0.0
    asked: list = field(default_factory=list)  # batch, context, mode of every reading
    how: list = field(default_factory=list)  # and how long they were
    made: dict[str, "Split"] = field(default_factory=dict)  # the newest of each
    num_made: Counter = field(default_factory=Counter)
    watch: Callable[[str], None] = lambda mode: None  # looks on before a step is read

    def streams(self, split) -> InOrder:
        name = ":".join(map(str, split))
        self.num_made[name] += 1
        if name in self.fails:
            raise GreenContextError("cuGreenCtxCreate", 2, "out of memory", "free some")
        self.made[name] = Split(name, self.broken)
        return self.made[name]

    def step_ms(self, batch, context, mode, run, reading) -> float:
        self.watch(mode)
        run()
        self.asked.append((batch, context, mode))
        self.how.append(reading)
        self.now += self.seconds_a_reading
        return self.ms / self.speedups.get(mode, 1.0)

    def clock(self) -> float:
        return self.now

    def read(self) -> set:
        """Batch and context of all readings."""
        return {(batch, context) for batch, context, _ in self.asked}


class Split(InOrder):
    """A stand-in for a partition's streams, which may break."""

    is_closed = False

    def __init__(self, name: str, broken: dict[str, int]) -> None:
        self.name = name
        self.granted = tuple(map(int, name.split(":")))
        self._broken = broken

    def run(self, launch, work) -> None:
        assert not self.is_closed
        if self.name in self._broken:
            if not self._broken[self.name]:
                raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")
            self._broken[self.name] -= 1
        work()

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


@pytest.fixture(scope="module", autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_of(save_random(tmp_path_factory.mktemp("m"), "llama"), row_by_row())


def auto_of(decoder, machine: Machine, folder, *, model=ANYTHING, **more) -> AutoPipeline:
    options = worker_options(decoder, 0, MAX_NUM_SEQS)
    more = {"min_requests": 3} | more
    return AutoPipeline(
        **options | more,
        model=model,
        splits=SPLITS,
        make_streams=machine.streams,
        file=CalibrationFile(folder, {"gpu": "stand-in"}),
        time_step=machine.step_ms,
        clock=machine.clock,
    )


def warmed_up(pipeline: AutoPipeline) -> AutoPipeline:
    """With the values in its KV blocks that it had, as a serial worker beside it has them."""
    kept = pipeline.kv_cache.blocks.clone()
    pipeline.warm_up()
    pipeline.kv_cache.blocks.copy_(kept)
    return pipeline


@given(
    gains=st.lists(st.floats(0.5, 1.5), min_size=3, max_size=3),
    context_lens=st.lists(st.integers(1, 40), min_size=1, max_size=MAX_NUM_SEQS),
)
@example([1.2, 1.3, 1.1], [30] * 12)
@settings(max_examples=15)
def test_steps_run_on_the_fastest_and_equal_the_serial_ones(
    decoder, tmp_path_factory, gains, context_lens
):
    names = [":".join(map(str, split)) for split in SPLITS]
    machine = Machine(dict(zip(names, gains, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.pipeline_choice.CONTEXTS", (1, 16))
        pipeline = warmed_up(auto_of(decoder, machine, tmp_path_factory.mktemp("cache")))
    best = max(names, key=machine.speedups.__getitem__)
    is_faster = 10.0 / machine.speedups[best] < 10.0 / (1 + MARGIN)
    assert list(pipeline.streams) == [best] * is_faster
    steps = Steps(pipeline, context_lens, 0)
    serial = Steps(DecodeWorker(**worker_options(decoder, 0, MAX_NUM_SEQS)), context_lens, 0)
    for _ in range(2):
        assert steps.step() == serial.step()
    is_pipelined = is_faster and len(context_lens) >= 3 and sum(context_lens) > len(context_lens)
    if min(context_lens) > 1:
        assert set(pipeline.statistics.num_steps) == {best if is_pipelined else "serial"}
    for name, streams in machine.made.items():
        assert streams.is_closed == (name not in pipeline.streams)


def test_a_step_between_two_contexts_is_pipelined_where_that_wins(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (8, 16, 32))
    machine = Machine({"40:92": 1.2, "56:76": 1.1})
    pipeline = warmed_up(auto_of(decoder, machine, tmp_path))
    assert {context for _, context, _ in machine.asked} == {8, 16, 32, LONGEST}
    steps = Steps(pipeline, [3, 9, 31, 8, 20], 0)
    serial = Steps(DecodeWorker(**worker_options(decoder, 0, MAX_NUM_SEQS)), [3, 9, 31, 8, 20], 0)
    for num in (5, 4, 2, 1):
        assert steps.step(steps.requests[:num]) == serial.step(serial.requests[:num])
    stats = pipeline.get_pipeline_statistics()
    assert stats["num_steps_by_mode"] == {"40:92": 2, "serial": 2}  # two requests are too few
    assert stats["partitioning"] == "40:92" and stats["granted_sms"]["ffn"] == 92
    assert stats["choices"][8] == "40:92 at 8-72 tokens (up to 1.20x), else serial"
    assert stats["choices"][2] == "serial: fewer than 3 requests"
    pipeline.print_pipeline_statistics()
    short = Steps(auto_of(decoder, Machine({"40:92": 1.2}), tmp_path), [3] * 5, 0)
    short.worker.warm_up()
    short.step()
    assert set(short.worker.statistics.num_steps) == {"serial"}


def test_a_second_start_times_nothing(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (8, 32))
    first = Machine({"56:76": 1.2})
    auto_of(decoder, first, tmp_path).warm_up()
    second = Machine()
    pipeline = auto_of(decoder, second, tmp_path)
    before = pipeline.kv_cache.blocks.clone()
    pipeline.warm_up()
    assert first.asked and not second.asked
    assert torch.equal(pipeline.kv_cache.blocks, before)
    assert list(pipeline.streams) == ["56:76"]
    assert second.num_made == {"56:76": 1}, "those that lost are not needed"
    refused = Machine(fails=frozenset({"56:76"}))
    pipeline = auto_of(decoder, refused, tmp_path)
    pipeline.warm_up()
    assert not pipeline.streams and not pipeline.choices[12]
    why_none = pipeline.statistics.why_none
    assert why_none.startswith("auto: serial is faster than 40:92, 72:60 for every batch; no 56:76")
    assert "cuGreenCtxCreate failed" in why_none


@pytest.mark.parametrize("num_readings", [0, 9, 10, 11, 10 * 3 - 1])
def test_what_time_does_not_suffice_for_is_serial_until_the_next_start(
    decoder, tmp_path, monkeypatch, num_readings
):
    """Ten readings, of four modes in two rounds and two of them long, are a batch at a context."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    seconds = CALIBRATION_SECONDS / num_readings if num_readings else 0.0
    slow = Machine({"40:92": 1.2}, seconds_a_reading=seconds * (1 + 1e-9))
    pipeline = auto_of(decoder, slow, tmp_path)
    if not num_readings:
        monkeypatch.setattr("engine.auto_pipeline.CALIBRATION_SECONDS", 0.0)
    pipeline.warm_up()
    assert len(slow.asked) == num_readings
    in_order = [(batch, context) for batch in (12, 8, 4) for context in (16, LONGEST)]
    known = in_order[: num_readings // 10]
    choices = pipeline.statistics.choices
    assert choices[4] == NOT_TIMED
    if (12, LONGEST) in known:
        assert choices[12] == "40:92 at 16-72 tokens (up to 1.20x), else serial"
        assert choices[8] == NOT_TIMED
    elif known:
        wanted = "40:92 at 16-18 tokens (up to 1.20x), else serial; not all is timed from 64 tokens"
        assert choices[12] == f"{wanted} on: {TIME_WAS_UP}"
    else:
        assert choices[12] == NOT_TIMED and pipeline.statistics.why_none == f"auto: {TIME_WAS_UP}"
    assert not pipeline.block_table.any()
    again = Machine({"40:92": 1.2})
    monkeypatch.undo()
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    auto_of(decoder, again, tmp_path).warm_up()
    assert again.read() == set(in_order) - set(known)
    last = Machine()
    auto_of(decoder, last, tmp_path).warm_up()
    assert not last.asked


def test_what_may_win_is_read_long(decoder, tmp_path, monkeypatch):
    """If near the fastest, and the serial step beside it; twice where it is close whether one
    wins."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))

    def num_read(speedups, folder) -> dict[str, list[int]]:
        machine = Machine(speedups)
        auto_of(decoder, machine, folder).warm_up()
        readings = Counter(
            (mode, how)
            for (batch, context, mode), how in zip(machine.asked, machine.how, strict=True)
            if (batch, context) == (12, 16)
        )
        return {mode: [readings[mode, SHORT], readings[mode, LONG]] for mode, _ in readings}

    one = num_read({"40:92": 0.979, "56:76": 0.9, "72:60": 0.981}, tmp_path / "1")
    assert one == {"serial": [2, 1], "40:92": [2, 0], "56:76": [2, 0], "72:60": [2, 1]}
    near_best = num_read({"40:92": 1.05, "56:76": 1.1, "72:60": 1.09}, tmp_path / "2")
    assert near_best == {"serial": [2, 1], "40:92": [2, 0], "56:76": [2, 1], "72:60": [2, 1]}
    slow = num_read(dict.fromkeys(("40:92", "56:76", "72:60"), 0.979), tmp_path / "3")
    assert slow == {mode: [2, 0] for mode in near_best}
    for i, (gain, num_long) in enumerate([(0.995, 1), (1.005, 2), (1.015, 2), (1.025, 1)]):
        one = num_read({"40:92": 0.9, "56:76": 0.9, "72:60": gain}, tmp_path / f"close {i}")
        assert one["serial"] == one["72:60"] == [2, num_long]


@pytest.mark.parametrize(("long_ms", "num_long"), [(9.95, 2), (10.05, 1)])
def test_what_loses_is_not_read_again(decoder, tmp_path, monkeypatch, long_ms, num_long):
    """However it fared in short readings."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (LONGEST,))
    machine = Machine(dict.fromkeys(("40:92", "56:76"), 0.9))

    def step_ms(batch, context, mode, run, reading) -> float:
        ms = machine.step_ms(batch, context, mode, run, reading)
        return long_ms if (mode, reading) == ("72:60", LONG) else ms

    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline._time_step = step_ms
    pipeline.warm_up()
    num_batches = len(pipeline.readings)
    assert machine.how.count(LONG) == 2 * num_long * num_batches


def test_a_second_reading_that_time_does_not_suffice_for_is_as_none(decoder, tmp_path, monkeypatch):
    """What was read long once is read again at the next start."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    close = dict.fromkeys(("40:92", "56:76", "72:60"), 1.01)
    slow = Machine(close, seconds_a_reading=CALIBRATION_SECONDS / 12 * (1 + 1e-9))
    pipeline = auto_of(decoder, slow, tmp_path)
    pipeline.warm_up()
    assert slow.how == [SHORT] * 8 + [LONG] * 4 and not pipeline.readings


def test_the_least_short_reading_says_what_may_win_and_the_long_one_what_counts(
    decoder, tmp_path, monkeypatch
):
    """What is read short alone does not win by that."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    ms = {  # short, short, long, long
        "serial": [11.0, 10.0, 12.0, 12.4],
        "40:92": [10.5, 9.9, 12.3, 12.7],  # a gain that does not last
        "56:76": [10.4, 12.0],
        "72:60": [20.0, 9.8, 11.8, 11.8],
    }
    machine, left = Machine(), {}

    def step_ms(batch, context, mode, run, reading) -> float:
        machine.step_ms(batch, context, mode, run, reading)
        return left.setdefault((batch, context, mode), iter(ms[mode])).__next__()

    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline._time_step = step_ms
    pipeline.warm_up()
    read = {"serial": 12.2, "40:92": 12.5, "56:76": 10.4 * (12.5 / 9.9), "72:60": 11.8}
    assert pipeline.readings[12][16] == read


@pytest.mark.parametrize("num_asked", [1, 2, 3])
@pytest.mark.parametrize("next_best", [1.0, 1.1])
def test_a_split_that_fails_while_it_is_read_is_asked_no_more(
    decoder, tmp_path, monkeypatch, num_asked, next_best
):
    """In a short reading or in the long one. Nor does what was read of it before count: the next
    best is read long."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    machine = Machine({"40:92": 1.2, "56:76": next_best})

    def step_ms(batch, context, mode, run, how) -> float:
        ms = machine.step_ms(batch, context, mode, run, how)
        if mode == "40:92" and num_of_it() == num_asked:
            raise RuntimeError("an illegal memory access was encountered")
        return ms

    def num_of_it() -> int:
        return [mode for _, _, mode in machine.asked].count("40:92")

    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline._time_step = step_ms
    pipeline.warm_up()
    assert num_of_it() == num_asked
    assert ((12, 16, "56:76"), LONG) in zip(machine.asked, machine.how, strict=True)
    assert all(ms.keys() == {"serial", "56:76", "72:60"} for ms in pipeline.readings[12].values())
    if next_best == 1.0:
        assert "illegal memory access" in pipeline.statistics.why_none


def test_a_step_is_read_once_clocks_have_settled(monkeypatch):
    """Launches that take a third of their time once there were 20 of them, 90 ms."""
    run = clocked(monkeypatch, lambda i: 4.5 if i < 20 else 1.5)
    assert replay_ms(1, 1, "serial", run, Reading(90.0, 5.0)) == 1.5
    run = clocked(monkeypatch, lambda i: 4.5 if i < 20 else 1.5)
    assert replay_ms(1, 1, "serial", run, Reading(40.0, 5.0)) == 4.5
    launches = []
    run = clocked(monkeypatch, lambda i: launches.append(i) or (1.5 if i else 4.5))
    assert replay_ms(1, 1, "serial", run, Reading(8.0, 5.0)) == 1.5
    assert len(launches) == 1 + 2 + 4  # each part as long as it must be by the one before


def test_a_win_with_nothing_read_beside_it_is_none_yet(decoder, tmp_path, monkeypatch):
    """What lies next to it is unread, and not what cannot win."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (8, 16, 32))

    slow = Machine({"40:92": 1.2}, seconds_a_reading=CALIBRATION_SECONDS / 10 * (1 + 1e-9))
    pipeline = auto_of(decoder, slow, tmp_path, model=AT_16)
    pipeline.warm_up()
    assert slow.read() == {(12, 16)}
    wanted = "serial: 40:92 won at 16 tokens (1.20x), but is not read beside that; not all is timed"
    assert pipeline.statistics.choices[12] == f"{wanted} from 8 tokens on: {TIME_WAS_UP}"
    lost = "auto: serial is faster than 56:76, 72:60 for every batch"
    assert pipeline.statistics.why_none == f"{lost}; auto: {TIME_WAS_UP}"


def test_reading_again_is_over_values_and_leaves_the_choices(decoder, tmp_path):
    machine = Machine({"40:92": 1.2})
    auto_of(decoder, machine, tmp_path).warm_up()
    pipeline = auto_of(decoder, Machine({"40:92": 1.2}), tmp_path)
    pipeline.warm_up()  # from the file: no trial of its own
    pipeline.kv_cache.blocks.fill_(torch.nan)
    other = Machine({"40:92": 0.5})
    other.watch = lambda mode: assert_finite(pipeline)
    launched = launches_of(pipeline, other)
    choices = dict(pipeline.choices)
    context = min(pipeline.readings[12])
    pipeline._time_step = other.step_ms
    found = pipeline.read_again(12, context, LONG)
    assert found == {"serial": 10.0, "40:92": 20.0, "56:76": 10.0, "72:60": 10.0}
    assert pipeline.choices == choices and other.how == [LONG] * 4
    assert launched == [*found, *(one for mode in found for one in (f"read {mode}", mode))]
    assert not pipeline.block_table.any()


def test_nothing_is_read_again_once_there_were_requests(decoder, tmp_path):
    """Trials write over the pool, which may hold what later requests share."""
    pipeline = warmed_up(auto_of(decoder, Machine(), tmp_path))
    context = min(pipeline.readings[12])
    steps = Steps(pipeline, [3, 9, 31], 0)
    with pytest.raises(AssertionError, match="got 3 of them and 0 steps"):
        pipeline.read_again(12, context, LONG)
    steps.step()
    for request in steps.requests:
        pipeline.rows.release(request)
    with pytest.raises(AssertionError, match="got 0 of them and 1 steps"):
        pipeline.read_again(12, context, LONG)


class Capturing:
    """In place of StepGraphs: what would be captured, and that no step is run on less."""

    is_capturing = False

    def __init__(self) -> None:
        self.captured: dict = {}

    def run(self, key, step) -> None:
        step(key)
        self.captured[key] = None

    def take_new_pool(self) -> None:
        pass

    def names(self) -> set[str]:
        """Of the splits."""
        return {key[0] for key in self.captured if not isinstance(key, int)}


@pytest.mark.parametrize("broken", [{}, {"40:92": 40}])
def test_graphs_that_no_step_comes_to_are_given_back_before_their_partition(
    decoder, tmp_path, monkeypatch, broken
):
    """Of splits that lost, of one that broke, and of the winner where it does not win."""
    machine = Machine({"40:92": 1.2, "56:76": 1.1}, broken=broken)
    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline.graphs = Capturing()

    def step_ms(batch, context, mode, run, reading) -> float:
        ms = machine.step_ms(batch, context, mode, run, reading)
        return ms if batch == MAX_NUM_SEQS or mode == "serial" else 2 * ms

    pipeline._time_step = step_ms
    seen, close = set(), Split.close

    def closed(split: Split) -> None:
        assert split.name not in pipeline.graphs.names()
        seen.add(split.name)
        close(split)

    monkeypatch.setattr(Split, "close", closed)
    pipeline.warm_up()
    best = "56:76" if broken else "40:92"
    assert pipeline.graphs.names() == {best} and seen == {*machine.made} - {best}
    assert pipeline.graphs.captured.keys() == set(pipeline._all_keys())


def assert_finite(pipeline: AutoPipeline) -> None:
    assert pipeline.buffers.logits[:4].isfinite().all()
    assert pipeline.block_table[:4].any(dim=1).all(), "of requests"


def launches_of(pipeline: AutoPipeline, machine: Machine, seconds: float = 0.0) -> list[str]:
    """Of trials' steps, by mode, and the readings between; each takes so many seconds."""
    found, launcher, watch = [], pipeline._launcher, machine.watch

    def launched(batch, context, streams) -> Callable[[], None]:
        run = launcher(batch, context, streams)

        def noted() -> None:
            found.append("serial" if streams is None else streams.name)
            machine.now += seconds
            run()

        return noted

    def watched(mode: str) -> None:
        watch(mode)
        found.append(f"read {mode}")

    pipeline._launcher, machine.watch = launched, watched
    return found


def test_all_modes_are_captured_before_the_first_is_read(decoder, tmp_path, monkeypatch):
    """And none once time is up."""
    machine = Machine()
    pipeline = auto_of(decoder, machine, tmp_path / "1")
    launched = launches_of(pipeline, machine)
    pipeline.warm_up()
    assert launched[:5] == ["serial", "40:92", "56:76", "72:60", "read serial"]
    slow = Machine()
    pipeline = auto_of(decoder, slow, tmp_path / "2")
    launched = launches_of(pipeline, slow, CALIBRATION_SECONDS / 2)
    pipeline.warm_up()
    assert launched == ["serial", "40:92"] and not slow.asked


def test_next_to_where_a_split_wins_it_is_timed_too(decoder, tmp_path, monkeypatch):
    """What lies between two contexts is judged by the times at both."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (8, 16, 32))

    lost = Machine(dict.fromkeys(("40:92", "56:76", "72:60"), 0.99))
    pipeline = auto_of(decoder, lost, tmp_path / "lost", model=AT_16)
    pipeline.warm_up()
    assert {context for _, context in lost.read()} == {16}
    assert not any(pipeline.choices.values())
    won = Machine({"40:92": 1.2})
    pipeline = auto_of(decoder, won, tmp_path / "won", model=AT_16)
    pipeline.warm_up()
    assert {context for _, context in won.read()} == {8, 16, 32, LONGEST}
    elsewhere = {mode for _, context, mode in won.asked if context != 16}
    assert elsewhere == {"serial", "40:92"}, "the others lost"
    assert pipeline.statistics.choices[12].startswith("40:92 at 8-72 tokens")
    again = Machine()
    auto_of(decoder, again, tmp_path / "won", model=AT_16).warm_up()
    assert not again.asked


def test_the_most_promising_batches_come_first(decoder, tmp_path):
    class Small(AnythingGoes):
        """Batches of 8 have the most to win."""

        def gain(self, batch, context, split) -> float:
            return 1.5 if batch == 8 else 1.2

    machine = Machine()
    auto_of(decoder, machine, tmp_path, model=Small(**vars(CHEAP_READS))).warm_up()
    assert list(dict.fromkeys(batch for batch, _, _ in machine.asked)) == [8, 12, 4]


def test_a_larger_pool_is_timed_where_a_smaller_one_had_no_room(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (8, 16, 32))

    def start(tokens_each: int) -> Machine:
        machine = Machine({"40:92": 1.3})
        pool = random_cache(decoder, MAX_NUM_SEQS * tokens_each, 4, 0)
        pipeline = auto_of(decoder, machine, tmp_path, kv_cache=pool)
        pipeline.warm_up()
        longest = min(tokens_each, LONGEST)
        assert pipeline.choices[12][-1].high >= longest
        return machine

    assert {c for b, c in start(16).read() if b == 12} == {8, 16}
    assert {c for b, c in start(LONGEST).read() if b == 12} == {32, LONGEST}
    assert not start(LONGEST).asked
    assert not start(60).asked, "what lies between two readings is known, and nearly the end"


def test_what_arithmetic_rules_out_costs_nothing(decoder, tmp_path):
    model = StepModel(**vars(CHEAP_READS) | {"rates": Rates(132, 1.0, 1e12, 1.0)})
    machine = Machine()
    pipeline = auto_of(decoder, machine, tmp_path, model=model)
    before = pipeline.kv_cache.blocks.clone()
    pipeline.warm_up()
    assert not machine.asked and not machine.made and not list(tmp_path.iterdir())
    assert torch.equal(pipeline.kv_cache.blocks, before)
    assert pipeline.statistics.choices[12] == NOT_WORTH_IT
    assert pipeline.statistics.why_none == "auto: serial is faster for every batch"
    text = pipeline.statistics.as_text()
    assert f"auto, 4-12 requests: {NOT_WORTH_IT}" in text


def test_a_pool_that_does_not_hold_the_batch_is_the_reason(decoder, tmp_path):
    pool = random_cache(decoder, 5 * 4, 4, 0)
    pipeline = auto_of(decoder, Machine(), tmp_path, kv_cache=pool)
    pipeline.warm_up()
    assert pipeline.statistics.choices[12] == NOT_HELD
    assert pipeline.statistics.choices[4] not in (NOT_HELD, NOT_WORTH_IT)


def test_a_split_that_cannot_be_had_is_timed_once_it_can(decoder, tmp_path):
    """The others' times are kept; its own count beside the serial ones of that start."""
    machine = Machine({"56:76": 1.2}, fails=frozenset({"40:92"}))
    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline.warm_up()
    assert {mode for _, _, mode in machine.asked} == {"serial", "56:76", "72:60"}
    assert list(pipeline.streams) == ["56:76"] and machine.num_made["40:92"] == 1
    again = Machine(fails=frozenset({"40:92"}))
    auto_of(decoder, again, tmp_path).warm_up()
    assert not again.asked
    there = Machine({"40:92": 1.3}, ms=20.0)  # clocks at half their rate
    pipeline = auto_of(decoder, there, tmp_path)
    pipeline.warm_up()
    assert {mode for _, _, mode in there.asked} == {"serial", "40:92"}
    assert list(pipeline.streams) == ["40:92"]
    assert pipeline.choices[12][0].speedup == pytest.approx(1.3)
    last = Machine()
    auto_of(decoder, last, tmp_path).warm_up()
    assert not last.asked


def test_what_lost_and_what_could_not_be_had_are_both_said(decoder, tmp_path):
    machine = Machine({"56:76": 0.8, "72:60": 0.9}, fails=frozenset({"40:92"}))
    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline.warm_up()
    lost, failed = pipeline.statistics.why_none.split("; ")
    assert lost == "auto: serial is faster than 56:76, 72:60 for every batch"
    assert failed.startswith("no 40:92: cuGreenCtxCreate failed with out of memory (2)")
    nothing = Machine(fails=frozenset({"40:92", "56:76", "72:60"}))
    pipeline = auto_of(decoder, nothing, tmp_path / "other")
    pipeline.warm_up()
    assert pipeline.statistics.why_none.count("cuGreenCtxCreate failed") == 3
    assert "faster" not in pipeline.statistics.why_none
    assert pipeline.statistics.choices[12] == "serial: nothing was timed"


@pytest.mark.parametrize("num_steps", [0, 0.3, 1, 2.5, 6])
def test_a_split_whose_step_fails_is_left_out(decoder, tmp_path, num_steps):
    """In its first step, in the middle of a reading, after it was read of another batch."""
    machine = Machine({"40:92": 1.3, "56:76": 1.2})
    pipeline = auto_of(decoder, machine, tmp_path)
    machine.broken["40:92"] = int(num_steps * len(pipeline.schedule))
    pipeline = warmed_up(pipeline)
    assert list(pipeline.streams) == ["56:76"]
    assert {mode for _, _, mode in machine.asked} >= {"serial", "56:76", "72:60"}
    assert {name for name, split in machine.made.items() if split.is_closed} == {"40:92", "72:60"}
    assert machine.num_made["40:92"] == 1
    assert not pipeline.block_table.any()
    steps = Steps(pipeline, [20] * 6, 0)
    serial = Steps(DecodeWorker(**worker_options(decoder, 0, MAX_NUM_SEQS)), [20] * 6, 0)
    assert steps.step() == serial.step()
    pipeline.close()
    again = Machine({"40:92": 1.3})
    auto_of(decoder, again, tmp_path).warm_up()
    assert {mode for _, _, mode in again.asked} <= {"serial", "40:92"}


def test_a_split_that_fails_once_it_was_chosen_leaves_its_steps_to_the_next_best(decoder, tmp_path):
    """As a capture that finds no memory, of times that an earlier start has read."""
    speedups = {"40:92": 1.3, "56:76": 1.2}
    auto_of(decoder, Machine(speedups), tmp_path).warm_up()
    machine = Machine(broken={"40:92": 0})
    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline.warm_up()
    assert not machine.asked and list(pipeline.streams) == ["56:76"]
    assert machine.made["40:92"].is_closed and not machine.made["56:76"].is_closed
    assert pipeline.statistics.choices[12].startswith("56:76")
    none_left = Machine(broken=dict.fromkeys(speedups, 0))
    pipeline = auto_of(decoder, none_left, tmp_path)
    pipeline.warm_up()
    assert not pipeline.streams
    why_none = "no 40:92: RuntimeError: CUDA error: operation not permitted; no 56:76: RuntimeError"
    assert why_none in pipeline.statistics.why_none


def test_a_serial_step_that_fails_is_an_error(decoder, tmp_path):
    machine = Machine()
    pipeline = auto_of(decoder, machine, tmp_path)

    def fail(size: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    pipeline._step = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        pipeline.warm_up()
    pipeline.close()
    assert machine.made and all(split.is_closed for split in machine.made.values())


def test_trials_read_values_and_mixed_tokens(decoder, tmp_path):
    """Whatever the pool had in it before: what was never written may be NaN."""
    tables = []
    machine = Machine()
    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline.kv_cache.blocks.fill_(torch.nan)

    def watch(mode: str) -> None:
        assert pipeline.buffers.logits[:4].isfinite().all()
        tables.append(pipeline.block_table[:4, : LONGEST // 4].clone())

    machine.watch = watch
    pipeline.warm_up()
    blocks = pipeline.kv_cache.blocks[tables[0].long()]
    assert blocks.mean().abs() < 0.1 and 0.9 < blocks.std() < 1.1
    assert tables[0].unique().numel() == tables[0].numel(), "each request has blocks of its own"
    with pipeline._requests_of(12, 8):
        token_ids = pipeline.token_ids[:12].tolist()
    assert len(set(token_ids)) > 6 and max(token_ids) < decoder.config.vocab_size


def test_a_calibration_leaves_nothing_behind(decoder, tmp_path):
    pipeline = auto_of(decoder, Machine(), tmp_path)
    with pipeline._requests_of(4, 8):
        filled = pipeline.kv_cache.blocks.clone()
    pipeline.warm_up()
    assert not pipeline.block_table.any() and not pipeline.token_ids[:-1].any()
    assert torch.equal(pipeline.kv_cache.blocks, filled)  # no step stored a k or v
    assert not pipeline.statistics.num_steps


def test_steps_do_not_depend_on_what_a_calibration_left_in_the_pool(decoder, tmp_path, monkeypatch):
    """Whoever serves requests has written what they read; all else may be poison, as it was."""
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    machine = Machine({"40:92": 1.3})
    pipeline = auto_of(decoder, machine, tmp_path)
    written = pipeline.kv_cache.blocks.clone()
    pipeline.warm_up()
    steps, poisoned = Steps(pipeline, [20] * 6, 0), auto_of(decoder, machine, tmp_path)
    poisoned.warm_up()
    poisoned.kv_cache.blocks.fill_(torch.nan)
    after_poison = Steps(poisoned, [20] * 6, 0)
    used = torch.tensor(sorted({block for table in steps.tables.values() for block in table}))
    for some in (pipeline, poisoned):
        some.kv_cache.blocks[used] = written[used]
    assert steps.tables == after_poison.tables
    assert steps.step() == after_poison.step()
    assert set(pipeline.statistics.num_steps) == {"40:92"}


@pytest.mark.parametrize(
    ("options", "changed", "wanted"),
    [
        ({"disable_green": True}, {}, "disable_green is set"),
        ({}, {"device": torch.device("cpu")}, "auto: a CPU has no SMs"),
        ({}, {"graph_pool": None}, "auto: without CUDA graphs"),
        ({}, {"itemsize": 4}, "auto: products of other than 16-bit"),
        ({}, {}, None),
    ],
)
def test_where_there_is_nothing_to_time(options, changed, wanted):
    config = EngineConfig(model="m", decode_pipeline="auto", **options)
    dtype = torch.float32 if changed.get("itemsize") == 4 else torch.bfloat16
    weights = SimpleNamespace(embedding=torch.empty(1, dtype=dtype))
    decoder = SimpleNamespace(weights=weights)
    found = {"device": torch.device("cuda"), "graph_pool": (0, 1), "decoder": decoder} | changed
    reason = _why_not_auto(config, found)
    assert reason == wanted or reason.startswith(wanted)


def test_where_there_is_nothing_to_compare_auto_is_serial_and_says_why(decoder):
    why_none = {
        "cpu": "auto: a CPU has no SMs to divide",
        "cuda": "auto: without CUDA graphs there is nothing to compare",
    }
    config = EngineConfig(
        model="m", device=DEVICE, decode_pipeline="auto", max_num_seqs=MAX_NUM_SEQS
    )
    options = worker_options(decoder, 0, MAX_NUM_SEQS)
    pool = options.pop("graph_pool")
    worker = make_decode_worker(config, **options, pool=pool)
    assert worker.statistics.why_none == why_none[DEVICE]
    steps = Steps(worker, [3, 9], 0)
    serial = Steps(DecodeWorker(**worker_options(decoder, 0, MAX_NUM_SEQS)), [3, 9], 0)
    assert steps.step() == serial.step()
    assert worker.get_pipeline_statistics()["num_steps_by_mode"] == {"serial": 1}
