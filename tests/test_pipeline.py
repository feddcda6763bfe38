"""Pipelined decode steps equal the serial ones to the bit, for every cut and every order."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kernels
from engine.decode import DecodeWorker, batch_buckets
from engine.pipeline import DecodePipeline
from engine.stage_schedule import STAGES, Placement
from engine.stage_streams import InOrder
from kernels import reference
from models.decoder import Decoder
from tests.checkpoints import save_random
from tests.decode_steps import Steps, decoder_of, row_by_row, worker_options
from tests.stand_in_streams import AnyOrder, Watched

FAMILIES = {
    "qwen3": {"num_hidden_layers": 3},
    "qwen2": {"num_hidden_layers": 2, "tie_word_embeddings": True},
    "llama": {"num_hidden_layers": 1},
}
MAX_NUM_SEQS = 12
ORDERS = (("attention", "ffn", "main"), ("main", "ffn", "attention"), ("ffn", "main", "attention"))

batches = st.lists(st.integers(1, 40), min_size=1, max_size=MAX_NUM_SEQS)
placements = st.builds(Placement, qkv=st.sampled_from(STAGES), o=st.sampled_from(STAGES))


@pytest.fixture(scope="module", autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_random(folder / name, name, **FAMILIES[name]) for name in FAMILIES}


@pytest.fixture(scope="module")
def decoders(folders) -> dict[str, Decoder]:
    return {name: decoder_of(folder, row_by_row()) for name, folder in folders.items()}


def pipeline_of(decoder: Decoder, *streams, seed: int = 0, num: int = 2, **more):
    options = worker_options(decoder, seed, MAX_NUM_SEQS, num)
    more = {"min_requests": 1, "num_micro_batches": num, "streams": streams} | more
    return DecodePipeline(**options | more)


def serial_of(decoder: Decoder, *, seed: int = 0) -> DecodeWorker:
    return DecodeWorker(**worker_options(decoder, seed, MAX_NUM_SEQS))


def assert_same(one: Steps, other: Steps) -> None:
    for blocks, wanted in zip(one.cached(), other.cached(), strict=True):
        assert torch.equal(blocks, wanted)


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    context_lens=batches,
    num=st.integers(2, 4),
    placement=placements,
    seed=st.integers(0, 99),
    num_steps=st.integers(1, 3),
)
@example("qwen3", [40], 3, Placement(), 0, 2)  # micro-batches of padding alone
@settings(max_examples=25)
def test_steps_equal_the_serial_ones_to_the_bit(
    decoders, family, context_lens, num, placement, seed, num_steps
):
    """Tokens, log-probabilities and KV blocks, with launches in any order that events allow."""
    decoder = decoders[family]
    pipeline = pipeline_of(decoder, AnyOrder.seeded(seed), seed=seed, num=num, placement=placement)
    piped = Steps(pipeline, context_lens, seed)
    serial = Steps(serial_of(decoder, seed=seed), context_lens, seed)
    for _ in range(num_steps):
        assert piped.step() == serial.step()
    assert_same(piped, serial)
    assert pipeline.statistics.num_steps == {"any order": num_steps}


@given(context_lens=batches, drop=st.integers(0, 11), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_requests_come_and_go_between_steps(decoders, context_lens, drop, seed):
    decoder = decoders["qwen2"]
    piped = Steps(pipeline_of(decoder, InOrder(), seed=seed), context_lens, seed)
    serial = Steps(serial_of(decoder, seed=seed), context_lens, seed)
    for steps in (piped, serial):
        steps.step()
        steps.worker.release(steps.requests[drop % len(context_lens)])
    left = [r.request_id for r in piped.requests if piped.worker.has_row(r)]
    if left:
        found = [s.step([s.requests[i] for i in reversed(left)]) for s in (piped, serial)]
        assert found[0] == found[1]
    for steps in (piped, serial):
        steps.worker.admit([r for r in steps.requests if not steps.worker.has_row(r)])
    assert piped.step() == serial.step()
    assert_same(piped, serial)


@given(context_lens=batches, seed=st.integers(0, 99))
@settings(max_examples=10)
def test_the_same_cut_in_order_gives_the_same_bits_with_whole_products(folders, context_lens, seed):
    """With products over a micro-batch, as the GPU has them: every order, and one stream."""
    decoder = decoder_of(folders["qwen3"], reference)
    piped = Steps(pipeline_of(decoder, AnyOrder.seeded(seed), seed=seed), context_lens, seed)
    serial = Steps(pipeline_of(decoder, InOrder(), seed=seed), context_lens, seed)
    for _ in range(2):
        assert piped.step() == serial.step()
    assert_same(piped, serial)


class OnFewSms(AnyOrder):
    """A partition for Triton's kernels."""

    def num_sms(self, stage):
        return {"attention": 2, "ffn": 3}.get(stage)


