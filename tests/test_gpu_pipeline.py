"""The decode pipeline on a GPU: graphs over two streams and over partitions, to the bit."""

import gc
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from engine import LLM, SamplingParams
from engine.pipeline import DecodePipeline
from engine.stage_schedule import STAGES, Placement
from engine.stage_streams import GpuStreams, InOrder, StageStreams
from experiments.shapes import write_config
from green.driver import GreenContextUnsupported
from green.probe import launch_records, record_launch, recorded_sms
from green.streams import GreenStreams
from models.config import ModelConfig
from models.decoder import Decoder
from models.weights import dummy_weights
from tests.decode_steps import Steps, worker_options
from tests.test_gpu_engine import LOGIT_TOLERANCE, assert_same_or_near_ties

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
MAX_NUM_SEQS = 320
MAX_MODEL_LEN = 1024
SPLITS = ((48, 84), (96, 36), (16, 116), (8, 8))
PLAIN = ("plain", "plain 48:84")
# products by one program a row, by thin and by tall tiles, in micro-batches that are not full
BATCHES = (2, 3, 19, 61, 150, 320)


@pytest.fixture(scope="module", autouse=True)
def _on_a_stream_of_its_own() -> Iterator[None]:
    """As the engine: a capture needs one."""
    stream = torch.cuda.Stream(DEVICE)
    with torch.inference_mode(), torch.cuda.device(DEVICE), torch.cuda.stream(stream):
        yield
        torch.cuda.synchronize(DEVICE)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    """Qwen3-0.6B with three layers."""
    folder = write_config("Qwen3-0.6B", tmp_path_factory.mktemp("qwen3"), num_hidden_layers=3)
    config = ModelConfig.from_folder(folder)
    weights = dummy_weights(config, device=DEVICE, dtype=torch.bfloat16, seed=0)
    return Decoder(config, weights, MAX_MODEL_LEN, kernels)


@pytest.fixture(scope="module")
def streams() -> Iterator[dict[str, StageStreams]]:
    """Every kind, and what there is of partitions."""
    with ExitStack() as stack:
        grids = ((None, None), (48, 84))
        found = [stack.enter_context(GpuStreams.plain(DEVICE, grid)) for grid in grids]
        try:
            GreenStreams.of((8,), DEVICE).close()
            found += [stack.enter_context(GpuStreams.partitioned(s, DEVICE)) for s in SPLITS]
        except GreenContextUnsupported:
            pass  # the tests of partitions skip
        yield {some.name: some for some in found}
        gc.collect()  # graphs over a partition go before it does
        torch.cuda.synchronize(DEVICE)


def chosen(streams: dict[str, StageStreams], name: str) -> StageStreams:
    if name not in streams:
        pytest.skip(f"no partition {name} here")
    return streams[name]


def pipeline_of(decoder: Decoder, streams: StageStreams, **more: Any) -> DecodePipeline:
    num = more.get("num_micro_batches", 2)
    is_eager = more.pop("is_eager", False)
    pool = None if is_eager else torch.cuda.graph_pool_handle()
    shape = {"block_size": 16, "max_model_len": MAX_MODEL_LEN, "graph_pool": pool}
    options = worker_options(decoder, 0, MAX_NUM_SEQS, num, **shape)
    return DecodePipeline(**options, streams=[streams], **{"min_requests": 1} | more)


def lengths(num_requests: int) -> list[int]:
    rng = random.Random(num_requests)
    return [rng.choice((1, 15, 16, 17, rng.randint(1, 1000))) for _ in range(num_requests)]


def steps_of(pipeline: DecodePipeline, num_requests: int, num_steps: int = 3) -> tuple[Any, Any]:
    """Everything that comes out: the first step runs as it is, the others are replays."""
    steps = Steps(pipeline, lengths(num_requests), 0)
    found = [steps.step() for _ in range(num_steps)]
    cached = steps.cached()
    for request in steps.requests:
        pipeline.release(request)
    return found, cached


