"""decode_pipeline="auto" on a GPU: real clocks, real partitions, real times."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import kernels
from engine import LLM, SamplingParams
from engine.auto_pipeline import AutoPipeline
from engine.calibration_file import CalibrationFile
from engine.device_rates import rates_of
from engine.stage_streams import GpuStreams
from engine.trial_steps import SHORT
from experiments.shapes import write_config
from models.config import ModelConfig
from models.decoder import Decoder
from models.weights import dummy_weights
from tests.decode_steps import Steps, worker_options
from tests.test_auto_pipeline import ANYTHING

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
SPLITS = ((48, 84), (64, 68))


def test_rates_are_those_of_the_machine():
    """Within what the data sheets of an A100 and of a B200 say; the clocks are read in kHz."""
    rates = rates_of(DEVICE)
    assert 1e9 < rates.bytes_per_ms < 8e9
    assert 1e11 < rates.flops_per_ms < 2e12
    assert 16 < rates.bytes_per_ms / rates.sm_bytes_per_ms < 80  # SMs that saturate the memory


@pytest.fixture(scope="module", autouse=True)
def _on_a_stream_of_its_own() -> Iterator[None]:
    """As the engine: a capture needs one."""
    stream = torch.cuda.Stream(DEVICE)
    with torch.inference_mode(), torch.cuda.device(DEVICE), torch.cuda.stream(stream):
        yield


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    """Qwen3-0.6B with three layers."""
    folder = write_config("Qwen3-0.6B", tmp_path_factory.mktemp("qwen3"), num_hidden_layers=3)
    config = ModelConfig.from_folder(folder)
    weights = dummy_weights(config, device=DEVICE, dtype=torch.bfloat16, seed=0)
    return Decoder(config, weights, 1024, kernels)


def pipeline_of(decoder: Decoder, file: CalibrationFile, make_streams: Any) -> AutoPipeline:
    shape = {"block_size": 16, "max_model_len": 1024}
    pool = torch.cuda.graph_pool_handle()
    return AutoPipeline(
        **worker_options(decoder, 0, 64, **shape, graph_pool=pool),
        model=ANYTHING,
        splits=SPLITS,
        make_streams=make_streams,
        file=file,
        min_requests=40,
    )


def test_a_calibration_times_what_it_is_given(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.auto_pipeline.CALIBRATION_SECONDS", 60.0)  # kernels are compiled
    monkeypatch.setattr("engine.trial_steps.LONG", SHORT)
    file = CalibrationFile(tmp_path, {"gpu": "this one"})
    pipeline = pipeline_of(decoder, file, partial(GpuStreams.partitioned, device=DEVICE))
    start = time.perf_counter()
    pipeline.warm_up()
    assert pipeline.calibration_s <= time.perf_counter() - start < 80
    readings = file.read()
    assert sorted(readings) == [b for b in pipeline.buckets if b >= 40]
    modes = {"serial", "48:84", "64:68"}
    assert all(set(ms) == modes for read in readings.values() for ms in read.values())
    longest = readings[64][1024]
    assert longest["serial"] > readings[64][128]["serial"]
    # a step takes at least as long as its keys and values take to be read at 8 TB/s
    num_bytes = 64 * 1024 * decoder.config.kv_bytes_per_token(2)
    assert min(longest.values()) > num_bytes / 8e9
    steps = Steps(pipeline, [200] * 50, 0)
    assert len(steps.step()[0]) == 50
    pipeline.print_pipeline_statistics()
    pipeline.close()


@pytest.mark.parametrize("num_good", [0, 7], ids=["first launch", "between the stages"])
def test_a_capture_that_fails_costs_its_split_alone(decoder, tmp_path, monkeypatch, num_good):
    """With work on other streams that nothing joins, too: torch then ends no capture by itself."""
    monkeypatch.setattr("engine.auto_pipeline.CALIBRATION_SECONDS", 60.0)
    monkeypatch.setattr("engine.trial_steps.LONG", SHORT)

    def make_streams(split) -> GpuStreams:
        streams = GpuStreams.partitioned(split, DEVICE)
        if split == SPLITS[0]:
            streams.run = partial(fail_in_capture, streams, iter(range(num_good)))
        return streams

    def fail_in_capture(streams, left, launch, work) -> None:
        if torch.cuda.is_current_stream_capturing() and next(left, None) is None:
            raise RuntimeError("no memory is left")
        GpuStreams.run(streams, launch, work)

    file = CalibrationFile(tmp_path, {"gpu": "this one"})
    pipeline = pipeline_of(decoder, file, make_streams)
    pipeline.warm_up()
    modes = {"serial", "64:68"}
    assert all(set(ms) == modes for read in file.read().values() for ms in read.values())
    assert "48:84" not in pipeline.streams
    steps = Steps(pipeline, [200] * 50, 0)
    assert len(steps.step()[0]) == 50
    pipeline.close()


def test_an_llm_starts_at_once_where_nothing_can_win(tmp_path, monkeypatch):
    monkeypatch.setenv("GREENLANE_CACHE", str(tmp_path / "cache"))
    folder = write_config("Qwen3-0.6B", tmp_path, num_hidden_layers=2)
    options = {"device": "cuda:0", "load_format": "dummy", "max_num_seqs": 64}
    options |= {"num_kv_blocks": 1024, "max_model_len": 512, "decode_pipeline": "auto"}
    with LLM(folder, **options) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        assert len(llm.generate([[1, 2, 3]] * 40, params)) == 40
        stats = llm.decode_runner.get_pipeline_statistics()
    assert set(stats["num_steps_by_mode"]) == {"serial"}
    assert stats["choices"][64].startswith("serial: by arithmetic")
    assert not (tmp_path / "cache").exists()
