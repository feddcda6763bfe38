"""What a byte and a FLOP cost in joules: the arithmetic of a step at the power limit.

    python -m experiments.energy_of [--device cuda:0]

Each is run without a pause for some seconds: nothing at all, a read-only stream, a copy, a product
of 8192^3 in bf16. The picojoules are those above an idle GPU's. A row of each goes to
experiments/results/energy.csv. Needs a GPU whose energy counter NVML can read (nvidia-ml-py).
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.ceilings import MATMUL_SIZE, STREAM_FORMS, read_stream
from experiments.energy import SUSTAINED_SECONDS, energy_counter, sustain
from experiments.harness import RESULTS, append_row, environment, table

STREAM_BYTES = 4 << 30
RUN_MS = 2.0  # about what one call of each takes
IDLE_MS = 10.0
TABLE = ("what", "ms", "watts", "pj_per_byte", "pj_per_flop")


@dataclass(frozen=True)
class Reading:
    """One call among many; bytes and flops are its own."""

    what: str
    ms: float
    millijoules: float
    bytes: int
    flops: int

    def summary(self, idle_watts: float) -> dict[str, Any]:
        """A line of the table: what lies above an idle GPU is of the bytes, or of the FLOPs."""
        above = (self.millijoules - idle_watts * self.ms) * 1e9
        return {
            "what": self.what,
            "ms": self.ms,
            "watts": self.millijoules / self.ms,
            "pj_per_byte": above / self.bytes if self.bytes else None,
            "pj_per_flop": above / self.flops if self.flops else None,
        }


def measure(
    device: torch.device,
    *,
    seconds: float = SUSTAINED_SECONDS,
    stream_bytes: int = STREAM_BYTES,
    matmul_size: int = MATMUL_SIZE,
) -> Iterator[Reading]:
    """The readings, the idle one first. RuntimeError where the energy cannot be read."""
    counter = energy_counter(device)
    if counter() is None:
        raise RuntimeError(f"{device} must have an energy counter that NVML reads, got none")
    idle = sustain(lambda: time.sleep(IDLE_MS / 1e3), IDLE_MS, device, seconds=seconds)
    yield Reading("idle", idle.ms, idle.millijoules, 0, 0)
    x = torch.ones(stream_bytes // 4, dtype=torch.int32, device=device)
    block, num_warps = STREAM_FORMS[1]
    sums = torch.empty(x.numel() // block, dtype=torch.int32, device=device)
    a, b = (torch.randn(matmul_size, matmul_size, device=device).bfloat16() for _ in range(2))
    y, c = torch.empty_like(x), torch.empty_like(a)
    for what, run, num_bytes, flops in (
        ("read stream", lambda: read_stream(x, sums, block, num_warps), stream_bytes, 0),
        ("copy", lambda: y.copy_(x), 2 * stream_bytes, 0),
        ("matmul", lambda: torch.mm(a, b, out=c), 0, 2 * matmul_size**3),
    ):
        run()
        found = sustain(run, RUN_MS, device, seconds=seconds)
        yield Reading(what, found.ms, found.millijoules, num_bytes, flops)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--out", type=Path, default=RESULTS / "energy.csv")
    args = p.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        sys.exit("energy_of: needs a GPU")
    stamp = environment(device)
    readings = []
    for reading in measure(device):
        append_row(args.out, asdict(reading) | stamp)
        readings.append(reading)
    idle_watts = readings[0].millijoules / readings[0].ms
    print(table([reading.summary(idle_watts) for reading in readings], list(TABLE)))


if __name__ == "__main__":
    main()
