"""The probe: what it reads out of records, and that its kernel compiles for Hopper."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from green import probe
from green.probe import OVERLAP_TRIES, are_concurrent, record_launch, recorded_sms, recorded_span

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from green.probe import _record_launch_kernel
source = triton.compiler.ASTSource(_record_launch_kernel, {"records_ptr": "*i64", "hold_ns": "i32"})
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]
assert "%smid" in ptx and ptx.count("%globaltimer") == 2, ptx
"""


def test_what_records_say():
    records = torch.tensor([[3, 100, 150], [5, 90, 140], [3, 120, 170]])
    assert recorded_sms(records) == {3, 5} and recorded_span(records) == (90, 170)
    records[1] = -1
    with pytest.raises(ValueError, match="every program must have run, got 1 without"):
        recorded_sms(records)


@pytest.mark.parametrize("num_late", range(OVERLAP_TRIES + 1))
def test_a_host_that_was_held_up_is_no_shared_queue(monkeypatch, num_late):
    """Of two streams, the second starts when the first has ended: once may be the host's fault."""
    rounds: list[list[int]] = []

    def record(records, hold_ns) -> None:
        if len(rounds[-1]) == 2 if rounds else True:
            rounds.append([])
        rounds[-1].append(hold_ns)

    def span(records) -> tuple[int, int]:
        is_first, is_late = records == 0, len(rounds) - 1 <= num_late
        return (0, 100) if is_first else (100, 200) if is_late else (50, 150)

    numbers = iter(range(2))
    monkeypatch.setattr(probe, "launch_records", lambda device: next(numbers))
    monkeypatch.setattr(probe, "record_launch", record)
    monkeypatch.setattr(probe, "recorded_span", span)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    streams = [SimpleNamespace(device=torch.device("cuda"))] * 2
    assert are_concurrent(streams) == (num_late < OVERLAP_TRIES)
    num_rounds = 1 + min(num_late + 1, OVERLAP_TRIES)
    assert rounds == [[0, 0]] + [[probe.OVERLAP_NS] * 2] * (num_rounds - 1)


@pytest.mark.parametrize("shape, dtype", [((4, 2), torch.int64), ((4, 3), torch.int32)])
def test_records_of_another_shape_are_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"records must be \[n, 3\] int64, got \[4, [23]\]"):
        record_launch(torch.zeros(shape, dtype=dtype))


def test_the_kernel_compiles_for_hopper():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
