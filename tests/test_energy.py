"""Energy of a call: what the counter and the clock say, divided by the calls."""

import sys
from collections.abc import Callable
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


def ticking(clock: SimpleNamespace, watts: float) -> Callable[[torch.device], Callable[[], float]]:
    """A counter that moves every 0.1 s."""
    return lambda device: lambda: watts * 1e3 * int(clock.now * 10 + 1e-9) / 10


@pytest.mark.parametrize("begin", [0.0, 0.033, 0.077])
def test_time_and_energy_are_of_one_call_wherever_the_counter_stands(clock, monkeypatch, begin):
    monkeypatch.setattr(energy, "energy_counter", ticking(clock, 600))
    clock.now = begin

    def run() -> None:
        clock.now += 0.004
        clock.num_calls += 1

    found = sustain(run, 5.0, DEVICE, seconds=2.0)
    assert found.ms == pytest.approx(4.0)
    assert found.watts == pytest.approx(600, rel=0.01)  # 5 % off if it were read at any time
    assert 0.4 + 2.0 <= clock.num_calls * 0.004 <= 0.4 + 2.0 + 2 * 0.11 + 0.016
    of_two = sustain(run, 5.0, DEVICE, seconds=2.0, calls=2)
    assert of_two.ms == pytest.approx(2.0) and of_two.watts == pytest.approx(600, rel=0.01)


def test_without_a_counter_there_is_the_time_alone(clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def run() -> None:
        clock.now += 0.5

    assert sustain(run, 500.0, DEVICE) == Sustained(pytest.approx(500.0), None)


def test_a_counter_that_stands_still_is_none(clock, monkeypatch):
    monkeypatch.setattr(energy, "energy_counter", lambda device: lambda: 7.0)

    def run() -> None:
        clock.now += 0.01

    assert sustain(run, 10.0, DEVICE).millijoules is None


def test_a_driver_that_does_not_answer_is_no_counter(monkeypatch):
    class NVMLError(Exception):
        pass

    def init() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NVMLError, nvmlInit=init))
    assert energy_counter(DEVICE)() is None
    assert Sustained(1.0, None).watts is None
