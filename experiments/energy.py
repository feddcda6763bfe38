"""The energy that a GPU takes, by its own counter, and time at its power limit."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SUSTAINED_SECONDS = 1.0  # the counter moves every 0.1 s or so; clocks have settled long before


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
    is run for `seconds`."""
    counter = energy_counter(device)
    num_runs = max(2, round(seconds * 1e3 / run_ms))
    num_calls = num_runs * calls
    for _ in range(num_runs // 5):  # until clocks have settled
        run()
    torch.cuda.synchronize(device)
    before, start = counter(), time.perf_counter()
    for _ in range(num_runs):
        run()
    torch.cuda.synchronize(device)
    ms = (time.perf_counter() - start) * 1e3 / num_calls
    after = counter()
    taken = None if before is None or after is None else (after - before) / num_calls
    return Sustained(ms, taken)


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
