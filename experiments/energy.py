"""The energy that a GPU takes, by its own counter, and time at its power limit."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# the counter moves every 0.1 s or so: a reading begins and ends where it does, and lasts until what
# is left of that is under 1 %; clocks settle in a fifth of the time
SUSTAINED_SECONDS = 5.0
LOOK_MS = 10.0  # between two looks at the counter
TICK_SECONDS = 2.0  # a counter that has not moved by then is none


@dataclass(frozen=True)
class Sustained:
    """One call among many without a pause, as long as the power limit needs to act."""

    ms: float
    millijoules: float | None  # None where the counter cannot be read

    @property
    def watts(self) -> float | None:
        return None if self.millijoules is None else self.millijoules / self.ms


def columns(found: Sustained | None) -> dict[str, float | str]:
    """The columns of a CSV that it fills; empty where nothing was measured."""
    millijoules = None if found is None else found.millijoules
    return {
        "sustained_ms": "" if found is None else found.ms,
        "sustained_mj": "" if millijoules is None else millijoules,
    }


def sustain(
    run: Callable[[], Any],
    run_ms: float,
    device: torch.device,
    *,
    calls: int = 1,
    seconds: float = SUSTAINED_SECONDS,
) -> Sustained:
    """Time and energy of a call. run: queues `calls` of them, which take about run_ms together, and
    is run for `seconds`, and from one move of the counter to another."""
    counter = energy_counter(device)
    num_runs = max(1, round(LOOK_MS / run_ms))

    def step() -> float:
        for _ in range(num_runs):
            run()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    end = time.perf_counter() + seconds / 5
    while step() < end:
        pass
    before, _ = _next_move(counter, step)
    start = now = time.perf_counter()
    num_steps = 0
    while now < start + seconds:
        now = step()
        num_steps += 1
    after, more = _next_move(counter, step)
    num_calls = (num_steps + more) * num_runs * calls
    ms = (time.perf_counter() - start) * 1e3 / num_calls
    taken = None if before is None or after is None else (after - before) / num_calls
    return Sustained(ms, taken)


def _next_move(
    counter: Callable[[], float | None], step: Callable[[], float]
) -> tuple[float | None, int]:
    """What the counter says when it has moved, and the steps until then; None where it does not."""
    last, end, num_steps = counter(), time.perf_counter() + TICK_SECONDS, 0
    while last is not None:
        now = step()
        num_steps += 1
        found = counter()
        if found != last:
            return found, num_steps
        if now > end:
            break
    return None, num_steps


def energy_counter(device: torch.device) -> Callable[[], float | None]:
    """Reads the millijoules that the device has taken since its driver was loaded; None where NVML
    or its Python binding is missing, or the device has no counter."""
    try:
        import pynvml
    except ImportError:
        return lambda: None
    try:
        pynvml.nvmlInit()
        # by UUID: torch may see fewer devices than there are, or in another order
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return lambda: None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
