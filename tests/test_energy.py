"""Energy of a call: what the counter and the clock say, divided by the calls."""

import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import energy
from experiments.energy import Sustained, energy_counter, sustain

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Seconds that pass by the calls alone, and a device that is done with them."""
    clock = SimpleNamespace(now=0.0, num_calls=0)
    monkeypatch.setattr(energy.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return clock


def test_time_and_energy_are_of_one_call(clock, monkeypatch):
    monkeypatch.setattr(energy, "energy_counter", lambda device: lambda: clock.now * 600e3)

    def run() -> None:
        clock.now += 0.004
        clock.num_calls += 1

    found = sustain(run, 5.0, DEVICE, seconds=1.0)
    assert found.ms == pytest.approx(4.0)
    assert found.millijoules == pytest.approx(2400)
    assert found.watts == pytest.approx(600)
    assert clock.num_calls == 240  # 200 after 40 for the clocks to settle


def test_without_a_counter_there_is_the_time_alone(clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def run() -> None:
        clock.now += 0.5

    assert sustain(run, 500.0, DEVICE) == Sustained(pytest.approx(500.0), None)


def test_a_driver_that_does_not_answer_is_no_counter(monkeypatch):
    class NVMLError(Exception):
        pass

    def init() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NVMLError, nvmlInit=init))
    assert energy_counter(DEVICE)() is None
    assert Sustained(1.0, None).watts is None