def assert_same(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


NAMES = (*PLAIN, *(f"{a}:{b}" for a, b in SPLITS))


def same_kernels(streams: StageStreams) -> InOrder:
    """The stages in order, with the grids and so the tiles that they have on these streams."""
    return InOrder.with_grid([streams.num_sms(stage) for stage in STAGES])


@pytest.mark.parametrize("num_requests", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_the_same_kernels_in_order(decoder, streams, name, num_requests):
    """To the bit by construction: the same launches, so that a difference is a race."""
    some = chosen(streams, name)
    wanted = steps_of(pipeline_of(decoder, same_kernels(some)), num_requests)
    assert len({t for token_ids, _ in wanted[0] for t in token_ids}) > 1
    assert_same(steps_of(pipeline_of(decoder, some), num_requests), wanted)


@pytest.mark.parametrize("num_requests", BATCHES)
def test_steps_of_every_split_are_the_same(decoder, streams, num_requests):
    """Micro-batches of up to 64 rows have the same tiles on any number of SMs. Of more, products
    have tiles by the SMs (`tall_matmul.choose_tile`), and it takes more: that wgmma sums a row's
    products alike whatever the columns of its tile. All tiles go through K in the same steps; a
    tile of tiles.json need not, nor need it be for the same kernel."""
    wanted = steps_of(pipeline_of(decoder, InOrder()), num_requests)
    differing = []
    for name in streams:
        found = steps_of(pipeline_of(decoder, streams[name]), num_requests)
        try:
            assert_same(found, wanted)
        except AssertionError:
            differing.append(name)
    assert not differing


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_equals_the_eager_step(decoder, streams, name):
    found = [
        steps_of(pipeline_of(decoder, chosen(streams, name), is_eager=is_eager), 37)
        for is_eager in (False, True)
    ]
    assert_same(*found)


@pytest.mark.parametrize("placement", [Placement(qkv=q, o=o) for q in STAGES for o in STAGES])
@pytest.mark.parametrize("num", [2, 3])
def test_every_placement_and_more_micro_batches(decoder, streams, placement, num):
    options = {"placement": placement, "num_micro_batches": num}
    some = chosen(streams, "48:84")
    wanted = steps_of(pipeline_of(decoder, same_kernels(some), **options), 90)
    found = steps_of(pipeline_of(decoder, some, **options), 90)
    assert_same(found, wanted)


def test_one_pipeline_changes_its_streams_between_steps(decoder, streams):
    """As `auto` does: graphs of several splits over the same buffers, and serial ones."""
    pipeline = pipeline_of(decoder, InOrder())
    pipeline.streams |= streams
    wanted = steps_of(pipeline_of(decoder, InOrder()), 70, num_steps=9)
    steps = Steps(pipeline, lengths(70), 0)
    found = []
    modes = [*streams.values(), InOrder()]
    for i in range(9):
        pipeline.modes = dict.fromkeys(pipeline.modes, modes[i % len(modes)])
        found.append(steps.step())
    assert found == wanted[0]
    pipeline.modes = dict.fromkeys(pipeline.modes)
    assert len(steps.step()[0]) == 70
    assert pipeline.statistics.num_steps["serial"] == 1


def probed(records: dict[str, torch.Tensor]) -> SimpleNamespace:
    """The kernels, with a note of their SMs from each stage."""
    ops = {name: getattr(kernels, name) for name in kernels.__all__}

    def noting(name: str, stage: str) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            if options.get("num_sms") is not None:
                record_launch(records[stage])
            return getattr(kernels, name)(*args, **options)

        return launch

    attend = noting("decode_attention", "attention")
    return SimpleNamespace(**ops | {"decode_attention": attend, "mlp": noting("mlp", "ffn")})


@pytest.mark.parametrize("split", SPLITS[:2])
def test_stages_of_a_replayed_step_keep_to_their_sms(decoder, streams, split):
    partition = chosen(streams, ":".join(map(str, split)))
    records = {stage: launch_records(DEVICE) for stage in STAGES}
    noted = Decoder(decoder.config, decoder.weights, MAX_MODEL_LEN, probed(records))
    pipeline = pipeline_of(noted, partition)
    steps = Steps(pipeline, lengths(40), 0)
    steps.step()
    for _ in range(2):
        for record in records.values():
            record.fill_(-1)
        steps.step()
        sms = [recorded_sms(records[stage]) for stage in STAGES]
        assert tuple(map(len, sms)) == partition.granted == split
        assert not sms[0] & sms[1]


@pytest.mark.parametrize("is_eager", [False, True])
def test_a_launch_does_not_wait_for_the_device(decoder, streams, is_eager):
    pipeline = pipeline_of(decoder, chosen(streams, "48:84"), is_eager=is_eager)
    steps = Steps(pipeline, lengths(40), 0)
    for _ in range(2):
        steps.step()
    for request in steps.requests:
        request.num_in_flight += 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipeline.launch(steps.requests, steps.tables.__getitem__)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_eager", [False, True])
@pytest.mark.parametrize("name", ["plain", "48:84"])
def test_stages_are_timed_on_the_device(decoder, streams, name, is_eager):
    pipeline = pipeline_of(decoder, chosen(streams, name), is_timed=True, is_eager=is_eager)
    if not is_eager:
        sizes = [size for size in pipeline.sizes if size == 32]
        pipeline.modes = {size: pipeline.modes[size] for size in sizes}
        pipeline.sizes = sizes
    untimed = steps_of(pipeline_of(decoder, chosen(streams, name)), 60, num_steps=8)
    timed = steps_of(pipeline, 60, num_steps=8)
    assert_same(timed, untimed)
    torch.cuda.synchronize(DEVICE)
    stats = pipeline.get_pipeline_statistics()
    assert stats["num_timed_steps"] >= 6
    assert 0 < stats["layers_ms"] <= stats["step_ms"]
    assert all(0 < stats["occupancy"][stage] <= 1.001 for stage in STAGES)
    assert 0 < stats["overlap"] <= 2.002
    pipeline.print_pipeline_statistics()


def test_an_llm_decodes_in_two_stages_and_gives_the_partition_back(tmp_path):
    folder = write_config("Qwen3-0.6B", tmp_path, num_hidden_layers=3)
    prompts = [[(i * 37 + j) % 10_000 for j in range(1 + 5 * i)] for i in range(40)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=20)
    sizes = {"max_num_seqs": 64, "num_kv_blocks": 1024, "max_model_len": 512}
    options = {"device": "cuda:0", "load_format": "dummy"} | sizes
    with LLM(folder, **options) as llm:
        wanted = llm.generate(prompts, params)
    asked = {"decode_attention_sm": 48, "decode_ffn_sm": 84, "decode_pipeline_profiling": True}
    with LLM(folder, **options, enable_decode_pipeline=True, **asked) as llm:
        found = llm.generate(prompts, params)
        stats = llm.decode_runner.get_pipeline_statistics()
        llm.decode_runner.print_pipeline_statistics()
    # other products in a micro-batch than in the whole batch, so other rounding
    assert_same_or_near_ties(found, wanted, LOGIT_TOLERANCE["bfloat16"])
    assert stats["partitioning"] == "48:84" and stats["num_timed_steps"] > 5
    assert stats["granted_sms"] == {"attention": 48, "ffn": 84}


def test_more_sms_than_there_are_is_an_error(tmp_path):
    folder = write_config("Qwen3-0.6B", tmp_path, num_hidden_layers=1)
    asked = {"decode_attention_sm": 1000, "decode_ffn_sm": 84, "enable_decode_pipeline": True}
    with pytest.raises(ValueError, match="must add up to at most the device's"):
        LLM(folder, device="cuda:0", load_format="dummy", num_kv_blocks=64, **asked)


def test_five_splits_of_every_bucket_take_little_memory_and_time(decoder, streams):
    """Of three layers; captures of a whole model take as much more as it has more of them."""
    names = [name for name in streams if name not in PLAIN] + list(PLAIN)
    chosen_streams: Sequence[StageStreams] = [streams[name] for name in names[:5]]
    pool = torch.cuda.graph_pool_handle()
    shape = {"block_size": 16, "max_model_len": MAX_MODEL_LEN, "graph_pool": pool}
    options = worker_options(decoder, 0, MAX_NUM_SEQS, 2, **shape)
    pipeline = DecodePipeline(**options, streams=chosen_streams, min_requests=1)
    for some in chosen_streams:
        pipeline.modes = {size: some for size in pipeline.sizes if size >= 8}
        for size in pipeline.modes:
            pipeline.inputs.upload({}, pipeline._padding)
            pipeline.graphs.run((some.name, size, 0), pipeline._pipelined_step)
    used, num = pipeline.graphs.captured_bytes, len(pipeline.graphs.captured)
    print(f"{num} graphs: {pipeline.graphs.capture_ms:.0f} ms, {used / 2**20:.0f} MiB")
    assert pipeline.graphs.capture_ms < 15_000
    if "PYTEST_XDIST_WORKER" not in os.environ:  # others' memory would be counted with it
        assert used < 512 << 20