def test_grids_of_a_partition_do_not_change_the_bits(folders):
    decoder = decoder_of(folders["llama"], kernels)
    found = []
    for streams in (OnFewSms.seeded(0), InOrder()):
        pipeline = pipeline_of(decoder, streams)
        steps = Steps(pipeline, [3, 17, 40, 8, 1], 0)
        found.append(([steps.step() for _ in range(2)], steps))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("placement", [Placement(), Placement(qkv="ffn", o="attention")])
def test_launches_read_and_write_what_the_schedule_says(decoders, placement):
    watched = Watched()
    pipeline = pipeline_of(decoders["qwen3"], watched, placement=placement)
    watched.pipeline = pipeline
    context_lens = [3, 17, 40, 8, 1, 5, 9]
    piped = Steps(pipeline, context_lens, 0)
    serial = Steps(serial_of(decoders["qwen3"]), context_lens, 0)
    for _ in range(2):
        assert piped.step() == serial.step()
    assert_same(piped, serial)
    assert watched.num_watched == 2 * (len(pipeline.schedule) - 2)


def test_without_one_of_its_events_a_step_goes_wrong(decoders):
    """Each missing wait is seen in what comes out, in one of a few orders at least."""
    decoder, context_lens = decoders["qwen2"], [3, 17, 40, 8, 1]
    serial = Steps(serial_of(decoder), context_lens, 0)
    wanted = [serial.step() for _ in range(2)]
    schedule = pipeline_of(decoder, InOrder()).schedule
    for i, launch in enumerate(schedule):
        for event in launch.waits:
            broken = (*schedule[:i], launch.without_wait(event), *schedule[i + 1 :])
            streams = [AnyOrder.preferring(*order) for order in ORDERS]
            streams += [AnyOrder.seeded(seed) for seed in range(8)]
            assert any(goes_wrong(decoder, broken, some, wanted) for some in streams), launch.name
    assert not any(goes_wrong(decoder, schedule, some, wanted) for some in streams)


def goes_wrong(decoder: Decoder, schedule, streams: AnyOrder, wanted: list) -> bool:
    pipeline = pipeline_of(decoder, streams)
    pipeline.schedule = schedule
    steps = Steps(pipeline, [3, 17, 40, 8, 1], 0)
    return [steps.step() for _ in range(2)] != wanted


def test_few_requests_are_served_serially(decoders):
    pipeline = pipeline_of(decoders["llama"], InOrder(), min_requests=6)
    steps = Steps(pipeline, [3, 9, 2, 7, 5, 4, 1], 0)
    serial = Steps(serial_of(decoders["llama"]), [3, 9, 2, 7, 5, 4, 1], 0)
    for num in (7, 2, 5, 1):
        assert steps.step(steps.requests[:num]) == serial.step(serial.requests[:num])
    stats = pipeline.get_pipeline_statistics()
    assert stats["num_steps_by_mode"] == {"in order": 1, "serial": 3}
    assert stats["modes"] == {1: "serial", 2: "serial", 8: "serial"}
    assert stats["num_steps"] == 4 and stats["num_tokens"] == 15


def test_without_streams_every_step_is_serial(decoders):
    pipeline = pipeline_of(decoders["llama"])
    steps = Steps(pipeline, [3, 9, 2], 0)
    assert steps.step() == Steps(serial_of(decoders["llama"]), [3, 9, 2], 0).step()
    stats = pipeline.get_pipeline_statistics()
    assert stats["partitioning"] == "none" and stats["num_steps_by_mode"] == {"serial": 1}


def test_statistics_show_the_newest_cut(decoders, capsys):
    pipeline = pipeline_of(decoders["llama"], InOrder())
    steps = Steps(pipeline, [9, 2, 3], 0)
    steps.step()
    cut = [{"num_requests": 1, "num_kv_tokens": 9}, {"num_requests": 2, "num_kv_tokens": 5}]
    assert pipeline.get_pipeline_statistics()["micro_batches"] == cut
    pipeline.print_pipeline_statistics()
    printed = capsys.readouterr().out
    assert "1 requests with 9 tokens, 2 requests with 5 tokens" in printed
    assert "no step was timed" in printed and "1 in order" in printed


