"""Joules of a byte and of a FLOP: what lies above an idle GPU, and only with a counter."""

import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import energy, energy_of
from experiments.energy_of import Reading, main, measure

CPU = torch.device("cpu")
SMALL = {"seconds": 1.0, "stream_bytes": 1 << 17, "matmul_size": 16}


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A clock of 4 ms a launch, and a counter of 100 W idle and 500 W at work."""
    clock = SimpleNamespace(now=0.0, millijoules=0.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        clock.millijoules += seconds * 100e3

    def launch(*args: object, **kwargs: object) -> None:
        clock.now += 0.004
        clock.millijoules += 0.004 * 500e3

    for module in (energy, energy_of):
        monkeypatch.setattr(module, "energy_counter", lambda device: lambda: clock.millijoules)
    monkeypatch.setattr(energy.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(energy.time, "sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(energy_of, "read_stream", launch)
    monkeypatch.setattr(torch, "mm", launch)
    monkeypatch.setattr(torch.Tensor, "copy_", launch)


def test_a_byte_costs_what_lies_above_an_idle_gpu(gpu):
    idle, read, copy, product = measure(CPU, **SMALL)
    assert idle.millijoules / idle.ms == pytest.approx(100)
    for reading in (read, copy, product):
        assert reading.ms == pytest.approx(4) and reading.millijoules == pytest.approx(2000)
    assert read.summary(100)["pj_per_byte"] == pytest.approx(1600e9 / (1 << 17))
    assert copy.summary(100)["pj_per_byte"] == pytest.approx(1600e9 / (1 << 18))
    assert product.summary(100)["pj_per_flop"] == pytest.approx(1600e9 / 8192)
    assert product.summary(100)["pj_per_byte"] is None
    assert idle.summary(100)["watts"] == pytest.approx(100)


def test_readings_are_rows_of_a_table():
    line = Reading("copy", 2.0, 1000.0, 10**9, 0).summary(100.0)
    assert tuple(line) == energy_of.TABLE
    assert line["watts"] == 500 and line["pj_per_byte"] == pytest.approx(800)


def test_without_a_counter_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(energy_of, "energy_counter", lambda device: lambda: None)
    with pytest.raises(RuntimeError, match="must have an energy counter that NVML reads, got none"):
        next(measure(CPU))


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["energy_of", "--device", "cpu"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        main()
