"""decode_pipeline="auto" on a GPU: real clocks, real partitions, real times."""

import time
from functools import partial

import pytest
import torch

import kernels
from engine import LLM, SamplingParams
from engine.auto_pipeline import AutoPipeline
from engine.calibration_file import CalibrationFile
from engine.device_rates import rates_of
from engine.stage_streams import GpuStreams
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


def test_a_calibration_times_what_it_is_given(tmp_path):
    folder = write_config("Qwen3-0.6B", tmp_path / "model", num_hidden_layers=3)
    config = ModelConfig.from_folder(folder)
    weights = dummy_weights(config, device=DEVICE, dtype=torch.bfloat16, seed=0)
    stream = torch.cuda.Stream(DEVICE)
    with torch.inference_mode(), torch.cuda.device(DEVICE), torch.cuda.stream(stream):
        decoder = Decoder(config, weights, 1024, kernels)
        pool = torch.cuda.graph_pool_handle()
        shape = {"block_size": 16, "max_model_len": 1024, "graph_pool": pool}
        options = worker_options(decoder, 0, 64, **shape)
        file = CalibrationFile(tmp_path, {"gpu": "this one"})
        pipeline = AutoPipeline(
            **options,
            model=ANYTHING,
            splits=SPLITS,
            make_streams=partial(GpuStreams.partitioned, device=DEVICE),
            file=file,
            min_requests=40,
        )
        start = time.perf_counter()
        pipeline.warm_up()
        assert time.perf_counter() - start < 60
        readings = file.read()
        assert sorted(readings) == [b for b in pipeline.buckets if b >= 40]
        modes = {"serial", "48:84", "64:68"}
        assert all(set(ms) == modes for read in readings.values() for ms in read.values())
        longest = readings[64][1024]
        assert longest["serial"] > readings[64][128]["serial"]
        # a step takes at least as long as its keys and values take to be read at 8 TB/s
        num_bytes = 64 * 1024 * config.kv_bytes_per_token(2)
        assert min(longest.values()) > num_bytes / 8e9
        steps = Steps(pipeline, [200] * 50, 0)
        assert len(steps.step()[0]) == 50
        pipeline.print_pipeline_statistics()
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
