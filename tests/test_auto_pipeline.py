"""decode_pipeline="auto" over stand-in times: what it times, chooses, keeps and says."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.auto_pipeline import CALIBRATION_SECONDS, NOT_TIMED, NOT_WORTH_IT, AutoPipeline
from engine.build import _why_not_auto, make_decode_worker
from engine.calibration_file import CalibrationFile
from engine.config import EngineConfig
from engine.decode import DecodeWorker
from engine.stage_streams import InOrder
from engine.step_model import MARGIN, Rates, StepModel
from green.driver import GreenContextError
from tests.checkpoints import save_random
from tests.decode_steps import Steps, decoder_of, row_by_row, worker_options
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


ANYTHING = AnythingGoes(**vars(CHEAP_READS))


@dataclass
class Machine:
    """Splits that can be had or not, and the time of every step."""

    speedups: dict[str, float] = field(default_factory=dict)
    fails: frozenset[str] = frozenset()
    seconds_a_reading: float = 0.0
    now: float = 0.0
    asked: list = field(default_factory=list)  # batch, context, mode of every reading
    made: dict[str, "Split"] = field(default_factory=dict)

    def streams(self, split) -> InOrder:
        name = ":".join(map(str, split))
        assert name not in self.made
        if name in self.fails:
            raise GreenContextError("cuGreenCtxCreate", 2, "out of memory", "free some")
        self.made[name] = Split(name)
        return self.made[name]

    def step_ms(self, batch, context, mode, run) -> float:
        run()
        self.asked.append((batch, context, mode))
        self.now += self.seconds_a_reading
        return 10.0 / self.speedups.get(mode, 1.0)

    def clock(self) -> float:
        return self.now


class Split(InOrder):
    """A stand-in for a partition's streams."""

    is_closed = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.granted = tuple(map(int, name.split(":")))

    def close(self) -> None:
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
        **options,
        model=model,
        splits=SPLITS,
        make_streams=machine.streams,
        file=CalibrationFile(folder, {"gpu": "stand-in"}),
        time_step=machine.step_ms,
        clock=machine.clock,
        **more,
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
    is_faster = 10.0 / (10.0 / machine.speedups[best]) >= 1 + MARGIN
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


def test_a_step_between_two_contexts_that_won_is_pipelined(decoder, tmp_path, monkeypatch):
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
    assert stats["choices"][8].startswith("40:92 at 8-16 tokens (1.20x)")
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
    refused = Machine(fails=frozenset({"56:76"}))
    pipeline = auto_of(decoder, refused, tmp_path)
    pipeline.warm_up()
    assert not pipeline.streams and not pipeline.choices[12]
    assert "cuGreenCtxCreate failed" in pipeline.statistics.why_none


def test_what_time_does_not_suffice_for_is_serial_until_the_next_start(decoder, tmp_path):
    slow = Machine({"40:92": 1.2}, seconds_a_reading=CALIBRATION_SECONDS / 11)
    pipeline = auto_of(decoder, slow, tmp_path)
    pipeline.warm_up()
    assert {batch for batch, _, _ in slow.asked} == {12}  # one batch is begun, and ended
    assert pipeline.statistics.choices[8] == NOT_TIMED
    again = Machine({"40:92": 1.2})
    auto_of(decoder, again, tmp_path).warm_up()
    assert {batch for batch, _, _ in again.asked} == {4, 8}


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


def test_a_split_that_cannot_be_had_is_left_out(decoder, tmp_path):
    machine = Machine(fails=frozenset({"40:92"}))
    pipeline = auto_of(decoder, machine, tmp_path)
    pipeline.warm_up()
    assert {mode for _, _, mode in machine.asked} == {"serial", "56:76", "72:60"}
    assert not list(tmp_path.iterdir())  # the next start may have it


def test_a_calibration_leaves_nothing_behind(decoder, tmp_path):
    pipeline = auto_of(decoder, Machine(), tmp_path)
    pipeline.warm_up()
    assert not pipeline.block_table.any() and not pipeline.token_ids[:-1].any()
    assert not pipeline.kv_cache.blocks.any()  # no step stored a k or v
    assert not pipeline.statistics.num_steps


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