@pytest.mark.parametrize("min_requests", [1, 4], ids=["pipelined", "serial"])
def test_a_launch_that_fails_is_no_step(decoders, monkeypatch, min_requests):
    def failing(key, step):
        raise RuntimeError("launch failed")

    pipeline = pipeline_of(decoders["llama"], InOrder(), min_requests=min_requests)
    before = pipeline.get_pipeline_statistics()
    steps = Steps(pipeline, [3, 9, 2], 0)
    monkeypatch.setattr(pipeline.graphs, "run", failing)
    with pytest.raises(RuntimeError, match="launch failed"):
        steps.step()
    assert pipeline.get_pipeline_statistics() == before and before["num_steps"] == 0


class OfSms(InOrder):
    """A stand-in for a partition; its close may fail."""

    def __init__(self, attention: int, ffn: int, error: Exception | None = None) -> None:
        self.name, self.granted = f"{attention}:{ffn}", (attention, ffn)
        self.error, self.num_closed = error, 0

    def close(self) -> None:
        self.num_closed += 1
        if self.error is not None:
            raise self.error


def test_all_partitions_are_given_back_whichever_of_them_fails(decoders):
    errors = (OSError("first"), None, OSError("second"), None)
    streams = [OfSms(40 + 8 * i, 92 - 8 * i, error) for i, error in enumerate(errors)]
    pipeline = pipeline_of(decoders["llama"], *streams)
    with pytest.raises(OSError, match="first"):
        pipeline.close()
    assert [some.num_closed for some in streams] == [1] * 4


def test_sms_are_shown_for_each_of_several_partitions(decoders):
    pipeline = pipeline_of(decoders["llama"], OfSms(40, 92), OfSms(56, 76), InOrder())
    assert pipeline.get_pipeline_statistics()["granted_sms_by_mode"] == {
        "40:92": {"attention": 40, "ffn": 92},
        "56:76": {"attention": 56, "ffn": 76},
    }


@pytest.mark.parametrize("max_num_seqs", [17, 65])
def test_serial_steps_have_the_rows_that_they_have_without_a_pipeline(decoders, max_num_seqs):
    """Micro-batches are rounded up to 8 rows, which is nothing to a serial step."""
    options = worker_options(decoders["llama"], 0, max_num_seqs)
    assert len(options["buffers"].logits) > max_num_seqs
    options["max_num_seqs"] = max_num_seqs
    pipeline = DecodePipeline(**options, streams=[InOrder()], min_requests=max_num_seqs)
    assert pipeline.buckets == batch_buckets(max_num_seqs)
    pipeline.warm_up()
    pipeline.graphs = Recorded()
    steps = Steps(pipeline, [3] * max_num_seqs, 0)
    steps.step()  # the fullest has more rows where it is pipelined
    assert list(pipeline.graphs.captured) == [("in order", len(options["buffers"].logits) // 2, 0)]
    pipeline.modes = dict.fromkeys(pipeline.modes)
    steps.step()
    assert list(pipeline.graphs.captured)[1:] == [max_num_seqs]


def test_requests_of_a_step_have_rows(decoders):
    options = worker_options(decoders["llama"], 0, 4)
    with pytest.raises(ValueError, match="max_num_seqs must be at most 4 rows, got 5"):
        DecodeWorker(**options, max_num_seqs=5)


class Recorded:
    """What StepGraphs was asked to run."""

    def __init__(self) -> None:
        self.captured: dict = {}

    def run(self, key, step) -> None:
        self.captured[key] = self.captured.get(key, 0) + 1
        step(key)


def test_a_warm_up_runs_each_graph_that_a_step_may_need(decoders):
    pipeline = pipeline_of(decoders["llama"], InOrder(), min_requests=6)
    pipeline.graphs = Recorded()
    pipeline.warm_up()
    warm = pipeline.graphs.captured
    assert warm == {("in order", 6, 0): 1, ("in order", 4, 0): 1} | dict.fromkeys((8, 4, 2, 1), 1)
    pipeline.graphs = Recorded()
    steps = Steps(pipeline, [3] * MAX_NUM_SEQS, 0)
    for num in (12, 9, 8, 7, 6, 5, 4, 3, 2, 1):
        steps.step(steps.requests[:num])
    assert pipeline.graphs.captured.keys() == warm.keys()


@pytest.mark.parametrize(("num", "wanted"), [(1, "2 or more"), (5, "got 5 with 12 rows")])
def test_micro_batches_divide_the_rows(decoders, num, wanted):
    with pytest.raises(ValueError, match=wanted):
        pipeline_of(decoders["llama"], InOrder(), num_micro_batches=num)


def test_streams_go_by_their_names(decoders):
    with pytest.raises(ValueError, match="streams must have names that differ"):
        pipeline_of(decoders["llama"], InOrder(), InOrder())
