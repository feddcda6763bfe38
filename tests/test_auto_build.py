"""How `auto` is put together on a GPU, over stand-ins for the driver and for torch's view of it."""

from types import SimpleNamespace

import pytest
import torch

from engine import build, device_rates
from engine.config import EngineConfig
from engine.pipeline_stats import PipelineStats
from experiments.shapes import SHAPES
from green.driver import Driver, GreenContextUnsupported
from models.config import ModelConfig

DEVICE = torch.device("cuda", 0)
ATTRIBUTES = {"CLOCK_RATE": 1_980_000, "MEMORY_CLOCK_RATE": 2_619_000}  # kHz, as of an H100
ATTRIBUTES |= {"GLOBAL_MEMORY_BUS_WIDTH": 5120}  # bits


class H100Driver(Driver):
    """Answers what is asked of it."""

    def __init__(self) -> None:
        names = {f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ATTRIBUTES}
        super().__init__(SimpleNamespace(CUdevice_attribute=SimpleNamespace(**names)))

    def call(self, name: str, *args):
        if name == "cuDeviceGetAttribute":
            return ATTRIBUTES[args[0]]
        return {"cuDeviceGet": 0, "cuDriverGetVersion": 13000}[name]


class Recorded(SimpleNamespace):
    """In place of a worker: its arguments."""

    def __init__(self, **options) -> None:
        super().__init__(options=options, statistics=PipelineStats())


@pytest.fixture
def h100(monkeypatch, tmp_path) -> None:
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    for module in (build, device_rates):
        monkeypatch.setattr(module, "load_driver", H100Driver)
    for name in ("AutoPipeline", "DecodePipeline"):
        monkeypatch.setattr(build, name, Recorded)
    monkeypatch.setenv("GREENLANE_CACHE", str(tmp_path))


def made(**config) -> Recorded:
    weights = SimpleNamespace(embedding=torch.empty(0, dtype=torch.bfloat16))
    shape = ModelConfig.from_dict(SHAPES["Qwen3-8B"])
    return build.make_decode_worker(
        EngineConfig(model="m", decode_pipeline="auto", **config),
        SimpleNamespace(config=shape, weights=weights),
        None,
        None,
        max_model_len=4096,
        pool=(0, 1),
        device=DEVICE,
    )


def why_serial() -> str:
    """What a worker without streams says."""
    worker = made()
    assert worker.options["streams"] == []
    return worker.statistics.why_none


def test_rates_follow_from_the_clocks(h100):
    rates = device_rates.rates_of(DEVICE)
    assert rates.num_sms == 132
    assert rates.bytes_per_ms == pytest.approx(0.9 * 3.352e9, rel=0.001)
    # between what cuBLAS reached there and what is promised
    assert 6e11 < rates.flops_per_ms < 7.3e11
    assert 40 < rates.bytes_per_ms / rates.sm_bytes_per_ms < 56  # SMs that saturate the memory


def test_what_an_h100_gets(h100, tmp_path):
    options = made().options
    assert (48, 84) in options["splits"] and all(sum(s) == 132 for s in options["splits"])
    assert options["num_micro_batches"] == 2 and options["min_requests"] == 16
    model = options["model"]
    assert model.is_compute_bound(1024) and not model.is_compute_bound(128)
    assert options["file"].path.parent == tmp_path / "decode_pipeline"
    assert not list(tmp_path.iterdir())  # nothing was timed yet


def test_times_are_of_a_setting(h100):
    changes = ({}, {"block_size": 32}, {"max_num_seqs": 928}, {"load_format": "dummy"})
    found = [made(**config).options["file"].setting for config in changes]
    assert found[0] == made().options["file"].setting and found.count(found[0]) == 1
    assert found[0]["gpu"] == "NVIDIA H100 80GB HBM3" and found[0]["model"]["num_layers"] == 36
    assert found[0]["dtype"] == "torch.bfloat16" and found[0]["max_model_len"] == 4096
    assert {"cuda", "torch", "triton", "sources"} < found[0].keys()


def test_without_the_constants_of_its_package_decode_is_serial_and_says_why(h100, monkeypatch):
    monkeypatch.delitem(ATTRIBUTES, "MEMORY_CLOCK_RATE")
    assert "CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE" in why_serial()


def test_whatever_else_fails_decode_is_serial_and_says_why(h100, monkeypatch):
    def digest_of_sources():
        raise PermissionError("not to be read\nby you")

    monkeypatch.setattr(build, "digest_of_sources", digest_of_sources)
    assert why_serial() == "PermissionError: not to be read"


def test_the_environment_of_cuda_is_shown(h100, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert made().statistics.max_connections == "1"


def test_without_a_driver_decode_is_serial_and_says_why(h100, monkeypatch):
    def load_driver():
        raise GreenContextUnsupported("the driver must be of CUDA 12.5 or later, got 12.2")

    monkeypatch.setattr(device_rates, "load_driver", load_driver)
    assert why_serial().endswith("12.5 or later, got 12.2")
